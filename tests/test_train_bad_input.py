"""What users get wrong, as a table: one clear line on standard error, an exit status, no traceback, nothing lost."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from runs import TINY, run_recipe, tiny

pytest.importorskip("sklearn", reason="the digits")

from recipes import files
from recipes.training import checkpoint, data, train
from recipes.training.data import Batch, DigitsSource
from recipes.training.trainer import Trainer


def has_torchvision() -> bool:
    try:
        import torchvision
    except (ImportError, RuntimeError):
        return False
    return bool(torchvision.__version__)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and with files that are no checkpoints."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("trained")
    train(tiny(folder / "run", train_images=20, epochs=1))
    whole = (folder / "run" / "last.pt").read_bytes()
    (folder / "half.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").touch()
    (folder / "text.pt").write_text("not a checkpoint\n")
    (folder / "hello.pt").write_text("hello, no checkpoint either\n")
    torch.save({"state_dict": {}, "best_acc1": 1.0}, folder / "foreign.pt")
    (folder / "stub.pt").write_bytes(whole[: len(whole) // 100])
    state = checkpoint.load(folder / "run" / "last.pt")
    checkpoint.save(state | {"preprocess": {}}, folder / "no-preprocess.pt")
    checkpoint.save(state | {"arch": {"name": "cifar_custom"}}, folder / "no-options.pt")
    checkpoint.save(state | {"model": 3}, folder / "no-weights.pt")
    torch.save(Path("an object"), folder / "object.pt")
    torch.save({"model": {}, "arch": {}, "epoch": 1, "seed": 0}, folder / "ablation.pt")
    checkpoint.save(state | {"version": 2}, folder / "newer.pt")
    checkpoint.save({name: value for name, value in state.items() if name != "classes"}, folder / "lacks.pt")
    checkpoint.save(state | {"classes": ["cat", "dog"]}, folder / "two-names.pt")
    other = {"group_width": 8, "widen": 1, "num_classes": 10, "in_chans": 1}
    checkpoint.save(state | {"arch": {"name": "cifar_custom", "options": other}}, folder / "other-model.pt")
    five = state["arch"]["options"] | {"num_classes": 5}
    weights = {name: value[:5] if name.startswith("classifier") else value for name, value in state["model"].items()}
    changes = {"arch": {"name": "cifar_custom", "options": five}, "classes": list("abcde"), "model": weights}
    checkpoint.save(state | changes, folder / "five.pt")
    for name, content in (("half-run", whole[:1000]), ("empty-run", b"")):
        (folder / name).mkdir()
        (folder / name / "last.pt").write_bytes(content)
    Image.new("L", (8, 8), 200).save(folder / "good.png")
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("not an image")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:50])
    (folder / "a-file").touch()
    return folder


NO_TORCHVISION = pytest.mark.skipif(has_torchvision(), reason="torchvision works here")
BEST, TO = "{0}/run/best.pt", "{tmp}/written"
PREDICT = ["predict", BEST, "--sheet", TO]
# id: arguments ({0}: the folder above, {tmp}: an empty one), exit status, what the line says
ROWS = {
    "data-without-root": (["train", "--data=cifar10"], 2, "data cifar10 needs a root"),
    "root-for-digits": (["train", "--root={0}"], 2, "takes no root"),
    "root-is-not-there": (["train", "--data=imagefolder", "--root={0}/no"], 2, "no/train/CLASS"),
    "unknown-model": (["train", "--model=seqresnet_b24"], 2, "did you mean .*seqresnet_b22"),
    "unknown-option": ([*TINY, "--model-options", "widht=3"], 2, "cifar_custom takes group_width, widen"),
    "option-without-value": ([*TINY, "--model-options", "widen"], 2, "'widen' must be name=value"),
    "options-without-model": (["train", "--model-options", "widen=1"], 2, "need a model"),
    "no-epochs": ([*TINY, "--epochs=0"], 2, r"epochs \(0\) must be at least 1"),
    "negative-rate": ([*TINY, "--learning-rate=-1"], 2, "learning_rate .* above 0"),
    "late-milestone": ([*TINY, "--milestones", "1", "9"], 2, r"milestones \(9\)"),
    "accumulates-too-much": ([*TINY, "--accumulate=21"], 2, r"accumulate \(21\)"),
    "too-many-images": ([*TINY, "--train-images=5000"], 2, r"train_images \(5000\)"),
    "image-size-of-digits": ([*TINY, "--image-size=32"], 2, "image_size is for imagefolder"),
    "output-is-a-file": ([*TINY, "--output={0}/a-file"], 2, r"output \(.*a-file\) is a file, not a folder"),
    "output-holds-a-run": ([*TINY, "--output={0}/run"], 2, "holds a run already.*--resume"),
    "resume-other-settings": (
        [*TINY, "--output={0}/run", "--resume", "--learning-rate=0.3"],
        2, "other settings: epochs: 1 → 2; learning_rate: 0.1 → 0.3; train_images: 20 → 100.*another --output",
    ),
    "resume-half-written": ([*TINY, "--output={0}/half-run", "--resume"], 2, "damaged or was only half written"),
    "resume-empty": ([*TINY, "--output={0}/empty-run", "--resume"], 2, r"is empty \(0 bytes\)"),
    "diverges": ([*TINY, "--learning-rate=1e30"], 1, r"loss is (nan|inf) in step \d of epoch 1.*nothing was saved yet"),
    "diverges-in-the-last-step": (
        [*TINY, "--batch-size=100", "--learning-rate=1e30"], 1,
        "validation loss is (nan|inf) after step 1 of epoch 1.*nothing was saved yet",
    ),
    "checkpoint-missing": (["evaluate", "{0}/no.pt"], 2, "there is no checkpoint .*no.pt"),
    "checkpoint-is-a-folder": (["evaluate", "{0}/run"], 2, "is a folder.*best.pt"),
    "checkpoint-empty": (["evaluate", "{0}/empty.pt"], 2, r"is empty \(0 bytes\)"),
    "checkpoint-half": (["evaluate", "{0}/half.pt"], 2, "damaged or was only half written"),
    "checkpoint-text": (["evaluate", "{0}/text.pt"], 2, "text.pt is no PyTorch file"),
    "checkpoint-greeting": (["evaluate", "{0}/hello.pt"], 2, "hello.pt is .*or is no PyTorch file$"),
    "checkpoint-foreign": (["evaluate", "{0}/foreign.pt"], 2, "holds the keys state_dict, best_acc1"),
    "checkpoint-with-objects": (["evaluate", "{0}/object.pt"], 2, "holds other objects than tensors"),
    "checkpoint-newer": (["evaluate", "{0}/newer.pt"], 2, "has version 2"),
    "checkpoint-incomplete": (["evaluate", "{0}/lacks.pt"], 2, "lacks classes"),
    "checkpoint-of-another-model": (["evaluate", "{0}/other-model.pt"], 2, "weights are another model's"),
    "names-and-model-differ": (["predict", "{0}/two-names.pt", "{0}/good.png"], 2, "2 classes, and a model of 10"),
    "classes-of-other-data": (["evaluate", "{0}/five.pt"], 2, "checkpoint has 5 classes, the data 10"),
    "evaluate-no-batch": (["evaluate", BEST, "--batch-size=0"], 2, r"--batch-size \(0\)"),
    "image-missing-strict": ([*PREDICT, "{0}/no.png", "--strict"], 2, "there is no image .*no.png"),
    "image-text-strict": ([*PREDICT, "{0}/text.png", "--strict"], 2, "text.png is no image that pillow knows"),
    "image-cut-strict": ([*PREDICT, "{0}/cut.png", "--strict"], 2, "cut.png does not decode"),
    "image-empty-strict": ([*PREDICT, "{0}/empty.png", "--strict"], 2, r"empty.png is empty \(0 bytes\)"),
    "image-is-a-folder-strict": ([*PREDICT, "{0}", "--strict"], 2, "is a folder, not an image"),
    "unknown-device": (["evaluate", BEST, "--device=gpu"], 2, r"device \(gpu\): PyTorch .* cannot use it here"),
    "predict-device-not-here": ([*PREDICT, "{0}/good.png", "--device=cuda:99"], 2, r"device \(cuda:99\): there "),
    "train-device-not-here": ([*TINY, "--device=xpu:99"], 2, r"device \(xpu:99\)"),
    "demo-device-not-here": (["demo", "--device=cuda:99", "--output", TO], 2, r"device \(cuda:99\): there "),
    "ablation-device-not-here": (["ablation", "--device=cuda:99", "--output", TO], 2, r"device \(cuda:99\): there "),
    "checkpoint-stub": (["evaluate", "{0}/stub.pt"], 2, "stub.pt is damaged or was only half written"),
    "checkpoint-no-preprocess": (["predict", "{0}/no-preprocess.pt", "{0}/good.png"], 2, "no whole checkpoint.*mean"),
    "checkpoint-no-options": (["evaluate", "{0}/no-options.pt"], 2, "no-options.pt is no whole checkpoint.*options"),
    "checkpoint-no-weights": (["evaluate", "{0}/no-weights.pt"], 2, "no-weights.pt is no whole checkpoint"),
    "checkpoint-of-the-ablation": (["predict", "{0}/ablation.pt", "{0}/good.png"], 2, "`ablation` are for `heatmap`"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "status", "says"), ROWS.values(), ids=ROWS)
def test_bad_input(
    arguments: list[str], status: int, says: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.format(trained, tmp=tmp_path) for argument in arguments]
    if filled[0] == "train":
        filled += ["--quiet"] + ([] if any(a.startswith("--output") for a in filled) else ["--output", str(tmp_path)])
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert run_recipe(filled) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    assert re.search(says, error), error
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.rglob("*.pt")) and not (tmp_path / "written").exists()


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(FileNotFoundError):
        run_recipe(["evaluate", "--debug", "no.pt"])


@NO_TORCHVISION
def test_missing_torchvision_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_recipe(["train", "--data=cifar10", "--root", str(tmp_path), "--output", str(tmp_path / "run")]) == 2
    assert "pip install seqconv-triton[train]" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="TensorBoard is installed")
def test_missing_tensorboard_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_recipe([*TINY, "--tensorboard", "--output", str(tmp_path), "--quiet"]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err


def test_unreadable_images_are_skipped_and_counted(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [str(trained / name) for name in ("good.png", "text.png", "empty.png", "no.png", "cut.png")]
    sheet = tmp_path / "sheet.png"
    assert run_recipe(["predict", str(trained / "run" / "best.pt"), *images, "--sheet", str(sheet)]) == 1
    out, err = capsys.readouterr()
    assert "good.png: " in out and sheet.exists()
    assert [line.split(":")[0] for line in err.splitlines()] == ["skipped"] * 4 + ["4 of 5 images skipped"]


class Damaged(DigitsSource):
    """The digits, with images on a disk that do not decode; more of them in the second epoch."""

    def train_batches(self, epoch: int, pieces: Iterable[Sequence[int]]) -> Iterator[Batch]:
        self.unreadable += ["a.png (empty)"] if epoch == 1 else [f"{i}.png (cut)" for i in range(25)]
        return super().train_batches(epoch, pieces)

    def val_batches(self, pieces: Iterable[Sequence[int]]) -> Iterator[Batch]:
        self.unreadable += [] if "v.png (empty)" in self.unreadable else ["v.png (empty)"]
        return super().val_batches(pieces)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_training_names_all_that_it_skipped_at_its_end(
    epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is a success all the same; the epochs on the way name some of what is new."""
    monkeypatch.setattr(data, "DigitsSource", Damaged)
    command = [*TINY, "--train-images=20", f"--epochs={epochs}", "--output", str(tmp_path), "--quiet"]
    assert run_recipe(command) == 0
    first, second = ["a.png (empty)", "v.png (empty)"], [f"{i}.png (cut)" for i in range(25)]
    expected = []
    if epochs > 1:
        expected += [f"skipped, does not decode: {line}" for line in first]
        expected += ["so far 2 images that do not decode were skipped"]
    if epochs > 2:
        expected += [f"skipped, does not decode: {line}" for line in second[:20]]
        expected += ["… and 5 more", "so far 27 images that do not decode were skipped"]
    names = first + (second if epochs > 1 else [])
    expected += [f"warning: {len(names)} images that do not decode were skipped:", *(f"  {line}" for line in names)]
    assert capsys.readouterr().err.splitlines() == expected
    assert run_recipe(["evaluate", str(tmp_path / "last.pt"), "--device=cpu"]) == 1
    assert capsys.readouterr().err == "warning: 1 image that does not decode was skipped:\n  v.png (empty)\n"


def fail_write(name: str, after: int) -> Callable[[Path, object], None]:
    """files.write on a disk that is full when `name` is written for the `after`th time."""
    write, count = files.write, 0

    def full(path: Path, content: bytes) -> None:
        nonlocal count
        count += path.name == name
        if path.name == name and count >= after:
            fsync = os.fsync

            def no_space(descriptor: int) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            os.fsync = no_space
            try:
                return write(path, content)
            finally:
                os.fsync = fsync
        return write(path, content)

    return full


@pytest.mark.parametrize("name", ["log.csv", "best.pt", "last.pt"])
def test_full_disk_keeps_the_last_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first epoch's checkpoint stays, the run says so, and goes on from it once there is room."""
    arguments = [*TINY, "--output", str(tmp_path), "--quiet", "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(files, "write", fail_write(name, {"log.csv": 3}.get(name, 2)))
        if name == "best.pt":
            patch.setattr("recipes.training.run.evaluate", improving())
        assert run_recipe(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No space left on device" in error and "last.pt is kept" in error and name in error
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best.pt", "last.pt", "log.csv"]
    assert run_recipe(arguments) == 0
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 2


def improving() -> Callable[..., object]:
    """An evaluation that finds every epoch better than the one before."""
    from recipes.training.evaluation import Evaluation

    errors = iter((50.0, 40.0, 30.0))
    return lambda *arguments: Evaluation(360, 1.0, next(errors), None)


def test_divergence_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, calls = Trainer.step, []

    def step_then_nan(self: Trainer, pieces: object, count: int) -> torch.Tensor:
        calls.append(count)
        return step(self, pieces, count) * (float("nan") if len(calls) == 8 else 1)

    monkeypatch.setattr(Trainer, "step", step_then_nan)
    assert run_recipe([*TINY, "--output", str(tmp_path), "--quiet", "--checkpoint-steps=1"]) == 1
    assert "loss is nan in step 3 of epoch 2: training has diverged; " in capsys.readouterr().err
    state = checkpoint.load(tmp_path / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 2)
    assert all(value.isfinite().all() for value in state["model"].values())


def test_checkpoint_of_other_classes_is_not_resumed(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    checkpoint.save(state | {"classes": ["cat", *state["classes"][1:]]}, tmp_path / "run" / "last.pt")
    with pytest.raises(ValueError, match="'cat' there, '0' here"):
        train(tiny(tmp_path / "run", train_images=20, epochs=1, resume=True))
