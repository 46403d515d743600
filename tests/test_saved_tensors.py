"""Saved tensors that come back with other strides, from hooks, `save_on_cpu` or offloading, change no gradient."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from helpers import randomise
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import seqconv_triton as sct
from seqconv_triton.plan import Plan, Tail

facility = pytest.mark.facility


def through_disk(t: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(t.numpy(force=True).copy("C"), file)
    file.seek(0)
    return torch.from_numpy(torch.load(file, weights_only=False)).to(t.device)


def dimensions_reversed(t: Tensor) -> Tensor:
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def with_gaps(t: Tensor) -> Tensor:
    """NaN between the elements, for whoever takes them to be dense."""
    gap = torch.full_like(t, float("nan")) if t.is_floating_point() else torch.full_like(t, -1)
    return torch.stack([t, gap], -1)[..., 0]


def hooks(unpack: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    return saved_tensors_hooks(lambda t: t, unpack)


HOOKS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "contiguous copy": lambda: hooks(lambda t: t.clone(memory_format=torch.contiguous_format)),
    "save_on_cpu": save_on_cpu,  # on a CPU the very same tensors: the others stand for it there
    "offloaded to a file": lambda: hooks(through_disk),
    "dimensions reversed": lambda: hooks(dimensions_reversed),
    "gaps between elements": lambda: hooks(with_gaps),
}
MODULES: dict[str, Callable[[], torch.nn.Module]] = {
    "basic": lambda: sct.SeqConv2d(16, 16, 8),
    "bottleneck": lambda: sct.SeqConv2d(16, 24, 8, bottleneck=True, subgroups=2, dropout=0.3),
    "dense": lambda: sct.SeqConv2d(6, 16, 8, bottleneck=True, windowed=False),
    "stage": lambda: sct.Stage(Plan.stage(16, 16, 1, extension=16, tail=Tail(16, 3, 2, 4)), dropout=0.2),
}


def gradients(module: torch.nn.Module, x: Tensor, hook: AbstractContextManager[None]) -> dict[str, Tensor]:
    torch.manual_seed(3)  # dropout masks
    x = x.clone().requires_grad_()
    with hook:
        out = module(x)
    named = {"x": x, **dict(module.named_parameters())}
    wave = torch.sin(torch.arange(out.numel(), device=out.device)).view(out.shape)
    return dict(zip(named, torch.autograd.grad(out, list(named.values()), wave), strict=True))


@facility("saved_tensors_hooks, save_on_cpu, activation offloading: the same gradients")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("size", [(2, 5, 3), (3, 1, 1)], ids=["5x3", "one-pixel"])
@pytest.mark.parametrize("module", MODULES)
def test_hooks(place: torch.device, module: str, size: tuple[int, int, int], training: bool) -> None:
    built = randomise(MODULES[module]()).train(training).to(place)
    images, height, width = size
    x = torch.randn(images, 6 if module == "dense" else 16, height, width, device=place)
    expected = gradients(built, x, hooks(lambda t: t))
    for hook, make in HOOKS.items():
        got = gradients(built, x, make())
        assert {name for name, gradient in expected.items() if not torch.equal(got[name], gradient)} == set(), hook


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_the_reference(hook: str) -> None:
    module = randomise(MODULES["stage"]())
    x = torch.randn(2, 16, 5, 3)
    with sct.use_backend("reference"):
        expected = gradients(module, x, hooks(lambda t: t))
        got = gradients(module, x, HOOKS[hook]())
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient)


@pytest.mark.parametrize("layout", [dimensions_reversed, with_gaps, lambda t: t[:1, :1, :1, :1].expand_as(t)])
@pytest.mark.parametrize("module", ["bottleneck", "stage"])
def test_upstream_gradient_in_any_layout(place: torch.device, module: str, layout: Callable[[Tensor], Tensor]) -> None:
    built = randomise(MODULES[module]()).eval().to(place)
    x = torch.randn(2, 16, 5, 3, device=place, requires_grad=True)
    out = built(x)
    upstream = layout(torch.randn_like(out))
    (got,) = torch.autograd.grad(out, x, upstream, retain_graph=True)
    (expected,) = torch.autograd.grad(out, x, upstream.contiguous(memory_format=torch.channels_last))
    assert torch.equal(got, expected)
