"""Switches hold for one thread (or asyncio task): two that overlap in time leave each other, and nothing, behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import seqconv_triton as sct
from seqconv_triton.backend import backend_for, chosen

Parts = Generator[None, None, None]


def take_turns(*threads: Callable[[], Parts]) -> None:
    """Run each in a thread of its own; at every `yield` it is the next one's turn."""
    turns = [threading.Semaphore(int(i == 0)) for i in range(len(threads))]
    errors: list[BaseException] = []

    def work(i: int) -> None:
        parts = threads[i]()
        running = True
        while running:
            assert turns[i].acquire(timeout=60)
            try:
                running = next(parts, parts) is not parts
            except BaseException as error:
                errors.append(error)
                running = False
            done.update({i} if not running else ())
            for step in range(1, len(threads) + 1):
                following = (i + step) % len(threads)
                if following not in done:
                    turns[following].release()
                    break

    done: set[int] = set()
    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(threads))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]


def computing() -> str:
    return backend_for(torch.empty(0))


def test_overlapping_backends() -> None:
    """A enters, B enters, A leaves, B leaves: with one variable for all, A's end restores nothing and B's end A's."""

    def first() -> Parts:
        with sct.use_backend("reference"):
            assert computing() == "reference"
            yield
            assert computing() == "reference"
        assert computing() == "aten"
        yield
        assert computing() == "aten"

    def second() -> Parts:
        with sct.use_backend("triton"), sct.use_backend(None), sct.use_backend("triton"):
            assert computing() == "triton"
            yield
            assert computing() == "triton"
        assert computing() == "aten"

    take_turns(first, second)
    assert computing() == "aten" and chosen.name is None


def test_one_block_object_in_two_threads() -> None:
    block = sct.use_backend("reference")

    def user() -> Parts:
        with block:
            yield
            with block:
                yield
                assert computing() == "reference"
            assert computing() == "reference"
        assert computing() == "aten"

    take_turns(user, user)


def test_asyncio_tasks_have_their_own() -> None:
    async def user(name: str) -> None:
        with sct.use_backend(name):
            await asyncio.sleep(0)
            assert computing() == name
            await asyncio.sleep(0)
        assert computing() == "aten"

    async def both() -> None:
        await asyncio.gather(user("reference"), user("triton"))

    asyncio.run(both())


def test_compiled_model_follows_each_thread() -> None:
    """One graph for each backend; which of them runs is asked in the thread that calls."""
    torch._dynamo.reset()
    layer = sct.SeqConv2d(8, 8, 4).eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(1, 8, 4, 4)

    def ops() -> list[bool]:
        return [any("seqconv_triton" in str(node.target) for node in graph.graph.nodes) for graph in counter.graphs]

    def first() -> Parts:
        with sct.use_backend("reference"):
            compiled(x)
            assert ops() == [False]
            yield
            compiled(x)
        compiled(x)

    def second() -> Parts:
        compiled(x)
        assert ops() == [False, True]
        yield
        with sct.use_backend("reference"):
            compiled(x)

    take_turns(first, second)
    assert counter.frame_count == 2


def test_blocks_inside_a_compiled_function() -> None:
    torch._dynamo.reset()
    layer = sct.SeqConv2d(8, 8, 4).eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")

    def both(x: Tensor) -> Tensor:
        with sct.use_backend("reference"):
            plain = layer(x)
            with sct.use_backend(None):
                ours = layer(x)
        return plain - ours

    with sct.use_backend("reference"):
        assert torch.compile(both, backend=counter, fullgraph=True)(torch.randn(1, 8, 4, 4)).abs().max() < 1e-5
        targets = [str(node.target) for node in counter.graphs[0].graph.nodes]
        assert sum("stage_forward" in target for target in targets) == 1
        assert computing() == "reference"
    assert computing() == "aten"


@pytest.fixture
def kernels() -> Any:
    pytest.importorskip("triton", reason="Triton is for Linux only")
    from seqconv_triton.kernels import configs, launch

    return configs, launch


@pytest.mark.usefixtures("triton_that_fences")
def test_kernel_switches_in_one_thread(kernels: Any) -> None:
    from seqconv_triton.kernels.heuristic import Key, LaunchConfig

    configs, _ = kernels
    key = Key("convolution", 64, 64, 2, 1)
    measured = {key: LaunchConfig(16, 64, 16, 8, 3)}
    plain = configs.config_for(*key[:4], taps=1)
    cpu = torch.device("cpu")

    def blocks() -> AbstractContextManager[Any]:
        stack = ExitStack()
        for block in (configs.use_tables(measured), configs.pin("pull", 32, 16), configs.assume("gfx942")):
            stack.enter_context(block)
        return stack

    def switching() -> Parts:
        outside = configs.pinned()
        with blocks(), configs.hear_keys() as keys:
            assert configs.config_for(*key[:4], taps=1) == measured[key]
            assert configs.config_for("pull", 64, 64, 2).block_p == 32
            assert configs.smallest_tile("sm_90") == 16
            assert configs.architecture(cpu) == "gfx942"
            inside = configs.pinned()
            assert inside != outside
            yield
            assert len(keys) == 2 and configs.pinned() == inside
        assert configs.pinned() == outside and configs.config_for(*key[:4], taps=1) == plain

    def another() -> Parts:
        assert configs.config_for(*key[:4], taps=1) == plain
        assert configs.config_for("pull", 64, 64, 2).block_p != 32
        assert configs.smallest_tile("sm_90") == 64
        assert configs.architecture(cpu) == "sm_90"
        yield

    take_turns(switching, another)


def test_listeners_hear_their_own_thread(kernels: Any) -> None:
    """Two threads that compute at the same time: each hears what it would hear alone."""
    _, launch = kernels
    x = torch.randn(1, 8, 4, 4)

    def computing_with(heard: list[str], groups: int) -> Parts:
        layer = sct.SeqConv2d(8, 4 * groups, 4).eval()
        with sct.use_backend("triton"), torch.no_grad():
            with launch.listen(lambda *_: heard.append("launch")), launch.record(lambda *_: heard.append("call")):
                yield
                layer(x)
                yield
            assert not launch.recorders.get()

    alone: list[list[str]] = [[], []]
    together: list[list[str]] = [[], []]
    for heard, groups in zip(alone, (2, 3), strict=True):
        take_turns(lambda heard=heard, groups=groups: computing_with(heard, groups))
    take_turns(lambda: computing_with(together[0], 2), lambda: computing_with(together[1], 3))
    assert 0 < len(alone[0]) < len(alone[1])
    assert together == alone


def test_a_backward_pass_follows_its_forward_pass(kernels: Any) -> None:
    """Autograd may run it in a thread of its own, where nothing is switched."""
    configs, launch = kernels
    layer = sct.SeqConv2d(8, 8, 4, bottleneck=True)
    heard: list[Any] = []
    with sct.use_backend("triton"), launch.listen(lambda kernel, *_: heard.append(kernel)), configs.assume("gfx942"):
        out = layer(torch.randn(2, 8, 4, 4, requires_grad=True))
    forward = len(heard)
    thread = threading.Thread(target=out.sum().backward)
    thread.start()
    thread.join()
    assert forward > 0 and len(heard) > forward and layer.transform_weight.grad is not None
