"""The benchmarks: nothing wrong is timed, nothing is lost, every case of the tables can run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqconv_triton as sct
from bench import check, contenders, memory, peers, runner, subjects, timing
from bench.__main__ import main
from bench.cases import BLOCKS, GROUPS, KERNELS, LAYERS, MODELS, TABLES, Case
from bench.contenders import Contender
from bench.timing import Mark, unmarked

CPU = torch.device("cpu")
SMALL = Case("layer basic", False, 2, ("reference eager", "ours eager"), 2)
TRAINED = Case("layer basic", True, 2, ("reference eager", "ours eager"), 2)
PARTS = {False: {"eval"}, True: {"forward", "backward", "step"}}


def spoiled(name: str, change: Callable[[Tensor], Tensor]) -> contenders.Build:
    """Contenders as usual, but one result of ours is changed."""

    def build(label: str, case: Case, base: nn.Module, x: Tensor) -> Contender:
        contender = contenders.build(label, case, base, x)
        gather = contender.gather

        def changed() -> contenders.Found:
            found = check.joined(contender.results | gather())
            return {**found, name: change(found[name])}

        if label.startswith("ours"):
            contender.gather = changed
        return contender

    return build


@pytest.mark.parametrize(
    ("case", "name", "change"),
    [
        (SMALL, "output", lambda value: 1.01 * value),
        (SMALL, "output", lambda value: value.clone().index_fill_(0, torch.tensor([1]), math.nan)),
        (TRAINED, "output", lambda value: value + 0.01),
        (TRAINED, "gradients", lambda value: value.clone().mul_(1.01)),
        (TRAINED, "input gradient", lambda value: value.roll(1, 0)),
    ],
    ids=["one-percent", "nan-in-one-image", "shifted", "gradients", "other-image's-gradient"],
)
def test_a_wrong_result_prints_no_time(case: Case, name: str, change: Callable[[Tensor], Tensor]) -> None:
    rows = runner.run_case(case, CPU, None, spoiled(name, change))
    right = [row for row in rows if row["contender"] == "reference eager"]
    assert {row["part"] for row in right} == PARTS[case.training] and all(row["median"] > 0 for row in right)
    (wrong,) = [row for row in rows if row["contender"] == "ours eager"]
    assert name in wrong["wrong"] and "seconds" not in wrong and "median" not in wrong


def test_a_missing_result_is_wrong() -> None:
    with pytest.raises(check.Wrong, match="no gradients"):
        check.Expected({"gradients": torch.ones(1)}, {"gradients": 0.0}).check({}, "float32")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_half_precision_is_checked_sharply(training: bool) -> None:
    """Plain bfloat16 is off by a percent at most, gradients of a deep network included: so may others be, no more."""
    case = Case("depth 2", training, 2, ("ours eager",), dtype="bfloat16")
    base, shape = subjects.make(case.subject, case.image)
    x = subjects.random_input(shape, 2, CPU)
    expected = check.expected("reference", case, base, x)
    assert all(error < 0.02 for error in expected.own_error.values())
    contender = contenders.build("ours eager", case, base, x)
    before = [p.clone() for p in base.parameters()]
    found = check.results_of(contender, case)
    assert expected.check(found, "bfloat16") < 0.02
    with pytest.raises(check.Wrong):
        expected.check(found | {"output": found["output"] * 1.1}, "bfloat16")
    assert contender.module is not None  # its biases are as they were
    for got, own in zip(contender.module.parameters(), before, strict=True):
        torch.testing.assert_close(got.detach().float(), own, atol=0.02, rtol=0.02)


def test_the_check_never_goes_blind() -> None:
    noisy = check.Expected({"gradients": torch.ones(4)}, {"gradients": 3.0})
    with pytest.raises(check.Wrong, match=r"allowed: 5\.0e-01"):
        noisy.check({"gradients": torch.zeros(4)}, "bfloat16")


def test_large_training_batches_have_the_aten_backend_as_specification() -> None:
    case = Case("layer basic", True, 65, ())
    base, shape = subjects.make(case.subject, case.image)
    x = subjects.random_input(shape, 65, CPU)
    contender = contenders.build("reference eager", case, base, x)
    plain, exact = check.results_of(contender, case), check.exact_results("reference", case, base, x)
    assert plain.keys() == exact.keys()
    assert all(check.relative_error(exact[name], value) < 1e-5 for name, value in plain.items())


def test_one_failure_leaves_the_others_their_rows() -> None:
    def build(label: str, case: Case, base: nn.Module, x: Tensor) -> Contender:
        if label.startswith("ours"):
            raise torch.OutOfMemoryError("no memory\nsecond line")
        return contenders.build(label, case, base, x)

    rows = runner.run_case(SMALL, CPU, None, build)
    assert [(row["contender"], row.get("failed")) for row in rows] == [
        ("reference eager", None),
        ("ours eager", "OutOfMemoryError: no memory"),
    ]


@pytest.mark.parametrize("case", [SMALL, TRAINED], ids=["eval", "training"])
def test_rows_of_a_case(case: Case) -> None:
    rows = runner.run_case(case, CPU, None)
    assert len(rows) == 2 * len(PARTS[case.training])
    for row in rows:
        assert len(row["seconds"]) == case.rounds and row["lower"] <= row["median"] <= row["upper"]
        assert row["error"] < 1e-5
        assert ("peak_bytes" in row) == (row["part"] in ("eval", "step"))
        assert ("kept_bytes" in row) == (row["part"] == "step")


def test_peers_say_why_they_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    peers.package.cache_clear()
    case = Case("cifar_seqresnet_b_r7_k16", False, 1, ("resnet50 eager",), 1, 32)
    (row,) = runner.run_case(case, CPU, None)
    peers.package.cache_clear()
    assert "timm is not installed" in row["not_measured"] and "torchvision" in row["not_measured"]


def test_peers_are_checked_against_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

    monkeypatch.setattr(peers, "package", lambda: (make, "some package 1.0"))
    case = Case("cifar_seqresnet_b_r7_k16", True, 2, ("resnet50 eager",), 1, 32)
    rows = runner.run_case(case, CPU, None)
    assert {row["part"] for row in rows} == PARTS[True] and {row["version"] for row in rows} == {"some package 1.0"}


def test_kept_bytes_are_those_of_info() -> None:
    from seqconv_triton.tools.info import summarize

    name = "cifar_seqresnet_b_r7_k16"
    case = Case(name, True, 2, (), image=32)
    base, shape = subjects.make(name, 32)
    x = subjects.random_input(shape, 2, CPU)
    summary = summarize(name)
    for label, per_image in (("ours eager", summary.kept_bytes), ("reference eager", summary.kept_bytes_reference)):
        contender = contenders.build(label, case, base, x)
        kept, peak = memory.kept(contender), memory.peak(contender, CPU)
        # `info` counts no loss, whose few numbers are the classes' of every image, and dropout's masks.
        assert kept == pytest.approx(2 * per_image, rel=0.05), label
        assert peak > kept + memory.storage_bytes(base.parameters())


def test_peak_counts_what_is_freed_again() -> None:
    """A run that holds 4 MiB, frees it and then holds 1 MiB peaks at 4 MiB."""

    def run(_: Mark) -> None:
        first = torch.empty(2**20)
        del first
        torch.empty(2**18)

    assert memory.peak(Contender("ours eager", run), CPU) == 4 * 2**20


def test_interleaved_rounds_turn() -> None:
    order: list[str] = []

    def run(name: str) -> dict[str, float]:
        order.append(name)
        return {"eval": len(order)}

    found = timing.interleave({name: partial(run, name) for name in "abc"}, 2)
    assert order == list("abcbcacab")
    assert [found[name]["eval"].seconds for name in "abc"] == [[6, 8], [4, 9], [5, 7]]
    assert timing.parts({"forward": 1.0, "backward": 3.0, "step": 3.5}) == {
        "forward": 1.0,
        "backward": 2.0,
        "step": 3.5,
    }
    assert timing.Timing([4.0, 1.0, 2.0, 3.0, 5.0]).quartiles == (2.0, 4.0)


def test_who_fails_in_a_round_is_left_out() -> None:
    runs = {"a": lambda: {"eval": 1.0}, "b": lambda: {"eval": 1 / 0}}
    failed: dict[str, Exception] = {}
    found = timing.interleave(runs, 3, 1, failed.__setitem__)
    assert [*found] == ["a"] and len(found["a"]["eval"].seconds) == 3
    assert [*failed] == ["b"] and isinstance(failed["b"], ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        timing.interleave(runs, 3)


@pytest.mark.parametrize("table", TABLES)
def test_tables_name_what_exists(table: str) -> None:
    known = {*sct.list_models(), *LAYERS, *(f"depth {b}" for b in BLOCKS)}
    known |= {f"{kind} {g}" for g in GROUPS for kind in ("width", "dense width")}
    for case in TABLES[table]():
        subject = case.subject
        if subject.startswith("kernel "):
            family, subject = subject.removeprefix("kernel ").split(", ")
            assert family in KERNELS
        if " stage " in subject:
            assert subject.rpartition(" stage ")[0] in known and subject[-1] in "1234"
        else:
            assert subject in known
        for label in case.contenders:
            who, how = label.split()
            assert who in ("ours", "reference", "torch", *peers.PEERS)
            assert how in ("eager", "compiled", "max-autotune", "fused", "graph", "plain")
            assert case.dtype == "float32" or table in ("gpu", "cpu-bf16")


def test_tables_hold_what_they_promise() -> None:
    gpu_cases = {(case.subject, case.training, case.batch) for case in TABLES["gpu"]() if case.dtype == "bfloat16"}
    for model in MODELS:
        assert {(model, False, batch) for batch in (1, 8, 32, 256)} <= gpu_cases
        assert {(model, True, batch) for batch in (64, 256)} <= gpu_cases
        assert {(f"{model} stage {i}", training, 256) for i in (1, 2, 3, 4) for training in PARTS} <= gpu_cases
    default = TABLES["cpu"]()
    slow = [case for case in default if case.subject == "seqresnet_b42" and "reference compiled" in case.contenders]
    assert slow == default[-1:], "B42's compiled reference compiles for minutes: last, so that it costs no other row"
    assert slow[0].minutes >= 3.5
    assert any("reference compiled" in case.contenders for case in default)


def rows_file(path: Path, **changes: Any) -> Path:
    row = {"subject": "a", "part": "eval", "batch": 8, "dtype": "float32", "contender": "ours eager", "case": 0}
    row |= {"seconds": [0.2, 0.1, 0.3], "median": 0.2}
    path.write_text(json.dumps({"format": 2, "provenance": {"torch": "1"}, "rows": [row], "notes": []} | changes))
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("{", "is no JSON"),
        ("[]", "is no results file"),
        ('{"rows": [], "provenance": {}}', "has format None, this program reads format 2"),
    ],
    ids=["missing", "half-written", "foreign", "old"],
)
def test_compare_refuses_other_files(
    text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = rows_file(tmp_path / "a.json"), tmp_path / "b.json"
    if text is not None:
        bad.write_text(text)
    assert main(["compare", str(good), str(bad)]) == 2
    error = capsys.readouterr().err
    assert said in error and str(bad) in error


def test_compare_prints_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = rows_file(tmp_path / "a.json")
    row = json.loads(first.read_text())["rows"][0]
    second = rows_file(
        tmp_path / "b.json", rows=[row | {"seconds": [0.05]}, row | {"part": "step"}], provenance={"torch": "2"}
    )
    assert main(["compare", str(first), str(second)]) == 0
    out = capsys.readouterr().out
    assert "4.00" in out and "torch: 1 | 2" in out and "1 rows in both; 0 only in A, 1 only in B" in out


def test_unknown_subjects_and_stages() -> None:
    with pytest.raises(ValueError, match="unknown subject 'resnet'"):
        subjects.make("resnet", 32)
    with pytest.raises(ValueError, match="has stages 1, 2, 3, 4, not 5"):
        subjects.make("seqresnet_b22 stage 5", 224)


def test_contenders_have_weights_of_their_own() -> None:
    base, shape = subjects.make("layer basic", 32)
    x = subjects.random_input(shape, 1, CPU)
    first, second = (contenders.build("ours eager", SMALL, base, x) for _ in range(2))
    assert first.module is not None and second.module is not None
    with torch.no_grad():
        next(first.module.parameters()).zero_()
    first.run(unmarked), second.run(unmarked)
    assert not torch.equal(first.results["output"], second.results["output"])
