"""Plans by hand-counted windows, and their text forms."""

from __future__ import annotations

import pytest

from seqconv_triton.plan import Group, Plan, Tail
from seqconv_triton.plan_text import decode, encode


def test_windowed_layer_slides_by_one_group() -> None:
    plan = Plan.layer(6, 6, 2)
    assert plan.groups == (Group(0, 6), Group(2, 6), Group(4, 6))
    assert plan.total_channels == 12


def test_dense_layer_sees_everything_before() -> None:
    plan = Plan.layer(6, 6, 2, windowed=False)
    assert plan.groups == (Group(0, 6), Group(0, 8), Group(0, 10))
    assert plan.transform_weight_shape == ((6 + 8 + 10) * 2 * 9,)


def test_window_may_cut_a_group_when_widths_do_not_divide() -> None:
    assert Plan.layer(5, 8, 4).groups == (Group(0, 5), Group(4, 5))


def test_stage_is_one_recurrence() -> None:
    """Two blocks and an extension of a windowed stage: one sliding window, shortcuts from 2·C channels earlier."""
    plan = Plan.stage(4, 2, 2, extension=4, tail=Tail(8, 3, 2, 4))
    assert [group.window_start for group in plan.groups] == [2 * j for j in range(10)]
    assert {group.window_width for group in plan.groups} == {4}
    shortcuts = {j: group.residual_start for j, group in enumerate(plan.groups) if group.residual_start is not None}
    assert shortcuts == {2: 0, 3: 2, 6: 8, 7: 10}
    assert all(plan.slot(j) - start == 2 * 4 for j, start in shortcuts.items())
    assert plan.read_channels == 8 and plan.out_channels == 8


def test_dense_stage_restarts_with_every_layer() -> None:
    plan = Plan.stage(4, 2, 1, windowed=False)
    assert plan.groups == (Group(0, 4), Group(0, 6), Group(4, 4, 0), Group(4, 6, 2))


def test_entry_layer_is_dense_and_marked() -> None:
    plan = Plan.stage(4, 2, 1, entry_channels=3)
    assert plan.groups[:3] == (Group(0, 3), Group(0, 5), Group(3, 4))
    assert plan.entry_groups == 2 and not plan.uniform


@pytest.mark.parametrize(
    "plan",
    [
        Plan.layer(6, 6, 2),
        Plan.layer(6, 6, 2, bottleneck=True, windowed=False, subgroups=2),
        Plan.stage(4, 2, 2, entry_channels=3, extension=4, bottleneck=False, tail=Tail(8, 3, 2, 4)),
        Plan.stage(4, 2, 1, extension=4, tail=Tail(8, 3, 2, 4, repeats=2)),
    ],
    ids=["layer", "dense-bottleneck", "entry", "repeats"],
)
def test_text_form_comes_back(plan: Plan) -> None:
    assert decode(encode(plan)) == plan


def test_picture_shows_windows_outputs_and_shortcuts() -> None:
    rows = str(Plan.stage(4, 2, 1)).splitlines()
    assert rows[2:] == ["   0  ==#", "   1  .==#", "   2  +.==#", "   3  .+.==#"]
    dense = str(Plan.layer(4, 4, 2, windowed=False)).splitlines()
    assert dense[2:] == ["   0  ==#", "   1  ===#"]
    assert "more groups" in str(Plan.stage(512, 64, 5))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((8, 100, 8), {}, r"out_channels \(100\) must be a multiple of group_width \(8\)"),
        ((8, 8, 8), {"bottleneck": True, "subgroups": 3}, r"group_width \(8\) must be a multiple of subgroups \(3\)"),
        ((8, 8, 8), {"subgroups": 2}, "bottleneck=True"),
        ((8, 8, 0), {}, r"group_width \(0\)"),
        ((0, 8, 8), {}, r"in_channels \(0\)"),
        ((8, 0, 8), {}, r"out_channels \(0\)"),
    ],
)
def test_widths_that_do_not_fit(arguments: tuple[int, int, int], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.layer(*arguments, **options)
