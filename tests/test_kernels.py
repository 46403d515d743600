"""Triton kernels alone, in the interpreter, against plain float64 PyTorch: odd sizes, offsets, many tiles.

Those of the backward pass are in test_kernels_backward.py.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from helpers import error

pytest.importorskip("triton", reason="Triton is for Linux only")

from kernel_operands import (
    CONVOLUTIONS,
    EPS,
    NAN,
    conv,
    empty_gradient,
    flat,
    images,
    normal,
    nowhere,
    random_norm,
    random_weight,
    shape_of,
)

from seqconv_triton.backend.triton.parts import in_blocks, mirrored, packed, taps_first
from seqconv_triton.kernels import configs, launch
from seqconv_triton.kernels.convolution import Newest, convolution
from seqconv_triton.kernels.elementwise import activate, norm_gradient
from seqconv_triton.kernels.heuristic import packing_factor
from seqconv_triton.kernels.launch import ConvShape, Scratch, Windows
from seqconv_triton.kernels.pixels import pixel_table
from seqconv_triton.kernels.pull import pull
from seqconv_triton.kernels.statistics import input_statistics
from seqconv_triton.kernels.transposed import transposed
from seqconv_triton.kernels.weight_gradient import conv_gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case: str, dtype: torch.dtype) -> None:
    """With a batch's statistics, and with known ones: raw, activated, or both, of channels behind NaN."""
    shape, start, tolerance = shape_of(case), 4, 1e-6 if dtype == torch.float32 else 1e-3
    x = torch.randn(shape.in_pixels, start + shape.total_in).to(dtype)
    x[:, :start] = NAN
    weight = random_weight(shape).to(dtype)
    ready = taps_first(in_blocks(weight, shape))
    mask = (torch.rand(shape.batch, shape.total_in) > 0.3).to(dtype) / 0.7
    shortcut = torch.randn(shape.out_pixels, shape.c_out + 3).to(dtype)[:, 2:-1]
    raw, activated = (torch.full((shape.out_pixels, shape.c_out), NAN, dtype=dtype) for _ in range(2))
    norm, scratch = nowhere(shape.c_out), Scratch.allocate(x, shape.out_pixels, shape.c_out)
    convolution(x, start, ready, packed(shape), raw=raw, mask=mask, shortcut=shortcut, norm=norm, scratch=scratch)
    dropped = images(x[:, start:], shape) * mask.double()[:, :, None, None]
    exact = flat(conv(dropped, weight, shape)) + shortcut.double()
    assert error(raw, exact) < tolerance
    var, mean = torch.var_mean(exact, 0, unbiased=False)
    if shape.out_pixels > 1:
        assert error(norm.mean, mean) < 5 * tolerance and error(norm.var, var) < 5 * tolerance
    assert scratch.counters.eq(0).all()

    norm, raw = random_norm(shape.c_out), raw.fill_(NAN)
    exact = flat(conv(images(x[:, start:], shape), weight, shape))  # what dropout's mask would hide
    convolution(x, start, ready, packed(shape), raw=raw, activated=activated, norm=norm, eps=EPS)
    assert error(raw, exact) < tolerance and error(activated, normal(exact, norm).relu()) < tolerance
    convolution(x, start, ready, packed(shape), activated=activated.fill_(NAN), norm=norm._replace(mean=None, var=None))
    assert error(activated, (exact * norm.weight + norm.bias).relu()) < tolerance


@pytest.mark.parametrize(("window", "newest"), [(24, 8), (20, 4), (40, 40)], ids=["even", "odd", "all"])
def test_first_reader_activates_the_newest_channels(window: int, newest: int) -> None:
    shape = ConvShape(2, 5, 3, 1, 1, 16, window, 16)
    buffer, norm = torch.randn(shape.in_pixels, 3 + window), random_norm(newest)
    raw, mask = torch.randn(shape.in_pixels, newest), torch.rand(2, window)
    whole = torch.cat([buffer[:, 3:-newest].double(), normal(raw, norm).relu()], 1)
    buffer[:, -newest:] = NAN
    weight, out = random_weight(shape), torch.empty(shape.out_pixels, 16)
    for own_mask in (None, mask):
        convolution(
            buffer, 3, taps_first(weight), shape, raw=out, newest=Newest(raw, norm), mask=own_mask, eps=EPS
        )  # fmt: skip
        seen = whole if own_mask is None else whole * mask.double().repeat_interleave(15, 0)
        assert error(out, seen @ weight[:, :, 0, 0].double().t()) < 1e-6
        assert error(buffer[:, 3:], whole) < 1e-6


def test_wide_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for buffers beyond 2^31 elements, on a small one; and what counts as beyond."""
    for rows, channels, expected in ((2**27, 16, True), (2**27 - 1, 16, False), (2**20, 3000, True)):
        assert launch.wide(None, torch.empty(rows, channels, device="meta")[:, :1]) == expected
    shapes = [ConvShape(1, 5, 4, 3, stride, 16, 16, 16) for stride in (1, 2)]
    window = ConvShape(1, 5, 4, 1, 1, 16, 16, 16)
    x, norm, results = torch.randn(20, 32), random_norm(16), []
    windows, weights = Windows(window, 16, 16, None, 16), [random_weight(shape) for shape in shapes]
    for beyond in (False, True):
        for launcher in (convolution, transposed, pull, conv_gradient, activate, norm_gradient, input_statistics):
            namespace = getattr(launcher, "__wrapped__", launcher).__globals__
            monkeypatch.setitem(namespace, "wide", lambda *_, beyond=beyond: beyond)
        own = []
        for shape, weight in zip(shapes, weights, strict=True):
            out, g = torch.empty(shape.out_pixels, 16), torch.empty(20, 16)
            convolution(x, 16, taps_first(weight), shape, raw=out)
            transposed(out, mirrored(weight, 16), shape, g)
            gradient = conv_gradient(
                out[None], x[None, :, 16:], shape, weight.numel(), norm=norm, table=pixel_table(shape, x), eps=EPS
            )  # fmt: skip
            own += [out, g, gradient]
        pulled, copied, dx = (torch.empty(20, 16) for _ in range(3))
        pull(own[0][None], weights[0], windows, (0, 1), 0, pulled)
        activate(pulled, None, norm, EPS, copied)
        norm_gradient(copied, pulled, torch.ones(3, 16), dx)
        statistics = nowhere(16)
        input_statistics(dx, copied, statistics, Scratch.allocate(x, 20, 16))
        results.append([*own, pulled, copied, dx, statistics.mean, statistics.var])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nan_stays() -> None:
    """A NaN passes ReLU, as in torch: a diverged training must not look healthy."""
    shape = ConvShape(1, 3, 1, 1, 1, 16, 16, 16)
    x, norm, out = torch.randn(3, 16), random_norm(16), torch.empty(3, 16)
    x[1, 5] = torch.nan
    convolution(x, 0, taps_first(random_weight(shape)), shape, activated=out, norm=norm, eps=EPS)
    assert out.isnan().all(1).tolist() == [False, True, False]
    activate(x, out, norm, EPS)
    assert torch.equal(out.isnan(), x.isnan())


def test_elementwise_and_input_statistics() -> None:
    x, g, upstream = torch.randn(3, 150, 72).unbind()
    passed, norm, copied = torch.randn(9, 150, 8), random_norm(72), torch.empty(150, 72)
    out = torch.empty(150, 80)[:, 5:77]
    activate(x, out, norm, EPS, copied)
    assert error(out, normal(x, norm).relu()) < 1e-6 and torch.equal(copied, x)
    activate(x, out, None, EPS)
    assert torch.equal(out, x)
    coefficients = torch.randn(3, 72)
    a, b, c = coefficients.double()
    norm_gradient(g, x, coefficients, out, upstream=upstream, passed=passed)
    added = passed.transpose(0, 1).flatten(1)
    assert error(out, a * g + b * x + c + upstream + added) < 1e-6
    norm_gradient(g, None, None, g, passed=passed[:, :, :8])
    assert error(g, out * 0 + added + g - added) < 1e-6
    norm = nowhere(72)
    input_statistics(x + 1e3, copied.fill_(NAN), norm, Scratch.allocate(x, 150, 72))
    var, mean = torch.var_mean((x + 1e3).double(), 0, unbiased=False)
    assert error(norm.mean, mean) < 1e-6 and error(norm.var, var) < 1e-4 and torch.equal(copied, x + 1e3)


def test_more_tiles_than_the_last_program_adds_up_at_once() -> None:
    """40 tiles: two chunks of up to 32, then both; against one tile for all pixels, forward and backward.

    The weight gradient is split into runs of pixels here.
    """
    shape = ConvShape(1, 26, 24, 1, 1, 24, 8, 24)
    x, weight = torch.randn(shape.in_pixels, 8) + 3, random_weight(shape)
    raw, through = torch.randn(shape.in_pixels, 8) + 2, random_norm(8)
    results = []
    for block_p in (16, 1024):
        with ExitStack() as stack:
            for kernel in ("convolution", "transposed"):
                stack.enter_context(configs.pin(kernel, block_p, 16))
            norm, into = nowhere(24), empty_gradient(8)
            out, g = torch.empty(shape.out_pixels, 24), torch.empty(shape.in_pixels, 8)
            scratch = Scratch.allocate(x, shape.out_pixels, 24)
            convolution(x, 0, taps_first(weight), shape, raw=out, norm=norm, scratch=scratch)
            transposed(
                out, mirrored(weight, 24), shape, g, raw=raw, norm=through, into=into, scratch=scratch, eps=EPS
            )  # fmt: skip
            results.append((norm.mean, norm.var, *into, g))
            assert scratch.counters.eq(0).all()
    for many, one in zip(*results, strict=True):
        assert error(many, one) < 1e-5
    exact = x.double() @ weight[:, :, 0, 0].double().t()
    var, mean = torch.var_mean(exact, 0, unbiased=False)
    assert error(results[0][0], mean) < 1e-6 and error(results[0][1], var) < 1e-5
    with configs.pin("weight_gradient", 16, 16):
        got = conv_gradient(out[None], raw[None], shape, weight.numel(), norm=through, table=None, eps=EPS)
    assert error(got.view(24, 8), out.double().t() @ normal(raw, through).relu()) < 1e-6


def test_conv_statistics_keep_digits_far_from_zero() -> None:
    """Outputs of mean 1e3 and deviation 1, over many tiles: the variance keeps four digits."""
    shape = ConvShape(1, 20, 17, 1, 1, 16, 16, 16)
    x, norm, out, weight = torch.randn(shape.in_pixels, 16), nowhere(16), torch.empty(340, 16), random_weight(shape)
    with configs.pin("convolution", 16, 16):
        scratch = Scratch.allocate(out, shape.out_pixels, 16)
        far = torch.full_like(out, 1e3)
        convolution(x, 0, taps_first(weight), shape, raw=out, shortcut=far, norm=norm, scratch=scratch)
    var = (x.double() @ weight[:, :, 0, 0].double().t()).var(0, unbiased=False)
    assert ((norm.var - var).abs() / var).max() < 1e-4


@pytest.mark.usefixtures("triton_that_fences")
def test_pinning_refuses_what_is_no_tile() -> None:
    with pytest.raises(ValueError, match="unknown kernel 'conv'"), configs.pin("conv", 16, 16):
        pass
    with pytest.raises(ValueError, match=r"block_p \(24\)"), configs.pin("convolution", 24, 16):
        pass
    before = configs.config_for("convolution", 64, 32, 2)
    with configs.pin("convolution", 32, 16):
        assert configs.config_for("convolution", 64, 32, 2) == (32, 32, 16, 4, 2)
        assert configs.smallest_tile("sm_90") == 32
    assert configs.config_for("convolution", 64, 32, 2) == before


@pytest.mark.parametrize(
    ("groups", "group_in", "group_out", "expected"),
    [(8, 4, 4, 8), (64, 8, 8, 8), (4, 32, 32, 2), (1, 112, 112, 1), (7, 16, 16, 1), (5, 8, 8, 5), (3, 24, 24, 3),
     (16, 128, 128, 1), (24, 1, 1, 24)],
)  # fmt: skip
def test_packing(groups: int, group_in: int, group_out: int, expected: int) -> None:
    """Full tiles of 64 where groups divide so, else whole power-of-two groups, else one group of all channels."""
    assert packing_factor(groups, group_in, group_out) == expected
