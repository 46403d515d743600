"""What the aten backend's passes share of a stage: its groups' weights, masks and BNs, and shortcuts between them."""

from __future__ import annotations

from torch import Tensor

from seqconv_triton.backend.aten.norm import Norm
from seqconv_triton.backend.aten.parts import Images, pixels
from seqconv_triton.backend.aten.ring import ring_of
from seqconv_triton.backend.contract import StageArguments
from seqconv_triton.backend.packing import reduce_matrices, transform_weights
from seqconv_triton.plan import Plan


class Groups:
    """A stage's groups on images like `like`; weights and masks over windows lie as the ring's columns do."""

    def __init__(self, stage: StageArguments, like: Tensor) -> None:
        plan, (main, inner) = stage.plan, stage.norms
        self.plan, self.ring, self.images = plan, ring_of(plan), Images(like)
        self.norm = Norm(main, stage, plan.total_channels - plan.normalized_channels)
        self.inner = None if inner is None else Norm(inner, stage)
        self.reduce = reduce_matrices(stage.convs.reduce, plan)
        self.transform = transform_weights(stage.convs.transform, plan)
        self.masks = None if stage.mask is None else self.ring.place_masks(stage.mask.to(like.dtype))
        self.subgroups = plan.subgroups if plan.bottleneck else 1

    def pixel_mask(self, j: int) -> Tensor | None:
        """Group j's dropout mask for every pixel of what it reads."""
        return None if self.masks is None else self.images.pixel_mask(self.masks[j])

    def placed_reduce(self, j: int) -> Tensor:
        return self.ring.place(self.reduce[j], j)

    def placed_transform(self, j: int) -> Tensor:
        return self.transform[j] if self.plan.bottleneck else self.ring.place(self.transform[j], j)


class Shortcuts:
    """What is added to the raw outputs of layers B: raw channels kept until then, or a single layer's shortcut."""

    def __init__(self, plan: Plan, rows: Tensor, shortcut: Tensor | None) -> None:
        self.plan, self.shortcut, k = plan, shortcut, plan.group_width
        self.awaited = {group.residual_start for group in plan.groups}
        self.raw = {c: rows[:, c : c + k] for c in self.awaited if c is not None and c < plan.in_channels}

    def pass_on(self, j: int, y: Tensor, images: Images) -> None:
        """Add to y [N, k, H, W], group j's 3×3 conv, what belongs there, and remember it where it is added later."""
        start, k = self.plan.groups[j].residual_start, self.plan.group_width
        if self.shortcut is not None:
            y += self.shortcut[:, j * k : (j + 1) * k]
        elif start is not None:
            y += images(self.raw.pop(start))
        if self.plan.slot(j) in self.awaited:
            self.raw[self.plan.slot(j)] = pixels(y)
