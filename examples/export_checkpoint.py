"""Write what `python -m recipes.train` has trained as plain weights, as pt2 (torch.export) and as ONNX.

In the checkout: python -m examples.export_checkpoint out/train/best.pt. ONNX needs pip install '.[onnx]'.
"""

import json
import sys
from pathlib import Path

import torch

import seqconv_triton as sct
from recipes.training import trained


def main(checkpoint: Path) -> None:
    run = trained.load(checkpoint)  # in evaluation mode, with the averaged weights where the run had them
    torch.save(run.model.state_dict(), checkpoint.with_suffix(".pth"))

    images = torch.randn(2, run.preprocess.channels, run.preprocess.image_size, run.preprocess.image_size)
    any_batch = {"x": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(sct.fuse(run.model, plain=True), (images,), dynamic_shapes=any_batch)
    difference = (program.module()(images) - run.model(images)).abs().max().item()
    print(f"BN folded: largest difference of a logit {difference:.1e}")
    assert difference < 1e-4

    meaning = {"seqconv_triton.json": json.dumps({"classes": run.classes, "preprocess": run.preprocess.to_dict()})}
    torch.export.save(program, checkpoint.with_suffix(".pt2"), extra_files=meaning)

    onnx = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"], output_names=["logits"])
    onnx.model.metadata_props.update(meaning)
    onnx.save(checkpoint.with_suffix(".onnx"), external_data=False)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m examples.export_checkpoint CHECKPOINT")
    main(Path(sys.argv[1]))
