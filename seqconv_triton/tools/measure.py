"""Measuring kernel configurations in the middle of a training step: which are right, which is fastest.

Nothing is known of the launchers: what a call writes is found by running it over random memory. A stage's results must
be those of PyTorch's own convolutions, a configuration's those of the heuristic's, before anything is timed.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqconv_triton.backend import use_backend
from seqconv_triton.kernels.candidates import candidates
from seqconv_triton.kernels.configs import architecture, hear_keys, use_tables
from seqconv_triton.kernels.heuristic import Key, LaunchConfig
from seqconv_triton.kernels.launch import Scratch, listen, record
from seqconv_triton.nn.layers import PackedSeqConv

# Lower quartile, median and upper quartile of a run's milliseconds.
Timer = Callable[[Callable[[], object]], Sequence[float]]

GAIN = 0.97
# Relative RMS error: of a configuration's results, and of a stage's beyond twice that of the aten backend.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 1e-2}
STAGE_IN_TF32 = 5e-3  # a stage's on a GPU: our products cut operands short where cuDNN's may round them
BLIND = 0.5  # never more than this: zeros are off by 1
# Of a BN's bias: near ReLU's corner, rounding turns single gradients on or off; where a channel never meets it, the sum
# of its gradients in front of the next BN is nothing but rounding, and no two tiles agree on that.
AWAY = 2.0


class Call(NamedTuple):
    """A launcher and its arguments by name."""

    launcher: Callable[..., Any]
    arguments: dict[str, Any]

    def run(self) -> Any:
        with record(ignore):
            return self.launcher(**self.arguments)

    def key(self) -> Key | None:
        """The key under which it asks for a configuration; None for a launcher that asks for none."""
        with listen(ignore), hear_keys() as keys:
            self.run()
        return keys[0] if keys else None

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in tensors(self.arguments))


def ignore(*_: object) -> None:
    """For launches and calls that nobody wants to hear of."""


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested arguments, but for scratch memory: its contents follow the tiles."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors([*value.values()])
    elif isinstance(value, tuple | list) and not isinstance(value, Scratch):
        for part in value:
            yield from tensors(part)


@dataclass(frozen=True)
class Work:
    """A key of a model and its launches in a training step.

    Measured is `call`, the one at `position` among those of `stage` with this key, for an input of `size`.
    """

    key: Key
    launches: int
    stage: PackedSeqConv
    size: torch.Size
    position: int
    call: Call


@dataclass
class Outcome:
    """What came of a key: its configuration and the heuristic's, median milliseconds, and what was turned down.

    `wrong` says why nothing was measured.
    """

    key: Key
    config: LaunchConfig
    heuristic: LaunchConfig
    milliseconds: float = math.nan
    heuristic_milliseconds: float = math.nan
    rejected: dict[LaunchConfig, str] = field(default_factory=dict)
    wrong: str = ""


def measure_stage(
    works: Sequence[Work],
    dtype: torch.dtype,
    device: torch.device,
    timer: Timer,
    deadline: float,
    done: Callable[[Outcome], None],
) -> None:
    """Measure keys of one stage until the deadline (of time.monotonic); `done` hears of every outcome.

    Where the stage's results are wrong, none is measured. Raises torch.OutOfMemoryError.
    """
    proposed = {work.key: candidates(work.key, architecture(device)) for work in works}
    stage = _prepared(works[0].stage, device)
    x = torch.randn(works[0].size, device=device).to(memory_format=torch.channels_last)
    if wrong := check(stage, x, dtype):
        for key, (heuristic, *_) in proposed.items():
            done(Outcome(key, heuristic, heuristic, wrong=wrong))
        return
    positions = {work.key: work.position for work in works}
    seen: Counter[Key] = Counter()

    def at_call(launcher: Callable[..., Any], arguments: dict[str, Any]) -> None:
        call = Call(launcher, dict(arguments))
        key = call.key()
        if key is None:
            return
        if positions.get(key) == seen[key] and time.monotonic() < deadline:
            done(measure(call, key, proposed[key], timer))
        seen[key] += 1

    # Under keys that nobody asks for, so that scratch memory has room for the smallest tiles.
    room = {key._replace(reduction=0): min(some, key=lambda config: config.block_p) for key, some in proposed.items()}
    with use_tables(room), record(at_call):
        _training_step(stage, x, "triton", dtype)


@torch.no_grad()
def _prepared(stage: PackedSeqConv, device: torch.device) -> PackedSeqConv:
    """A copy with memory on a device: random weights, zeros nowhere, features on both sides of ReLU's corner."""
    stage = copy.deepcopy(stage).to_empty(device=device).train()
    for part in stage.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.weight.uniform_(0.5, 1.5)
            part.bias.bernoulli_(0.75).mul_(2 * AWAY).sub_(AWAY)
    for weight in stage.parameters(recurse=False):
        weight.uniform_(-0.1, 0.1)
    return stage


def check(stage: PackedSeqConv, x: Tensor, dtype: torch.dtype) -> str:
    """What is wrong with the heuristic's output and gradients, or nothing: against the aten backend in float32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = _training_step(stage, x, "aten", torch.float32)
    plain = _training_step(stage, x, "aten", dtype)
    try:
        with use_tables():
            got = _training_step(stage, x, "triton", dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's, a driver's: the other stages are still tuned
        return type(error).__name__
    beyond = STAGE_IN_TF32 if dtype == torch.float32 and x.is_cuda else TOLERANCE[dtype]
    for name, value in exact.items():
        allowed = min(2 * _relative_error(plain[name], value) + beyond, BLIND)
        if not (off := _relative_error(got[name], value)) <= allowed:
            return f"{name} of its stage is off by {off:.0e} (allowed: {allowed:.0e})"
    return ""


def _relative_error(got: Tensor, expected: Tensor) -> float:
    distance, scale = torch.dist(got.float(), expected).item(), expected.norm().item()
    return distance / scale if scale else distance


def _training_step(stage: PackedSeqConv, x: Tensor, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and the gradients of x and all parameters, the upstream gradient always being the same.

    Backward runs in this thread: what is recorded and in use here holds there too.
    """
    wanted = {"x": x.detach().requires_grad_(), **dict(stage.named_parameters())}
    with (
        use_backend(backend),
        torch.autograd.set_multithreading_enabled(False),
        torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32),
    ):
        out = stage(wanted["x"])
        upstream = torch.randn(out.shape, generator=torch.Generator(x.device).manual_seed(0), device=x.device)
        gradients = torch.autograd.grad(out, [*wanted.values()], upstream.to(out.dtype))
    return {"output": out.detach()} | dict(zip(wanted, gradients, strict=True))


class Trial:
    """A call that can be repeated: its memory as it was, and which of it the heuristic's configuration writes."""

    def __init__(self, call: Call, key: Key, heuristic: LaunchConfig) -> None:
        self.call, self.key = call, key
        # Whole storages: what is written may be a part of what is read.
        found = {t.untyped_storage().data_ptr(): t for t in tensors(call.arguments) if t.is_floating_point()}
        flats = [t.new_empty(0).set_(t.untyped_storage()) for t in found.values() if t.numel()]
        self.memory = [(flat, flat.clone()) for flat in flats]
        try:
            random = [flat.uniform_(0.5, 1.5).clone() for flat in flats]
            self.launch(heuristic)
            self.written = [(new, (new != old).nonzero()[:, 0]) for new, old in zip(flats, random, strict=True)]
            del random
            self.poisoned = self.written
            # What is NaN now was read before it was written: it has to keep its value.
            first = zip(self.written, self.run(heuristic), strict=False)
            self.poisoned = [(flat, places[~result.isnan()]) for (flat, places), result in first]
            self.expected = self.run(heuristic)
        finally:
            self.restore()

    def restore(self) -> None:
        for flat, original in self.memory:
            flat.copy_(original)

    def launch(self, config: LaunchConfig, how: Callable[[Callable[[], Any]], Any] = lambda run: run()) -> Any:
        """Run the call so configured, or let `how` do it."""
        with use_tables({self.key: config}):
            return how(self.call.run)

    def run(self, config: LaunchConfig) -> list[Tensor]:
        """Copies of what the call writes and returns; what is left unwritten is NaN."""
        self.restore()
        for flat, places in self.poisoned:
            flat[places] = math.nan
        returned = self.launch(config)
        return [*(flat[places] for flat, places in self.written), *(result.clone() for result in tensors(returned))]


def measure(call: Call, key: Key, proposed: list[LaunchConfig], timer: Timer) -> Outcome:
    """Check and time configurations, the heuristic's first; the call's memory is afterwards what it was.

    The fastest replaces the heuristic's if it is faster by more than noise, twice. Whatever a configuration raises, the
    next one is tried. Raises torch.OutOfMemoryError where copies have no room.
    """
    heuristic, *others = proposed
    outcome = Outcome(key, heuristic, heuristic)
    try:
        trial = Trial(call, key, heuristic)
        if not any(result.numel() for result in trial.expected):
            outcome.wrong = "nothing is computed"
        elif not all(result.isfinite().all() for result in trial.expected):
            outcome.wrong = "results that are not finite"
        else:
            for config in others:
                if reason := _difference_of(trial, config):
                    outcome.rejected[config] = reason
            times = {config: trial.launch(config, timer) for config in proposed if config not in outcome.rejected}
            best = min(times, key=lambda config: times[config][1])
            if faster(times[best], times[heuristic]):
                times = {config: trial.launch(config, timer) for config in (heuristic, best)}
                outcome.config = best if faster(times[best], times[heuristic]) else heuristic
            outcome.milliseconds = times[outcome.config][1]
            outcome.heuristic_milliseconds = times[heuristic][1]
        trial.restore()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's, a driver's: the other kernels are still tuned
        outcome.wrong = type(error).__name__
    return outcome


def faster(new: Sequence[float], old: Sequence[float]) -> bool:
    """More than noise: quartiles that do not overlap, and a median at least 3 % lower."""
    return new[2] < old[0] and new[1] <= GAIN * old[1]


def _difference_of(trial: Trial, config: LaunchConfig) -> str:
    try:
        return difference(trial.run(config), trial.expected)
    except Exception as error:  # a compiler's, a driver's: this configuration is out
        return type(error).__name__


def difference(got: list[Tensor], expected: list[Tensor]) -> str:
    """What is wrong with results, or nothing: one element in 100,000 may be off by twenty times the RMS tolerance."""
    for result, exact in zip(got, expected, strict=True):
        exact = exact.float()
        away, tolerance = result.float() - exact, TOLERANCE[result.dtype]
        scale, rms = (value.norm().item() / math.sqrt(max(1, value.numel())) for value in (exact, away))
        if not rms <= tolerance * scale:
            return f"wrong by {rms / scale:.0e}" if scale else "wrong"
        if (away.abs() > 20 * tolerance * scale).sum().item() > 1e-5 * away.numel():
            return "wrong in some elements"
    return ""
