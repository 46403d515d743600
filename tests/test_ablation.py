"""The ablation: sizes, the table's arithmetic by hand, resuming, and data that are not there."""

from __future__ import annotations

import dataclasses
import json
import sys
import tarfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import run_recipe

pytest.importorskip("sklearn", reason="the demo's extra")
pytest.importorskip("tqdm", reason="the demo's extra")

from recipes.ablation import comparison, data, runs
from recipes.ablation.report import as_json, markdown, rows
from recipes.ablation.runs import Result
from recipes.ablation.settings import CONTESTANTS, SETTINGS, Setting, budget
from recipes.figures.networks import load_network
from recipes.training.baseline import count_parameters

SEQRESNETS = [key for key, one in CONTESTANTS.items() if one.options is not None]
BASELINES = [key for key, one in CONTESTANTS.items() if one.options is None]
QUICK = dataclasses.replace(SETTINGS["digits"], epochs=1, stem_channels=4)
TWO = ["wide-resnet", "windowed-r4-k16"]


def test_sizes_are_the_papers() -> None:
    """On CIFAR the exact counts of Table 5's networks."""
    counts = [count_parameters(CONTESTANTS[key].build(SETTINGS["cifar10"])) for key in SEQRESNETS]
    assert counts == [1_233_370, 1_229_658, 1_254_106, 1_256_154]


def test_small_networks_keep_the_papers_groups() -> None:
    for key in SEQRESNETS:
        large, small = (CONTESTANTS[key].build(SETTINGS[name]) for name in ("cifar10", "digits"))
        for one, other in zip(large.stages, small.stages, strict=True):
            assert len(one.plan.groups) == len(other.plan.groups)
            assert one.plan.in_channels == 2 * other.plan.in_channels


@pytest.mark.parametrize("data_name", SETTINGS)
@pytest.mark.parametrize("key", [*BASELINES, *SEQRESNETS])
def test_budgets_are_equal(key: str, data_name: str) -> None:
    """Within 2 %, and every network gives logits for its images."""
    setting = SETTINGS[data_name]
    model = CONTESTANTS[key].build(setting).eval()
    assert abs(count_parameters(model) / budget(setting) - 1) < 0.02
    with torch.inference_mode():
        assert model(torch.randn(2, setting.in_chans, 8, 8)).shape == (2, 10)


def result(key: str, seed: int, error: float) -> Result:
    setting = dataclasses.replace(SETTINGS["digits"], epochs=2)
    return Result(key, seed, setting.as_dict(), 300_000, 360, 1437, [99.0, error], [1.0, 0.1], "2.11")


FIRST = {0: 3.0, 1: 4.0, 2: 5.0}
TABLE = [
    *(result("windowed-r4-k8", seed, error) for seed, error in FIRST.items()),
    *(result("resnet", seed, error + extra) for (seed, error), extra in zip(FIRST.items(), (1, 2, 3), strict=True)),
    *(result("densenet", seed, error - extra) for (seed, error), extra in zip(FIRST.items(), (1, 1, 1.3), strict=True)),
    result("wide-resnet", 1, 2.0),
]


def test_arithmetic_of_the_table() -> None:
    """Against figures worked out by hand: t for two degrees of freedom is 4.30265."""
    first, resnet, densenet, wide = rows(TABLE)
    assert (first.mean, first.spread, first.difference) == (4.0, 1.0, None)
    assert (resnet.mean, resnet.spread, resnet.difference) == (6.0, 2.0, 2.0)
    assert resnet.half_width == pytest.approx(4.30265 / 3**0.5, rel=1e-5)  # differences 1, 2, 3: deviation 1
    assert not resnet.told_apart
    assert densenet.difference == pytest.approx(-1.1)
    assert densenet.half_width == pytest.approx(4.30265 * 0.03**0.5 / 3**0.5, rel=1e-5)
    assert densenet.told_apart
    assert (wide.mean, wide.spread, wide.difference) == (2.0, None, None)  # one seed shows no spread


def test_pages_say_what_the_numbers_allow() -> None:
    setting = dataclasses.replace(SETTINGS["digits"], epochs=2)
    page = markdown(TABLE, setting, {"torch": "2.11", "date": "2026-01-02"})
    assert "| pre-activation ResNet | 300,000 | 6.00 ± 2.00 | +2.00 ± 2.48 | 4.62 (ResNet-1001, 10.2 M) |" in page
    assert "| wide ResNet | 300,000 | 2.00 |  | 4.17 (WRN-28-10, 36.5 M) |" in page
    assert "whose interval excludes 0: DenseNet-BC (-1.10), of 2." in page
    assert "lowest mean error is that of wide ResNet (2.00), the highest that of pre-activation ResNet (6.00)" in page
    assert "Made with torch 2.11, date 2026-01-02." in page
    single = markdown([one for one in TABLE if one.seed == 0], setting, {})
    assert "nothing can be said about differences" in single
    alone = markdown([one for one in TABLE if one.key == "resnet"], setting, {})
    assert "6.00 ± 2.00" in alone and "interval excludes" not in alone and "nothing can be said" not in alone
    none = markdown([one for one in TABLE if one.key in ("windowed-r4-k8", "resnet")], setting, {})
    assert "whose interval excludes 0: none, of 1." in none
    figures = as_json(TABLE, setting, {"torch": "2.11"})
    assert figures["rows"][1]["difference"] == 2.0 and len(figures["runs"]) == len(TABLE)
    json.dumps(figures, allow_nan=False)


def test_committed_table_is_that_of_its_runs() -> None:
    folder = Path(__file__).parent.parent / "docs" / "results"
    figures = json.loads((folder / "ablation-digits.json").read_text(encoding="utf-8"))
    page = (folder / "ablation-digits.md").read_text(encoding="utf-8")
    assert figures["setting"] == SETTINGS["digits"].as_dict()
    assert [row["key"] for row in figures["rows"]] == list(CONTESTANTS)
    for row in figures["rows"]:
        last = [run["errors"][-1] for run in figures["runs"] if run["key"] == row["key"]]
        assert len(last) == 3 and row["mean_error"] == pytest.approx(sum(last) / 3, abs=1e-4)
        text = f"| {row['name']} | {row['parameters']:,} | {row['mean_error']:.2f} ± {row['standard_deviation']:.2f} |"
        assert text in page
        assert row["parameters"] == count_parameters(CONTESTANTS[row["key"]].build(SETTINGS["digits"]))


def compare(output: Path, **options: Any) -> str:
    return comparison.compare(QUICK, output, **({"seeds": 2, "networks": TWO, "device": "cpu"} | options))


def test_interrupted_comparison_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in its third run; the rerun trains the rest alone, and the table is that of an undisturbed comparison."""
    whole = compare(tmp_path / "whole")
    trained: list[tuple[str, int]] = []
    real = runs.run

    def stopping(contestant: Any, seed: int, *rest: Any) -> Result:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append((contestant.key, seed))
        return real(contestant, seed, *rest)

    monkeypatch.setattr(comparison, "run", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "table.md").exists()
    first = trained.copy()
    trained[:] = []
    again = compare(tmp_path / "stopped")
    assert len(first) == len(trained) == 2 and set(first) | set(trained) == {(k, s) for k in TWO for s in (0, 1)}
    assert "2 of 4 runs are finished already" in capsys.readouterr().out
    assert again.split("Made with")[0] == whole.split("Made with")[0]  # then versions and the date
    assert again == (tmp_path / "stopped" / "table.md").read_text(encoding="utf-8")
    trained[:] = [("", 0)] * 2  # any further run would stop
    assert compare(tmp_path / "stopped") == again
    figures = json.loads((tmp_path / "stopped" / "results.json").read_text())
    assert [one["key"] for one in figures["rows"]] == TWO[::-1]
    files = {file.name for file in (tmp_path / "stopped" / "runs").iterdir()}
    expected = {f"{key}-seed{seed}.json" for key in TWO for seed in (0, 1)}
    assert files == expected | {f"{TWO[1]}-seed{seed}.pt" for seed in (0, 1)}
    model = load_network(tmp_path / "stopped" / "runs" / f"{TWO[1]}-seed0.pt")
    assert [stage.plan.group_width for stage in model.stages] == [4, 4, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no result of this command"),
        ("[1]", "is no result of this command"),
        ('{"key": "x"}', "is no result of this command"),
        (dataclasses.asdict(result("wide-resnet", 0, 1.0)), "comes from another setting (stem_channels 8, now 4;"),
        (dataclasses.asdict(result("wide-resnet", 1, 1.0)), "it describes another run"),
    ],
    ids=["empty", "list", "foreign", "other-setting", "other-seed"],
)
def test_foreign_results_are_not_mixed_in(content: object, message: str, tmp_path: Path) -> None:
    file = tmp_path / "runs" / "wide-resnet-seed0.json"
    file.parent.mkdir()
    text = content if isinstance(content, str) else json.dumps(content)
    file.write_text(text)
    with pytest.raises(ValueError, match=r"wide-resnet-seed0\.json") as caught:
        compare(tmp_path, networks=["wide-resnet"])
    assert message in str(caught.value)
    assert file.read_text() == text


def test_digits_are_the_same_for_all_networks_and_new_for_every_seed() -> None:
    one, same, other = (data.load(QUICK, None, seed) for seed in (0, 0, 1))
    assert (one.train_images, len(one.test[1])) == (360, 1437)
    assert torch.equal(one.test[0], same.test[0]) and not torch.equal(one.test[0], other.test[0])
    for (images, labels), (again, _) in zip(one.epoch_batches(), same.epoch_batches(), strict=True):
        assert torch.equal(images, again) and len(labels) <= QUICK.batch_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--networks", "vgg"], "unknown network 'vgg'; allowed are windowed-r4-k8"),
        (["--seeds", "0"], "seeds (0) must be at least 1"),
        (["--epochs", "0"], "epochs (0) must be at least 1"),
        (["--root", "{tmp}"], "the digits data come with scikit-learn"),
        (["--data", "cifar10"], "must be named: --root DIR with cifar-10-python.tar.gz"),
        (["--data", "cifar10", "--root", "{tmp}"], "; cifar10 reads {tmp}/cifar-10-batches-py/ or "),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    assert run_recipe(["ablation", *arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert message.format(tmp=tmp_path) in error[-1] and not any("Traceback" in line for line in error)
    assert len(error) == 1 or "reads" in message, "a progress bar for what cannot run"
    assert not (tmp_path / "out").exists()


def test_diverged_training_is_an_error_that_names_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Setting, "recipe", property(lambda self: runs_recipe(self)))
    with pytest.raises(ValueError, match="wide-resnet, seed 0: the loss is"):
        compare(tmp_path, networks=["wide-resnet"])
    assert not list(tmp_path.rglob("*.json"))


def runs_recipe(setting: Setting) -> Any:
    from recipes.training.recipe import Recipe

    return Recipe(setting.epochs, setting.batch_size, learning_rate=1e30)


class FakeCifar:
    """What torchvision's CIFAR10 offers: `data` uint8 [N, 32, 32, 3] and `targets`."""

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert not download
        random = np.random.default_rng(int(train))
        self.data = random.integers(0, 256, (70 if train else 20, 32, 32, 3), dtype=np.uint8)
        self.targets = random.integers(0, 10, len(self.data)).tolist()


def test_torchvision_of_another_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing it raises RuntimeError."""

    def missing(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    module = types.ModuleType("torchvision.datasets")
    module.__getattr__ = missing
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(ImportError, match=r"needs torchvision.*nms does not exist"):
        data.load(SETTINGS["cifar10"], tmp_path, 0)


def test_cifar_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalised by the training images' channels; every image is a crop of its padded self, mirrored or not."""
    module = types.ModuleType("torchvision.datasets")
    module.CIFAR10 = FakeCifar
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(Path(__file__).parent / "conftest.py", "cifar-10-batches-py/data_batch_1")
    problem = data.load(SETTINGS["cifar10"], tmp_path, 0)
    assert [file.name for file in (tmp_path / "cifar-10-batches-py").iterdir()] == ["data_batch_1"]
    source = torch.from_numpy(FakeCifar("", True, False).data).permute(0, 3, 1, 2).double() / 255
    mean, std = source.mean((0, 2, 3)), source.std((0, 2, 3), correction=0)
    whole = (source - mean[:, None, None]) / std[:, None, None]
    batches = list(problem.epoch_batches())
    assert [len(labels) for _, labels in batches] == [64, 6] and problem.test[0].shape == (20, 3, 32, 32)
    padded = torch.nn.functional.pad(whole, (4, 4, 4, 4)).float()
    labels = torch.tensor(FakeCifar("", True, False).targets)
    found = []
    for image, label in zip(batches[0][0][:8], batches[0][1][:8], strict=True):
        candidates = (labels == label).nonzero().flatten()
        crops = padded[candidates].unfold(2, 32, 1).unfold(3, 32, 1)  # [n, 3, 9, 9, 32, 32]
        for flipped in (False, True):
            wanted = image.flip(2) if flipped else image
            near = (crops - wanted[None, :, None, None]).abs().amax((1, 4, 5)) < 1e-4
            found += [(int(candidates[i]), flipped) for i, _, _ in near.nonzero()]
    assert len(found) == len({i for i, _ in found}) == 8 and {flipped for _, flipped in found} == {False, True}
