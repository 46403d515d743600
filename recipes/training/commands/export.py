"""`python -m seqconv_triton export`: a checkpoint's model for use elsewhere, checked by running it, written whole."""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes.training import checkpoint, trained
from seqconv_triton.models.fuse import fuse
from seqconv_triton.optional import require

TOLERANCE = 1e-4  # of the largest logit: folding BN rounds differently
META = "seqconv_triton.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="best.pt or last.pt of a run")
    parser.add_argument("file", type=Path, metavar="FILE", help="what to write")
    parser.add_argument("--to", choices=tuple(FORMATS), required=True,
                        help="state: the weights, for load_state_dict; onnx and pt2 (torch.export): the network, "
                             "BN folded, for any batch")  # fmt: skip


def run_from_arguments(arguments: argparse.Namespace) -> int:
    """Exit status 0."""
    one = trained.load(arguments.checkpoint)
    content = FORMATS[arguments.to](one)
    checkpoint.write(arguments.file, content)
    print(f"{arguments.file}: {one.arch['name']}, {len(one.classes)} classes, {len(content):,} bytes")
    return 0


def to_state(one: trained.Trained) -> bytes:
    """torch.save of the state dict."""
    buffer = io.BytesIO()
    torch.save(one.model.state_dict(), buffer)
    return buffer.getvalue()


def to_pt2(one: trained.Trained) -> bytes:
    """torch.export of the folded network; `torch.export.load` needs nothing of this package."""
    buffer = io.BytesIO()
    images = _images(one, 2)
    program = torch.export.export(fuse(one.model), (images,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    torch.export.save(program, buffer, extra_files={META: json.dumps(meaning(one))})
    buffer.seek(0)
    _check(one, torch.export.load(buffer).module())
    return buffer.getvalue()


def to_onnx(one: trained.Trained) -> bytes:
    """ONNX of the folded network, in one file. Raises ImportError without the packages of the extra `onnx`."""
    require("ONNX", "onnx", "onnx", "onnxruntime", "onnxscript")
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        dims = {"x": {0: torch.export.Dim("batch")}}
        program = torch.onnx.export(
            fuse(one.model), (_images(one, 2),), dynamic_shapes=dims, dynamo=True, verbose=False,
            input_names=["images"], output_names=["logits"],
        )  # fmt: skip
        assert program is not None
        program.model.metadata_props[META] = json.dumps(meaning(one))
        program.save(file, external_data=False)
        content = file.read_bytes()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    _check(one, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]))
    return content


FORMATS = {"state": to_state, "onnx": to_onnx, "pt2": to_pt2}


def meaning(one: trained.Trained) -> dict[str, Any]:
    """What goes along in pt2 and ONNX files: how images are prepared, and the classes' names."""
    return {"preprocess": one.preprocess.to_dict(), "classes": list(one.classes)}


def _images(one: trained.Trained, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    size = one.preprocess.image_size
    return torch.randn(count, one.preprocess.channels, size, size, generator=generator)


def _check(one: trained.Trained, exported: nn.Module | Callable[[Tensor], Tensor]) -> None:
    """Raises ValueError where the exported network does not answer as the trained one, for batches of 1 and 3."""
    with torch.no_grad():
        for count in (1, 3):
            images = _images(one, count)
            expected = one.model(images)
            distance = ((exported(images) - expected).abs().max() / expected.abs().max()).item()
            if not distance <= TOLERANCE:
                raise ValueError(f"the exported network's logits are off by {distance:.1e} of the largest: not written")
