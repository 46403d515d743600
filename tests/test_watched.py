"""Hooks on a stage's BNs, and helpers that call or replace their forward: they see what a BN would see."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from helpers import error, randomise, small_imagenet
from plain import pair
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.optim.swa_utils import update_bn

import seqconv_triton as sct
from seqconv_triton.plan import Plan, Tail

facility = pytest.mark.facility
LAYERS = {"basic": {}, "bottleneck": {"bottleneck": True}, "subgroups": {"bottleneck": True, "subgroups": 2}}


class Seen:
    """What hooks on BNs have seen: inputs and outputs by name, those of several side by side."""

    def __init__(self, *named: tuple[str, nn.Module]) -> None:
        self.parts: dict[str, list[Tensor]] = {}
        for name, norm in named:
            norm.register_forward_pre_hook(lambda _, args, name=name: self.note(f"{name} before", args[0]))
            norm.register_forward_hook(lambda _, args, out, name=name: self.note(f"{name} behind", out))

    def note(self, name: str, tensor: Tensor) -> None:
        self.parts.setdefault(name, []).append(tensor)

    def tensors(self) -> dict[str, Tensor]:
        found = {name: torch.cat(parts, 1) for name, parts in self.parts.items()}
        self.parts.clear()
        return found


def named(layer: sct.SeqConv2d) -> list[tuple[str, nn.Module]]:
    return [(name, getattr(layer, name)) for name in ("norm", "reduce_norm") if getattr(layer, name) is not None]


@facility("Hooks on a stage's BNs: inputs, outputs and statistics are those of conv-BN-ReLU")
@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("kind", LAYERS)
def test_hooks_see_what_a_bn_sees(kind: str, backend: str) -> None:
    layer, plain = pair(**LAYERS[kind])
    seen, expected = Seen(*named(layer)), Seen(*plain.bn_modules())
    with sct.use_backend(backend):
        for training in (True, True, False):
            layer.train(training), plain.train(training)
            x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
            assert error(layer(x), plain(x)) < 1e-10
            got, wanted = seen.tensors(), expected.tensors()
            assert set(got) == set(wanted) and len(got) == 2 * len(named(layer))
            for name, value in wanted.items():
                assert error(got[name], value) < 1e-10, name
            for name, norm in named(layer):
                for vector in ("running_mean", "running_var", "num_batches_tracked"):
                    assert error(getattr(norm, vector), plain.vector(name, vector)) < 1e-10, (name, vector)


def test_hooks_in_a_stage() -> None:
    """Raw input, blocks, extension, tail, dropout: hooks change nothing, and both BNs see whole statistics."""
    plan = Plan.stage(8, 8, 2, extension=8, tail=Tail(16, 3, 2, 2))
    stage = randomise(sct.Stage(plan, dropout=0.3, dtype=torch.float64))
    twin = copy.deepcopy(stage)
    seen = Seen(*named(stage))
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64)
    outputs = []
    for module in (stage, twin):
        torch.manual_seed(7)
        outputs.append(module(x))
    assert torch.equal(*outputs)
    for name, value in twin.state_dict().items():
        assert error(stage.state_dict()[name], value) < 1e-10, name
    tensors = seen.tensors()
    for name, channels in (("norm", plan.normalized_channels), ("reduce_norm", len(plan.groups) * 8)):
        raw, norm = tensors[f"{name} before"], getattr(stage, name)
        assert raw.shape[1] == channels
        mean = 0.1 * raw.mean((0, 2, 3)) + 0.9 * getattr(randomised_like(stage), name).running_mean
        assert error(norm.running_mean, mean) < 1e-10


def randomised_like(stage: sct.Stage) -> sct.Stage:
    return randomise(sct.Stage(stage.plan, dtype=torch.float64))


def test_a_loss_on_what_hooks_see_has_its_gradient() -> None:
    """As for images made from statistics (DeepInversion): the input's gradient of a loss on the BNs' inputs."""
    layer, plain = pair(bottleneck=True)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    gradients = []
    for module, norms in ((layer, named(layer)), (plain, plain.bn_modules())):
        seen, image = Seen(*norms), x.clone().requires_grad_()
        module.eval()(image)
        loss = sum(t.square().mean((0, 2, 3)).sum() for name, t in seen.tensors().items() if "before" in name)
        gradients.append(torch.autograd.grad(loss, image)[0])
    assert error(*gradients) < 1e-10


def collect_by_forward(model: nn.Module, batches: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """As helpers do that estimate statistics anew: a forward in the BN's place notes mean and variance."""
    model, sums = copy.deepcopy(model), {}

    def replaced(name: str, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            sums.setdefault(name, []).append((mean, var))
            return nn.functional.batch_norm(x, mean, var, norm.weight, norm.bias, False, 0.0, norm.eps)

        return forward

    for name, norm in model.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.forward = replaced(name, norm)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return {name: tuple(torch.stack(t).mean(0) for t in zip(*pairs, strict=True)) for name, pairs in sums.items()}


def test_statistics_estimated_anew_by_a_forward_in_the_bns_place() -> None:
    layer, plain = pair(bottleneck=True)
    batches = [torch.randn(4, 6, 4, 5, dtype=torch.float64) for _ in range(3)]
    got, expected = (collect_by_forward(module.train(), batches) for module in (layer, plain))
    for name in ("norm", "reduce_norm"):
        for i, values in enumerate(zip(*(v for k, v in expected.items() if k.split("s.")[0] == name), strict=True)):
            assert error(got[name][i], torch.cat(values)) < 1e-10
    with pytest.raises(RuntimeError, match="forward in the place of its own, returned something else"):
        collect_by_forward(layer.eval(), batches)  # the stage would go on with its running statistics


def precise_bn(module: nn.Module, batches: list[Tensor]) -> None:
    """Momentum 1, and the average of what each batch leaves: as the helpers do that are called precise BN."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]
    sums = [torch.zeros_like(norm.running_var) for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    for batch in batches:
        module(batch)
        for total, norm in zip(sums, norms, strict=True):
            total += norm.running_var
    for total, norm in zip(sums, norms, strict=True):
        norm.running_var.copy_(total / len(batches))


@pytest.mark.parametrize("estimate", [lambda module, batches: update_bn(batches, module), precise_bn])
@pytest.mark.parametrize("hooked", [False, True])
def test_statistics_estimated_anew(estimate: Callable[[nn.Module, list[Tensor]], None], hooked: bool) -> None:
    """By torch.optim.swa_utils.update_bn, and by precise BN; with hooks it is the BNs that move them."""
    layer, plain = pair(bottleneck=True)
    if hooked:
        Seen(*named(layer))
    batches = [torch.randn(4, 6, 4, 5, dtype=torch.float64) for _ in range(3)]
    for module in (layer, plain):
        estimate(module, batches)
    for name, norm in named(layer):
        assert error(norm.running_var, plain.vector(name, "running_var")) < 1e-10


def test_what_cannot_be_used_is_an_error() -> None:
    layer, _ = pair(bottleneck=True)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    for name in ("norm", "reduce_norm"):
        handle = getattr(layer, name).register_forward_hook(lambda _, args, out: out * 1.01)
        with pytest.raises(RuntimeError, match=f"a hook on {name}"):
            layer(x)
        handle.remove()
        handle = getattr(layer, name).register_forward_pre_hook(lambda _, args: (args[0].clamp_max(0.5),))
        with pytest.raises(RuntimeError, match=f"a hook on {name}"):
            layer(x)
        handle.remove()
        handle = getattr(layer, name).register_full_backward_hook(lambda *_: None)
        with pytest.raises(NotImplementedError, match=f"{name} has backward hooks"):
            layer(x)
        with torch.no_grad():
            layer(x)
        handle.remove()
    layer(x)


def test_what_a_hook_changes_is_an_error_however_little() -> None:
    """Noise and rounding, in any precision, in place or not."""
    for dtype, factor in ((torch.bfloat16, 1.05), (torch.float16, 1.01), (torch.float32, 1.0005)):
        layer = randomise(sct.SeqConv2d(8, 8, 4)).to(dtype).eval()
        x = torch.randn(2, 8, 4, 4).to(dtype)
        expected = layer(x)

        def in_place(_: nn.Module, args: tuple[Tensor], factor: float = factor) -> None:
            args[0].data.mul_(factor)

        for register, hook in (
            (layer.norm.register_forward_hook, lambda _, args, out, factor=factor: out * factor),
            (layer.norm.register_forward_hook, lambda _, args, out, factor=factor: out.mul_(factor)),
            (layer.norm.register_forward_pre_hook, lambda _, args, factor=factor: (args[0] * factor,)),
            (layer.norm.register_forward_pre_hook, in_place),
        ):
            handle = register(hook)
            with pytest.raises(RuntimeError, match="a hook on norm"):
                layer(x)
            handle.remove()
        assert torch.equal(layer(x), expected)


def test_hooks_where_several_threads_share_a_layer() -> None:
    layer, _ = pair(bottleneck=True)
    for _, norm in named(layer.eval()):
        norm.register_forward_hook(lambda *_: None)
    x = [torch.randn(2, 6, 4, 5, dtype=torch.float64) for _ in range(4)]
    expected = [layer(one) for one in x]

    def work(i: int) -> bool:
        return all(torch.equal(layer(x[i]), expected[i]) for _ in range(30))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_hooks_that_take_themselves_away_or_others_in() -> None:
    """Every BN's statistics move once a batch, whatever its hooks do with hooks."""
    for first in ("norm", "reduce_norm"):
        layer, plain = pair(bottleneck=True)
        norms, handles = dict(named(layer)), []
        x = torch.randn(2, 6, 4, 5, dtype=torch.float64)

        def once(*_: object, handles: list[torch.utils.hooks.RemovableHandle] = handles) -> None:
            for handle in handles:
                handle.remove()

        handles += [norm.register_forward_hook(once) for norm in norms.values()]
        layer(x), plain(x)
        other = norms["reduce_norm" if first == "norm" else "norm"]

        def add(*_: object, other: nn.Module = other) -> None:
            other.register_forward_hook(lambda *_: None)

        norms[first].register_forward_hook(add)
        layer(x), plain(x)
        for name, norm in norms.items():
            assert norm.num_batches_tracked == 2
            for vector in ("running_mean", "running_var"):
                assert error(getattr(norm, vector), plain.vector(name, vector)) < 1e-10, (name, vector)


def test_hooks_where_images_are_nan() -> None:
    """Some tools run a model on memory as they find it."""
    layer, _ = pair(bottleneck=True)
    seen = Seen(*named(layer.eval()))
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    x[1] = torch.nan
    out = layer(x)
    assert out[0].isfinite().all() and out[1].isnan().all()
    assert all(t[0].isfinite().all() for t in seen.tensors().values())


def test_hooks_where_tensors_have_no_values() -> None:
    """On the meta device and in FakeTensorMode, as summaries use them."""
    with FakeTensorMode():
        fake = small_imagenet()
        inputs = torch.randn(2, 3, 40, 40)
    for model, x in ((small_imagenet(device="meta"), torch.empty(2, 3, 40, 40, device="meta")), (fake, inputs)):
        called: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_hook(lambda module, args, out, name=name, called=called: called.append(name))
        assert model(x).shape == (2, 7) and "stages.0.reduce_norm" in called


def test_hooked_under_autocast_and_compiled() -> None:
    stage = randomise(sct.Stage(Plan.stage(8, 8, 1, tail=Tail(8, 1))))
    x, shapes = torch.randn(2, 8, 4, 6), SimpleNamespace(seen=[])
    for _, norm in named(stage):
        norm.register_forward_hook(lambda _, args, out: shapes.seen.append((out.dtype, out.isfinite().all().item())))
    with torch.autocast("cpu", torch.bfloat16):
        stage(x)
    assert shapes.seen == [(torch.bfloat16, True)] * 2
    for norm in (stage.norm, stage.reduce_norm):
        norm._forward_hooks.clear()
        norm.register_forward_hook(lambda _, args, out: None)
    expected = copy.deepcopy(stage)
    out = torch.compile(stage, fullgraph=True, backend="aot_eager")(x)
    assert error(out, expected(x)) < 1e-5
    assert error(stage.norm.running_mean, expected.norm.running_mean) < 1e-5
    assert stage.norm.num_batches_tracked == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS)
def test_hooks_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    """A network's own vectors are halves, a batch's are not."""
    layer, plain = pair(**LAYERS[kind])
    layer.to(dtype), plain.to(dtype)
    seen, expected = Seen(*named(layer)), Seen(*plain.bn_modules())
    x = torch.randn(2, 6, 4, 5).to(dtype)
    for training in (True, False):
        layer.train(training)(x), plain.train(training)(x)
        wanted = expected.tensors()
        for name, value in seen.tensors().items():
            assert value.dtype == dtype and error(value, wanted[name]) < 0.05, name
