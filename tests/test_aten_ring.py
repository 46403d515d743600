"""The aten backend's ring, followed channel by channel: every group reads its window, every part leaves in time."""

from __future__ import annotations

import pytest
import torch

from seqconv_triton.backend.aten.output import Output
from seqconv_triton.backend.aten.parts import Images
from seqconv_triton.backend.aten.ring import Features, Ring
from seqconv_triton.plan import Plan, Tail

# id: plan, columns, whether groups read all of them
RINGS = {
    "sliding": (Plan.stage(12, 4, 3, extension=12, tail=Tail(24, 3, 2, 6)), 12, True),
    "dense-entry": (Plan.stage(12, 4, 1, entry_channels=4), 12, True),
    "turned-input": (Plan.stage(12, 4, 3, entry_channels=8, tail=Tail(24, 1)), 16, True),
    "basic-entry": (Plan.stage(12, 4, 3, entry_channels=4, bottleneck=False), 48, False),
    "tail-that-does-not-split": (Plan.stage(8, 4, 2, extension=4, tail=Tail(9, 3, 2, 3)), 32, False),
    "published-quirk": (Plan.stage(12, 4, 3, extension=12, tail=Tail(24, 3, 2, 6, repeats=2)), 12, True),
    "dense": (Plan.stage(12, 4, 3, windowed=False, bottleneck=False), 80, False),
    "window-cuts-a-group": (Plan.layer(10, 96, 4, bottleneck=True), 96, False),
    "narrower-than-a-group": (Plan.layer(3, 40, 5), 40, False),
    "leaves-in-parts": (Plan.layer(8, 20, 4), 8, True),
}


@pytest.mark.parametrize("case", RINGS)
def test_channels_lie_where_they_are_read(case: str) -> None:
    plan, channels, whole = RINGS[case]
    ring = Ring(plan)
    assert (ring.channels, ring.whole) == (channels, whole)
    numbers = torch.arange(plan.total_channels, dtype=torch.float64)
    features = Features(ring, numbers[None])
    output = Output(ring, Images(torch.empty(1, 1, 1, 1)), None, None)
    output.tail = None
    out = torch.full((1, plan.read_channels, 1, 1), torch.nan, dtype=torch.float64)
    for part, into in features.input_pieces():
        into[:] = numbers[: plan.in_channels][part]
    for j, group in enumerate(plan.groups):
        output.write(plan.slot(j), features, out)
        window = numbers[group.window_start : group.window_start + group.window_width]
        read = features.window(j)
        for part, columns in ring.columns_read[j]:
            assert read[0, columns].equal(window[part])
        # Weights over the window meet their channels, and zeros whatever else is read.
        weight = window[None] + 1
        placed = ring.place(weight, j)
        assert (placed * read.nan_to_num()).sum() == (weight * window).sum()
        features.slot(j)[:] = numbers[plan.slot(j) : plan.slot(j) + plan.group_width]
    output.write(plan.total_channels, features, out)
    assert out.flatten().equal(numbers[-plan.read_channels :])
