"""The modules: SeqConv2d, one layer, and Stage, whole stages; both hold packed parameters."""

# Annotations are not postponed: torch.fx copies those of a forward, and cannot pickle them as text.
import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from seqconv_triton.backend.aten.packed import mark, stays
from seqconv_triton.backend.contract import Convs, Norms, StageOutput, StatisticsMode
from seqconv_triton.backend.packing import transform_weights
from seqconv_triton.nn.computed import make_weights
from seqconv_triton.nn.leaf import leaf, refuse_script
from seqconv_triton.nn.norm import Affine, StageNorms, normalise, read_both, update_running
from seqconv_triton.nn.watched import fetch, show, watched
from seqconv_triton.ops import stage as functional
from seqconv_triton.plan import Plan


class PackedSeqConv(nn.Module):
    """Parameters and statistics of a plan, packed: one tensor for all 1×1 convs, one for all 3×3 convs, two BNs.

    `norm` holds the affine and the statistics of the BN behind every channel of the buffer, `reduce_norm` of those
    behind the 1×1 convs: BatchNorm2ds, or what `norm.py` takes in their place. Both must be in the same mode. With
    `recompute` the 1×1 convs' outputs are not kept for backward but computed again (gradient checkpointing).
    """

    norm: nn.Module
    reduce_norm: nn.Module | None
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        plan: Plan,
        *,
        dropout: float = 0.0,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout ({dropout}) must be at least 0 and below 1")
        if not eps > 0:
            raise ValueError(f"eps ({eps}) must be above 0")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.plan, self.dropout, self.recompute = plan, dropout, False
        # Columns of a dropout mask: before the first group that has dropout, before the tail's, all. Counted here,
        # because Python 3.11 counts under a lock, which torch.compile cannot trace.
        self.mask_columns = plan.window_offsets[plan.entry_groups], plan.window_offsets[-1], plan.mask_channels
        appended = len(plan.groups) * plan.group_width
        self.reduce_weight = _parameter(plan.reduce_weight_shape, where)
        self.reduce_norm = nn.BatchNorm2d(appended, eps, momentum, **where) if plan.bottleneck else None
        self.transform_weight = nn.Parameter(torch.empty(plan.transform_weight_shape, **where))
        self.norm = nn.BatchNorm2d(plan.normalized_channels, eps, momentum, **where)
        self.tail_weight = _parameter(plan.tail_weight_shape, where)
        self.reset_parameters()

    @property
    def eps(self) -> float:
        """That of the BNs, as they have it now. Raises ValueError where the two differ."""
        return self.read_norms().eps

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initialisation: uniform, from each group's fan-out; zeros in layers B (identity blocks)."""
        k = self.plan.group_width
        if self.reduce_weight is not None:
            fan_out_uniform_(self.reduce_weight, k)
        fan_out_uniform_(self.transform_weight, k * 9)
        for group, weight in zip(self.plan.groups, transform_weights(self.transform_weight, self.plan), strict=True):
            if group.residual_start is not None:
                weight.zero_()
        if self.tail_weight is not None:
            fan_out_uniform_(self.tail_weight, self.tail_weight.shape[0] * self.tail_weight[0, 0].numel())
        for norm in (self.norm, self.reduce_norm):
            if isinstance(norm, nn.BatchNorm2d | Affine):
                norm.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `fuse(model, pack=True)` has marked is still marked when it has been moved or cast."""
        marked = [name for name, buffer in self.named_buffers() if stays(buffer)]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in marked:
            mark(self.get_buffer(name))
        return self

    def convs(self) -> Convs:
        """The conv weights as `ops.stage` takes them."""
        return Convs(self.reduce_weight, self.transform_weight, self.tail_weight)

    def read_norms(self) -> StageNorms:
        """The BNs, what they normalise with, eps and ranks. Raises as `norm.read_both` does."""
        return read_both(self.norm, self.reduce_norm, self.transform_weight)

    def norms(self) -> tuple[Norms, StatisticsMode]:
        """The BNs as `ops.stage` takes them, and which statistics they normalise with."""
        norms, statistics, _, _ = self.read_norms()
        return norms, statistics

    def run(self, x: Tensor, shortcut: Tensor | None = None, *, keep_buffer: bool = False) -> StageOutput:
        """`ops.stage` with this module's parameters; updates the running statistics in training."""
        put_back = fetch(x, self)
        try:
            make_weights(self)
            return self._run(x, shortcut, keep_buffer)[0]
        finally:
            put_back()

    def _run(
        self,
        x: Tensor,
        shortcut: Tensor | None = None,
        keep_buffer: bool = False,
        features: tuple[int, int] | None = None,
    ) -> tuple[StageOutput, Tensor | None]:
        """`run` where calling the module has made or brought its weights; and activated `features` [start, stop)."""
        put_back = fetch(x, self.norm, self.reduce_norm)
        try:
            return self._run_with(self.read_norms(), x, shortcut, keep_buffer, features)
        finally:
            put_back()

    def _run_with(
        self,
        read: StageNorms,
        x: Tensor,
        shortcut: Tensor | None,
        keep_buffer: bool,
        features: tuple[int, int] | None,
    ) -> tuple[StageOutput, Tensor | None]:
        if read.statistics == "folded" and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise RuntimeError("a folded layer (seqconv_triton.fuse) is not for training; train what it was made from")
        mask = self.draw_mask(x)
        shown = [norm for norm in (self.norm, self.reduce_norm) if watched(norm)]
        output = functional.stage(
            x,
            self.convs(),
            read.norms,
            self.plan,
            statistics=read.statistics,
            shortcut=shortcut,
            mask=mask,
            eps=read.eps,
            keep_buffer=keep_buffer or features is not None or len(shown) > 0,
            recompute=self.recompute,
            process_group=read.group,
        )
        taken = None
        if features is not None and output.buffer is not None:  # before hooks take the weights away
            offset = self.plan.total_channels - self.plan.normalized_channels
            channels = slice(features[0] - offset, features[1] - offset)
            # A batch's statistics are taken again: their gradient then comes for free.
            taken = normalise(output.buffer[:, slice(*features)], read.main, channels).relu_()
        if shown:
            show(shown, self.norm, self.reduce_norm, output, read, self.reduce_weight, self.plan, mask)
        if output.statistics is not None:
            own = x.shape[0] * x.shape[2] * x.shape[3]
            count = own if output.counts is None else output.counts.sum()
            # Without images there is a batch to be counted, and nothing to learn from it.
            mean, var, inner_mean, inner_var = output.statistics if x.shape[0] else (None,) * 4
            for norm, vectors in ((self.norm, (mean, var)), (self.reduce_norm, (inner_mean, inner_var))):
                if norm not in shown:  # those have moved theirs themselves
                    update_running(norm, *vectors, count)
        return output, taken

    def draw_mask(self, x: Tensor) -> Tensor | None:
        """Dropout of whole channels, drawn anew for every sample and group: [N, plan.mask_channels], or None.

        The network's first layer and a downsizing conv see everything (published code).
        """
        if not self.training or self.dropout == 0:
            return None
        entry, tail, columns = self.mask_columns
        mask = x.new_empty((x.shape[0], columns)).bernoulli_(1 - self.dropout).div_(1 - self.dropout)
        mask[:, :entry] = 1
        if self.plan.tail is not None and self.plan.tail.kernel_size > 1:
            mask[:, tail:] = 1
        return mask

    def extra_repr(self) -> str:
        text = str(self.plan).splitlines()[0]
        return text if not self.dropout else f"{text}, dropout={self.dropout}"


class SeqConv2d(PackedSeqConv):
    """A sequentially aggregated convolution: out_channels in groups of group_width, each seeing the ones before it.

    [N, in_channels, H, W] → [N, out_channels, H, W], on an activated input; every group ends in BN-ReLU. Paper,
    sections 3.1 (SeqConv, windowed=False), 3.2 (WSeqConv) and 3.3 (bottleneck=True; subgroups as in SeqResNeXt).
    `dropout` drops whole channels of what each group sees. Raises ValueError where the widths do not divide.

    Args:
        in_channels: C, any number.
        out_channels: a multiple of group_width.
        group_width: k, channels per group.
        bottleneck: a 1×1 conv to k channels before each 3×3 conv.
        windowed: a group sees the last C channels only; otherwise everything before it.
        subgroups: groups of the 3×3 conv inside a bottleneck group; divides group_width.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        group_width: int,
        *,
        bottleneck: bool = False,
        windowed: bool = True,
        subgroups: int = 1,
        dropout: float = 0.0,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        plan = Plan.layer(
            in_channels, out_channels, group_width, bottleneck=bottleneck, windowed=windowed, subgroups=subgroups
        )
        super().__init__(plan, dropout=dropout, eps=eps, momentum=momentum, device=device, dtype=dtype)

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        """The activated output [N, out_channels, H, W] of an activated x, in the memory format of x."""
        return laid_out_like(x, self._run(with_gradient_like(x))[0].out)

    @leaf
    def forward_raw(self, x: Tensor, shortcut: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(raw, activated): the output before and after the last BN-ReLU; `shortcut` is added group by group to raw."""
        output = self.run(x, shortcut, keep_buffer=True)
        assert output.buffer is not None
        return output.buffer[:, self.plan.in_channels :], output.out


class Stage(PackedSeqConv):
    """Residual blocks, extension and tail conv as one op: raw features in, raw features out (`Plan.stage`)."""

    @leaf
    def forward(self, x: Tensor, features: bool = False) -> Any:
        """The raw output of the tail; its BN belongs to what comes next. Without a tail: the activated features.

        With `features` (out, features): also the activated output of the last block [N, channels, H, W], before any
        extension.
        """
        output, taken = self._run(x, features=self.feature_channels if features else None)
        return (output.out, taken) if features else output.out

    def forward_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(out, features), by calling the module: its hooks are called, on both."""
        out, features = self(x, features=True)
        return out, features

    @property
    def feature_channels(self) -> tuple[int, int]:
        """Buffer channels [start, stop) of the last residual block's (or the entry layer's) output."""
        end = stop = self.plan.in_channels
        width = self.plan.in_channels
        for layer in self.plan.layers:
            end += layer.out_channels
            if layer.residual or layer.entry:
                stop, width = end, layer.out_channels
        return stop - width, stop


@leaf
def laid_out_like(x: Tensor, out: Tensor) -> Tensor:
    """A channels-last result; contiguous, as a plain conv's is, where that would not take x for channels-last."""
    return out if _is_channels_last(x) else out.contiguous()


def with_gradient_like(x: Tensor) -> Tensor:
    """x, and where it is not channels-last its gradient contiguous too: `torch.autograd.grad(…)[0].view(n, -1)`."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return x
    if not isinstance(x, Tensor) or not x.requires_grad or x.dim() != 4 or _is_channels_last(x):
        return x
    x = x.view_as(x)
    x.register_hook(Tensor.contiguous)
    return x


def _is_channels_last(x: Tensor) -> bool:
    """As PyTorch's convs decide it: strides in the order of channels, columns, rows and images, gaps or not."""
    (_, channels, height, width), (image, channel, row, column) = x.shape, x.stride()
    return channel > 0 and column >= channel * channels and row >= column * width and image >= row * height


def _parameter(shape: tuple[int, ...] | None, where: dict[str, Any]) -> nn.Parameter | None:
    return None if shape is None else nn.Parameter(torch.empty(shape, **where))


def fan_out_uniform_(weight: Tensor, fan_out: int) -> Tensor:
    """Fill with uniform(−b, b), b = √3·√2 / √fan_out (published initialisation; standard deviation √(2 / fan_out))."""
    bound = math.sqrt(6 / fan_out)
    return weight.uniform_(-bound, bound)
