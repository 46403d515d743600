"""The groups of the aten backend's evaluation: BN folded into weights and biases once.

Only activations are stored, where they stay in the cache; raw features live from where they are written until a layer
B adds them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seqconv_triton.backend.aten.packed import packed, packed_convolution
from seqconv_triton.backend.aten.parts import Images, convolution, onednn_takes, pixels, pointwise
from seqconv_triton.backend.aten.ring import ring_of
from seqconv_triton.backend.contract import StageArguments
from seqconv_triton.backend.folding import Folding, GroupWeights

# More than this leaves a CPU's last-level cache, and glibc gives blocks above 32 MiB back to the system each time.
CHUNK_BYTES = 16 * 2**20


def images_per_chunk(x: Tensor, channels: int) -> int:
    """How many images' activated channels fit into CHUNK_BYTES, in even shares of the batch; off a CPU all of them."""
    if not x.is_cpu:
        return max(1, x.shape[0])
    fit = max(1, CHUNK_BYTES // (channels * x.shape[2] * x.shape[3] * x.element_size()))
    return -(-x.shape[0] // -(-x.shape[0] // fit))


class FoldedGroups:
    """As `parts.Groups` in the forward pass, on the images that `begin` names.

    `added`: a shortcut from outside comes; `again`: the same weights serve several times; `packs`: they are the
    caller's own, of which packed copies may be remembered.
    """

    weights: Callable[[int], GroupWeights]
    images: Images

    def __init__(self, stage: StageArguments, x: Tensor, added: bool, again: bool, packs: bool) -> None:
        self.plan = plan = stage.plan
        self.subgroups = plan.subgroups if plan.bottleneck else 1
        self.folding = Folding(stage, x.dtype, added, ring_of(plan).place)
        if packs and self.folding.done and not added and onednn_takes(x):
            self.weights = packed(stage, self.folding, x)
        else:
            folded = self.folding.group
            self.weights = [folded(j) for j in range(len(plan.groups))].__getitem__ if again else folded

    def begin(self, x: Tensor) -> None:
        self.images = Images(x)

    def activate_input(self, x: Tensor, pieces: list[tuple[slice, Tensor]]) -> None:
        rows = pixels(x)
        for part, into in pieces:
            if self.plan.raw_input:
                self._activate(rows[:, part], part, into)
            else:
                into.copy_(rows[:, part])

    def _activate(self, raw: Tensor, channels: slice, into: Tensor) -> None:
        torch.addcmul(self.folding.shift[channels], raw, self.folding.scale[channels], out=into)
        into.clamp_min_(0)

    def convolve(self, j: int, window: Tensor) -> Tensor:
        """Group j's convs over what it reads, rows [P, columns]: [N, k, H, W], raw or with its BN."""
        convs, images = self.weights(j), self.images
        if convs.packed and convs.reduce is not None:
            window = pixels(packed_convolution(images(window), convs.reduce, convs.reduce_shift, 0, 1).relu_())
        elif convs.reduce is not None:
            window = pointwise(window, convs.reduce, convs.reduce_shift, images).relu_()
        if convs.packed:
            return packed_convolution(images(window), convs.transform, convs.transform_shift, 1, self.subgroups)
        return convolution(images(window), convs.transform, convs.transform_shift, 1, self.subgroups)

    def activate(self, j: int, y: Tensor, into: Tensor) -> None:
        if j in self.folding.foldable:
            torch.clamp_min(pixels(y), 0, out=into)
        else:
            start = self.plan.slot(j)
            self._activate(pixels(y), slice(start, start + self.plan.group_width), into)
