"""int8 as PyTorch's documentation makes it: export what `fuse` gives, prepare, calibrate, convert."""

from __future__ import annotations

import importlib

import pytest
import torch
from helpers import error, randomise, small_imagenet

import seqconv_triton as sct


@pytest.mark.facility("int8 by PT2E (torchao's x86 Inductor quantizer): every conv of a fused model is quantised")
def test_every_conv_is_quantised() -> None:
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason="torchao")
    x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    model = randomise(small_imagenet(), layer_b=0.1).eval()
    folded, x = sct.fuse(model, plain=True), torch.randn(2, 3, 32, 32)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        prepared = pt2e.prepare_pt2e(torch.export.export(folded, (x,)).module(), quantizer)
        for _ in range(4):
            prepared(torch.randn(2, 3, 32, 32))
        prepared(x)
        quantised = pt2e.convert_pt2e(prepared)
        nodes = [node for node in quantised.graph.nodes if str(node.target) == "aten.conv2d.default"]
        assert len(nodes) == sum(isinstance(module, torch.nn.Conv2d) for module in folded.modules())
        for node in nodes:
            assert all("dequantize" in str(argument.target) for argument in node.args[:2])
        assert error(quantised(x), model(x)) < 0.2
