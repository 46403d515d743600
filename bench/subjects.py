"""From a subject's name to a module with random weights and its input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import seqconv_triton as sct
from bench.cases import LAYERS
from seqconv_triton.nn.layers import PackedSeqConv
from seqconv_triton.plan import Plan


@dataclass(frozen=True)
class Shape:
    """What a subject takes: [batch, channels, size, size]."""

    channels: int
    size: int


def stage_of(name: str, image: int) -> tuple[Plan, Shape]:
    """Plan and input of a model's stage, "MODEL stage NUMBER"; nothing is computed."""
    model_name, _, number = name.rpartition(" stage ")
    model = sct.create_model(model_name, device="meta")
    plans = {i + 1: stage.plan for i, stage in enumerate(model.stages) if isinstance(stage, PackedSeqConv)}
    if int(number) not in plans:
        raise ValueError(f"{model_name} has stages {', '.join(map(str, plans))}, not {number}")
    seen: list[Shape] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(Shape(inputs[0].shape[1], inputs[0].shape[2]))

    model.stages[int(number) - 1].register_forward_pre_hook(note)
    with torch.no_grad():
        model.eval()(torch.empty(1, 3, image, image, device="meta"))
    return plans[int(number)], seen[0]


def make(name: str, image: int) -> tuple[nn.Module, Shape]:
    """The module, with random weights and zero-initialised layers made random, and the shape of its input.

    Raises ValueError for a name that is none of a model, a stage, a layer, a depth or a width.
    """
    torch.manual_seed(0)
    module: nn.Module
    if name in sct.list_models():
        module, shape = sct.create_model(name), Shape(3, image)
    elif " stage " in name:
        plan, shape = stage_of(name, image)
        module = sct.Stage(plan)
    elif name in LAYERS:
        (c_in, c_out, k, size), options = LAYERS[name]
        module, shape = sct.SeqConv2d(c_in, c_out, k, **options), Shape(c_in, size)  # type: ignore[arg-type]
    elif name.startswith("depth "):
        module, shape = sct.Stage(Plan.stage(128, 32, int(name.split()[-1]))), Shape(128, 28)
    elif name.startswith(("width ", "dense width ")):
        groups = int(name.split()[-1])
        module = sct.SeqConv2d(256, 64 * groups, 64, bottleneck=True, windowed=not name.startswith("dense"))
        shape = Shape(256, 14)
    else:
        raise ValueError(f"unknown subject {name!r}")
    return channels_last(randomise(module)), shape


def channels_last(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@torch.no_grad()
def randomise(module: nn.Module) -> nn.Module:
    """Fill what starts at zero: zeros would make the check before timing blind. Residual layers stay small.

    Dropout is off: contenders would draw different masks.
    """
    for part in module.modules():
        if isinstance(part, PackedSeqConv):
            plan, part.dropout = part.plan, 0.0
            deviation = (2 / (9 * (plan.group_width // plan.subgroups if plan.bottleneck else plan.in_channels))) ** 0.5
            weights = part.transform_weight
            assert weights is not None
            weights.normal_(0, deviation)
            pieces = weights.split(plan.group_width) if weights.dim() > 1 else ()
            for group, weight in zip(plan.groups, pieces, strict=False):
                if group.residual_start is not None:
                    weight.mul_(0.1)
    return module


def random_input(shape: Shape, batch: int, device: torch.device) -> Tensor:
    """Images, or features, from a normal distribution; channels_last, float32."""
    x = torch.randn(batch, shape.channels, shape.size, shape.size, device=device)
    return x.contiguous(memory_format=torch.channels_last)
