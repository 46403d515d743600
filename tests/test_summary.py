"""The paper's exact figures, the command line, and what an import costs."""

from __future__ import annotations

import re
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from torch import Tensor

import seqconv_triton as sct
from seqconv_triton.cli import main
from seqconv_triton.tools.arguments import images_of
from seqconv_triton.tools.info import kept_for_backward, summarize

# parameters (exact), multiply-adds in G at the paper's image size, the paper's GFLOPs
FIGURES = {
    "seqresnet_b22": (11_859_656, 2.8827, "2.73"),
    "seqresnet_b42": (25_642_696, 5.6444, "5.33"),
    "seqresnext_24": (26_211_784, 4.5440, "4.32"),
    "cifar_seqresnet_r4_k8": (1_233_370, None, None),
    "cifar_seqresnet_r10_k8": (7_575_514, None, None),
    "cifar_seqresnet_b_r7_k16": (843_834, None, None),
    "cifar_seqresnet_b_r20_k32": (6_024_794, None, None),
    "cifar_seqresnet_dense_r3_k8_n121": (1_229_658, None, None),
    "cifar_seqresnet_r4_k16": (1_254_106, None, None),
    "cifar_seqresnet_r3_k16_n122": (1_256_154, None, None),
}


def test_every_registered_model_has_its_figure() -> None:
    assert set(FIGURES) == set(sct.list_models())


@pytest.mark.parametrize("name", FIGURES)
def test_figures_equal_the_papers(name: str) -> None:
    parameters, multiply_adds, gflops = FIGURES[name]
    summary = summarize(name)
    assert summary.parameters == parameters
    assert sum(row.parameters for row in summary.rows) == parameters
    if multiply_adds is not None:
        assert round(summary.multiply_adds / 1e9, 4) == multiply_adds
        assert f"{summary.paper_gflops:.2f}" == gflops


def test_b42_is_packed_and_keeps_little() -> None:
    summary = summarize("seqresnet_b42")
    assert summary.parameter_tensors < 70
    assert summary.kept_bytes <= 68 * 2**20
    assert 255 * 2**20 < summary.kept_bytes_reference < 275 * 2**20


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_memory_on_meta_is_memory_for_real(backend: str) -> None:
    """The saved tensors of a real training step, added up here by their addresses."""
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    model = sct.CifarSeqResNet(8, 1, bottleneck=True, dropout=0.0)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with sct.use_backend(backend):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(x)
        real = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own) // 2
        meta = kept_for_backward(sct.CifarSeqResNet(8, 1, bottleneck=True, dropout=0.0, device="meta"), 32)
    assert out.requires_grad
    assert abs(real - meta) <= 0.01 * real


def test_info_prints_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "seqresnet_b22", "--windows"]) == 0
    text = capsys.readouterr().out
    assert "11,859,656 in 43 tensors" in text and "2.73" in text and "====#" in text
    assert main(["info", "cifar_seqresnet_r4_k8", "--image-size", "16"]) == 0
    assert capsys.readouterr().out.startswith("cifar_seqresnet_r4_k8 at 16×16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "seqresnet_b43"], "did you mean seqresnet_b42"),
        (["info", "seqresnet_b22", "--image-size", "0"], "image_size (0) must be at least 1"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    with pytest.raises(ValueError, match=r"must be|unknown"):
        main(["--debug", *arguments])


def test_kernels_says_when_it_cannot_compile(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux only")
    assert main(["kernels", "seqresnet_b22"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.parametrize(("batch", "size", "said"), [(0, None, "--batch (0)"), (1, 0, "--image-size (0)")])
def test_images_that_commands_measure_with(batch: int, size: int | None, said: str) -> None:
    for name, side in (("seqresnet_b22", 224), ("cifar_seqresnet_r4_k8", 32)):
        model = sct.create_model(name, device="meta")
        assert images_of(Namespace(batch=2, image_size=None), model) == (2, 3, side, side)
        assert images_of(Namespace(batch=2, image_size=64), model) == (2, 3, 64, 64)
        with pytest.raises(ValueError, match=re.escape(f"{said} must be at least 1")):
            images_of(Namespace(batch=batch, image_size=size), model)


IMPORT = """
import sys, torch
before = set(sys.modules)
import seqconv_triton
new = set(sys.modules) - before
print(torch.cuda.is_initialized(), *sorted(m for m in new if m.split(".")[0] in
      {"triton", "matplotlib", "sklearn", "tqdm", "scipy", "timm", "torchvision", "recipes", "bench"}))
"""


def test_import_is_light() -> None:
    """No Triton, no GPU, no extras."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
