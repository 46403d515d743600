"""Launches that are replayed get what the launchers would have passed, at the addresses of other tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import randomise
from torch import Tensor

pytest.importorskip("triton", reason="Triton is for Linux only")

import triton

import seqconv_triton as sct
from seqconv_triton.backend.triton import backward, forward
from seqconv_triton.kernels import configs, launch, replay
from seqconv_triton.plan import Plan, Tail

PLANS = {
    "stage": Plan.stage(16, 8, 2, subgroups=2, extension=16, tail=Tail(32, 3, 2, 4)),
    "dense": Plan.stage(16, 8, 1, entry_channels=8, tail=Tail(16, 1)),
    "basic": Plan.stage(16, 8, 1, bottleneck=False, windowed=False),
}


class Compiled:
    """A compiled kernel that notes what the driver would be given."""

    function = packed_metadata = None

    def __init__(self, kernel: Any, heard: list[Any]) -> None:
        self.kernel, self.heard = kernel, heard

    def run(self, x: int, y: int, z: int, stream: Any, *rest: Any) -> None:
        assert stream == triton.runtime.driver.active.stream
        self.heard.append((self.kernel.__name__, (x, y, z), rest[5:]))


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Any], list[Any]]]:
    """Nothing is launched; pairs of what launchers would pass, tensors as addresses, and what was replayed."""
    pairs: list[tuple[list[Any], list[Any]]] = []
    heard: list[Any] = []
    active = SimpleNamespace(get_current_stream=lambda device: active.stream, get_current_device=lambda: 0, stream=7)
    monkeypatch.setattr(launch, "_launch", lambda kernel, grid, arguments: Compiled(kernel, heard))
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(replay, "replayable", lambda tensors: True)
    monkeypatch.setattr(replay, "_programs", type(replay._programs)())
    alive: list[Any] = []

    def replayed(name: Any, memory: tuple[Any, ...], launches: Callable[[], None]) -> None:
        alive.append(memory)  # no tensor may get the address of one before it
        passed: list[Any] = []

        def note(kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
            values = [arguments[name] for name in kernel.arg_names]
            values = [v.data_ptr() if isinstance(v, Tensor) else v for v in values]
            passed.append((kernel.__name__, (*grid, 1, 1)[:3], tuple(values)))

        with launch.note(note):
            launches()
        heard.clear()
        replay.replayed(name, memory, launches)
        pairs.append((passed, list(heard)))
        for _ in range(2 * bool(heard)):  # and again where everything lies where it lay
            heard.clear()
            active.stream += 1
            replay.replayed(name, memory, launches)
            assert heard == pairs[-1][1]

    for module in (forward, backward):
        monkeypatch.setattr(module, "replayed", replayed)
    return pairs


def step(stage: sct.Stage, images: int = 2, *, dtype: torch.dtype = torch.float32) -> None:
    x = torch.randn(images, stage.plan.in_channels, 5, 3, dtype=dtype).requires_grad_()
    with sct.use_backend("triton"):
        stage(x).sum().backward()


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recompute"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_second_step_is_replayed_at_its_own_addresses(
    plan: str, training: bool, dropout: float, recompute: bool, replays: list[tuple[list[Any], list[Any]]]
) -> None:
    first, second = (
        randomise(sct.Stage(PLANS[plan], dropout=dropout), seed).train(training).to(torch.float32) for seed in (0, 1)
    )
    first.recompute = second.recompute = recompute
    step(first)
    # Forward, backward, and between them the 1×1 convs once more.
    parts = 3 if recompute and PLANS[plan].bottleneck else 2
    assert [heard for _, heard in replays] == [[]] * parts, "the first step launches for itself"
    replays.clear()
    step(second)
    step(first)
    for passed, heard in replays:
        assert len(passed) > 2 and heard == passed


def test_what_launches_depend_on_is_noted_anew(replays: list[tuple[list[Any], list[Any]]]) -> None:
    stage = randomise(sct.Stage(PLANS["stage"]))
    step(stage)
    changes: list[tuple[dict[str, Any], contextlib.AbstractContextManager[Any]]] = [
        ({"images": 3}, contextlib.nullcontext()),
        ({}, configs.pin("convolution", 32, 16)),
    ]
    for options, block in changes:
        replays.clear()
        with block:
            step(stage, **options)
        assert replays[0][1] == [], "another pass was replayed"
    for change in ("eval", "eps", "half", "frozen"):
        other = randomise(sct.Stage(PLANS["stage"]))
        if change == "eval":
            other.eval()
        elif change == "eps":
            other.norm.eps = other.reduce_norm.eps = 1e-3
        replays.clear()
        if change == "half":
            step(other.half(), dtype=torch.float16)
        elif change == "frozen":
            with torch.no_grad(), sct.use_backend("triton"):
                other(torch.randn(2, 16, 5, 3))
        else:
            step(other)
        assert replays[0][1] == [], change


def test_shared_memory_is_not_replayed(replays: list[tuple[list[Any], list[Any]]]) -> None:
    """Where an address lies in two tensors, nothing says to which of them it belongs next time."""
    stage = randomise(sct.Stage(PLANS["stage"]))
    stage.norm.bias = stage.norm.weight
    for _ in range(2):
        step(stage)
    assert all(heard == [] for _, heard in replays)


def test_programs_are_bounded(replays: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 3)
    for images in (1, 2, 3, 4):
        step(randomise(sct.Stage(PLANS["basic"])), images)
    assert len(replay._programs) == 3
