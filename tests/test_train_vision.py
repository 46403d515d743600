"""CIFAR archives and ImageFolder trees, made here in their real formats, through torchvision's loaders."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import OPTIONS, run_recipe

try:
    import torchvision
except RuntimeError as error:  # torchvision beside a torch that it was not built for
    pytest.skip(f"torchvision does not work here: {error}", allow_module_level=True)
except ImportError:
    pytest.skip("torchvision is not installed", allow_module_level=True)
pytest.importorskip("PIL", reason="pillow")

from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

from recipes.training import Config, checkpoint, train
from recipes.training.images import Preprocess
from recipes.training.trainer import Trainer
from recipes.training.vision import Lighting, open_source, training_transform

MODEL = [
    *("--model=cifar_custom", "--model-options", *(f"{name}={value}" for name, value in OPTIONS.items())),
    *("--batch-size=16", "--epochs=1", "--device=cpu", "--workers=1", "--quiet"),
]


def add(archive: tarfile.TarFile, name: str, content: bytes) -> str:
    """A file in the archive; returns its MD5 sum."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def cifar(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """An archive of few images; torchvision is told its checksums, so that it goes on checking."""
    name = request.param
    generator = np.random.default_rng(0)
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    root = tmp_path / "data"
    root.mkdir()
    with tarfile.open(root / kind.filename, "w:gz") as archive:
        lists = {"train_list": [], "test_list": []}
        for part, rows in lists.items():
            for file, _ in getattr(kind, part):
                labels = generator.integers(0, 10, 8).tolist()
                values = {"data": generator.integers(0, 256, (8, 3072), dtype=np.uint8)}
                values["labels" if name == "cifar10" else "fine_labels"] = labels
                rows.append([file, add(archive, f"{kind.base_folder}/{file}", pickle.dumps(values))])
            monkeypatch.setattr(kind, part, rows)
        key = kind.meta["key"]
        names = {key: [f"class {i}" for i in range(10 if name == "cifar10" else 100)]}
        checksum = add(archive, f"{kind.base_folder}/{kind.meta['filename']}", pickle.dumps(names))
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": checksum})
    return name, root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """train/ and val/ of three classes, JPEG and PNG, of different sizes; one training image is grey."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(("ant", "bee", "cat")):
            folder = tmp_path / "tree" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                side = 40 + 3 * i
                pixels = generator.integers(0, 60, (side, 44, 3)) + 60 * label
                image = Image.fromarray(pixels.astype(np.uint8)).convert("L" if i == 1 else "RGB")
                image.save(folder / f"{i}.{'jpg' if i % 2 else 'png'}")
    return tmp_path / "tree"


@pytest.mark.parametrize("cifar", ["cifar10", "cifar100"], indirect=True)
def test_cifar_archive_trains(cifar: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the archive alone: unpacked, checked, trained on, evaluated."""
    name, root = cifar
    run = tmp_path / "run"
    assert run_recipe(["train", f"--data={name}", "--root", str(root), "--output", str(run), *MODEL]) == 0
    state = checkpoint.load(run / "last.pt")
    assert state["classes"] == [f"class {i}" for i in range(10 if name == "cifar10" else 100)]
    assert not list(root.glob(".cifar*"))
    assert run_recipe(["evaluate", str(run / "last.pt"), "--root", str(root), "--device=cpu", "--workers=0"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("8 images") and f"error {state['log'][0]['val_error']:.2f} %" in said


@pytest.mark.parametrize("cifar", ["cifar10"], indirect=True)
def test_damaged_cifar_is_named(cifar: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, root = cifar
    arguments = ["train", f"--data={name}", "--root", str(root), "--output", str(tmp_path / "run"), *MODEL]
    archive = root / "cifar-10-python.tar.gz"
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2])
    assert run_recipe(arguments) == 2
    assert "does not unpack" in capsys.readouterr().err
    assert [path.name for path in root.iterdir()] == [archive.name]
    archive.write_bytes(content)
    assert run_recipe(arguments) == 0
    capsys.readouterr()
    (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"")
    assert run_recipe([*arguments[:-1], "--resume"]) == 2
    error = capsys.readouterr().err
    assert "incomplete or damaged" in error and error.count("\n") == 1


@pytest.mark.parametrize("data", ["cifar10", "imagefolder"])
def test_absent_data_show_the_layout(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    assert run_recipe(["train", f"--data={data}", "--root", str(tmp_path), "--output", run, *MODEL]) == 2
    error = capsys.readouterr().err
    expected = {"cifar10": "cifar-10-python.tar.gz", "imagefolder": f"{tmp_path}/train/CLASS/*.jpg"}[data]
    assert expected in error and error.count("\n") == 1


def test_image_folder_trains(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One epoch at 32²; then the same command finds other classes in the tree, and says so."""
    (tree / "train" / "bee" / "3.jpg").write_bytes(b"")
    (tree / "val" / "cat" / "0.png").write_bytes((tree / "val" / "cat" / "0.png").read_bytes()[:200])
    run = tmp_path / "run"
    arguments = ["train", "--data=imagefolder", "--root", str(tree), "--image-size=32", "--output", str(run), *MODEL]
    assert run_recipe(arguments) == 0
    error = capsys.readouterr().err
    assert (
        "bee/3.jpg" in error and "cat/0.png" in error and "warning: 2 images that do not decode were skipped" in error
    )
    state = checkpoint.load(run / "last.pt")
    assert state["classes"] == ["ant", "bee", "cat"] and state["preprocess"]["resize"] == 37
    assert run_recipe(["evaluate", str(run / "best.pt"), "--root", str(tree), "--device=cpu", "--workers=0"]) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith("8 images") and "warning: 1 image that does not decode was skipped" in shown.err
    assert run_recipe([*arguments[:-1], "--resume", "--strict"]) == 0  # finished: nothing is read
    assert run_recipe([*arguments, "--strict", "--output", str(tmp_path / "strict")]) == 2
    assert "an image does not decode" in capsys.readouterr().err
    for part in ("train", "val"):
        (tree / part / "cat").rename(tree / part / "dog")
    assert run_recipe(["evaluate", str(run / "best.pt"), "--root", str(tree), "--device=cpu"]) == 2
    assert "'cat' there, 'dog' here" in capsys.readouterr().err
    (tree / "val" / "dog").rename(tree / "val" / "eel")
    assert run_recipe([*arguments, "--output", str(tmp_path / "other")]) == 2
    assert "have different classes: dog, eel" in capsys.readouterr().err


def test_workers_and_resuming_change_no_bit(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through torchvision's own random transforms: 0 and 2 workers, and a run cut off after its second step."""
    torch.set_num_threads(1)

    def config(name: str, **settings: object) -> Config:
        return Config(
            "imagefolder", tree, "cifar_custom", OPTIONS, tmp_path / name, image_size=16, batch_size=8, epochs=1,
            device="cpu", quiet=True, **settings,
        )  # fmt: skip

    train(config("none", workers=0))
    step, calls = Trainer.step, []

    def step_until_cut_off(self: Trainer, pieces: object, count: int) -> torch.Tensor:
        calls.append(count)
        if len(calls) == 3:
            raise OSError("cut off")
        return step(self, pieces, count)

    monkeypatch.setattr(Trainer, "step", step_until_cut_off)
    with pytest.raises(OSError, match="cut off"):
        train(config("two", workers=2, checkpoint_steps=2))
    assert checkpoint.load(tmp_path / "two" / "last.pt")["step"] == 2
    train(config("two", workers=2, resume=True))
    weights = [checkpoint.load(tmp_path / name / "last.pt")["model"] for name in ("none", "two")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("size", [(50, 70), (71, 40), (20, 23), (37, 37)], ids=["tall", "wide", "small", "as-it-is"])
def test_preprocess_is_torchvision_s(size: tuple[int, int]) -> None:
    """Bit for bit: Resize, CenterCrop, Normalize of a pillow image."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    ours = Preprocess(3, 32, 37, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    theirs = v2.Compose([
        v2.Resize(37), v2.CenterCrop(32), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(ours.mean, ours.std),
    ])  # fmt: skip
    image = Image.fromarray(pixels)
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("photographs", [False, True], ids=["cifar", "imagenet"])
def test_training_transform(photographs: bool) -> None:
    """The right size and scale; another draw gives another image."""
    prepare = Preprocess(3, 32, 32, (0.5,) * 3, (0.25,) * 3)
    transform = training_transform(prepare, photographs=photographs)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40 if photographs else 32, 32, 3), np.uint8))
    torch.manual_seed(0)
    draws = [transform(image) for _ in range(3)]
    assert {tuple(draw.shape) for draw in draws} == {(3, 32, 32)}
    assert not torch.equal(draws[0], draws[1])
    assert all(draw.min() > -4 and draw.max() < 4 for draw in draws)
    names = str(transform)
    for part in ("RandomResizedCrop", "ColorJitter", "Lighting") if photographs else ("RandomCrop",):
        assert part in names
    assert "RandomHorizontalFlip" in names


def test_lighting_has_the_covariance_of_its_components() -> None:
    torch.manual_seed(0)
    lighting = Lighting(0.1)
    shifts = torch.stack([lighting(torch.zeros(3, 1, 1)).flatten() for _ in range(4000)]).double()
    vectors, values = (torch.tensor(one, dtype=torch.float64) for one in (Lighting.VECTORS, Lighting.VALUES))
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3, dtype=torch.float64), atol=1e-3, rtol=0)
    expected = vectors @ torch.diag((0.1 * values) ** 2) @ vectors.T
    torch.testing.assert_close(torch.cov(shifts.T), expected, rtol=0.1, atol=1e-6)


def test_subset_of_the_training_images(tree: Path) -> None:
    sources = [open_source(Config("imagefolder", tree, train_images=n, workers=0), None, pinned=False) for n in (5, 24)]
    assert [source.train_images for source in sources] == [5, 24]
    with pytest.raises(ValueError, match=r"train_images \(25\) must be at most 24"):
        open_source(Config("imagefolder", tree, train_images=25, workers=0), None, pinned=False)
    assert torchvision.__version__
