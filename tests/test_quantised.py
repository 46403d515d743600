"""int8 as PyTorch's documentation makes it: export or trace what `fuse` gives, prepare, calibrate, convert."""

from __future__ import annotations

import importlib
import warnings

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


@pytest.mark.parametrize("classes", [10, 7])
def test_every_conv_is_quantised_in_a_trace_of_fx(classes: int) -> None:
    """By PyTorch's own quantisation, with the classifier, whether it started as the published ones do or not."""
    torch.use_deterministic_algorithms(False)  # some quantised operators know one way alone
    quantize_fx = importlib.import_module("torch.ao.quantization.quantize_fx")
    mapping = importlib.import_module("torch.ao.quantization").get_default_qconfig_mapping("x86")
    model = randomise(sct.CifarSeqResNet(16, 1, bottleneck=True, num_classes=classes)).eval()
    folded, x = sct.fuse(model, plain=True), torch.randn(2, 3, 16, 16)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # it is deprecated, and in use
        prepared = quantize_fx.prepare_fx(folded, mapping, (x,))
        prepared(x)
        quantised = quantize_fx.convert_fx(prepared)
        kinds = [f"{type(module).__module__}.{type(module).__name__}" for module in quantised.modules()]
        assert error(quantised(x), model(x)) < 0.2
    convs = sum(isinstance(module, torch.nn.Conv2d) for module in folded.modules())
    assert sum("quantized" in kind and "Conv" in kind for kind in kinds) == convs
    assert sum("quantized" in kind and kind.endswith(".Linear") for kind in kinds) == 1


@pytest.mark.parametrize("classes", [10, 7])
def test_dynamic_quantisation_finds_the_classifier(classes: int) -> None:
    folded = sct.fuse(sct.CifarSeqResNet(4, 1, num_classes=classes).eval(), plain=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(folded, {torch.nn.Linear})
    assert "quantized" in type(quantised.classifier).__module__


def test_a_plain_classifier_keeps_what_is_on_it() -> None:
    """Hooks, and what computes its weight, whatever its start was."""
    model, called = sct.CifarSeqResNet(4, 1, num_classes=10).eval(), []
    torch.nn.utils.parametrizations.weight_norm(model.classifier)
    model.classifier.register_forward_hook(lambda *_: called.append(1))
    folded, x = sct.fuse(model, plain=True), torch.randn(2, 3, 8, 8)
    assert error(folded(x), model(x)) < 1e-5 and len(called) == 2 and isinstance(folded.classifier, torch.nn.Linear)
