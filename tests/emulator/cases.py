"""What is executed: layers and stages of the library, small enough for thousands of instructions a thread.

Together they meet every kernel, windows that grow and windows that slide, subgroups from one to one a channel, groups
of 4 to 128 channels, shortcuts, dropout, tails, and images of one pixel up to several tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers import Run, randomise
from torch import Tensor, nn

import seqconv_triton as sct
from seqconv_triton.plan import Layer, Plan, Tail

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}
ARCHITECTURES = ("sm_80", "sm_90")


@dataclass(frozen=True, eq=False)  # known by its name
class Case:
    """A module, its input [N, C, H, W] and how it is run. With `tiles`, every kernel is pinned to tiles of so many."""

    name: str
    plan: Plan
    size: tuple[int, int, int]
    dropout: float = 0.0
    is_layer: bool = True
    layer: dict[str, Any] = field(default_factory=dict)
    tiles: int | None = None

    def build(self, training: bool) -> nn.Module:
        """The module with random weights, running statistics and affines, in float32."""
        module: nn.Module = sct.SeqConv2d(**self.layer) if self.is_layer else sct.Stage(self.plan, dropout=self.dropout)
        return randomise(module).train(training)

    def input(self, dtype: torch.dtype) -> Tensor:
        images, height, width = self.size
        size = (images, self.plan.in_channels, height, width)
        return torch.randn(size, generator=torch.Generator().manual_seed(7)).to(dtype)

    @property
    def run(self) -> Run:
        return run_layer if self.is_layer else run_stage


def run_layer(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """A layer that adds a shortcut."""
    shortcut = torch.sin(x[:, :1].double()).to(x.dtype)
    return module.forward_raw(x, shortcut.expand(-1, module.plan.out_channels, -1, -1))


def run_stage(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return module.forward_features(x)


def layer(
    name: str, channels: int, out: int, k: int, size: tuple[int, int, int], tiles: int | None = None, **options: Any
) -> Case:
    given = {"in_channels": channels, "out_channels": out, "group_width": k, **options}
    return Case(name, sct.SeqConv2d(**given).plan, size, options.get("dropout", 0.0), True, given, tiles)


def stage(
    name: str, plan: Plan, size: tuple[int, int, int], dropout: float = 0.0, tiles: int | None = None
) -> Case:  # fmt: skip
    return Case(name, plan, size, dropout, False, tiles=tiles)


B: dict[str, Any] = {"bottleneck": True}
DENSE: dict[str, Any] = {"windowed": False}


def layers() -> Iterator[Case]:
    yield layer("basic-k4", 12, 12, 4, (2, 5, 3))
    yield layer("basic-k8", 16, 24, 8, (2, 5, 3))
    yield layer("basic-k16-dropout", 32, 32, 16, (1, 3, 3), dropout=0.3)
    yield layer("basic-k32", 32, 64, 32, (1, 7, 5))
    yield layer("basic-k64", 64, 128, 64, (1, 3, 3))
    yield layer("basic-dense-k8-dropout", 16, 24, 8, (2, 4, 3), dropout=0.2, **DENSE)
    yield layer("basic-dense-k16-odd", 5, 48, 16, (1, 7, 5), **DENSE)
    yield layer("basic-k16-c160", 160, 32, 16, (1, 3, 3))
    yield layer("k8", 16, 32, 8, (2, 7, 5), **B)
    yield layer("k8-one-pixel", 16, 24, 8, (3, 1, 1), **B)
    yield layer("k8-s2-dropout", 24, 24, 8, (2, 3, 4), subgroups=2, dropout=0.3, **B)
    yield layer("k8-s8", 16, 16, 8, (1, 7, 5), subgroups=8, **B)
    yield layer("k4-s2-window-cuts-a-group", 10, 24, 4, (2, 5, 3), subgroups=2, dropout=0.3, **B)
    yield layer("k8-window-narrower", 3, 16, 8, (1, 5, 5), **B)
    yield layer("k16", 32, 64, 16, (2, 4, 5), **B)
    yield layer("k16-s2", 48, 32, 16, (2, 4, 5), subgroups=2, **B)
    yield layer("k16-s16-dropout", 32, 32, 16, (1, 5, 5), subgroups=16, dropout=0.2, **B)
    yield layer("k16-c160", 160, 32, 16, (1, 3, 3), **B)
    yield layer("k24", 24, 48, 24, (1, 3, 5), **B)
    yield layer("k24-s2", 24, 48, 24, (1, 5, 4), subgroups=2, **B)
    yield layer("k24-s24", 24, 24, 24, (1, 2, 3), subgroups=24, **B)
    yield layer("k32", 64, 64, 32, (2, 7, 5), **B)
    yield layer("k32-s2", 32, 96, 32, (1, 3, 3), subgroups=2, **B)
    yield layer("k32-s32", 32, 64, 32, (2, 3, 5), subgroups=32, **B)
    yield layer("k64", 64, 128, 64, (1, 5, 5), **B)
    yield layer("k64-s2-dropout", 64, 128, 64, (2, 3, 3), subgroups=2, dropout=0.2, **B)
    yield layer("k64-s64", 64, 128, 64, (1, 4, 4), subgroups=64, **B)
    yield layer("k128-s8", 128, 128, 128, (1, 1, 5), subgroups=8, **B)
    yield layer("dense-k8-odd", 7, 24, 8, (2, 5, 3), **B, **DENSE)
    yield layer("dense-k16-s2", 16, 64, 16, (1, 7, 5), subgroups=2, **B, **DENSE)
    yield layer("dense-k32-dropout", 32, 96, 32, (1, 4, 4), dropout=0.2, **B, **DENSE)
    # Many programs: sums over tiles, and a neighbour's pixels, matter.
    yield layer("basic-k8-many-tiles", 16, 24, 8, (2, 7, 5), tiles=16)
    yield layer("k8-s2-many-readers", 32, 32, 8, (3, 14, 14), tiles=16, subgroups=2, **B)


def stages() -> Iterator[Case]:
    extended = Plan.stage(16, 8, 1, extension=16, tail=Tail(32, 3, 2, 4))
    repeated = Plan.stage(16, 8, 1, extension=16, subgroups=2, tail=Tail(32, 3, 2, 8, repeats=2))
    entered = Plan.stage(16, 8, 1, entry_channels=5, bottleneck=False, tail=Tail(16, 1))
    yield stage("stage-k8", extended, (2, 5, 3))
    yield stage("stage-k8-s2-repeats", repeated, (2, 5, 3))
    yield stage("stage-basic-entry-dropout-1x1", entered, (1, 5, 4), 0.2)
    yield stage("stage-dense-k8", Plan.stage(16, 8, 1, windowed=False, extension=16, tail=Tail(32, 3, 2, 4)), (1, 7, 5))
    yield stage("stage-k16-dropout-1x1", Plan.stage(32, 16, 1, tail=Tail(24, 1)), (2, 3, 3), 0.2)
    yield stage(
        "stage-basic-k16", Plan.stage(32, 16, 1, bottleneck=False, extension=16, tail=Tail(32, 3, 2, 1)), (1, 4, 3)
    )
    yield stage("stage-k32-s32", Plan.stage(64, 32, 1, extension=64, subgroups=32, tail=Tail(64, 3, 2, 4)), (1, 5, 5))
    yield stage("stage-k64", Plan.stage(64, 64, 1), (1, 3, 3))
    yield stage("stage-k8-many-tiles", extended, (3, 14, 14), tiles=16)


def wide() -> Iterator[Case]:
    """Groups and tails as wide as in the ImageNet networks, on few pixels: their kernels' very configurations."""
    # On four pixels its batch statistics lose bfloat16 more than is allowed, in the plain equations too.
    yield wide_stage("wide-c128-k32", 128, 32, 4, Tail(128, 3, 2, 2), size=3)
    yield wide_stage("wide-c256-k32-s8", 256, 32, 4, Tail(256, 3, 2, 32), subgroups=8)
    yield wide_stage("wide-c256-k32-s8-alone", 256, 32, 1, None, subgroups=8)
    yield wide_stage("wide-c256-k64", 256, 64, 2, Tail(256, 3, 2, 4))
    yield wide_stage("wide-c512-k64", 512, 64, 2, Tail(512, 3, 2, 4))
    yield wide_stage("wide-c1024-k64-s8", 1024, 64, 2, Tail(256, 3, 2, 32), subgroups=8)
    yield wide_stage("wide-c1024-k128", 1024, 128, 2, Tail(1024, 1))
    yield wide_stage("wide-c2048-k128-s8", 2048, 128, 2, Tail(2048, 1), subgroups=8)


def wide_stage(
    name: str, channels: int, k: int, groups: int, tail: Tail | None, subgroups: int = 1, size: int = 2
) -> Case:  # fmt: skip
    """A few groups alone, and a tail over the last channels."""
    read = channels if tail is None or tail.kernel_size == 1 else tail.out_channels
    return stage(name, Plan((Layer(channels, groups * k),), k, True, subgroups, read, True, tail), (1, size, size))


CASES = {case.name: case for case in (*layers(), *stages(), *wide())}
