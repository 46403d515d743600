"""The first page of results: runs side by side, and what is faster than ours."""

from __future__ import annotations

from result_rows import contents, row

from bench import document, halves, summary


def test_runs_stand_side_by_side() -> None:
    """One column a run, bold is the faster side, and what is faster is told once, over all runs."""
    b42, source = "seqresnet_b42", {"processor": "A chip", "date": "today"}
    runs = [
        contents(
            row(b42, "eval", 8, "ours eager", ours, peak_bytes=2**24),
            row(b42, "eval", 8, "reference eager", 0.2, peak_bytes=2**25),
            row(b42, "eval", 8, "resnet50 eager", 0.1, version="timm 1"),
            row(b42, "forward", 8, "resnet50 eager", 0.1, version="timm 1"),
        )
        | {"provenance": source}
        for ours in (0.15, 0.3)
    ]
    assert summary.networks(runs).splitlines()[2:] == [
        "| seqresnet_b42, evaluation | 8 | 200 → **150 ms** | **200** → 300 ms | 32 MiB → 16 MiB |  |"
    ]
    assert summary.faster(runs).splitlines() == [
        "Compared with the concatenating code and resnet50.",
        "",
        "- resnet50, evaluation, batch 8, bfloat16: 1.50 to 3.00 times as fast as seqresnet_b42",
        "- the concatenating code, evaluation, batch 8, bfloat16: 0.75 to 1.50 times as fast as seqresnet_b42",
    ]
    assert "- nothing is faster than ours" in summary.faster([contents(*runs[0]["rows"][:2]) | {"provenance": source}])
    found = [r | {"dtype": "float32"} for r in runs[0]["rows"]]
    assert "- A chip, today: seqresnet_b42, evaluation, batch 8 1.33 ×" in summary.again([runs[0] | {"rows": found}])
    assert summary.again(runs) == ""
    both = [runs[0] | {"rows": [*runs[0]["rows"], *(r | {"median": 2 * r["median"]} for r in found)]}]
    assert "| **seqresnet_b42, ours**, evaluation | 8 | 300 → 150 ms, 2.00 × |" in halves.side_by_side(both)


def test_what_was_executed_is_told_with_its_faults() -> None:
    group = {"launches": 2, "instructions": 1000, "races": 1, "misaligned": 0, "out of bounds": 0, "other errors": 0}
    read = {"kernels_read": 5, "races": 0, "misaligned": 0, "out of bounds": 0, "other errors": 0}
    found = {"groups": [group, group, read], "complaints": [], "finished": 3, "tasks": 3, "date": "today"}
    text = document.executed(found)
    assert "4 launches, 2,000 warp instructions, 2 races, " in text and "0 other errors (today). " in text
    text = document.executed(found | {"complaints": ["a"], "tasks": 5})
    assert "0 other errors, 1 complaints, 2 of 5 tasks not run (today)" in text
