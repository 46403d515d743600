"""State and autograd as users of PyTorch know them: checkpoints, copies, EMA, freezing, recomputing, layouts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import error, everything, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

import seqconv_triton as sct
from seqconv_triton.backend.contract import Needs
from seqconv_triton.ops.registered import BACKWARD_NAMES, named
from seqconv_triton.plan import Plan, Tail

facility = pytest.mark.facility


def small(**options: object) -> nn.Module:
    return randomise(sct.CifarSeqResNet(8, 1, bottleneck=True, dropout=0.0, **options), layer_b=0.3)


def small_stage() -> nn.Module:
    return randomise(sct.Stage(Plan.stage(8, 8, 1, extension=8, tail=Tail(16, 3, 2, 2))))


def run(module: nn.Module, x: Tensor) -> list[Tensor]:
    return [module(x)]


NORM = "weight bias running_mean running_var num_batches_tracked"
STAGE = [f"norm.{n}" for n in NORM.split()] + ["transform_weight", "tail_weight"]
BOTTLENECK = [*STAGE, "reduce_weight", *(f"reduce_norm.{n}" for n in NORM.split())]
HEAD = [*(f"norm.{n}" for n in NORM.split()), "classifier.weight", "classifier.bias", "stem.0.weight"]
KEYS = {
    "cifar": (lambda: sct.CifarSeqResNet(8, 1, device="meta"), {"stages.{}": STAGE}, 3),
    "cifar-bottleneck": (
        lambda: sct.CifarSeqResNet(8, 1, bottleneck=True, device="meta"),
        {"stages.{}": BOTTLENECK},
        3,
    ),
    "imagenet": (
        lambda: sct.SeqResNetB22(device="meta"),
        {"stages.{}": BOTTLENECK, "stem.1": NORM.split(), "stem.3": ["weight"], "stem.4": BOTTLENECK},
        4,
    ),
}


@facility("state_dict: documented keys, strict loading, deepcopy, pickle")
@pytest.mark.parametrize("case", KEYS)
def test_keys_are_stable(case: str) -> None:
    """docs/facilities.md promises these names; a checkpoint of today must load tomorrow."""
    make, parts, stages = KEYS[case]
    expected = {f"{part.format(i)}.{name}" for part, names in parts.items() for name in names for i in range(stages)}
    assert set(make().state_dict()) == expected | set(HEAD)


@facility("state_dict: documented keys, strict loading, deepcopy, pickle")
def test_state_goes_round() -> None:
    model = small().eval()
    x = torch.randn(2, 3, 8, 8)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    fresh = sct.CifarSeqResNet(8, 1, bottleneck=True).eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(x), model(x))
    state = model.state_dict()
    del state["stages.1.reduce_weight"]
    with pytest.raises(RuntimeError, match=r"stages\.1\.reduce_weight"):
        fresh.load_state_dict(state)


@facility("Hooks on stages and parameters; parametrizations and pruning of weights")
def test_hooks_on_stages() -> None:
    model, seen = small(), []
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda module, given, out, i=i: seen.append(("forward", i)))
        stage.register_full_backward_hook(lambda module, given, out, i=i: seen.append(("backward", i, given[0].shape)))
    model.stages[0].reduce_weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.shape))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert seen[:3] == [("forward", i) for i in range(3)]
    assert [entry[1] for entry in seen if entry[0] == "backward"] == [2, 1, 0]
    assert model.stages[0].reduce_weight.shape in seen


@facility("Hooks on stages and parameters; parametrizations and pruning of weights")
def test_parametrized_weights() -> None:
    model, x = small().eval(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    parametrizations.weight_norm(model.stages[0], "transform_weight")
    parametrizations.weight_norm(model.stages[1], "reduce_weight", dim=None)
    out = model(x)
    assert error(out, expected) < 1e-5
    out.sum().backward()
    assert all(p.grad.norm() > 0 for p in model.stages[0].parametrizations.parameters())
    prune.l1_unstructured(model.stages[2], "reduce_weight", 0.5)
    pruned = model(x)
    prune.remove(model.stages[2], "reduce_weight")
    assert torch.equal(model(x), pruned) and error(pruned, expected) > 1e-3


@facility("EMA of parameters and statistics (torch.optim.swa_utils)")
def test_moving_average() -> None:
    model = small()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for number in range(3):
        model(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        average.update_parameters(model)
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = value.clone() if number == 0 else torch.lerp(value, expected[name], 0.75)
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            assert error(value, expected[name]) < 1e-6, name
    assert average.eval()(torch.randn(1, 3, 8, 8)).isfinite().all()


@facility("torch.func.functional_call")
def test_functional_call() -> None:
    model, other = small().eval(), randomise(small(), seed=1).eval()
    x = torch.randn(2, 3, 8, 8)
    assert error(torch.func.functional_call(model, other.state_dict(), (x,)), other(x)) < 1e-6
    assert error(model(x), other(x)) > 0.1


@facility("Parameter groups without weight decay for BN and biases: sct.parameter_groups")
def test_parameter_groups() -> None:
    model = sct.SeqResNetB22(num_classes=3)
    decayed, spared = sct.parameter_groups(model, 1e-4)
    assert decayed["weight_decay"] == 1e-4 and spared["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in (decayed, spared)]
    assert not groups[0] & groups[1] and groups[0] | groups[1] == set(names.values())
    assert "stem.4.reduce_weight" in groups[0]  # one-dimensional, and yet the weights of convs
    assert all("norm" in name or "bias" in name or name.startswith("stem.1.") for name in groups[1])
    model.stages[0].requires_grad_(False)
    assert not any("stages.0." in names[id(p)] for group in sct.parameter_groups(model, 0.1) for p in group["params"])
    with pytest.raises(ValueError, match="weight_decay"):
        sct.parameter_groups(model, -1.0)


class BackwardNeeds(TorchDispatchMode):
    """Which gradients every stage's backward pass was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.needs: list[Needs] = []

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func is torch.ops.seqconv_triton.stage_backward.default:
            self.needs.append(Needs(*named(BACKWARD_NAMES, args)["needs"]))
        return func(*args, **(kwargs or {}))


@facility("Freezing a stage: its weight gradients are not computed")
@pytest.mark.parametrize("number", range(3))
def test_frozen_stage(number: int) -> None:
    model = small()
    x = torch.randn(2, 3, 8, 8)
    free = everything(model, x, run)
    model.stages[number].requires_grad_(False)
    frozen = everything(model, x, run)
    for name, value in frozen.items():
        assert torch.equal(value, free[name]), name
    with BackwardNeeds() as seen:
        model(x).sum().backward()
    weights = [needs[2:] for needs in reversed(seen.needs)]  # the last stage comes first
    assert weights == [(i != number,) * 3 for i in range(3)]
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    with BackwardNeeds() as seen:
        model(x).sum().backward()
    assert not seen.needs


def kept(module: nn.Module, x: Tensor) -> int:
    """Bytes saved for backward beside parameters and input."""
    module = copy.deepcopy(module)
    own = {t.untyped_storage().data_ptr() for t in (x, *module.parameters(), *module.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = module(x)
    del out
    return sum(size for pointer, size in saved.items() if pointer not in own)


@facility("Gradient checkpointing switch: set_grad_checkpointing()")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_changes_memory_alone(place: torch.device, dropout: float) -> None:
    stage = small_stage().to(place)
    stage.dropout = dropout
    x = torch.randn(2, 8, 4, 5, device=place)
    plain, before = everything(stage, x, run), kept(stage, x)
    stage.recompute = True
    again, after = everything(stage, x, run), kept(stage, x)
    for name, value in plain.items():
        assert error(again[name], value) < 1e-6, name
    assert after < 0.7 * before


def test_checkpointing_reaches_every_stage() -> None:
    model = small(windowed=False)
    x = torch.randn(2, 3, 8, 8)
    plain, before = everything(model, x, run), kept(model, x)
    model.set_grad_checkpointing()
    again, after = everything(model, x, run), kept(model, x)
    for name, value in plain.items():
        assert error(again[name], value) < 1e-5, name
    assert after < 0.75 * before
    model.set_grad_checkpointing(False)
    assert kept(model, x) == before


@facility("channels_last, contiguous and strided input; gradient of the input")
def test_layouts(place: torch.device) -> None:
    stage = small_stage().to(place)
    x = torch.randn(2, 8, 4, 5, device=place)
    expected = everything(stage, x, run)
    strided = torch.randn(2, 8, 8, 5, device=place)[:, :, ::2].copy_(x)
    for given in (x.to(memory_format=torch.channels_last), strided):
        got = everything(stage, given, run)
        for name, value in expected.items():
            assert error(got[name], value) < 1e-6, name


@facility("Gradients in evaluation mode (Grad-CAM)")
def test_gradients_of_feature_maps() -> None:
    model = small(dtype=torch.float64).eval()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    maps = []
    for backend in ("aten", "reference"):
        with sct.use_backend(backend):
            features = model.forward_features(x)
            (grad,) = torch.autograd.grad(model.forward_head(features)[0, 3], features)
            inner = model.stages[1](model.stages[0](model.forward_stem(x))).detach().requires_grad_()
            out = model.forward_head(torch.relu(model.norm(model.stages[2](inner))))
            maps.append((grad, torch.autograd.grad(out[0, 3], inner)[0]))
    for got, expected in zip(*maps, strict=True):
        assert error(got, expected) < 1e-12 and expected.norm() > 0


@facility("Second derivatives: an error names the reference backend, which has them")
def test_second_derivatives(place: torch.device) -> None:
    stage = small_stage().to(place)
    x = torch.randn(2, 8, 4, 5, device=place, requires_grad=True)
    (grad,) = torch.autograd.grad(stage(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'use_backend\("reference"\)'):
        grad.sum().backward()
    with sct.use_backend("reference"):
        (grad,) = torch.autograd.grad(stage(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.norm() > 0
