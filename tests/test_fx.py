"""torch.fx and TorchScript: what reads the networks' Python code gets one node a stage, or an error with a way out."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from backbones import converted
from helpers import error, everything, randomise, small_imagenet
from torch import Tensor, fx, nn

import seqconv_triton as sct

facility = pytest.mark.facility


class Maps(nn.Module):
    """The features of all stages, as a detector takes them."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        backbone.reset_classifier(0)
        self.backbone = backbone

    def forward(self, x):
        last, maps = self.backbone.forward_intermediates(x)
        return [last, *maps]


class Shortcut(nn.Module):
    """A layer with a shortcut that comes by keyword, and one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = sct.SeqConv2d(3, 8, 4)
        self.layer = sct.SeqConv2d(8, 8, 4, bottleneck=True)

    def forward(self, x):
        x = self.stem(x=x)
        raw, activated = self.layer.forward_raw(x, shortcut=x)
        return raw + activated + self.layer(x)


def layer() -> nn.Module:
    return sct.SeqConv2d(3, 12, 4, bottleneck=True, dropout=0.3)


CASES: dict[str, Callable[[], nn.Module]] = {
    "imagenet": small_imagenet,
    "cifar-dropout": lambda: sct.CifarSeqResNet(16, 1, bottleneck=True, dropout=0.5),
    "published-classifier": lambda: sct.CifarSeqResNet(16, 1, dropout=0.0, num_classes=100),
    "headless": lambda: sct.CifarSeqResNet(16, 1, num_classes=0),
    "synchronised": lambda: sct.convert_sync_batchnorm(small_imagenet()),
    "recomputing": lambda: recomputing(small_imagenet()),
    "features": lambda: Maps(small_imagenet()),
    "in-sequence": lambda: nn.Sequential(layer(), nn.Conv2d(12, 5, 3)),
    "alone": layer,
    "alone-dense": lambda: sct.SeqConv2d(3, 8, 4, windowed=False),
    "shortcut": Shortcut,
    **{f"converted-{name}": lambda name=name: converted(name)[0] for name in ("vgg", "resnet-basic", "resnext")},
}
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def recomputing(model: nn.Module) -> nn.Module:
    model.set_grad_checkpointing()
    return model


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    out = model(x)
    return out if isinstance(out, list) else [out]


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(copy.deepcopy(model), backend="aot_eager")


def same(got: nn.Module, model: nn.Module, x: Tensor) -> bool:
    """Outputs and every gradient and statistic, for the same dropout masks."""
    results, expected = everything(got, x, run), everything(model, x, run)
    return results.keys() == expected.keys() and all(error(results[k], expected[k]) < 1e-10 for k in expected)


@facility("torch.fx.symbolic_trace: one node a stage; values, gradients, state dict keys, copies, pickles, compilation")
@pytest.mark.parametrize("name", CASES)
@MODES
def test_traced_equals_the_model(name: str, training: bool) -> None:
    """The graph is the same in both modes, so that a traced network changes its mode as the network does."""
    model = randomise(CASES[name]()).double().train(training)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    traced = fx.symbolic_trace(model)
    traced.graph.lint()
    assert list(traced.state_dict()) == list(model.state_dict())
    assert sum(p.requires_grad for p in traced.parameters()) == len(list(model.parameters()))
    for twin in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), fx.symbolic_trace(traced)):
        for mode in (training, not training):
            assert same(twin.train(mode), model.train(mode), x)
    torch.manual_seed(2)
    expected = run(copy.deepcopy(model), x)
    torch.manual_seed(2)
    assert all(error(a, b) < 1e-10 for a, b in zip(run(compiled(traced.train(not training)), x), expected, strict=True))


@pytest.mark.parametrize("name", ["alone", "in-sequence"])
def test_dropout_without_batch_statistics(name: str) -> None:
    """As many fine-tune: the network in training, its BNs in evaluation, whether set before the trace or after it."""
    model = randomise(CASES[name]()).double().train()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    late = fx.symbolic_trace(model)
    for network in (model, late):
        for norm in (part for part in network.modules() if isinstance(part, nn.BatchNorm2d)):
            norm.eval()
    early = fx.symbolic_trace(model)
    assert not same(copy.deepcopy(model).eval(), model, x)
    for twin in (late, early, copy.deepcopy(early), pickle.loads(pickle.dumps(early)), fx.symbolic_trace(early)):
        assert same(twin, model, x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_traced_layer_in_a_network_of_another_mode(training: bool) -> None:
    inner = fx.symbolic_trace(randomise(layer()).double()).train(training)
    network = nn.Sequential(inner, nn.Conv2d(12, 5, 3).double()).train(not training)
    inner.train(training)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for twin in (fx.symbolic_trace(network), fx.symbolic_trace(fx.symbolic_trace(network))):
        assert same(twin, network, x)


def test_traced_layers_that_share_weights_keep_their_modes() -> None:
    """Also where the network knows a weight by another name first."""

    class Network(nn.Module):
        def forward(self, x):
            return self.other(self.one(x))

    network = Network()
    one, other = (fx.symbolic_trace(randomise(sct.SeqConv2d(8, 8, 4, dropout=0.5)).double()) for _ in range(2))
    other.transform_weight = one.transform_weight
    network.shared, network.one, network.other = one.transform_weight, one.eval(), other.train()
    x = torch.randn(4, 8, 5, 3, dtype=torch.float64)
    traced = fx.Tracer().trace(network)
    modes = [str(node.target) for node in traced.nodes if str(node.target).endswith("training")]
    assert modes == ["one.training", "other.training"]
    assert same(fx.GraphModule(network, traced), network, x)


@pytest.mark.parametrize("pack", [False, True])
def test_fused_models(pack: bool) -> None:
    model = randomise(small_imagenet(), layer_b=0.3).eval()
    x = torch.randn(2, 3, 32, 32)
    fused = sct.fuse(model, pack=pack)
    traced = fx.symbolic_trace(fused)
    assert set(traced.state_dict()) == set(fused.state_dict())
    assert torch.equal(traced(x), fused(x)) and error(traced(x), model(x)) < 1e-4
    assert error(sct.fuse(fx.symbolic_trace(model))(x), model(x)) < 1e-4


def test_a_stage_is_one_node_with_its_name() -> None:
    graph = fx.symbolic_trace(sct.SeqResNetB22(num_classes=1000)).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    stem, stages = [f"stem.{i}" for i in range(5)], [f"stages.{i}" for i in range(4)]
    assert called == [*stem, *stages, "norm", "relu", "classifier"]
    assert len(graph.nodes) < 20


def test_part_of_a_network() -> None:
    """As a feature extractor does: the nodes behind a stage go, and their modules with them."""
    model = randomise(small_imagenet()).eval()
    traced = fx.symbolic_trace(model)
    stage = next(node for node in traced.graph.nodes if node.target == "stages.1")
    next(node for node in traced.graph.nodes if node.op == "output").args = (stage,)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    x = torch.randn(2, 3, 32, 32)
    seen: list[Tensor] = []
    model.stages[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(x)
    assert torch.equal(traced(x), seen[0]) and not any("stages.2" in name for name in traced.state_dict())


def test_hooks_run_once() -> None:
    """fx traces the hooks of a module that it opens, whose node must not run them again."""
    model = randomise(sct.CifarSeqResNet(16, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    plain = model(x)
    model.stages[0].register_forward_hook(lambda module, inputs, output: output * 2)
    model.stages[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    expected = model(x)
    assert error(expected, plain) > 0.01
    assert error(fx.symbolic_trace(model)(x), expected) < 1e-6


def test_wrong_input_has_the_same_errors() -> None:
    traced = fx.symbolic_trace(small_imagenet())
    with pytest.raises(ValueError, match=r"x has 4 channels \[1, 4, 32, 32\]; expected \[N, 3, H, W\]"):
        traced(torch.randn(1, 4, 32, 32))
    with pytest.raises(TypeError, match=r"x is torch\.float64 but the model is torch\.float32"):
        traced(torch.randn(1, 3, 32, 32, dtype=torch.float64))


@facility("torch.jit.trace, evaluation; torch.jit.script has an error that names it")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["imagenet", "in-sequence", "alone", "converted-resnet-basic"])
def test_script_names_trace_which_works(name: str) -> None:
    model = randomise(CASES[name]()).eval()
    x = torch.randn(2, 3, 16, 16)
    message = re.escape("torch.export.export(model.eval(), (x,)) and torch.jit.trace(model.eval(), x) can")
    with pytest.raises(NotImplementedError, match=rf"^torch.jit.script cannot compile \w+; {message}$"):
        torch.jit.script(model)
    if name != "alone":  # fx leaves no module of ours of a layer alone
        with pytest.raises(NotImplementedError, match=r"torch\.jit\.script cannot compile"):
            torch.jit.script(fx.symbolic_trace(model))
    traced = torch.jit.trace(model, x)
    assert error(traced(torch.cat([x, 2 * x])), model(torch.cat([x, 2 * x]))) < 1e-5
