"""Gradients of a stage in half precision, against float64 at the very features that the kernels rounded and kept.

A feature near ReLU's corner falls on either side of it as it is rounded, and one of 60 pixels then moves a gradient by
percents, in any implementation. So the float64 reference takes the values of `buffer`, `z` and the batch statistics
from the kernels, node by node, and differentiates around them: both sides of every ReLU agree by construction, and what
is left is the rounding of the backward pass itself. Outputs are compared with plain float64 beside it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seqconv_triton.backend import reference
from seqconv_triton.backend.contract import FOLDED, StageParameters, Statistics
from seqconv_triton.nn.layers import Stage
from seqconv_triton.plan_text import encode


def replaced(value: Tensor, by: Tensor) -> Tensor:
    """The value of `by`, with the gradient of `value`."""
    return value + (by.to(value.dtype) - value).detach()


def gradients(out: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a sum whose weights are exact in half precision."""
    wave = torch.sin(torch.arange(out.numel(), dtype=torch.float64, device=out.device)).view(out.shape)
    loss = (out.double() * wave.bfloat16().double()).sum()
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))


def compare(stage: Stage, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Tensor, Tensor]]:
    """(what the kernels give, float64) of the output and of every gradient; `x` and conv weights in x.dtype."""
    plan, training = stage.plan, stage.training
    parameters, running = stage.parameters_and_statistics()
    names = [name for name, p in zip(parameters._fields, parameters, strict=True) if p is not None]
    mask = stage.draw_mask(x)

    def leaves(dtype: torch.dtype, precise: torch.dtype) -> dict[str, Tensor]:
        """x and parameters; float64 ones start from the rounded values."""
        found = {"x": x} | {name: getattr(parameters, name) for name in names}
        return {
            name: t.detach().to(precise if "norm" in name else x.dtype).to(dtype if "norm" not in name else precise)
            .requires_grad_()
            for name, t in found.items()
        }  # fmt: skip

    def packed(given: dict[str, Tensor]) -> StageParameters:
        return StageParameters(*(given.get(name) for name in parameters._fields))

    given = leaves(x.dtype, torch.float32)
    out, buffer, z, *batch, _ = torch.ops.seqconv_triton.stage_forward(
        given["x"], None, *packed(given), *(running or (None,) * 4), mask,
        encode(plan), stage.eps, training, True, True, "", "triton",
    )  # fmt: skip
    got = gradients(out, given)

    exact_given = leaves(torch.float64, torch.float64)
    exact_mask = None if mask is None else mask.double()
    double = Statistics(*(None if s is None else s.double() for s in running or FOLDED))
    call: tuple[Any, ...] = (exact_given["x"], None, packed(exact_given), None if training else double, exact_mask)
    exact = reference.stage(*call, plan, stage.eps, False, "").out.detach()

    first = plan.total_channels - plan.normalized_channels
    inner = z.permute(1, 0, 4, 2, 3).flatten(1, 2) if plan.bottleneck else buffer

    def activate(self: reference.Norm, raw: Tensor) -> Tensor:
        """`reference.Norm.activate` at the kept features and statistics."""
        main = self.weight is call[2].norm_weight
        channels = slice(self.start, self.start + raw.shape[1])
        self.start = channels.stop
        raw = replaced(raw, buffer[:, first:][:, channels] if main else inner[:, channels])
        mean, var = self.mean, self.var
        if mean is not None and var is not None:
            mean, var = mean[channels], var[channels]
        else:
            var, mean = torch.var_mean(raw, (0, 2, 3), unbiased=False)
            mean, var = (
                replaced(s, kept[channels])
                for s, kept in zip((mean, var), batch[:2] if main else batch[2:], strict=True)
            )
            self.batch.append((mean.detach(), var.detach()))
        scale = self.weight[channels] * (var + self.eps).rsqrt()
        return F.relu((raw - mean[:, None, None]) * scale[:, None, None] + self.bias[channels][:, None, None])

    with monkeypatch.context() as patch:
        patch.setattr(reference.Norm, "activate", activate)
        expected = gradients(reference.stage(*call, plan, stage.eps, False, "").out, exact_given)
    return {"output": (out, exact)} | {name: (got[name], value) for name, value in expected.items()}
