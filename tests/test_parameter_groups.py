"""sct.parameter_groups: what is spared from weight decay, and weights handed out group by group."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from helpers import error, randomise
from plain import PlainLayer, pair
from torch import Tensor, nn

import seqconv_triton as sct

facility = pytest.mark.facility


class Orthogonal(torch.optim.Optimizer):
    """Steps along the orthogonal matrix nearest to each gradient [rows, the rest], as Muon does."""

    def __init__(self, params: Iterable[dict[str, object]], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.dim() > 1:
                    u, _, v = torch.linalg.svd(parameter.grad.flatten(1), full_matrices=False)
                    parameter.add_((u @ v).view_as(parameter), alpha=-group["lr"])


class Trusted(torch.optim.Optimizer):
    """Steps as long as the weight, in the direction of its gradient (LARS)."""

    def __init__(self, params: Iterable[dict[str, object]], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.dim() > 1:
                    parameter.sub_(parameter.grad, alpha=group["lr"] * float(parameter.norm() / parameter.grad.norm()))


LAYERS = {
    "basic": (6, 12, 4, {}),
    "bottleneck": (6, 12, 4, {"bottleneck": True}),
    "subgroups": (6, 12, 4, {"bottleneck": True, "subgroups": 2}),
}


@facility("Matrix-wise optimizers (Muon, LARS): sct.parameter_groups(per_group=True) steps as separate convs do")
@pytest.mark.parametrize("make", [Orthogonal, Trusted, torch.optim.AdamW])
@pytest.mark.parametrize("case", LAYERS)
def test_steps_are_those_of_separate_convs(case: str, make: Callable[..., torch.optim.Optimizer]) -> None:
    channels, out, k, options = LAYERS[case]
    layer = randomise(sct.SeqConv2d(channels, out, k, dtype=torch.float64, **options))
    plain = PlainLayer(layer)
    optimizers = [make(sct.parameter_groups(layer, 0.0, per_group=True)), make(sct.parameter_groups(plain, 0.0))]
    for _ in range(3):
        x = torch.randn(2, channels, 4, 5, dtype=torch.float64)
        for module, optimizer in zip((layer, plain), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    transform = torch.cat([conv.weight for conv in plain.transform])
    assert error(layer.transform_weight, transform) < 1e-8
    if layer.reduce_weight is not None:
        assert error(layer.reduce_weight, torch.cat([conv.weight for conv in plain.reduce]).flatten(1)) < 1e-8


def test_packed_whole_they_are_another_optimizers() -> None:
    layer = randomise(sct.SeqConv2d(6, 12, 4, bottleneck=True, dtype=torch.float64))
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    for module, per_group in ((layer, True), (twin, False)):
        module(x).square().sum().backward()
        Orthogonal(sct.parameter_groups(module, 0.0, per_group=per_group)).step()
    assert error(layer.reduce_weight, twin.reduce_weight) > 1e-2


@pytest.mark.parametrize("model", ["cifar_seqresnet_b_r7_k16", "cifar_seqresnet_dense_r3_k8_n121", "seqresnet_b22"])
def test_every_weight_is_in_one_group(model: str) -> None:
    """Flat and two-dimensional packed weights; together they are all parameters, once."""
    network = sct.create_model(model, device="meta" if model == "seqresnet_b22" else "cpu")
    decayed, spared = sct.parameter_groups(network, 0.1, per_group=True)
    assert sum(p.numel() for p in decayed["params"] + spared["params"]) == sum(p.numel() for p in network.parameters())
    assert all(p.dim() in (2, 4) for p in decayed["params"]) and all(p.dim() == 1 for p in spared["params"])
    plans = [m.plan for m in network.modules() if isinstance(m, sct.Stage)]
    assert len(decayed["params"]) >= sum(len(plan.groups) * (2 if plan.bottleneck else 1) for plan in plans)


def test_gradients_are_parts_of_the_packed_one() -> None:
    """Accumulation, clipping by the model's parameters, loss scaling and zero_grad in both its forms."""
    model = randomise(sct.CifarSeqResNet(4, 1, bottleneck=True, dropout=0.0))
    stage = model.stages[0]
    parts = [p for p in sct.parameter_groups(model, 0.0, per_group=True)[0]["params"] if type(p) is not nn.Parameter]
    optimizer = torch.optim.SGD(parts, lr=0.5)
    x = torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    once = stage.transform_weight.grad.clone()
    model.eval()(x).sum().backward()
    assert not torch.equal(stage.transform_weight.grad, once)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    expected = {name: p - 0.5 * p.grad for name, p in stage.named_parameters() if name.endswith("m_weight")}
    version = stage.transform_weight._version
    optimizer.step()
    for name, value in expected.items():
        assert error(stage.get_parameter(name), value) < 1e-6
    assert stage.transform_weight._version > version  # a graph that needs the old value notices
    optimizer.zero_grad(set_to_none=False)
    assert stage.transform_weight.grad.count_nonzero() == 0
    optimizer.zero_grad()
    assert stage.transform_weight.grad is None and all(p.grad is None for p in parts)
    parts[0].grad = torch.ones_like(parts[0])
    assert parts[0].grad.eq(1).all() and parts[1].grad is not None


def sharpness_aware(module: nn.Module, parameters: list[nn.Parameter], steps: int) -> list[float]:
    """SAM as it is mostly written: up along the gradient, and back by assigning to `data`."""
    generator, losses = torch.Generator().manual_seed(1), []
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    x = torch.randn(8, 6, 4, 5, dtype=torch.float64, generator=generator)
    target = torch.rand(8, 12, 4, 5, dtype=torch.float64, generator=generator)
    for _ in range(steps):
        loss = (module(x) - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        old = [p.data.clone() for p in parameters]
        for p in parameters:
            p.data.add_(p.grad * (0.05 / norm))
        optimizer.zero_grad()
        (module(x) - target).square().mean().backward()
        for p, value in zip(parameters, old, strict=True):
            p.data = value
        optimizer.step()
        optimizer.zero_grad()
    return losses


def listed(module: nn.Module) -> list[nn.Parameter]:
    return [p for group in sct.parameter_groups(module, 0.0, per_group=True) for p in group["params"]]


def test_parts_whose_data_is_assigned() -> None:
    layer, plain = pair(bottleneck=True)
    expected = sharpness_aware(plain, list(plain.parameters()), 10)
    assert expected[-1] < expected[0]
    for one, other in zip(sharpness_aware(layer, listed(layer), 10), expected, strict=True):
        assert abs(one - other) < 1e-10
    with pytest.raises(ValueError, match="data must be of shape"):
        listed(layer)[0].data = torch.zeros(3)


@pytest.mark.parametrize("road", ["double", "vector", "data"])
def test_parts_follow_a_whole_that_gets_other_memory(road: str) -> None:
    """As parameters do, which stay the same when a model is moved."""
    layer = randomise(sct.SeqConv2d(6, 12, 4, bottleneck=True))
    parts = listed(layer)
    optimizer, x = torch.optim.SGD(parts, lr=0.1, momentum=0.9), torch.randn(2, 6, 4, 5)
    layer(x).square().sum().backward()
    optimizer.step()
    if road == "double":
        layer.double()
    elif road == "vector":
        nn.utils.vector_to_parameters(0.5 * nn.utils.parameters_to_vector(layer.parameters()), layer.parameters())
    else:
        for p in layer.parameters():
            p.data = 0.5 * p.data
    twin = copy.deepcopy(layer)
    optimizer = torch.optim.SGD(parts, lr=0.1)
    for module, steps in ((layer, optimizer), (twin, torch.optim.SGD(twin.parameters(), lr=0.1))):
        steps.zero_grad()
        module(x.to(module.transform_weight.dtype)).square().sum().backward()
        steps.step()
    for name, value in twin.named_parameters():
        assert torch.equal(layer.get_parameter(name), value), name


def test_optimizers_that_share_a_packed_weight() -> None:
    """Each clears its own parts of the gradient, whatever the order."""
    layer, twin = pair()
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    parts = [p for p in listed(layer) if p.dim() == 4]
    optimizers = [torch.optim.SGD(parts[:1], lr=0.1), torch.optim.SGD(parts[1:], lr=0.01)]
    convs = [conv.weight for conv in twin.transform]
    others = [torch.optim.SGD(convs[:1], lr=0.1), torch.optim.SGD(convs[1:], lr=0.01)]
    for module, (first, second) in ((layer, optimizers), (twin, others)):
        for i in range(4):  # the second steps with the gradients of two batches
            module(x).square().sum().backward()
            first.step()
            first.zero_grad()
            if i % 2:
                second.step()
                second.zero_grad()
    assert error(layer.transform_weight, torch.cat(convs)) < 1e-10
    assert layer.transform_weight.grad is None


def test_gradients_that_somebody_kept_outlive_zero_grad() -> None:
    """As for the gradients of several tasks, which are compared afterwards."""
    layer = randomise(sct.SeqConv2d(6, 12, 4))
    parts, x = listed(layer), torch.randn(2, 6, 4, 5)
    optimizers = [torch.optim.SGD(parts[:1], lr=0.1), torch.optim.SGD(parts[1:], lr=0.1)]
    for cleared in ([parts[0]], parts):  # by the first, by both
        layer(x).square().sum().backward()
        kept = [p.grad for p in cleared]
        values = [grad.clone() for grad in kept]
        for optimizer in optimizers[: len(cleared)]:
            optimizer.zero_grad()
        layer(2 * x).square().sum().backward()
        assert all(torch.equal(grad, value) for grad, value in zip(kept, values, strict=True))
        assert not torch.equal(parts[0].grad, values[0])


def test_a_loss_on_the_parts_themselves() -> None:
    """A penalty on just these matrices, in one backward pass with the model's loss, or alone."""
    layer, plain = pair()
    parts = listed(layer)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    for alone in (False, True, False):
        for module, matrices in ((layer, parts), (plain, [conv.weight for conv in plain.transform])):
            penalty = sum(p.square().sum() for p in matrices if p.dim() > 1)
            (penalty if alone else penalty + module(x).square().mean()).backward()
    assert error(layer.transform_weight.grad, torch.cat([conv.weight.grad for conv in plain.transform])) < 1e-10
    for p in parts:
        del p.grad
    assert all(p.grad is None for p in parts) and layer.transform_weight.grad is None


def test_state_that_is_loaded_after_the_model_was_moved() -> None:
    layer = randomise(sct.SeqConv2d(6, 12, 4))
    twin, x = copy.deepcopy(layer), torch.randn(2, 6, 4, 5, dtype=torch.float64)
    for module, parameters in ((layer, listed(layer)), (twin, list(twin.parameters()))):
        optimizer = torch.optim.AdamW(parameters, lr=0.01)
        module(x.float()).square().sum().backward()
        optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
        optimizer = torch.optim.AdamW(parameters, lr=0.01)
        module.double()
        optimizer.load_state_dict(state)
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
    for name, value in twin.named_parameters():
        assert error(layer.get_parameter(name), value) < 1e-6, name


def test_parts_on_the_meta_device() -> None:
    layer = sct.SeqConv2d(6, 12, 4, device="meta")
    parts = listed(layer)
    layer(torch.empty(2, 6, 4, 5, device="meta")).sum().backward()
    assert all(p.is_meta and p.grad.shape == p.shape == p.data.shape for p in parts)
    torch.optim.SGD(parts).zero_grad()
    assert layer.transform_weight.grad is None
    with pytest.raises(ValueError, match="grad must be of shape"):
        parts[0].grad = torch.zeros(3)


def test_hooks_belong_to_the_whole() -> None:
    part = listed(sct.SeqConv2d(6, 12, 4))[0]
    for register in (part.register_hook, part.register_post_accumulate_grad_hook):
        with pytest.raises(NotImplementedError, match="register the hook on the model's own parameter"):
            register(lambda *_: None)


def test_a_copy_of_model_and_optimizer() -> None:
    """As tools that go back to the best step make it: the copy's optimizer moves the copy's weights."""
    model = randomise(sct.SeqConv2d(6, 12, 4, bottleneck=True))
    optimizer = torch.optim.AdamW(sct.parameter_groups(model, 0.1, per_group=True), lr=0.01)
    x = torch.randn(2, 6, 4, 5)
    scaled_step(model, optimizer, x)
    before = copy.deepcopy(model.state_dict())
    twin, copied = copy.deepcopy((model, optimizer))
    for module, steps in ((twin, copied), (model, optimizer)):
        steps.zero_grad()
        scaled_step(module, steps, x)
        assert not torch.equal(module.transform_weight, before["transform_weight"])
        if module is twin:
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, twin.get_parameter(name)) for name, p in model.named_parameters())


def test_model_and_optimizer_in_one_file(tmp_path: Path) -> None:
    model = randomise(sct.SeqConv2d(6, 12, 4, bottleneck=True))
    optimizer = torch.optim.SGD(sct.parameter_groups(model, 0.1, per_group=True), lr=0.01)
    torch.save((model, optimizer), tmp_path / "both.pt")
    twin, loaded = torch.load(tmp_path / "both.pt", weights_only=False)
    x, before = torch.randn(2, 6, 4, 5), model.transform_weight.detach().clone()
    for module, steps in ((twin, loaded), (model, optimizer)):
        scaled_step(module, steps, x)
        assert not torch.equal(module.transform_weight, before)
    for name, value in model.named_parameters():
        assert torch.equal(value, twin.get_parameter(name)), name


def scaled_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(model(x).sum()).backward()
    scaler.step(optimizer)
    scaler.update()


def test_under_grad_scaler_and_with_saved_state() -> None:
    model = randomise(sct.SeqConv2d(6, 12, 4, bottleneck=True))
    twin = copy.deepcopy(model)
    optimizers = [
        torch.optim.AdamW(sct.parameter_groups(m, 0.1, per_group=per_group), lr=0.01)
        for m, per_group in ((model, True), (twin, False))
    ]
    x = torch.randn(2, 6, 4, 5)
    for module, optimizer in zip((model, twin), optimizers, strict=True):
        scaled_step(module, optimizer, x)
    fresh = torch.optim.AdamW(sct.parameter_groups(model, 0.1, per_group=True), lr=0.01)
    fresh.load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for module, optimizer in ((model, fresh), (twin, optimizers[1])):
        optimizer.zero_grad()
        scaled_step(module, optimizer, x)
    for name, value in twin.named_parameters():
        assert error(model.get_parameter(name), value) < 1e-5, name


def test_folded_and_frozen_bns_are_spared() -> None:
    fused = sct.fuse(sct.CifarSeqResNet(4, 1, bottleneck=True)).requires_grad_(True)
    decayed, spared = sct.parameter_groups(fused, 0.1)
    names = {id(p): name for name, p in fused.named_parameters()}
    assert all("norm" not in names[id(p)] for p in decayed["params"])
    assert sum("norm" in names[id(p)] for p in spared["params"]) == 2 * (2 * 3 + 1)
