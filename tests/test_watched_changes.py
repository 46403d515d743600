"""Hooks on a stage's BNs that change what they compute with, wait for gradients, or bring weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import error, randomise, small_imagenet
from plain import pair
from test_watched import LAYERS, Seen, named
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import seqconv_triton as sct
from seqconv_triton.backend.ranks import Known
from seqconv_triton.nn import norm as norm_module


def set_eps(norm: nn.BatchNorm2d) -> None:
    norm.eps = 0.5


def new_mean(norm: nn.BatchNorm2d) -> None:
    norm.running_mean = norm.running_mean + 1


# What a pre-forward hook does, and in which mode it changes the result.
CHANGES: dict[str, tuple[Callable[[nn.BatchNorm2d], object], tuple[bool, ...]]] = {
    "eval()": (lambda norm: norm.eval(), (True,)),
    "train()": (lambda norm: norm.train(), (False,)),
    "eps": (set_eps, (True, False)),
    "another mean": (new_mean, (False,)),
    "variance in place": (lambda norm: norm.running_var.mul_(2), (False,)),
    "weight in place": (lambda norm: norm.weight.data.mul_(0.5), (True, False)),
    "bias in place": (lambda norm: norm.bias.data.add_(1e-3), (True, False)),
}


@pytest.mark.parametrize("which", ["norm", "reduce_norm"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_hook_changes_in_the_bn_is_an_error(change: str, which: str) -> None:
    """A stage has read its BNs before their hooks are called."""
    make, modes = CHANGES[change]
    for training in modes:
        layer, _ = pair(bottleneck=True)
        getattr(layer.train(training), which).register_forward_pre_hook(lambda norm, _: (make(norm), None)[1])
        with pytest.raises(RuntimeError, match=f"a hook on {which} changes what its BN computes with"):
            layer(torch.randn(2, 6, 4, 5, dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", LAYERS)
def test_weights_scaled_by_what_a_bn_returned(kind: str, training: bool) -> None:
    """As initialisers do that go once through the data: later BNs of that pass see what was computed before."""
    layer, plain = pair(**LAYERS[kind])
    seen, expected = Seen(*named(layer)), Seen(*plain.bn_modules())

    @torch.no_grad()
    def rescale(norm: nn.BatchNorm2d, _: object, out: Tensor) -> None:
        norm.weight.div_(out.std((0, 2, 3)))

    for _, norm in (*named(layer), *plain.bn_modules()):
        norm.register_forward_hook(rescale)
    for _ in range(2):
        x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
        assert error(layer.train(training)(x), plain.train(training)(x)) < 1e-10
        got, wanted = seen.tensors(), expected.tensors()
        assert max(error(got[name], value) for name, value in wanted.items()) < 1e-10
        for name, norm in named(layer):
            for vector in ("weight", "running_mean", "running_var"):
                assert error(getattr(norm, vector), plain.vector(name, vector)) < 1e-10, (name, vector)


@pytest.mark.parametrize("wait", [lambda t: t.register_hook(lambda gradient: None), lambda t: t.retain_grad()])
@pytest.mark.parametrize("behind", [True, False], ids=["out", "in"])
def test_hooks_that_wait_for_a_gradient_are_an_error(behind: bool, wait: Callable[[Tensor], None]) -> None:
    """None comes by what a BN was given or returns, as Grad-CAM and pruning by Taylor series want it."""
    for which in ("norm", "reduce_norm"):
        layer, _ = pair(bottleneck=True)
        x = torch.randn(2, 6, 4, 5, dtype=torch.float64)

        def hook(_: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            tensor = out if behind else args[0]
            if tensor.requires_grad:
                wait(tensor)

        getattr(layer, which).register_forward_hook(hook)
        with pytest.raises(NotImplementedError, match=f"{which} has backward hooks, or a hook on it waits"):
            layer(x)
        with torch.no_grad():
            layer(x)


def offload(model: nn.Module, empty: bool) -> None:
    """Weights and statistics are there from a module's pre-forward hook to its forward hook."""

    def bring(module: nn.Module, _: object) -> None:
        for tensors, kept in ((module._parameters, module.kept[0]), (module._buffers, module.kept[1])):
            for name, tensor in kept.items():
                if empty and tensors[name].is_floating_point():
                    tensors[name].data = tensor
                else:
                    tensors[name] = tensor

    def take_away(module: nn.Module, *_: object) -> None:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and empty and tensor.is_floating_point():
                    tensor.data = tensor.data.new_empty(0)
                elif tensor is not None:
                    away = tensor.to("meta")
                    tensors[name] = nn.Parameter(away) if isinstance(tensor, nn.Parameter) else away

    for module in model.modules():
        held = (module._parameters, module._buffers)
        module.kept = [
            {n: copy.copy(t.data) if empty else t for n, t in tensors.items() if t is not None} for tensors in held
        ]
        module.register_forward_pre_hook(bring)
        module.register_forward_hook(take_away)
        take_away(module)


@pytest.mark.parametrize("empty", [True, False], ids=["emptied", "meta"])
def test_weights_that_hooks_bring(empty: bool) -> None:
    """By hand, on every module, as for plain convs and BNs."""
    model, x = randomise(small_imagenet(), layer_b=0.3).eval(), torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        expected, features = model(x), model.forward_intermediates(x, intermediates_only=True)
        offload(model, empty)
        for _ in range(2):
            assert error(model(x), expected) < 1e-6
            for one, other in zip(model.forward_intermediates(x, intermediates_only=True), features, strict=True):
                assert error(one, other) < 1e-6
        assert all(p.is_meta or p.numel() == 0 for p in model.parameters())


def test_weights_that_nobody_brings_are_an_error_with_their_name() -> None:
    layer = sct.SeqConv2d(6, 12, 4)
    layer.norm.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"norm_weight has shape \(0,\)"):
        layer(torch.randn(2, 6, 4, 4))


@pytest.mark.parametrize("change", [lambda out: out.detach(), lambda out: out.clone()], ids=["detached", "copied"])
def test_hooks_that_change_only_gradients_are_an_error(change: Callable[[Tensor], Tensor]) -> None:
    layer, _ = pair()
    layer.norm.register_forward_hook(lambda norm, args, out: change(out))
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="a hook on norm"):
        layer(x)
    with torch.no_grad():
        layer(x)


def test_gradients_asked_for_where_none_are_needed() -> None:
    layer, _ = pair()
    layer.requires_grad_(False).norm.register_forward_hook(lambda norm, args, out: (out.requires_grad_(), None)[1])
    with pytest.raises(NotImplementedError, match="waits for the gradient"):
        layer(torch.randn(2, 6, 4, 5, dtype=torch.float64))


def test_hooks_for_all_modules_may_wait_for_gradients() -> None:
    """FlopCounterMode registers some on everything that is called."""
    layer, _ = pair(bottleneck=True)
    for _, norm in named(layer):
        norm.register_forward_hook(lambda *_: None)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(2, 6, 4, 5, dtype=torch.float64)).sum().backward()
    assert counter.get_total_flops() > 0


def test_a_copy_made_by_a_hook_is_a_bn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world of this process alone."""
    monkeypatch.setattr(norm_module, "group_name", lambda group: "all")
    monkeypatch.setattr(torch.ops.seqconv_triton, "sum_over_ranks", lambda local, group: local)
    copies, bn = [], sct.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(8)))[0]
    bn.register_forward_hook(lambda norm, args, out: copies.append(copy.deepcopy(norm)))
    x = torch.randn(2, 8, 4, 4)
    with norm_module.knowing(bn, Known(torch.ones(8), torch.ones(8), torch.tensor(32.0))):
        assert error(bn(x), (x - 1) / (1 + bn.eps) ** 0.5) < 1e-5
        copies[0]._forward_hooks.clear()
        expected = nn.functional.batch_norm(x, None, None, training=True)
        assert error(copies[0](x), expected) < 1e-5
