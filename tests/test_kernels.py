"""Every Triton kernel alone, in the interpreter, against plain float64 PyTorch: odd sizes, both layouts, many tiles."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from helpers import error
from torch import Tensor

pytest.importorskip("triton", reason="Triton is for Linux only")

from seqconv_triton.kernels import configs, launch
from seqconv_triton.kernels.convolution import convolution
from seqconv_triton.kernels.data_gradient import Fresh, data_gradient
from seqconv_triton.kernels.elementwise import activate, apply_gradient
from seqconv_triton.kernels.launch import (
    BACKWARD_ROWS,
    BIAS,
    D_BIAS,
    D_WEIGHT,
    MEAN,
    SCALE,
    SHIFT,
    VAR,
    WEIGHT,
    A,
    B,
    C,
    ConvShape,
    Features,
    Readers,
    Scratch,
    covered,
)
from seqconv_triton.kernels.statistics import input_statistics
from seqconv_triton.kernels.weight_gradient import weight_gradient

EPS = 1e-5

# id: batch, height, width, kernel, stride, channels read, channels out, conv groups
CONVOLUTIONS = {
    "1x1": (3, 5, 7, 1, 1, 20, 24, 1),
    "3x3": (1, 7, 14, 3, 1, 8, 8, 1),
    "3x3-one-pixel": (3, 1, 1, 3, 1, 16, 16, 1),
    "3x3-pairs": (1, 5, 2, 3, 1, 8, 8, 4),
    "3x3-depthwise": (1, 2, 5, 3, 1, 24, 24, 24),
    "3x3-groups-wider-than-a-tile": (1, 5, 5, 3, 1, 48, 48, 2),
    "stride-2": (2, 7, 5, 3, 2, 12, 24, 6),
    "stride-2-even": (1, 14, 2, 3, 2, 32, 64, 2),
    "channels-beyond-a-tile": (1, 2, 2, 1, 1, 8, 160, 1),
}


def shape_of(case: str) -> ConvShape:
    batch, height, width, kernel, stride, read, c_out, groups = CONVOLUTIONS[case]
    return ConvShape(batch, height, width, kernel, stride, c_out, read // groups, c_out // groups, read)


def random_norm(channels: int, rows: int = BACKWARD_ROWS) -> Tensor:
    """A BN's vectors, consistent with one another; what backward writes is NaN."""
    norm = torch.full((rows, channels), float("nan"))
    norm[WEIGHT], norm[BIAS] = 1 + 0.3 * torch.randn(channels), 0.3 * torch.randn(channels)
    norm[MEAN], norm[VAR] = 0.2 * torch.randn(channels), 1 + torch.rand(channels)
    norm[SCALE] = norm[WEIGHT] * (norm[VAR] + EPS).rsqrt()
    norm[SHIFT] = norm[BIAS] - norm[SCALE] * norm[MEAN]
    return norm


def images(rows: Tensor, shape: ConvShape, out: bool = False) -> Tensor:
    size = (shape.out_height, shape.out_width) if out else (shape.height, shape.width)
    return rows.double().view(shape.batch, *size, -1).permute(0, 3, 1, 2)


def flat(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def conv(x: Tensor, weight: Tensor, shape: ConvShape) -> Tensor:
    """x [N, read, H, W], weight [c_out, taps, c_in] as the kernels hold it."""
    square = weight.double().view(shape.c_out, shape.kernel, shape.kernel, -1).permute(0, 3, 1, 2)
    return F.conv2d(x, square, None, shape.stride, shape.kernel // 2, 1, shape.c_out // shape.group_out)


def random_weight(shape: ConvShape) -> Tensor:
    return torch.randn(shape.c_out, shape.kernel**2, shape.group_in) / (shape.kernel**2 * shape.group_in) ** 0.5


def activated(features: Features, start: int, read: int) -> Tensor:
    """What a reader sees, float64 [P, read], whatever the layout."""
    raw = features.rows.double()
    if features.block:
        raw = raw.transpose(0, 1).flatten(1)
    positive = (raw * features.scale.double() + features.shift.double()).relu()
    positive[:, : features.identity] = raw[:, : features.identity]
    return positive[:, start : start + read]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case: str, dtype: torch.dtype) -> None:
    shape = shape_of(case)
    start, identity = 4, 6
    norm = random_norm(start + shape.read)
    x = torch.randn(shape.in_pixels, start + shape.read).to(dtype)
    source = Features(x, norm[SCALE], norm[SHIFT], identity)
    weight = random_weight(shape).to(dtype)
    mask = (torch.rand(shape.batch, shape.read) > 0.3).to(dtype) / 0.7
    shortcut = torch.randn(shape.out_pixels, shape.c_out + 3).to(dtype)[:, 2:-1]
    out = torch.empty(shape.out_pixels, shape.c_out, dtype=dtype)
    behind = random_norm(shape.c_out)
    behind[MEAN : SHIFT + 1] = float("nan")
    scratch = Scratch.allocate(x, shape.out_pixels, shape.c_out)
    convolution(source, start, weight, shape, out, mask=mask, shortcut=shortcut, norm=behind, scratch=scratch, eps=EPS)
    dropped = images(activated(source, start, shape.read), shape) * mask.double()[:, :, None, None]
    exact = flat(conv(dropped, weight, shape)) + shortcut.double()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    assert error(out, exact) < tolerance
    var, mean = torch.var_mean(exact, 0, unbiased=False)
    scale = behind[WEIGHT].double() * (var + EPS).rsqrt()
    if shape.out_pixels > 1:
        for row, expected in ((MEAN, mean), (VAR, var), (SCALE, scale), (SHIFT, behind[BIAS] - scale * mean)):
            assert error(behind[row], expected) < 5 * tolerance, row
    assert scratch.counters.eq(0).all()
    convolution(source, start, weight, shape, out)  # what dropout's mask would hide
    assert error(out, flat(conv(images(activated(source, start, shape.read), shape), weight, shape))) < tolerance


@pytest.mark.parametrize("through", [True, False], ids=["through-relu", "plain"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_data_gradient_of_one_reader(case: str, through: bool) -> None:
    """Also with the reader's gradient still in front of its BN, where the conv's stride allows it."""
    shape = shape_of(case)
    weight = random_weight(shape)
    raw = torch.randn(shape.in_pixels, shape.read)
    norm = random_norm(shape.read)
    scratch = Scratch.allocate(raw, shape.in_pixels, shape.read)
    readers = Readers.table([(0, shape.read, 0, 0)])
    for fresh in (False, True) if shape.stride == 1 else (False,):
        dy = torch.randn(1, shape.out_pixels, shape.c_out)
        new = None
        if fresh:
            own = random_norm(shape.c_out)
            own[A : C + 1] = torch.randn(3, shape.c_out)
            g, own_raw, upstream, passed = torch.randn(4, shape.out_pixels, shape.c_out).unbind()
            dy = own[A] * g + own[B] * own_raw + own[C] + upstream + passed
            new, dy_given, dy = Fresh(g, own_raw, own, upstream, passed), dy[None], torch.full_like(dy[None], torch.nan)
        out = torch.empty(shape.in_pixels, shape.read)
        data_gradient(
            dy, weight, shape, readers, (0, 1), 0, shape.read, out, EPS, windows=False, fresh=new,
            raw=raw if through else None, norm=norm if through else None, scratch=scratch if through else None,
        )  # fmt: skip
        if fresh:
            assert error(dy, dy_given) < 1e-6, "the completed gradient is not written"
        x = images(activated(Features(raw, norm[SCALE], norm[SHIFT]), 0, shape.read), shape).requires_grad_()
        (exact,) = torch.autograd.grad(conv(x, weight, shape), x, images(dy[0], shape, out=True))
        exact = flat(exact)
        if through:
            exact = exact * (raw * norm[SCALE] + norm[SHIFT] > 0)
        assert error(out, exact) < 1e-6
        if through:
            assert_bn_backward(norm, exact, raw)


def assert_bn_backward(norm: Tensor, g: Tensor, raw: Tensor) -> None:
    """dγ, dβ and a·g + b·x + c equal autograd's on a BN whose mean and variance are those of `norm`."""
    rstd = (norm[VAR].double() + EPS).rsqrt()
    normal = (raw.double() - norm[MEAN].double()) * rstd
    weight_grad, bias_grad = (g * normal).sum(0), g.sum(0)
    assert error(norm[D_WEIGHT], weight_grad) < 1e-5
    assert error(norm[D_BIAS], bias_grad) < 1e-5
    pixels = len(raw)
    exact = norm[WEIGHT].double() * rstd * (g - bias_grad / pixels - normal * weight_grad / pixels)
    assert error(norm[A] * g + norm[B] * raw + norm[C], exact) < 1e-5 * max(1, (g.norm() / exact.norm()).item())


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_weight_gradient(case: str) -> None:
    shape = shape_of(case)
    norm = random_norm(shape.read)
    source = Features(torch.randn(shape.in_pixels, shape.read), norm[SCALE], norm[SHIFT])
    dy = torch.randn(1, shape.out_pixels, shape.c_out)
    weight = random_weight(shape).double().requires_grad_()
    readers = Readers.table([(0, shape.read, 0, 0)])
    got = weight_gradient(dy, source, shape, readers, shape.total_in, False, weight.numel())
    out = conv(images(activated(source, 0, shape.read), shape), weight, shape)
    (exact,) = torch.autograd.grad(out, weight, images(dy[0], shape, out=True))
    assert error(got.view_as(exact), exact) < 1e-6


@pytest.mark.parametrize("windows", [[(0, 4), (2, 4), (1, 5)], [(0, 4), (0, 8), (4, 4)]], ids=["any", "aligned"])
def test_windows_pull_from_all_their_readers(windows: list[tuple[int, int]]) -> None:
    """Three 1×1 convs over overlapping windows of eight-channel features, with dropout, pulled four at a time."""
    k, batch, height, width = 8, 2, 3, 2
    pixels = batch * height * width
    table = [(start, count, 100 * i, 12 * i) for i, (start, count) in enumerate(windows)]
    weights, mask = torch.randn(300), torch.rand(batch, 36)
    dy = torch.randn(3, pixels, k)
    shape = ConvShape(batch, height, width, 1, 1, k, 4, k, 4)
    exact = torch.zeros(pixels, 8, dtype=torch.float64)
    for i, (start, count) in enumerate(windows):
        weight = weights[100 * i : 100 * i + k * count].view(k, count).double()
        seen = mask[:, 12 * i : 12 * i + count].double().repeat_interleave(height * width, 0)
        exact[:, start : start + count] += dy[i].double() @ weight * seen
    for target in (0, 2, 4):
        out = torch.empty(pixels, 4)
        data_gradient(
            dy, weights, shape, Readers.table(table), (0, 3), target, 4, out, EPS, windows=True, mask=mask
        )  # fmt: skip
        assert error(out, exact[:, target : target + 4]) < 1e-6


@pytest.mark.parametrize("align", [1, 16])
def test_wide_offsets(monkeypatch: pytest.MonkeyPatch, align: int) -> None:
    """The kernels for buffers beyond 2^31 elements, on a small one; and what counts as beyond."""
    for rows, channels, expected in ((2**27, 16, True), (2**27 - 1, 16, False), (2**20, 3000, True)):
        assert launch.wide(None, torch.empty(rows, channels, device="meta")[:, :1]) == expected
    shape = ConvShape(1, 5, 4, 1, 1, 16, 16, 16, 16)
    x, norm = torch.randn(20, align + 16), random_norm(align + 16)
    source, weight, results = Features(x, norm[SCALE], norm[SHIFT]), random_weight(shape), []
    readers = Readers.table([(align, 16, 0, 0)])
    for beyond in (False, True):
        for module in (convolution, data_gradient, weight_gradient):
            monkeypatch.setitem(module.__globals__, "wide", lambda *_, beyond=beyond: beyond)
        out, g = torch.empty(20, 16), torch.empty(20, 16)
        convolution(source, align, weight, shape, out)
        data_gradient(out[None], weight, shape, readers, (0, 1), align, 16, g, EPS, windows=True)
        results.append((out, g, weight_gradient(out[None], source, shape, readers, 16, True, 256)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nan_stays() -> None:
    """A NaN passes ReLU, as in torch: a diverged training must not look healthy."""
    shape = ConvShape(1, 3, 1, 1, 1, 16, 16, 16, 16)
    x, norm, out = torch.randn(3, 16), random_norm(16), torch.empty(3, 16)
    x[1, 5] = torch.nan
    convolution(Features(x, norm[SCALE], norm[SHIFT]), 0, random_weight(shape), shape, out)
    assert out.isnan().all(1).tolist() == [False, True, False]
    activate(x, norm[SCALE], norm[SHIFT], out)
    assert torch.equal(out.isnan(), x.isnan())


def test_elementwise_and_input_statistics() -> None:
    x, g, upstream, passed = torch.randn(4, 150, 70).unbind()
    norm = random_norm(70)
    out = torch.empty(150, 80)[:, 5:75]
    activate(x, norm[SCALE], norm[SHIFT], out)
    assert error(out, (x.double() * norm[SCALE] + norm[SHIFT]).relu()) < 1e-6
    norm[A : C + 1] = torch.randn(3, 70)
    apply_gradient(g, x, norm, out, upstream, passed)
    assert error(out, norm[A].double() * g + norm[B].double() * x + norm[C] + upstream + passed) < 1e-6
    input_statistics(x + 1e3, norm, Scratch.allocate(x, 150, 70), EPS)
    var, mean = torch.var_mean((x + 1e3).double(), 0, unbiased=False)
    assert error(norm[MEAN], mean) < 1e-6 and error(norm[VAR], var) < 1e-4


def test_more_tiles_than_the_last_program_adds_up_at_once() -> None:
    """40 tiles: two chunks of up to 32, then both; against one tile for all pixels, forward and backward.

    The weight gradient is split into runs of pixels here.
    """
    shape = ConvShape(1, 26, 24, 1, 1, 24, 8, 24, 8)
    norm = random_norm(8)
    x = torch.randn(shape.in_pixels, 8) + 3
    weight, raw = random_weight(shape), torch.randn(shape.in_pixels, 8) + 2
    results = []
    for block_p in (16, 1024):
        with ExitStack() as stack:
            for kernel in ("convolution", "data_gradient"):
                stack.enter_context(configs.pin(kernel, block_p, 16))
            behind, through = (random_norm(channels) for channels in (24, 8))
            behind[WEIGHT], behind[BIAS] = 1.5, 0.5
            through[: SHIFT + 1] = norm[: SHIFT + 1]
            out, g = torch.empty(shape.out_pixels, 24), torch.empty(shape.in_pixels, 8)
            scratch = Scratch.allocate(x, shape.out_pixels, 24)
            source = Features(x, norm[SCALE], norm[SHIFT])
            convolution(source, 0, weight, shape, out, norm=behind, scratch=scratch, eps=EPS)
            readers = Readers.table([(0, 8, 0, 0)])
            data_gradient(
                out[None], weight, shape, readers, (0, 1), 0, 8, g, EPS, windows=False, raw=raw, norm=through,
                scratch=scratch,
            )  # fmt: skip
            results.append((behind[: SHIFT + 1], through[D_WEIGHT:], g))
            assert scratch.counters.eq(0).all()
    for many, one in zip(*results, strict=True):
        assert error(many, one) < 1e-5
    got = weight_gradient(out[None], source, shape, readers, 8, False, weight.numel())
    assert error(got.view(24, 8), out.double().t() @ activated(source, 0, 8)) < 1e-6
    var, mean = torch.var_mean(activated(source, 0, 8) @ weight.double()[:, 0].t(), 0, unbiased=False)
    assert error(results[0][0][MEAN], mean) < 1e-6
    assert error(results[0][0][VAR], var) < 1e-5


def test_conv_statistics_keep_digits_far_from_zero() -> None:
    """Outputs of mean 1e3 and deviation 1, over many tiles: the variance keeps four digits."""
    shape = ConvShape(1, 20, 17, 1, 1, 16, 16, 16, 16)
    norm, behind, out = random_norm(16), random_norm(16), torch.empty(shape.out_pixels, 16)
    source, weight = Features(torch.randn(shape.in_pixels, 16), norm[SCALE], norm[SHIFT]), random_weight(shape)
    far = torch.full_like(out, 1e3)
    with configs.pin("convolution", 16, 16):
        scratch = Scratch.allocate(out, shape.out_pixels, 16)
        convolution(source, 0, weight, shape, out, shortcut=far, norm=behind, scratch=scratch, eps=EPS)
    var = (activated(source, 0, 16) @ weight[:, 0].double().t()).var(0, unbiased=False)
    assert ((behind[VAR] - var).abs() / var).max() < 1e-4


@pytest.mark.parametrize("block", [4, 16])
def test_group_blocked_features(block: int) -> None:
    """The kernels that read a window give the same bits from [groups, P, block] as from channels-last features."""
    shape = ConvShape(2, 5, 3, 1, 1, 8, 24, 8, 24)
    norm = random_norm(48)
    rows = torch.randn(shape.in_pixels, 48)
    blocked = rows.unflatten(1, (-1, block)).transpose(0, 1).contiguous()
    weight, dy = random_weight(shape), torch.randn(2, shape.out_pixels, 8)
    groups = Readers.table([(4, 24, 0, 0), (block, 24, 192, 0)])
    results = []
    for source in (
        Features(rows, norm[SCALE], norm[SHIFT], 10),
        Features(blocked, norm[SCALE], norm[SHIFT], 10, block),
    ):
        out = torch.empty(shape.out_pixels, 8)
        convolution(source, 12, weight, shape, out)
        results.append((out, weight_gradient(dy, source, shape, groups, 24, True, 384)))
        assert error(out, activated(source, 12, 24) @ weight[:, 0].double().t()) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


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
    ("tile", "group", "other", "channels", "total", "expected"),
    [(16, 4, 4, 64, 64, 16), (16, 32, 8, 64, 16, 8), (64, 4, 2, 64, 32, 32), (128, 8, 8, 64, 64, 64)],
)
def test_covered_channels(tile: int, group: int, other: int, channels: int, total: int, expected: int) -> None:
    assert covered(tile, group, other, channels, total) == expected
