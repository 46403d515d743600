"""Every measured figure in README is what a results file says; the goals, tables and plots made of such files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from result_rows import contents, row

from bench import compilation, document, floors, goals, halves, tables
from bench.plot_kernels import slope

# A figure that somebody measured: a time, a size, a rate, a ratio.
FIGURE = re.compile(r"\d[\d,.]*\s?(ms|µs|s\b|seconds|minutes|MiB|GiB|MB|GB|×(?!\d)|%|images/s|times as fast)")
NOT_MEASURED = {"22.06 %", "23.67 %", "21.92 %"}  # the paper's


@pytest.mark.parametrize("name", document.DOCUMENTS)
def test_measured_parts_are_what_the_results_say(name: str) -> None:
    """`python -m bench document` writes them."""
    text = (document.ROOT / name).read_text()
    assert document.PART.search(text)
    assert document.rewritten(text) == text


def test_readme_has_no_measured_figure_elsewhere() -> None:
    text = document.PART.sub("", (document.ROOT / "README.md").read_text())
    found = {match.group(0) for match in FIGURE.finditer(text)}
    assert found <= NOT_MEASURED


def test_a_touched_figure_is_noticed() -> None:
    text = (document.ROOT / "README.md").read_text()
    part = document.PART.search(text)
    assert part is not None
    number = re.search(r"\d+ ms", part.group(0))
    assert number is not None
    touched = text.replace(number.group(0), "1 ms")
    assert touched != text and document.rewritten(touched) == text


def test_goals_without_a_measurement() -> None:
    for source, count in (({"gpu": "a GPU"}, 14), ({}, 8)):
        lines = goals.goals(contents() | {"provenance": source}).splitlines()[1:]
        assert len(lines) == count and all(line.endswith("not measured") for line in lines)


def test_goals_reached_and_missed() -> None:
    b42 = "seqresnet_b42"
    text = goals.goals(
        contents(
            row(b42, "eval", 256, "ours eager", 0.02),
            row(b42, "eval", 256, "ours compiled", 0.01),
            row(b42, "eval", 256, "resnet50 compiled", 0.012),
            row(b42, "eval", 256, "reference compiled", 0.03),
            row(b42, "step", 256, "ours eager", 0.1, peak_bytes=9),
            row(b42, "step", 256, "resnet50 compiled", 0.1, peak_bytes=10),
            row(b42, "eval", 1, "ours graph", 0.0015),
        )
    )
    found = {line[:78].strip(): line[78:].split() for line in text.splitlines()}
    name = f"{b42}, evaluation, batch 256, against "
    assert found[name + "resnet50 compiled"] == ["≥", "1", "×", "1.20", "×", "reached"]
    assert found[name + "reference compiled"] == ["≥", "4", "×", "3.00", "×", "missed"]
    assert found[f"{b42}, latency, batch 1, CUDA graph"][-3:] == ["1.50", "ms", "missed"]
    assert found[f"{b42}, training step, batch 256, peak memory over resnet50's"][-2:] == ["0.90", "reached"]


def test_goals_of_a_cpu() -> None:
    rows = [
        row("seqresnet_b42", "step", 4, f"{who} eager", seconds) | {"dtype": "float32"}
        for who, seconds in (("ours", 1.0), ("reference", 1.5))
    ]
    text = goals.goals(contents(*rows) | {"provenance": {}})
    (line,) = [
        line
        for line in text.splitlines()
        if line.startswith("seqresnet_b42, training step, batch 4, against reference eager")
    ]
    assert line.split()[-6:] == ["≥", "1.3", "×", "1.50", "×", "reached"]


def test_goals_on_two_processors() -> None:
    """Each under its own name, and what only one of them was asked for."""
    b42, float32 = "seqresnet_b42", {"dtype": "float32"}
    one, other = (
        contents(
            row(b42, "eval", 8, "ours eager", ours) | float32,
            row(b42, "eval", 8, "reference eager", 1.5) | float32,
        )
        | {"provenance": {"processor": processor, "date": "today"}}
        for processor, ours in (("Intel(R) Xeon(R) Processor", 1.0), ("AMD EPYC", 0.75))
    )
    head, _, *found = tables.goals_table(one, other).splitlines()
    assert head == "| goal | wanted | Intel Xeon, today | AMD EPYC, today |"
    assert found[0].split(" | ")[1:] == ["≥ 1.6 ×", "1.50 ×, **missed**", "2.00 ×, reached |"]
    assert found[2].split(" | ")[2:] == ["not measured", "not measured |"]
    assert "| goal | wanted | found |" in tables.goals_table(one)
    half = [row(b42, "eval", 8, f"{who} eager", 0.5) for who in ("ours", "reference")]
    cells = [line.split(" | ")[2:] for line in tables.goals_table(one | {"rows": half}, other).splitlines()[2:]]
    assert ["1.00 ×, reached", "not measured |"] in cells and ["not measured", "2.00 ×, reached |"] in cells


def test_a_table_has_one_run_of_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make bench` on the machine of a file laid aside takes that file's place."""
    monkeypatch.setattr(document, "FOLDER", tmp_path)
    assert document.runs_of("cpu") == []
    for name, model in (("cpu", "family 1"), ("cpu-on-a", "family 1"), ("cpu-on-b", "family 2")):
        source = {"processor": "AMD EPYC", "processor_model": model, "date": name}
        (tmp_path / f"{name}.json").write_text(json.dumps({"format": 2, "provenance": source, "rows": []}))
    assert [run["provenance"]["date"] for run in document.runs_of("cpu")] == ["cpu", "cpu-on-b"]
    assert tables.machine(document.runs_of("cpu")[1]) == "AMD EPYC (family 2)"


def test_a_gpu_run_changes_what_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in document.FOLDER.glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    monkeypatch.setattr(document, "FOLDER", tmp_path)
    assert (
        "No GPU has run" in document.status()
        and "evaluation, 256 images, bfloat16, not measured" in document.measured()
    )
    rows = [
        row("seqresnet_b42", "eval", 256, f"{who} compiled", 0.01 * i) for i, who in ((1, "ours"), (2, "reference"))
    ]
    found = contents(*rows)
    (tmp_path / "gpu.json").write_text(json.dumps(found))
    assert "one a GPU (today)" in document.status()
    lines = [line for line in document.measured().splitlines() if "256 images" in line]
    assert lines[0] == "| a GPU, evaluation, 256 images, bfloat16 | compiled 20 ms | compiled **10 ms** |"
    assert len(lines) == 2 and "H200, training step, 256 images, bfloat16, not measured" in lines[1]


def test_failures_are_told() -> None:
    wrong = row("m", "eval", 8, "ours eager", 1.0, wrong="off by 1")
    assert document.failures(contents(row("m", "eval", 8, "ours eager", 1.0))) == ""
    assert "ours eager — wrong: off by 1" in document.failures(contents(wrong))


def test_goals_of_bfloat16_on_a_cpu() -> None:
    b42 = "seqresnet_b42"
    found = contents(
        row(b42, "eval", 8, "ours eager", 0.3) | {"dtype": "float32"},
        row(b42, "eval", 8, "ours eager", 0.15),
        row(b42, "eval", 8, "reference eager", 0.12),
        row(b42, "eval", 8, "resnet50 eager", 0.1, version="timm 1"),
        row(b42, "eval", 8, "resnet50 eager", 0.25, version="timm 1") | {"dtype": "float32"},
    ) | {"provenance": {}}
    assert [line.split()[-6:] for line in goals.goals(found).splitlines()[1:]] == [
        ["≥", "1.5", "×", "2.00", "×", "reached"],
        ["≥", "1", "×", "0.80", "×", "missed"],
    ]
    assert halves.markdown(found).splitlines()[2:] == [
        "| evaluation | 8 | **seqresnet_b42, ours** | 300 ms | 150 ms | 2.00 × as fast |",
        "| evaluation | 8 | resnet50 | 250 ms | 100 ms | 2.50 × as fast |",
    ]


def test_floors_and_rooflines() -> None:
    times = {"bytes_seconds": 0.002, "operations_seconds": 0.001, "roofline_seconds": 0.002}
    ours = times | {"network": "m", "mode": "eval", "launches": 1234, "issue_seconds": 0.001, "floor_seconds": 0.003}
    found = {
        "architecture": "sm_90", "batch": 2, "image": 224,
        "provenance": {"triton": "3", "date": "today", "revision": "r"},
        "rows": [
            ours | {"dtype": "float32", "floor_seconds": 0.004}, ours | {"dtype": "bfloat16"},
            times | {"network": "resnet50", "mode": "train", "dtype": "bfloat16"},
        ],
    }  # fmt: skip
    assert floors.markdown(found).splitlines()[2:5] == [
        "| m, evaluation, float32 as TF32 | 1,234 | 2.0 | 1.0 | 1.0 | **4.0** | 2.00 |",
        "| m, evaluation, bfloat16 | 1,234 | 2.0 | 1.0 | 1.0 | **3.0** | 1.50 |",
        "| resnet50, training step, bfloat16 | | 2.0 | 1.0 | | 2.0 | |",
    ]
    assert [floors.seconds(found, *key) for key in (("m", "eval"), ("resnet50", "train"))] == [0.003, 0.002]


def test_compile_times_have_owners() -> None:
    """What no share names is Inductor's own."""
    shares = {"tracing": 2.0, "autograd": 1.0, "C++": 4.0}
    rows = [
        {"network": "m", "seconds": 10.0, "shares": shares, "compilations": 1},
        {"network": "resnet50", "version": "timm 1", "seconds": 25.0, "shares": shares, "compilations": 2},
    ]
    source = {"processor": "a CPU", "vectors": "AVX2", "torch": "2", "date": "today", "revision": "r"}
    text = compilation.markdown({"rows": rows, "batches": [2, 3], "provenance": source})
    assert text.splitlines()[2:4] == [
        "| **m** | 10.0 | 2.0 | 1.0 | 3.0 | 4.0 | 1 |",
        "| resnet50, timm 1 | 25.0 | 2.0 | 1.0 | 18.0 | 4.0 | 2 |",
    ]
    assert "0.40 of ResNet-50's time (goal: a third, and one compilation for all batches; **missed**)" in text


def test_losses_are_listed() -> None:
    text = tables.losses(
        contents(
            row("m", "eval", 8, "ours eager", 0.2, peak_bytes=100),
            row("m", "eval", 8, "reference eager", 0.3, peak_bytes=50),
            row("m", "eval", 8, "resnet50 compiled", 0.1, peak_bytes=200, version="timm 1"),
        )
    )
    assert "m, eval, batch 8: resnet50 compiled is 2.00 times as fast as ours" in text
    assert "m, eval, batch 8: reference eager needs 50.0% less memory" in text
    assert len([line for line in text.splitlines() if line.startswith("- ")]) == 2


def test_memory_is_compared_like_with_like() -> None:
    """Our eager form needs less than theirs; our fused one, which keeps a second copy of the weights, more."""
    forms = [row("m", "eval", 1, f"{who} {how}", 0.1, peak_bytes=size) for who, how, size in (
        ("ours", "eager", 100), ("reference", "eager", 110), ("ours", "fused", 200), ("reference", "fused", 150),
        ("reference", "compiled", 90),
    )]  # fmt: skip
    assert tables.loss_lines(contents(*forms)) == [
        "- m, eval, batch 1: reference fused needs 25.0% less memory",
        "- m, eval, batch 1: reference compiled needs 10.0% less memory",
    ]


def test_peers_stand_beside_us_with_their_versions() -> None:
    b42 = "seqresnet_b42"
    found = contents(
        row(b42, "eval", 8, "ours eager", 0.2, peak_bytes=2**24),
        row(b42, "eval", 8, "resnet50 compiled", 0.1, version="timm 1"),
        row(b42, "eval", 8, "reference eager", 0.3),
        row(b42, "eval", 1, "ours eager", 0.1),
        row(b42, "forward", 8, "ours eager", 0.1),
        row(b42, "forward", 8, "resnet50 compiled", 0.1, version="timm 1"),
        row("small", "step", 8, "ours eager", 0.4),
        row("small", "step", 8, "resnet50 compiled", 0.8, version="timm 1"),
    )
    assert tables.peers_table(found).splitlines()[2:] == [
        "| resnet50, timm 1, compiled | eval | 8 | 100 ms | 80 |  | 24.01 % |",
        "| **seqresnet_b42, ours, eager** | eval | 8 | 200 ms | 40 | 16 MiB | 22.06 % |",
        "| seqresnet_b42, reference, eager | eval | 8 | 300 ms | 26.7 |  | 22.06 % |",
        "| **small, ours, eager** | step | 8 | 400 ms | 20 |  |  |",
        "| resnet50, timm 1, compiled | step | 8 | 800 ms | 10 |  | 24.01 % |",
    ]
    forms = [row(b42, "eval", 8, f"ours {how}", 0.1 * i) for i, how in ((2, "fused"), (1, "eager"))]
    short = tables.peers_table(contents(*forms, *found["rows"][1:2]), best_only=True).splitlines()[2:]
    assert [line.split(" | ")[0] for line in short] == [
        "| **seqresnet_b42, ours, eager**",
        "| resnet50, timm 1, compiled",
    ]
    assert tables.peers_table(contents(row(b42, "eval", 1, "ours eager", 0.1))) == ""


def test_peers_are_compared_with_rows_of_their_own_case() -> None:
    """Only what ran in turns: the machine's speed drifts between two cases."""
    found = contents(
        row("m", "step", 4, "ours compiled", 0.4, case=3),
        row("m", "step", 4, "resnet50 compiled", 0.3, case=3, version="timm 1"),
        row("m", "step", 4, "ours eager", 0.2, case=5),
        row("m", "step", 4, "reference eager", 0.1, case=5),
    )
    names = [line.split(" | ")[0] for line in tables.peers_table(found).splitlines()[2:]]
    assert names == ["| resnet50, timm 1, compiled", "| **m, ours, compiled**"]
    lost = tables.losses(found)
    assert "resnet50 compiled is 1.33 times as fast" in lost and "reference eager is 2.00 times as fast" in lost


def test_bold_is_who_wins() -> None:
    rows = {
        "ours eager": row("m", "eval", 8, "ours eager", 0.2),
        "reference eager": row("m", "eval", 8, "reference eager", 0.3),
        "reference compiled": row("m", "eval", 8, "reference compiled", 0.1, compile_seconds=9.6, caches="cold"),
    }
    assert tables.times(rows, "ours", "reference") == "200 ms"
    assert tables.times(rows, "reference", "ours") == "300 ms; compiled **100 ms** after 10 s"


def test_growth_exponents() -> None:
    assert slope([(1, 2.0), (2, 4.0), (4, 8.0)]) == pytest.approx(1)
    assert slope([(1, 1.0), (2, 4.0), (4, 16.0)]) == pytest.approx(2)


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra")
    from bench.plots import PICTURES, draw

    b42, more = "seqresnet_b42", {"peak_bytes": 2**25, "operations": 1e9, "moved_bytes": 1e7}
    rows = [row(b42, part, b, "ours eager", 0.01 * b, **more) for part in ("eval", "step") for b in (1, 8)]
    rows += [row(b42, "eval", 8, "resnet50 compiled", 0.1, version="timm 1")]
    rows += [row(f"{kind} {n}", "eval", 1, "ours eager", n) for kind in ("depth", "width") for n in (1, 2, 4)]
    drawn = draw(contents(*rows), tmp_path)
    assert [path.stem for path in drawn] == sorted([*PICTURES, "roofline"])
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert draw(contents(), tmp_path / "nothing") == []


def test_results_in_the_repository_are_readable() -> None:
    from bench.results import load

    for path in (document.FOLDER / "cpu.json", document.FOLDER / "gpu.json"):
        if path.exists():
            assert load(path)["rows"]
            assert json.loads(path.read_text())["provenance"]["revision"]


def test_caption_says_whose_the_processes_were() -> None:
    source = {"threads": 2, "processor": "a CPU", "vectors": "AVX2", "torch": "2", "date": "today", "revision": "r"}
    assert "processes" not in document.caption({"provenance": source})
    text = document.caption({"provenance": source | {"processes": "own"}})
    assert "each contender in processes of its own" in text.replace("\n", " ")
