"""The forward pass over the shared buffer on PyTorch's own ops: CPU first, and wherever Triton is not.

Group by group: 1×1 conv over the window as one matrix product, BN-ReLU, 3×3 conv, shortcut, BN-ReLU into the
ring (`ring.py`). Kept for backward are the raw buffer and z, the raw outputs of the 1×1 convs. An evaluation folds BN
into the convs and takes a few images at a time (`evaluation.py`).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from seqconv_triton.backend.aten import memory
from seqconv_triton.backend.aten.evaluation import FoldedGroups, images_per_chunk
from seqconv_triton.backend.aten.output import Output
from seqconv_triton.backend.aten.parts import Groups, Shortcuts, pixels
from seqconv_triton.backend.aten.precision import cast, working_dtype
from seqconv_triton.backend.aten.ring import Features, ring_of
from seqconv_triton.backend.contract import ForwardOutputs, StageArguments, empty_outputs, with_statistics


def forward(
    x: Tensor, shortcut: Tensor | None, stage: StageArguments, *, keep: bool, keep_inner: bool
) -> ForwardOutputs:
    """As `contract.ForwardPass` says; what is kept lies in memory that belongs to the stage's weights."""
    owner = stage.norms.main.weight
    if not keep:
        memory.release(owner)
    allocate = partial(memory.empty_strided, owner)
    outputs = empty_outputs(x, stage, keep=keep, keep_inner=keep_inner, empty_strided=allocate)
    if outputs.statistics is not None:
        stage = stage._replace(norms=with_statistics(stage.norms, outputs.statistics))
    as_given = stage
    if (dtype := working_dtype(x)) != x.dtype:  # outputs are rounded as they are written
        x, stage = x.to(dtype), stage._replace(convs=cast(stage.convs, dtype))
    # Half precisions keep BN apart: folding rounds weights once more. Those that `fuse` has folded are rounded already.
    half = x.dtype in (torch.bfloat16, torch.float16)
    folds = stage.statistics == "folded" or not half
    if outputs.statistics is None and not keep and folds:
        _evaluate(x, shortcut, stage, outputs.out, packs=stage is as_given)
        return outputs
    groups = Groups(stage, x, outputs.z)
    _walk(groups, Features(groups.ring, pixels(x)), x, shortcut, stage, outputs.out, outputs.buffer)
    groups.store_statistics()
    return outputs


def _evaluate(x: Tensor, shortcut: Tensor | None, stage: StageArguments, out: Tensor, packs: bool) -> None:
    """Nothing links the images, so they go through a few at a time."""
    ring = ring_of(stage.plan)
    chunk = images_per_chunk(x, ring.channels)
    groups = FoldedGroups(stage, x[:chunk], shortcut is not None, chunk < x.shape[0], packs)
    features = None
    for start in range(0, x.shape[0], chunk):
        images = slice(start, start + chunk)
        rows = pixels(x[images])
        # Fresh memory costs a page fault every 4 KiB.
        if features is None or features.rows.shape[0] != rows.shape[0]:
            features = Features(ring, rows)
        features.clear()
        part_shortcut, mask = (None if t is None else t[images] for t in (shortcut, stage.mask))
        groups.begin(x[images])
        _walk(groups, features, x[images], part_shortcut, stage._replace(mask=mask), out[images], None)


def _walk(
    groups: Groups | FoldedGroups,
    features: Features,
    x: Tensor,
    shortcut: Tensor | None,
    stage: StageArguments,
    out: Tensor,
    buffer: Tensor | None,
) -> None:
    plan, rows, images = stage.plan, pixels(x), groups.images
    raw: tuple[Tensor, ...] = ()
    if buffer is not None:
        kept = pixels(buffer)
        kept[:, : plan.in_channels] = rows
        raw = kept[:, plan.in_channels :].split(plan.group_width, 1)
    masks = None if stage.mask is None else features.ring.place_masks(stage.mask.to(x.dtype))
    shortcuts = Shortcuts(plan, rows, shortcut)
    leaving = Output(features.ring, images, stage.convs.tail, masks)
    groups.activate_input(x, features.input_pieces())
    for j in range(len(plan.groups)):
        leaving.write(plan.slot(j), features, out)
        window = features.window(j)
        if masks is not None:
            window = window * images.pixel_mask(masks[j])
        y = groups.convolve(j, window)
        shortcuts.pass_on(j, y, images)
        if raw:
            raw[j].copy_(pixels(y))
        groups.activate(j, y, features.slot(j))
    leaving.write(plan.total_channels, features, out)
