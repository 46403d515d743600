"""Every Triton kernel alone, in the interpreter, against plain float64 PyTorch: odd sizes, offsets, many tiles."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from helpers import error
from torch import Tensor

pytest.importorskip("triton", reason="Triton is for Linux only")

from seqconv_triton.backend.triton.parts import in_blocks, mirrored, packed, taps_first
from seqconv_triton.kernels import configs, launch
from seqconv_triton.kernels.convolution import Newest, convolution
from seqconv_triton.kernels.elementwise import activate, norm_gradient
from seqconv_triton.kernels.launch import BatchNorm, ConvShape, NormGradient, Scratch, Windows
from seqconv_triton.kernels.pixels import pixel_table
from seqconv_triton.kernels.pull import NewestGradient, pull
from seqconv_triton.kernels.statistics import input_statistics
from seqconv_triton.kernels.transposed import transposed
from seqconv_triton.kernels.weight_gradient import conv_gradient, window_gradient

EPS = 1e-5
NAN = float("nan")

# id: batch, height, width, kernel, stride, channels in, channels out, conv groups
CONVOLUTIONS = {
    "1x1": (3, 5, 7, 1, 1, 20, 24, 1),
    "3x3": (1, 7, 14, 3, 1, 8, 8, 1),
    "3x3-one-pixel": (3, 1, 1, 3, 1, 16, 16, 1),
    "3x3-pairs": (1, 5, 2, 3, 1, 8, 8, 4),
    "3x3-depthwise": (1, 2, 5, 3, 1, 24, 24, 24),
    "3x3-groups-wider-than-a-tile": (1, 5, 5, 3, 1, 48, 48, 2),
    "5x5": (1, 4, 3, 5, 1, 8, 16, 1),
    "5x5-stride-3": (1, 7, 8, 5, 3, 8, 16, 2),
    "stride-2": (2, 7, 5, 3, 2, 12, 24, 6),
    "stride-2-even": (1, 14, 2, 3, 2, 32, 64, 2),
    "1x1-stride-2": (1, 5, 4, 1, 2, 16, 16, 1),
    "channels-beyond-a-tile": (1, 2, 2, 1, 1, 8, 160, 1),
}


def shape_of(case: str) -> ConvShape:
    batch, height, width, kernel, stride, c_in, c_out, groups = CONVOLUTIONS[case]
    return ConvShape(batch, height, width, kernel, stride, c_out, c_in // groups, c_out // groups)


def random_norm(channels: int) -> BatchNorm:
    return BatchNorm(
        1 + 0.3 * torch.randn(channels), 0.3 * torch.randn(channels), 0.2 * torch.randn(channels),
        1 + torch.rand(channels),
    )  # fmt: skip


def normal(x: Tensor, norm: BatchNorm) -> Tensor:
    """BN of [P, C] in float64."""
    weight, bias, mean, var = (v.double() for v in norm)
    return (x.double() - mean) * (var + EPS).rsqrt() * weight + bias


def images(rows: Tensor, shape: ConvShape, out: bool = False) -> Tensor:
    size = (shape.out_height, shape.out_width) if out else (shape.height, shape.width)
    return rows.double().view(shape.batch, *size, -1).permute(0, 3, 1, 2)


def flat(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def conv(x: Tensor, weight: Tensor, shape: ConvShape) -> Tensor:
    """x [N, C, H, W], weight [c_out, c_in, kernel, kernel]."""
    return F.conv2d(x, weight.double(), None, shape.stride, shape.kernel // 2, 1, shape.c_out // shape.group_out)


def random_weight(shape: ConvShape) -> Tensor:
    size = (shape.c_out, shape.group_in, shape.kernel, shape.kernel)
    return torch.randn(size) / (shape.kernel**2 * shape.group_in) ** 0.5


def empty_gradient(channels: int) -> NormGradient:
    return NormGradient(*(torch.full(size, NAN) for size in ((channels,), (channels,), (3, channels))))


def nowhere(channels: int) -> BatchNorm:
    """A BN whose statistics are still to come."""
    return random_norm(channels)._replace(mean=torch.full((channels,), NAN), var=torch.full((channels,), NAN))


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


@pytest.mark.parametrize("through", [True, False], ids=["through-relu", "plain"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_transposed(case: str, through: bool) -> None:
    shape = shape_of(case)
    weight, channels = random_weight(shape), shape.total_in
    ready = mirrored(in_blocks(weight, shape), packed(shape).group_out)
    raw, norm, into = torch.randn(shape.in_pixels, channels), random_norm(channels), empty_gradient(channels)
    scratch, g = Scratch.allocate(raw, shape.in_pixels, channels), torch.full((shape.in_pixels, channels), NAN)
    dy = torch.randn(shape.out_pixels, shape.c_out + 2)[:, 1:-1]
    x = images(raw, shape).requires_grad_()
    (exact,) = torch.autograd.grad(conv(x, weight, shape), x, images(dy.contiguous(), shape, out=True))
    if not through:
        transposed(dy, ready, packed(shape), g)
        assert error(g, flat(exact)) < 1e-6
    elif shape.stride > 1:
        with pytest.raises(ValueError, match=f"stride {shape.stride}"):
            transposed(dy, ready, packed(shape), g, raw=raw, norm=norm, into=into, scratch=scratch, eps=EPS)
    else:
        transposed(dy, ready, packed(shape), g, raw=raw, norm=norm, into=into, scratch=scratch, eps=EPS)
        exact = flat(exact) * (normal(raw, norm) > 0)
        assert error(g, exact) < 1e-6
        assert_bn_backward(norm, into, exact, raw)
        assert scratch.counters.eq(0).all()


def assert_bn_backward(norm: BatchNorm, into: NormGradient, g: Tensor, raw: Tensor) -> None:
    """dγ, dβ and a·g + b·x + c equal autograd's on a BN whose mean and variance are those of `norm`."""
    rstd = (norm.var.double() + EPS).rsqrt()
    x = (raw.double() - norm.mean.double()) * rstd
    weight_grad, bias_grad = (g * x).sum(0), g.sum(0)
    assert error(into.weight, weight_grad) < 1e-5
    assert error(into.bias, bias_grad) < 1e-5
    exact = norm.weight.double() * rstd * (g - bias_grad / len(raw) - x * weight_grad / len(raw))
    a, b, c = into.coefficients
    assert error(a * g + b * raw + c, exact) < 1e-5 * max(1, (g.norm() / exact.norm()).item())


def windows_of(shape: ConvShape, table: list[tuple[int, int]] | None) -> tuple[Windows, list[tuple[int, int]]]:
    """Three groups' windows, uniform or any, and where each begins and how many channels it has."""
    k, taps = shape.c_out, shape.kernel**2
    if table is None:
        c = shape.group_in
        return Windows(shape, c, c, None, launch.alignment(k, c)), [(i * k, c) for i in range(3)]
    rows, weight, mask = [], 0, 0
    for start, channels in table:
        rows.append((start, channels, weight, mask))
        weight, mask = weight + k * taps * channels, mask + channels
    most = max(channels for _, channels in table)
    align = launch.alignment(*(entry for row in rows for entry in row))
    return Windows(shape._replace(group_in=most), most, most, torch.tensor(rows), align), table


WINDOWS = {
    "uniform": None,
    "dense": [(0, 16), (0, 24), (0, 32)],
    "odd": [(0, 5), (0, 13), (2, 19)],
}


@pytest.mark.parametrize("masked", [False, True], ids=["all", "dropout"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("case", WINDOWS)
def test_windows_backward(case: str, kernel: int, masked: bool) -> None:
    """Pull and weight gradient of three groups of eight channels, against autograd on their convs."""
    k, shape = 8, ConvShape(2, 4, 3, kernel, 1, 8, 16, 8)
    windows, spans = windows_of(shape, WINDOWS[case])
    channels = max(start + count for start, count in spans)
    size = sum(k * kernel**2 * count for _, count in spans)
    flat_weight, dz = torch.randn(size), torch.randn(3, shape.in_pixels, k)
    mask = torch.rand(2, sum(count for _, count in spans)) if masked else None
    raw, norm = torch.randn(shape.in_pixels, channels), random_norm(channels)
    x = images(normal(raw, norm).relu(), shape).requires_grad_()
    weights, outs, place, column = [], [], 0, 0
    for start, count in spans:
        length = k * kernel**2 * count
        own = flat_weight[place : place + length].view(k, kernel, kernel, count).permute(0, 3, 1, 2)
        weights.append(own.double().requires_grad_())
        seen = x[:, start : start + count]
        if mask is not None:
            seen = seen * mask[:, column : column + count].double()[:, :, None, None]
        outs.append(F.conv2d(seen, weights[-1], padding=kernel // 2))
        place, column = place + length, column + count
    exact_x, *exact_weights = torch.autograd.grad(outs, [x, *weights], [images(d, shape) for d in dz])

    for target, count, upstream in ((0, channels, None), (5, 8, torch.randn(shape.in_pixels, 8)), (8, 8, None)):
        g = torch.full((shape.in_pixels, count), NAN)
        pull(dz, flat_weight, windows, (0, 3), target, g, mask=mask, upstream=upstream)
        expected = flat(exact_x)[:, target : target + count] + (0 if upstream is None else upstream)
        assert error(g, expected) < 1e-6
    bits = pixel_table(shape, raw)[0] if kernel > 1 else None
    got = window_gradient(dz, raw, windows, size, norm=norm, identity=0, bits=bits, mask=mask, eps=EPS)
    assert error(got, torch.cat([w.flatten() for w in exact_weights])) < 1e-6


@pytest.mark.parametrize("batch", [True, False], ids=["batch", "running"])
def test_pull_completes_the_first_readers_gradient(batch: bool) -> None:
    """g and z of the first reader, in front of its BN: dz is stored, and the sums of the next BN are taken."""
    k, shape = 8, ConvShape(2, 5, 3, 1, 1, 8, 16, 8)
    windows, _ = windows_of(shape, None)
    weight, dz = torch.randn(3 * k * 16), torch.randn(3, shape.in_pixels, k)
    g, z, coefficients = torch.randn(shape.in_pixels, k), torch.randn(shape.in_pixels, k), torch.randn(3, k)
    a, b, c = coefficients.double()
    exact_dz = dz.double()
    exact_dz[1] = a * g + b * z + c
    dz[1] = NAN
    exact = sum(exact_dz[i] @ weight.double().view(3, k, 16)[i, :, 16 - 8 * i : 24 - 8 * i] for i in (1, 2))
    raw, norm, into = torch.randn(shape.in_pixels, k), random_norm(k), empty_gradient(k)
    out, scratch = torch.full((shape.in_pixels, k), NAN), Scratch.allocate(raw, shape.in_pixels, k)
    pull(
        dz, weight, windows, (1, 3), 16, out, newest=NewestGradient(g, z, coefficients), raw=raw, norm=norm, into=into,
        scratch=scratch, eps=EPS, batch=batch,
    )  # fmt: skip
    exact = exact * (normal(raw, norm) > 0)
    assert error(out, exact) < 1e-6 and error(dz, exact_dz) < 1e-6
    if batch:
        assert_bn_backward(norm, into, exact, raw)
    else:
        scale = norm.weight.double() * (norm.var.double() + EPS).rsqrt()
        assert error(into.coefficients, torch.stack([scale, 0 * scale, 0 * scale])) < 1e-6


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv_gradient(case: str) -> None:
    """Of two convs of one shape; the first channels of the input are activated already."""
    shape, identity = shape_of(case), 5
    x, norms = torch.randn(2, shape.in_pixels, shape.total_in), [random_norm(shape.total_in) for _ in range(2)]
    dy = torch.randn(2, shape.out_pixels, shape.c_out)
    table = pixel_table(shape, x) if shape.kernel > 1 or shape.stride > 1 else None
    both = BatchNorm(*(torch.cat(vectors) for vectors in zip(*norms, strict=True)))
    size = shape.c_out * shape.group_in * shape.kernel**2
    got = conv_gradient(dy, x, shape, 2 * size, norm=both, table=table, eps=EPS).view(2, -1)
    exacts = []
    for i in range(2):
        weight = random_weight(shape).double().requires_grad_()
        out = conv(images(normal(x[i], norms[i]).relu(), shape), weight, shape)
        exacts.append(torch.autograd.grad(out, weight, images(dy[i], shape, out=True))[0])
        assert error(got[i], exacts[i].flatten()) < 1e-6

    behind = BatchNorm(*(vector[identity:] for vector in norms[0]))
    mask = torch.rand(shape.batch, shape.total_in)
    got = conv_gradient(
        dy[:1], x[:1], shape, size, norm=behind, identity=identity, table=table, mask=mask, eps=EPS
    )  # fmt: skip
    seen = normal(x[0], norms[0]).relu()
    seen[:, :identity] = x[0, :, :identity].double()
    weight = random_weight(shape).double().requires_grad_()
    out = conv(images(seen, shape) * mask.double()[:, :, None, None], weight, shape)
    (exact,) = torch.autograd.grad(out, weight, images(dy[0], shape, out=True))
    assert error(got, exact.flatten()) < 1e-6


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
    assert configs.packing_factor(groups, group_in, group_out) == expected
