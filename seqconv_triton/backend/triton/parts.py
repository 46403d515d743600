"""What both passes of the Triton backend derive from a stage: shapes, rows, BNs, weights as the kernels read them."""

from __future__ import annotations

from functools import cache, cached_property

import torch
from torch import Tensor

from seqconv_triton.backend.contract import Norms, NormVectors, StageArguments, empty_channels_last
from seqconv_triton.backend.packing import window_weights
from seqconv_triton.backend.ranks import AcrossRanks
from seqconv_triton.kernels.heuristic import packing_factor
from seqconv_triton.kernels.launch import INTERPRETED, BatchNorm, ConvShape, NormGradient, Windows, alignment
from seqconv_triton.plan import Plan
from seqconv_triton.plan_text import decode, encode

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_TAPS = 5  # of a kernel's side: a bit a tap in 32


def check(x: Tensor, plan: Plan) -> None:
    """Refuse what the kernels cannot take, before anything is launched."""
    if x.dtype not in DTYPES:
        raise TypeError(f'x is {x.dtype}; the triton backend takes float32, float16 and bfloat16 (use_backend("aten"))')
    if not (x.is_cuda or x.is_meta or INTERPRETED):  # meta: kernels are only listed
        raise ValueError(f"x is on {x.device}; the triton backend needs a GPU (or TRITON_INTERPRET=1, for tests)")
    if plan.tail is not None and plan.tail.kernel_size > MOST_TAPS:
        raise ValueError(
            f"the tail's kernel_size ({plan.tail.kernel_size}) must be at most {MOST_TAPS} in the triton backend "
            '(use_backend("aten"))'
        )


def dense(stage: StageArguments) -> StageArguments:
    """The stage with its vectors and 1×1 weights without gaps, as the kernels address them; 3×3 ones are laid out."""
    convs, norms = stage.convs, stage.norms

    def packed_vectors(norm: NormVectors) -> NormVectors:
        weight, bias, mean, var = (None if vector is None else vector.contiguous() for vector in norm)
        assert weight is not None and bias is not None
        return NormVectors(weight, bias, mean, var)

    inner = None if norms.inner is None else packed_vectors(norms.inner)
    reduce = None if convs.reduce is None else convs.reduce.contiguous()
    return stage._replace(convs=convs._replace(reduce=reduce), norms=Norms(packed_vectors(norms.main), inner))


class Geometry:
    """The convs of a plan on images of one size: over windows, inside a group, the tail; with and without packing."""

    def __init__(self, plan: Plan, images: Tensor) -> None:
        self.plan, self.device = plan, images.device
        self.batch, _, self.height, self.width = images.shape
        self.pixels = self.batch * self.height * self.width
        k, sub, size = plan.group_width, plan.group_width // plan.subgroups, (self.batch, self.height, self.width)
        self.inside = ConvShape(*size, 3, 1, k, sub, sub)
        self.tail = None
        if plan.tail is not None:
            t = plan.tail
            inputs = plan.read_channels * t.repeats // t.groups
            self.tail = ConvShape(*size, t.kernel_size, t.stride, t.out_channels, inputs, t.out_channels // t.groups)

    @cached_property
    def windows(self) -> list[ConvShape]:
        """Of every group; a replay does without."""
        return [self._over_window(group.window_width) for group in self.plan.groups]

    def _over_window(self, channels: int) -> ConvShape:
        plan, k = self.plan, self.plan.group_width
        compiled = any(layer.in_channels == channels and (layer.windowed or plan.uniform) for layer in plan.layers)
        size, kernel = (self.batch, self.height, self.width), 1 if plan.bottleneck else 3
        return ConvShape(*size, kernel, 1, k, channels, k, dense=not compiled)

    def readers(self) -> Windows:
        """All windows, as the kernels of the backward pass take them.

        A table is copied to the device anew each time and never kept: a tensor that outlives the pass would be foreign
        to the memory pool of a CUDA graph being warmed up.
        """
        widest = self._over_window(self.plan.widest_window)
        if self.plan.uniform:
            k, channels = self.plan.group_width, widest.group_in
            return Windows(widest, channels, channels, None, alignment(k, channels))
        table, align = _table(encode(self.plan), self.device.type == "cuda")
        return Windows(widest, widest.group_in, widest.group_in, table.to(self.device, non_blocking=True), align)


@cache
def _table(encoded: str, pinned: bool) -> tuple[Tensor, int]:
    """A row a group: window start, its channels, offset of its weight, of its dropout mask; on the host.

    Never dropped: a captured CUDA graph copies from this memory in every replay.
    """
    plan = decode(encoded)
    k, area = plan.group_width, 1 if plan.bottleneck else 9
    table = [
        (group.window_start, group.window_width, offset * k * area, offset)
        for group, offset in zip(plan.groups, plan.window_offsets[:-1], strict=True)
    ]
    host = torch.tensor(table, dtype=torch.int64)
    return host.pin_memory() if pinned else host, alignment(*(entry for row in table for entry in row))


def packed(shape: ConvShape) -> ConvShape:
    """The same conv with neighbouring conv groups as one block-diagonal group, as `in_blocks` lays its weight out.

    Matrix units have FLOPs to spare there, but a tile of few channels costs as many instructions as a full one.
    """
    factor = packing_factor(shape.c_out // shape.group_out, shape.group_in, shape.group_out)
    return shape._replace(group_in=factor * shape.group_in, group_out=factor * shape.group_out)


def in_blocks(weight: Tensor, shape: ConvShape) -> Tensor:
    """[C_out, c, K, K] weights of a conv of this shape, or of several, as [C_out, packed c, K, K]."""
    factor = packed(shape).group_out // shape.group_out
    if factor == 1:
        return weight
    blocks = weight.unflatten(0, (-1, factor, shape.group_out))  # [blocks, factor, out, c, K, K]
    dense = weight.new_zeros((*blocks.shape[:3], factor, *blocks.shape[3:]))
    dense.diagonal(dim1=1, dim2=3).copy_(blocks.movedim(1, -1))
    return dense.flatten(3, 4).flatten(0, 2)


def taps_first(weight: Tensor) -> Tensor:
    """[C_out, taps, C_in], as a conv reads it; free where the weight is channels-last already."""
    return weight.permute(0, 2, 3, 1).contiguous()


def mirrored(weight: Tensor, group_out: int) -> Tensor:
    """[C_in, taps, C_out of a conv group], as a transposed conv reads it."""
    return weight.unflatten(0, (-1, group_out)).permute(0, 2, 3, 4, 1).contiguous().flatten(0, 1)


def window_taps_first(weight: Tensor, plan: Plan) -> Tensor:
    """Basic layers' weights, flat: [k, taps, window] of each group end to end."""
    if plan.uniform:
        return taps_first(weight).flatten()
    return torch.cat([w.permute(0, 2, 3, 1).reshape(-1) for w in window_weights(weight, plan, 3)])


def rows(x: Tensor) -> Tensor:
    """A channels-last [N, C, H, W] tensor as [P, C], without a copy."""
    flat = x.permute(0, 2, 3, 1)
    return flat.as_strided((flat.shape[0] * flat.shape[1] * flat.shape[2], x.shape[1]), (flat.stride(2), 1))


def channels_last(x: Tensor) -> Tensor:
    """x with rows of channels, as the kernels address it, whatever its layout."""
    _, c, h, w = x.shape
    return x if x.stride() == (h * w * c, 1, w * c, c) else empty_channels_last(x, c, h, w).copy_(x)


class StageNorms:
    """The BNs of a stage by what they follow: the input (None if it is activated), each group, each 1×1 conv."""

    def __init__(self, stage: StageArguments, main: NormVectors, inner: NormVectors | None) -> None:
        plan = stage.plan
        self.identity = plan.total_channels - plan.normalized_channels  # channels that are activated already
        self.main = BatchNorm(*main)
        own = plan.in_channels - self.identity
        self.input = _part(self.main, 0, own) if plan.raw_input else None
        self.behind_input, self.group_width = _part(self.main, own, None), plan.group_width
        self.all_inner = BatchNorm(*inner) if inner is not None else None

    @cached_property
    def groups(self) -> list[BatchNorm]:
        return _split(self.behind_input, self.group_width)

    @cached_property
    def inner(self) -> list[BatchNorm]:
        return [] if self.all_inner is None else _split(self.all_inner, self.group_width)

    def behind(self, first: int) -> tuple[BatchNorm, int]:
        """The BNs of buffer channels from `first` on, and how many of those have none."""
        return _part(self.main, max(0, first - self.identity), None), max(0, self.identity - first)


def _part(norm: BatchNorm, start: int, stop: int | None) -> BatchNorm:
    return BatchNorm(*(None if vector is None else vector[start:stop] for vector in norm))


def _split(norm: BatchNorm, size: int) -> list[BatchNorm]:
    assert norm.weight is not None
    count = len(norm.weight) // size
    return [
        BatchNorm(*vectors)
        for vectors in zip(*([None] * count if v is None else v.split(size) for v in norm), strict=True)
    ]


def share_statistics(norm: BatchNorm, ranks: AcrossRanks | None) -> None:
    """Replace this rank's batch statistics of a BN by those of all ranks."""
    if ranks is not None:
        assert norm.mean is not None and norm.var is not None
        mean, var = ranks.statistics(norm.mean, norm.var)
        norm.mean.copy_(mean), norm.var.copy_(var)


def share_gradients(norm: BatchNorm, gradient: NormGradient, ranks: AcrossRanks | None, eps: float) -> None:
    """Make BN's backward dx = a·g + b·x + c that of all ranks; the affine's gradients stay this rank's own."""
    if ranks is None:
        return
    assert gradient.coefficients is not None and norm.mean is not None and norm.var is not None
    assert gradient.weight is not None and gradient.bias is not None
    a, b, c = gradient.coefficients
    mean_gx, mean_g = ranks.means(torch.stack([gradient.weight, gradient.bias]))
    torch.mul(a * -mean_gx, (norm.var + eps).rsqrt(), out=b)
    torch.sub(a * -mean_g, b * norm.mean, out=c)


def repeated(x: Tensor, times: int) -> Tensor:
    """x [P, C] side by side: what the published SeqResNeXt-24's downsizing convs read."""
    return x if times == 1 else x.repeat(1, times)


def padded(norm: BatchNorm, identity: int, times: int) -> BatchNorm:
    """The BNs of `repeated` channels, of which none may be activated already."""
    if times == 1:
        return norm
    if identity:
        raise ValueError("a tail that reads channels repeatedly needs them raw")
    return BatchNorm(*(None if vector is None else vector.repeat(times) for vector in norm))


def masked_rows(x: Tensor, mask: Tensor, pixels: int) -> Tensor:
    """x [P, C] times a dropout mask [N, C], in place."""
    return x.view(-1, pixels, x.shape[1]).mul_(mask[:, None]).view(x.shape)
