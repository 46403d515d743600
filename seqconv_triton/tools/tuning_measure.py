"""Measuring one key's candidates on a device: which are right, which is fastest, and whether that is more than noise.

The configuration in use must agree with plain PyTorch, every candidate with it, before anything is timed. A candidate
replaces it only if the slowest quarter of the candidate's times begins below the fastest quarter of the other's, and
its median is at least 3 % lower.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from seqconv_triton.kernels.configs import Key, LaunchConfig, config_for, heuristic
from seqconv_triton.kernels.launch import listen, precision
from seqconv_triton.kernels.tuning_candidates import MOST, candidates, shared_memory
from seqconv_triton.tools import ahead
from seqconv_triton.tools.tuning_calls import Call, compute, fill, plain, roomy, with_config

Timer = Callable[[Callable[[], object]], list[float]]  # milliseconds of some runs

ROUNDS = 3
GAIN = 0.97
HOPELESS = 1.5  # after the first round
# Relative RMS error of a result, and how many elements may be off by twenty times that: ReLU's corner is sharp.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 1e-2}
TF32_TOLERANCE = 4e-3
OFF = 1e-5
NO_TIME = "no time"
MOST_THREADS = 32  # a compilation takes some 200 MB
FLUSH_BYTES = 256 * 2**20  # more than any L2 cache


@dataclass
class Outcome:
    """What came of a key: the configuration in use before and after, median milliseconds, and what was turned down.

    `wrong` says why nothing could be compared: the key stays as it is.
    """

    key: Key
    before: LaunchConfig
    after: LaunchConfig
    milliseconds: dict[LaunchConfig, float] = field(default_factory=dict)
    rejected: dict[LaunchConfig, str] = field(default_factory=dict)
    wrong: str = ""


def contenders(key: Key, arch: str) -> list[LaunchConfig]:
    """The configuration in use, the heuristic's and the candidates, at most eight in all."""
    kernel, reduction, block_n, element_size, taps = key
    in_use = config_for(kernel, reduction, block_n, element_size, arch, taps)
    return list(dict.fromkeys([in_use, *candidates(key, arch)]))[:MOST]


def measure(call: Call, arch: str, timer: Timer, known: Mapping[LaunchConfig, str] | None = None) -> Outcome:
    """Check and time a call's contenders; `known` are those that need not be tried, and why.

    Never raises: whatever a candidate does, the next one is tried.
    """
    order = contenders(call.key, arch)
    outcome = Outcome(call.key, order[0], order[0], rejected=dict(known or {}))
    if outcome.rejected.get(order[0]) == NO_TIME:
        outcome.wrong = NO_TIME
        return outcome
    try:
        fill(call)
        right = _right(call, order, heuristic(call.key, arch), outcome)
        if right:
            _time(call, right, timer, outcome)
        else:
            outcome.wrong = outcome.rejected[heuristic(call.key, arch)]
    except Exception as error:  # a compiler's, a driver's: the other kernels are still tuned
        outcome.wrong = type(error).__name__
    return outcome


def _right(
    call: Call, order: list[LaunchConfig], fallback: LaunchConfig, outcome: Outcome
) -> dict[LaunchConfig, list[float]]:
    """Room for the times of the configurations that compute rightly, first the one that the others must beat.

    That is the one in use, or the heuristic's where it is wrong; without either there is nothing to compare with.
    """
    right: dict[LaunchConfig, list[float]] = {}
    expected = plain(call)
    for config in order:
        if config in outcome.rejected:
            continue
        if not right and config not in (order[0], fallback):
            break
        try:
            with with_config(call, config):
                got = compute(call)
            reason = difference(got, expected, call)
        except Exception as error:  # a compiler's, a driver's: this configuration is out
            reason = type(error).__name__
        if reason:
            outcome.rejected[config] = reason
            continue
        if not right:
            expected = got
        right[config] = []
    return right


def _time(call: Call, times: dict[LaunchConfig, list[float]], timer: Timer, outcome: Outcome) -> None:
    """Rounds over all that are right, so that a drift of the device's clock hits all alike; then the choice."""
    base = next(iter(times))
    for number in range(ROUNDS):
        for config in list(times):
            with with_config(call, config):
                times[config] += timer(roomy(call).run)
            if number == 0 and statistics.median(times[config]) > HOPELESS * statistics.median(times[base]):
                outcome.rejected[config] = "slow"
                del times[config]
    outcome.milliseconds = {config: statistics.median(values) for config, values in times.items()}
    better = [config for config, values in times.items() if faster(values, times[base])]
    outcome.after = min(better, key=lambda config: outcome.milliseconds[config], default=base)


def faster(new: list[float], old: list[float]) -> bool:
    """More than noise: quartiles that do not overlap, and a median at least 3 % lower."""
    upper = statistics.quantiles(new, n=4, method="inclusive")[2]
    lower = statistics.quantiles(old, n=4, method="inclusive")[0]
    return upper < lower and statistics.median(new) <= GAIN * statistics.median(old)


def difference(got: list[Tensor], expected: list[Tensor], call: Call) -> str:
    """What is wrong with results, or nothing."""
    reference = call.given["dy" if call.key.kernel == "weight_gradient" else "out"]
    tolerance = TF32_TOLERANCE if precision(reference.dtype) == "tf32" else TOLERANCE[reference.dtype]
    for result, exact in zip(got, expected, strict=True):
        exact = exact.float()
        away = result.float() - exact
        scale = exact.norm().item() / math.sqrt(max(1, exact.numel()))
        rms = away.norm().item() / math.sqrt(max(1, exact.numel()))
        if not rms <= tolerance * scale:
            return f"wrong by {rms / scale:.0e}" if scale else "wrong"
        if (away.abs() > 20 * tolerance * scale).float().mean() > OFF:
            return "wrong in some elements"
    return ""


def unusable(
    calls: Iterable[Call], arch: str, target: GPUTarget, deadline: float
) -> Iterator[tuple[Key, LaunchConfig, str]]:
    """Compile all contenders into Triton's cache, in threads; why each cannot be used ("" if it can).

    What is not compiled by the deadline (of time.monotonic) is turned down: there is no time to measure it.
    """
    jobs = {}
    pool = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))
    try:
        for call in calls:
            for config in contenders(call.key, arch):
                jobs[pool.submit(_verdict, _launches(call, config), arch, target)] = call.key, config
        for job in as_completed(jobs, timeout=max(0.0, deadline - time.monotonic())):
            key, config = jobs.pop(job)
            # What runs without measuring may spill: that is what the others have to beat.
            unmeasured = config in (contenders(key, arch)[0], heuristic(key, arch))
            yield key, config, "" if unmeasured and job.result() == "spills" else job.result()
    except TimeoutError:
        for key, config in jobs.values():
            yield key, config, NO_TIME
    finally:
        pool.shutdown(cancel_futures=True)


def _launches(call: Call, config: LaunchConfig) -> list[ahead.Launch]:
    """What a call would launch."""
    found = []
    with (
        with_config(call, config),
        listen(lambda kernel, given, constants: found.append(ahead.describe(kernel, given, dict(constants)))),
        torch.no_grad(),
    ):
        call.run()
    return found


def _verdict(items: list[ahead.Launch], arch: str, target: GPUTarget) -> str:
    for item in items:
        try:
            compiled = ahead.build(item, target)
        except Exception as error:  # a compiler's: any
            return type(error).__name__
        if compiled.metadata.shared > shared_memory(arch):
            return "shared memory"
        try:
            spills = ahead.machine_code(compiled)[1]
        except (OSError, ValueError, RuntimeError):  # no disassembler: it is measured all the same
            spills = 0
        if spills:
            return "spills"
    return ""


def gpu_timer(device: torch.device, limit: float = 8.0) -> Timer:
    """Times runs by events within about `limit` milliseconds, three at least and 25 at most.

    Before each run a large memory is written: it empties the L2 cache, and keeps the GPU busy while the CPU issues the
    run, so that a short kernel's time is its own and not that of its launch.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    def events(run: Callable[[], object], count: int, flushes: int) -> list[float]:
        pairs = [(event(), event()) for _ in range(count)]
        for start, end in pairs:
            for _ in range(flushes):
                flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(device)
        return [max(1e-4, start.elapsed_time(end)) for start, end in pairs]

    events(flush.zero_, 2, 0)
    own = min(events(flush.zero_, 3, 0))

    def timer(run: Callable[[], object]) -> list[float]:
        run()
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        run()
        issue = (time.perf_counter() - began) * 1e3
        flushes = math.ceil(1.5 * issue / own)
        estimate = min(events(run, 2, flushes))
        return events(run, max(3, min(25, int(limit / estimate))), flushes)

    return timer
