"""evaluate, predict and the export of a checkpoint: what they say agrees with the run, what they write works."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from runs import OPTIONS, run_recipe, tiny
from torch import Tensor

pytest.importorskip("sklearn", reason="the digits")

import seqconv_triton as sct
from recipes.training import checkpoint, train, trained
from recipes.training.images import decode

pytestmark = pytest.mark.xdist_group("commands")  # one worker: they share a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny(tmp_path_factory.mktemp("run"), ema=0.5, epochs=3, train_images=200)
    train(config)
    return config.output


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    from recipes.training import digits

    test = digits.load().test
    return test.images[:6], test.labels[:6]


def test_evaluate_agrees_with_the_log(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = checkpoint.load(run / "last.pt")
    assert run_recipe(["evaluate", str(run / "last.pt"), "--device=cpu", "--batch-size=100"]) == 0
    said = capsys.readouterr().out
    match = re.fullmatch(r"360 images: error ([\d.]+) %, top-5 error ([\d.]+) %, cross-entropy ([\d.]+) nats\n", said)
    assert match, said
    error, top5, loss = map(float, match.groups())
    assert error == pytest.approx(state["log"][-1]["val_error"], abs=0.006)
    assert loss == pytest.approx(state["log"][-1]["val_loss"], abs=6e-5)
    assert top5 < error


def test_predict_sees_files_as_evaluation_sees_the_data(
    run: Path, digits: tuple[Tensor, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Digits written as black ink on white paper, 8-bit, give the probabilities of the data set's own."""
    from PIL import Image

    one = trained.load(run / "best.pt")
    images = (255 * (1 - digits[0])).round().to(torch.uint8)
    files = []
    for i, image in enumerate(images):
        files.append(tmp_path / f"digit {i}.png")
        Image.fromarray(image[0].numpy()).save(files[-1])
    prepared = torch.stack([one.preprocess(decode(file)) for file in files])
    torch.testing.assert_close(prepared, one.preprocess.normalize(1 - images / 255))
    with torch.no_grad():
        probabilities = one.model(prepared).softmax(1)
    sheet = tmp_path / "new" / "sheet.png"
    assert run_recipe(["predict", str(run / "best.pt"), *map(str, files), "--sheet", str(sheet)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for file, line, row in zip(files, lines[:-1], probabilities, strict=True):
        values, indices = row.topk(5)
        expected = [f"{i} {100 * value:.1f} %" for i, value in zip(indices.tolist(), values.tolist(), strict=True)]
        assert line == f"{file}: {', '.join(expected)}"
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_averaged_weights_are_the_ones_used(run: Path) -> None:
    state, one = checkpoint.load(run / "last.pt"), trained.load(run / "last.pt")
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, state["ema"][name])
    assert not torch.equal(state["ema"]["classifier.weight"], state["model"]["classifier.weight"])


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    """Beside the checkpoint: what examples/export_checkpoint.py has written."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the onnx extra")
    script = Path(__file__).parent.parent / "examples" / "export_checkpoint.py"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", [script.name, str(run / "best.pt")])
        runpy.run_path(str(script), run_name="__main__")
    assert "BN folded: largest difference" in out.getvalue()
    return run


def test_exported_weights(exported: Path) -> None:
    model = sct.CifarSeqResNet(**OPTIONS, num_classes=10, in_chans=1)
    model.load_state_dict(torch.load(exported / "best.pth", weights_only=True))


def test_exported_pt2(exported: Path) -> None:
    meaning = {"seqconv_triton.json": ""}
    program = torch.export.load(exported / "best.pt2", extra_files=meaning)
    one, network = trained.load(exported / "best.pt"), program.module()
    for batch in (1, 5):
        x = torch.randn(batch, 1, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(network(x), one.model(x), rtol=1e-4, atol=1e-4)
    assert json.loads(meaning["seqconv_triton.json"])["classes"] == [str(digit) for digit in range(10)]


def test_exported_onnx(exported: Path) -> None:
    import onnx
    import onnxruntime

    file = exported / "best.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    one = trained.load(exported / "best.pt")
    for batch in (1, 4):
        x = torch.randn(batch, 1, 8, 8)
        (logits,) = session.run(["logits"], {"images": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), one.model(x), rtol=1e-4, atol=1e-4)
    (meta,) = onnx.load(file).metadata_props
    assert json.loads(meta.value)["preprocess"]["image_size"] == 8
    assert not list(exported.glob("*.data")), "the weights are in the file"


@pytest.mark.parametrize(
    "settings",
    [{"amp": "bf16"}, {"amp": "fp16"}, {"channels_last": True}, {"deterministic": True}, {"sync_bn": True}],
    ids=lambda settings: next(iter(settings)) + str(next(iter(settings.values()))),
)
def test_speed_settings_train(settings: dict[str, object], tmp_path: Path) -> None:
    """Each trains on the tiny run as plain float32 does: the loss of the first epoch within 10 %."""
    plain = train(tiny(tmp_path / "plain", epochs=1))
    other = train(tiny(tmp_path / "other", epochs=1, **settings))
    losses = [checkpoint.load(run.output / "last.pt")["log"][0]["train_loss"] for run in (plain, other)]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_compiled_training(tmp_path: Path) -> None:
    """--compile: the same figures within rounding, and a checkpoint under the same names."""
    settings = dict(epochs=1, model_options={"group_width": 4, "widen": 1, "dropout": 0})
    plain, compiled = (train(tiny(tmp_path / f"{on}", compile=on, **settings)) for on in (False, True))
    states = [checkpoint.load(run.output / "last.pt") for run in (plain, compiled)]
    assert states[0]["model"].keys() == states[1]["model"].keys()
    assert states[1]["log"][0]["train_loss"] == pytest.approx(states[0]["log"][0]["train_loss"], rel=1e-3)


def test_tensorboard(tmp_path: Path) -> None:
    name = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(name, reason="an optional package")
    train(tiny(tmp_path, tensorboard=True))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("val/error")] == [1, 2]
