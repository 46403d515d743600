"""Export a network as ONNX with a dynamic batch, and run it with ONNX Runtime.

Needs pip install 'seqconv-triton[onnx]'; says so and stops where that is missing.
"""

import importlib.util
import tempfile
from pathlib import Path

import torch

import seqconv_triton as sct


def main() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}; pip install 'seqconv-triton[onnx]'")
        return
    import onnxruntime

    torch.manual_seed(0)
    model = sct.fuse(sct.CifarSeqResNet(group_width=16, widen=1).eval())
    batch = torch.export.Dim("batch", min=1, max=64)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        example = (torch.randn(2, 3, 32, 32),)
        torch.onnx.export(model, example, file, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        images = torch.randn(5, 3, 32, 32)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.inference_mode():
        difference = (model(images) - torch.from_numpy(logits)).abs().max().item()
    print(f"ONNX Runtime, 5 images: largest difference of a logit {difference:.1e}")
    assert difference < 1e-4


if __name__ == "__main__":
    main()
