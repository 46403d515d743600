"""Published checkpoints: both ways bit for bit, and everything that can be wrong with a file."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import torch
from helpers import error, randomise
from torch import Tensor, nn

import seqconv_triton as sct

ORACLES = {
    "seqresnet_b22": oracle.seqresnet_b22,
    "seqresnet_b42": oracle.seqresnet_b42,
    "seqresnext_24": oracle.seqresnext_24,
    "cifar_seqresnet_r4_k8": oracle.seqresnet_r4_k8,
    "cifar_seqresnet_r10_k8": oracle.seqresnet_r10_k8,
    "cifar_seqresnet_b_r7_k16": oracle.seqresnet_b_r7_k16,
    "cifar_seqresnet_b_r20_k32": oracle.seqresnet_b_r20_k32,
    "cifar_seqresnet_dense_r3_k8_n121": oracle.ablation_dense_r3_k8,
    "cifar_seqresnet_r4_k16": oracle.ablation_r4_k16,
    "cifar_seqresnet_r3_k16_n122": oracle.ablation_r3_k16,
}
SMALL = "cifar_seqresnet_b_r7_k16"


def counted(model: nn.Module, batches: int = 7) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked.fill_(batches)
    return model


@pytest.mark.parametrize("name", ORACLES)
def test_round_trips_are_bit_equal(name: str) -> None:
    """Names and shapes are those of the oracle, which was written from the paper's description alone."""
    published = {
        key: value.clone() for key, value in counted(oracle.randomise(ORACLES[name](), 3)).state_dict().items()
    }
    model = sct.load_published(sct.create_model(name), published)
    back = sct.export_published(model)
    assert back.keys() == published.keys()
    assert all(torch.equal(back[key], value) for key, value in published.items())
    again = sct.load_published(sct.create_model(name), back)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize("repeat", [False, True])
def test_extension_quirk_of_the_published_seqresnext(repeat: bool) -> None:
    """repeat_extension computes what the published code does with the same weights."""
    theirs = oracle.randomise(oracle.seqresnext_24(repeat_extension=repeat), 3, 0.1).double().eval()
    mine = sct.SeqResNeXt24(repeat_extension=repeat, dtype=torch.float64).eval()
    sct.load_published(mine, theirs.state_dict())
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert error(mine(x), theirs(x)) < 1e-8
        other = sct.SeqResNeXt24(repeat_extension=not repeat, dtype=torch.float64).eval()
        assert error(sct.load_published(other, theirs.state_dict())(x), theirs(x)) > 1e-3


def wrapped(state: dict[str, Tensor]) -> dict[str, object]:
    prefixed = {f"module.{key}": value for key, value in state.items()}
    return {"epoch": 99, "best_acc1": 77.9, "state_dict": prefixed, "optimizer": {"lr": 0.1}}


def test_file_with_prefix_and_wrapping(tmp_path: Path) -> None:
    state = sct.export_published(randomise(sct.create_model(SMALL)))
    torch.save(wrapped(state), tmp_path / "model.pth")
    for source in (tmp_path / "model.pth", str(tmp_path / "model.pth"), (tmp_path / "model.pth").open("rb")):
        loaded = sct.export_published(sct.load_published(sct.create_model(SMALL), source))
        assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_counters_may_be_missing() -> None:
    state = sct.export_published(randomise(sct.create_model(SMALL)))
    old = {key: value for key, value in state.items() if "num_batches" not in key}
    sct.load_published(sct.create_model(SMALL), old)


def refused(source: object, message: str) -> str:
    """Loading fails with this message, and changes nothing."""
    model = randomise(sct.create_model(SMALL))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        sct.load_published(model, source)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return str(caught.value)


def test_every_bad_entry_is_listed_and_nothing_is_loaded() -> None:
    state: dict[str, object] = dict(sct.export_published(randomise(sct.create_model(SMALL))))
    del state["Blender.LinearLayer.weight"]
    del state["Head.Filters.0.BottleneckLayer.LinearLayer.weight"]
    state["Stage9.weight"] = torch.zeros(1)
    state["Classifier.weight"] = torch.zeros(100, 336)
    state["Classifier.bias"] = "ten"
    text = refused(state, "nothing was loaded")
    for part in ("missing: Blender", "missing: Head.Filters.0", "unknown: Stage9", "[100, 336]", "bias is str"):
        assert part in text


def test_differing_counters_are_refused() -> None:
    state = sct.export_published(sct.create_model(SMALL))
    state["Stage1.0.LayerA.Filters.0.BottleneckLayer.BatchNormalizationLayer.num_batches_tracked"] += 1
    refused(state, "counters that differ")


def test_a_long_list_is_cut() -> None:
    assert "more" in refused({}, "missing")


def as_code(path: Path) -> bytes:
    class Code:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return (Path.touch, (path,))

    return pickle.dumps(Code())


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pth"
    torch.save(wrapped(sct.export_published(sct.create_model(SMALL))), whole)
    trap = tmp_path / "trap"
    bad = {
        "truncated": whole.read_bytes()[:100_000],
        "empty": b"",
        "text": b"<html>not found</html>",
        "accounts": b"root:x:0:0:root:/root:/bin/bash\n",  # the unpickler fails on it with an IndexError
        "code": as_code(trap),
    }
    for name, content in bad.items():
        file = tmp_path / f"{name}.pth"
        file.write_bytes(content)
        with file.open("rb") as opened:
            for source in (file, str(file), opened):
                text = refused(source, f"^{re.escape(str(file))} (is|holds) ")
                assert "weights_only" not in text, "PyTorch's advice to run the file's code is not passed on"
    assert not trap.exists()
    torch.save([1, 2], tmp_path / "list.pth")
    refused(tmp_path / "list.pth", f"^{re.escape(str(tmp_path / 'list.pth'))} holds a list")
    with pytest.raises(FileNotFoundError):
        sct.load_published(sct.create_model(SMALL), tmp_path / "none.pth")


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="source must be a path, an open file or a state dict, not NoneType"):
        sct.load_published(sct.create_model(SMALL), None)
    with pytest.raises(TypeError, match="not Linear"):
        sct.load_published(nn.Linear(1, 1), {})
    with pytest.raises(TypeError, match="not Linear"):
        sct.export_published(nn.Linear(1, 1))
