"""What several test files share: random parameters, comparison by relative RMS error, both backends side by side."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import seqconv_triton as sct
from seqconv_triton.backend.packing import transform_weights
from seqconv_triton.nn.layers import PackedSeqConv
from seqconv_triton.ops import registered

DOCS = Path(__file__).parent.parent / "docs"
Run = Callable[[nn.Module, Tensor], Sequence[Tensor]]


def randomise(module: nn.Module, seed: int = 0, layer_b: float = 1.0) -> nn.Module:
    """Random weights of keeping scale, affines and running statistics: zero-initialised layers would hide errors.

    `layer_b` scales the 3×3 weights of the residual layers B, whose full scale amplifies rounding in deep networks.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if not tensor.is_floating_point():
                continue
            random = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            flat_conv = name.endswith("_weight")
            if name.endswith("running_var") or (name.endswith("weight") and tensor.dim() == 1 and not flat_conv):
                value = 1 + 0.5 * torch.tanh(random)
            elif tensor.dim() == 1 and not flat_conv:
                value = 0.3 * random
            else:
                fan_in = tensor[0].numel() if tensor.dim() > 1 else 64
                value = random * (2 / fan_in) ** 0.5
            tensor.copy_(value)
        for part in module.modules():
            if isinstance(part, PackedSeqConv) and layer_b != 1:
                for group, weight in zip(
                    part.plan.groups, transform_weights(part.transform_weight, part.plan), strict=True
                ):
                    if group.residual_start is not None:
                        weight.mul_(layer_b)
    return module


class SmallImageNet(sct.models.imagenet.ImageNetNetwork):
    """Stem, four stages and head as in the paper's networks, subgroups and all, with few channels."""

    rows = tuple(
        sct.models.imagenet.StageRow(channels, k, s, blocks)
        for channels, k, s, blocks in ((8, 4, 2, 1), (16, 8, 2, 2), (32, 16, 1, 1), (64, 32, 1, 1))
    )


def small_imagenet(**options: bool) -> SmallImageNet:
    return SmallImageNet(7, **options)


@contextmanager
def exact_kernels() -> Iterator[None]:
    """Kernels multiply float32 exactly on a GPU, as in the interpreter; for users that is PyTorch's to do."""
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with exact, patch.object(registered, "left_to_pytorch", lambda x: False):
        yield


def error(got: Tensor, expected: Tensor) -> float:
    """Relative RMS error; exact zeros must be met exactly."""
    got, expected = got.detach().double(), expected.detach().double()
    scale = expected.norm().item()
    distance = (got - expected).norm().item()
    return distance if scale == 0 else distance / scale


def everything(module: nn.Module, x: Tensor, run: Run) -> dict[str, Tensor]:
    """Outputs, the gradients of x and of every parameter for fixed upstream gradients, and the buffers afterwards."""
    module = copy.deepcopy(module)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(5)  # dropout masks
    outputs = run(module, x)
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    for output in outputs:
        wave = torch.sin(torch.arange(output.numel(), dtype=torch.float64, device=output.device)).view(output.shape)
        loss = loss + (output.double() * wave).sum()
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, [x, *named.values()])
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    results |= dict(zip(["x", *named], gradients, strict=True))
    return results | dict(module.named_buffers())


def assert_backends_agree(module: nn.Module, x: Tensor, run: Run, tolerance: float, backend: str = "aten") -> None:
    """Output, every gradient and every running statistic of a backend equal the reference's."""
    with sct.use_backend("reference"):
        expected = everything(module, x, run)
    with sct.use_backend(backend):
        got = everything(module, x, run)
    errors = {name: error(got[name], expected[name]) for name in expected}
    wrong = {name: e for name, e in errors.items() if not e <= tolerance}
    assert not wrong, wrong


class _GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient.clamp_min(0) * (x > 0)


def guided_gradient(model: nn.Module, x: Tensor, target: int) -> Tensor:
    """Guided backpropagation in the paper's equations: every ReLU passes positive gradients alone."""
    x = x.detach().clone().requires_grad_()
    guided = patch.object(torch.nn.functional, "relu", lambda x, inplace=False: _GuidedReLU.apply(x))
    with sct.use_backend("reference"), guided:
        (gradient,) = torch.autograd.grad(model(x)[:, target].sum(), x)
    return gradient


def python_blocks(page: str) -> list[str]:
    """The Python code blocks of a page in docs/."""
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
