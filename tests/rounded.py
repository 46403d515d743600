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
from seqconv_triton.backend.contract import StageArguments
from seqconv_triton.nn.layers import Stage
from seqconv_triton.ops.registered import FlatOutputs, flatten, unflatten


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
    plan = stage.plan
    norms, statistics = stage.norms()
    arguments = StageArguments(plan, stage.convs(), norms, statistics, stage.eps, stage.draw_mask(x))
    call = flatten(arguments, "", "triton")
    if statistics == "batch":
        call |= {name: None for name in call if name.endswith(("_mean", "_var"))}
    learned = [name for name, value in call.items() if name.endswith(("_weight", "_bias")) and value is not None]

    def leaves(dtype: torch.dtype, precise: torch.dtype) -> dict[str, Tensor]:
        """x and parameters; float64 ones start from the rounded values."""
        found = {"x": x} | {name: call[name] for name in learned}
        return {
            name: t.detach().to(precise if "norm" in name else x.dtype).to(dtype if "norm" not in name else precise)
            .requires_grad_()
            for name, t in found.items()
        }  # fmt: skip

    rounded = leaves(x.dtype, torch.float32)
    result = FlatOutputs(
        *torch.ops.seqconv_triton.stage_forward(**call | rounded, shortcut=None, keep=True, keep_inner=True)
    )
    got = gradients(result.out, rounded)

    exact = leaves(torch.float64, torch.float64)
    double = {name: t.double() if isinstance(t, Tensor) else t for name, t in call.items()}
    exact_call: tuple[Any, ...] = (exact["x"], None, unflatten(double | exact), False, "")
    out = reference.stage(*exact_call).out.detach()

    first = plan.total_channels - plan.normalized_channels
    inner = result.z.permute(1, 0, 4, 2, 3).flatten(1, 2) if plan.bottleneck else result.buffer

    def activate(self: reference.Norm, raw: Tensor) -> Tensor:
        """`reference.Norm.activate` at the kept features and statistics."""
        main = self.weight is exact["norm_weight"]
        channels = slice(self.start, self.start + raw.shape[1])
        self.start = channels.stop
        raw = replaced(raw, result.buffer[:, first:][:, channels] if main else inner[:, channels])
        mean, var = self.mean, self.var
        if mean is not None and var is not None:
            mean, var = mean[channels], var[channels]
        else:
            var, mean = torch.var_mean(raw, (0, 2, 3), unbiased=False)
            kept = (result.norm_mean, result.norm_var) if main else (result.reduce_norm_mean, result.reduce_norm_var)
            mean, var = (replaced(s, batch[channels]) for s, batch in zip((mean, var), kept, strict=True))
            self.batch.append((mean.detach(), var.detach()))
        scale = self.weight[channels] * (var + self.eps).rsqrt()
        return F.relu((raw - mean[:, None, None]) * scale[:, None, None] + self.bias[channels][:, None, None])

    with monkeypatch.context() as patch:
        patch.setattr(reference.Norm, "activate", activate)
        expected = gradients(reference.stage(*exact_call).out, exact)
    return {"output": (result.out, out)} | {name: (got[name], value) for name, value in expected.items()}
