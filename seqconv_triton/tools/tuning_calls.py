"""What there is to tune in a model: its launchers' calls by key, and for each key the call that does most.

Calls are recorded while nothing is launched, on meta tensors or on a device; there `fill` gives them random inputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from seqconv_triton.kernels.configs import Key, LaunchConfig, assume, derive_again, hear_keys, pin
from seqconv_triton.kernels.launch import D_WEIGHT, MEAN, SHIFT, C, ConvShape, Features, Scratch, listen, record
from seqconv_triton.nn.layers import PackedSeqConv
from seqconv_triton.tools import tuning_plain
from seqconv_triton.tools.ahead import stage_inputs, stage_passes


@dataclass(frozen=True)
class Call:
    """A launcher's call: its arguments by name, and the key under which it asks for a configuration."""

    key: Key
    launcher: Callable[..., Any]
    given: dict[str, Any]

    @property
    def amount(self) -> int:
        """Multiply-adds."""
        shape: ConvShape = self.given["shape"]
        if self.key.kernel == "data_gradient":
            first, last = self.given["span"]
            inputs = self.given["channels"] if self.given["windows"] else shape.group_in
            return shape.out_pixels * shape.kernel**2 * shape.c_out * inputs * (last - first)
        times = len(self.given["dy"]) if self.key.kernel == "weight_gradient" else 1
        return shape.out_pixels * shape.kernel**2 * shape.c_out * shape.group_in * times

    @property
    def options(self) -> int:
        """How much is done beside the convolution."""
        values = [*self.given.values(), *(self.given.get("fresh") or ())]
        return sum(isinstance(value, Tensor | tuple) for value in values)

    def run(self) -> Any:
        return self.launcher(**self.given)


@dataclass(frozen=True)
class Work:
    """A key of a model: its launches in a training step, all their multiply-adds, and the call that does most.

    That call is the one at `position` of `stage`, for an input of `size`.
    """

    key: Key
    launches: int
    amount: int
    stage: PackedSeqConv
    size: torch.Size
    position: int
    call: Call


def collect(model: nn.Module, images: tuple[int, ...], dtype: torch.dtype, arch: str) -> list[Work]:
    """The keys of `model`, which is on the meta device, for images [N, C, H, W]; those with most arithmetic first.

    A training step has all keys of an evaluation.
    """
    found: dict[Key, Work] = {}
    with assume(arch):
        for stage, size in stage_inputs(model, images):
            for position, call in enumerate(recorded(stage, torch.empty(size, dtype=dtype, device="meta"))):
                own = most = Work(call.key, 1, call.amount, stage, size, position, call)
                if (known := found.get(call.key)) is not None:
                    most = max(known, own, key=lambda work: (work.call.amount, work.call.options))
                    most = replace(most, launches=known.launches + 1, amount=known.amount + call.amount)
                found[call.key] = most
    return sorted(found.values(), key=lambda work: -work.amount)


def recorded(stage: PackedSeqConv, x: Tensor) -> list[Call]:
    """The tunable calls of a training step of one stage, in their order; none is made."""
    noted: list[tuple[Callable[..., Any], dict[str, Any]]] = []

    def note(launcher: Callable[..., Any], given: dict[str, Any]) -> None:
        noted.append((launcher, dict(given)))
        derive_again()  # so that this very call asks for its configuration

    with hear_keys() as keys, listen(lambda *_: None), record(note), torch.no_grad():
        for run_pass in stage_passes(stage, x, training=True):
            run_pass()
    return [Call(key, *call) for key, call in zip(keys, noted, strict=True)]


def on_device(works: list[Work], dtype: torch.dtype, device: torch.device) -> list[Call]:
    """The calls of some keys of one stage, with memory behind them on a device."""
    stage = copy.deepcopy(works[0].stage).to_empty(device=device)
    calls = recorded(stage, torch.empty(works[0].size, dtype=dtype, device=device))
    return [calls[work.position] for work in works]


def fill(call: Call) -> None:
    """Random inputs: normal features, weights and gradients; BN's vectors between a half and one and a half."""
    for name, value in call.given.items():
        if isinstance(value, Features):
            value.rows.normal_()
            value.scale.uniform_(0.5, 1.5)
            value.shift.uniform_(0.5, 1.5)
        elif name == "norm" and value is not None:
            value.uniform_(0.5, 1.5)
        elif name == "fresh" and value is not None:
            value.norm.uniform_(0.5, 1.5)
            for part in (value.g, value.raw, value.upstream, value.passed):
                if part is not None:
                    part.normal_()
        elif isinstance(value, Tensor) and value.is_floating_point():
            for dimension, stride in enumerate(value.stride()):
                value = value if stride else value.narrow(dimension, 0, 1)  # what is expanded is filled once
            value.normal_()


def with_config(call: Call, config: LaunchConfig) -> Any:
    """A context in which the call's kernel is configured so."""
    return pin(call.key.kernel, config.block_p, config.block_k, config.num_warps, config.num_stages)


def roomy(call: Call) -> Call:
    """The call with room for the sums of the tiles that are pinned now."""
    if call.given.get("scratch") is None:
        return call
    shape: ConvShape = call.given["shape"]
    like = call.given["out"]
    pixels = max(shape.in_pixels, shape.out_pixels)
    return Call(call.key, call.launcher, {**call.given, "scratch": Scratch.allocate(like, pixels, like.shape[1])})


def results(call: Call, returned: Any) -> list[Tensor]:
    """What the call has written or returned: the tensors themselves."""
    norm = call.given.get("norm")
    if call.key.kernel == "weight_gradient":
        return [returned]
    if call.key.kernel == "convolution":
        if norm is None or call.given.get("scratch") is None:
            return [call.given["out"]]
        return [call.given["out"], *norm[MEAN : SHIFT + 1]]
    first = call.given["span"][0]
    completed = () if call.given.get("fresh") is None else (call.given["dy"][first],)
    return [call.given["out"], *(() if norm is None else norm[D_WEIGHT : C + 1]), *completed]


def plain(call: Call) -> list[Tensor]:
    """The same results from PyTorch's own convolutions, in float32."""
    function: Callable[..., list[Tensor]] = getattr(tuning_plain, call.key.kernel)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return function(**call.given)


def compute(call: Call) -> list[Tensor]:
    """Run the call and copy its results; what it leaves unwritten is NaN."""
    if call.key.kernel != "weight_gradient":
        for written in results(call, None):
            written.fill_(math.nan)
    return [result.clone() for result in results(call, roomy(call).run())]
