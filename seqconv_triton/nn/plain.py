"""A folded layer as PyTorch's own modules, one conv each: what quantizers, converters and pruners look for."""

# Annotations are not postponed: torch.fx copies those of a forward, and cannot pickle them as text.
from typing import Any

import torch
from torch import Tensor, nn

from seqconv_triton.backend.traced import GroupConstants, GroupSteps, StageConstants, StageSteps, walk
from seqconv_triton.plan import Plan


class PlainGroup(nn.Module):
    """A group's convs, and the scale and shift of one whose BN is not folded in."""

    def __init__(self, plan: Plan, window: int, given: GroupConstants) -> None:
        super().__init__()
        k = plan.group_width
        self.reduce = None
        if given.reduce is not None:
            self.reduce = conv(window, k, 1, 1, 1, given.reduce, given.reduce_shift)
        self.inner_relu = nn.ReLU()
        inside, groups = (k, plan.subgroups) if plan.bottleneck else (window, 1)
        self.transform = conv(inside, k, 3, 1, groups, given.transform, given.transform_shift)
        self.scale, self.shift = _frozen(given.scale), _frozen(given.shift)
        self.relu = nn.ReLU()

    def steps(self) -> GroupSteps:
        return GroupSteps(self.reduce, self.inner_relu, self.transform, self.scale, self.shift, self.relu)


class PlainSeqConv(nn.Module):
    """In place of a folded `Stage` or `SeqConv2d`, for evaluation: the same methods, on any device, in any backend."""

    def __init__(self, plan: Plan, given: StageConstants, features: tuple[int, int]) -> None:
        super().__init__()
        self.plan, self.feature_channels = plan, features
        self.entry_scale, self.entry_shift = _frozen(given.entry_scale), _frozen(given.entry_shift)
        self.entry_relu = nn.ReLU()
        self.groups = nn.ModuleList(
            PlainGroup(plan, group.window_width, own) for group, own in zip(plan.groups, given.groups, strict=True)
        )
        self.tail = None
        if (tail := plan.tail) is not None and given.tail is not None:
            channels = plan.read_channels * tail.repeats
            self.tail = conv(
                channels, plan.out_channels, tail.kernel_size, tail.stride, tail.groups, given.tail, None
            )  # fmt: skip

    def steps(self) -> StageSteps:
        groups = tuple(group.steps() for group in self.groups if isinstance(group, PlainGroup))
        return StageSteps(self.entry_scale, self.entry_shift, self.entry_relu, groups, self.tail)

    def forward(self, x: Tensor, features: bool = False) -> Any:
        """As `Stage.forward` and `SeqConv2d.forward`."""
        walked = walk(x, None, self.plan, self.steps())
        start, stop = self.feature_channels
        return (walked.out, walked.features.window(start, stop - start)) if features else walked.out

    def forward_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `Stage.forward_features`."""
        out, features = self(x, features=True)
        return out, features

    def forward_raw(self, x: Tensor, shortcut: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `SeqConv2d.forward_raw`."""
        walked = walk(x, shortcut, self.plan, self.steps())
        return torch.cat(walked.raw, 1), walked.out


def conv(
    c_in: int, c_out: int, kernel: int, stride: int, groups: int, weight: Tensor, bias: Tensor | None
) -> nn.Conv2d:
    """With a copy of a weight that may be a view."""
    module = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False, device="meta")
    module.weight, module.bias = nn.Parameter(_copy(weight), requires_grad=False), _frozen(bias)
    return module


def _frozen(value: Tensor | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(_copy(value), requires_grad=False)


def _copy(value: Tensor) -> Tensor:
    return value.detach().clone(memory_format=torch.contiguous_format)
