"""Memory that a training step uses again on a CPU: never while anybody reads it, never longer than its weights live."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from helpers import error, randomise
from torch import Tensor

import seqconv_triton as sct
from seqconv_triton.backend.aten import memory as aten_memory
from seqconv_triton.plan import Plan, Tail

PLAN = Plan.stage(12, 4, 2, tail=Tail(12, 1))


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten_memory, "LARGE", 1)


def make() -> sct.Stage:
    return randomise(sct.Stage(PLAN, dtype=torch.float64), layer_b=0.1)


def blocks(stage: sct.Stage) -> list[int]:
    """Sizes of what the stage could use again, in bytes."""
    return sorted(block.numel() for block in aten_memory._free.get(stage.norm.weight.untyped_storage(), []))


def gradients(stage: sct.Stage, out: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out.square().sum(), list(stage.parameters())))


def test_the_next_step_uses_it_again() -> None:
    stage = make()
    pointers = []
    for _ in range(3):
        out = stage(torch.randn(2, 12, 5, 6, dtype=torch.float64))
        pointers.append({t.data_ptr() for t in (out.grad_fn.saved_tensors[0], out.grad_fn.saved_tensors[1])})
        assert blocks(stage) == []
        gradients(stage, out)
        del out
        assert len(blocks(stage)) == 2
    assert pointers[0] == pointers[1] == pointers[2]


def test_steps_in_flight_share_nothing() -> None:
    """Two passes before their backward, interleaved with others, give the gradients that each gives alone."""
    stage = make()
    inputs = [torch.randn(n, 12, 5, 6, dtype=torch.float64) for n in (2, 3, 2)]
    with sct.use_backend("reference"):
        expected = [gradients(stage, stage(x)) for x in inputs]
    gradients(stage, stage(inputs[0]))  # blocks to use again
    outputs = [stage(x) for x in inputs]
    for i in (1, 0, 2):
        got = gradients(stage, outputs[i])
        assert max(error(a, b) for a, b in zip(got, expected[i], strict=True)) < 1e-10
        outputs[i] = stage(inputs[i])


def test_features_that_someone_holds_stay() -> None:
    stage = make()
    x = torch.randn(2, 12, 5, 6, dtype=torch.float64)
    held = stage.forward_features(x)
    before = [t.detach().clone() for t in held]
    raw = [t.detach() for t in held]
    del held
    for _ in range(2):
        gradients(stage, stage(-x))
    assert all(torch.equal(a, b) for a, b in zip(raw, before, strict=True))


def test_features_may_be_changed_in_place() -> None:
    """What comes out is no view for autograd, whatever its size."""
    layer = randomise(sct.SeqConv2d(8, 8, 4, bottleneck=True, dtype=torch.float64))
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    expected, _ = layer.forward_raw(x)
    raw, _ = layer.forward_raw(x)
    assert torch.equal(raw.relu_(), expected.relu())


def test_weights_can_be_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.__future__.set_swap_module_params_on_conversion` refuses weights that someone refers to weakly."""
    stage = make()
    gradients(stage, stage(torch.randn(2, 12, 5, 6, dtype=torch.float64)))
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    stage.float()
    out = stage(torch.randn(2, 12, 5, 6))
    assert all(gradient.isfinite().all() for gradient in gradients(stage, out))


def test_other_batches() -> None:
    """A smaller batch takes the same blocks, a larger one new ones, in whose place the small ones go."""
    stage = make()
    sizes = []
    for n in (2, 1, 4, 2):
        gradients(stage, stage(torch.randn(n, 12, 5, 6, dtype=torch.float64)))
        sizes.append(blocks(stage))
    assert sizes[0] == sizes[1] and sizes[2] == sizes[3] == [2 * size for size in sizes[0]]


def test_evaluation_frees_it() -> None:
    stage = make()
    gradients(stage, stage(torch.randn(2, 12, 5, 6, dtype=torch.float64)))
    assert blocks(stage)
    with torch.no_grad():
        stage.eval()(torch.randn(2, 12, 5, 6, dtype=torch.float64))
    assert not blocks(stage)


def test_it_dies_with_the_weights() -> None:
    gc.collect()
    before = len(aten_memory._free)
    stage = make()
    other = copy.deepcopy(stage)
    for each in (stage, other):
        gradients(each, each(torch.randn(2, 12, 5, 6, dtype=torch.float64)))
    assert len(aten_memory._free) == before + 2
    out = stage(torch.randn(2, 12, 5, 6, dtype=torch.float64))
    del stage, other, each
    gc.collect()
    out.square().sum().backward()
    del out
    gc.collect()
    assert len(aten_memory._free) == before


def test_uninitialised_memory_is_poisoned() -> None:
    owner, like = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    for _ in range(2):
        tensor = aten_memory.empty_strided(owner, like, (2, 3), (3, 1))
        assert tensor.dtype == torch.bfloat16 and tensor.isnan().all()
        tensor.zero_()


def test_an_evaluation_waits_while_another_thread_takes() -> None:
    """Blocks that it has found must still be there when it takes one."""
    with aten_memory._taking:
        thread = threading.Thread(target=aten_memory.release)
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
    thread.join()


def test_threads() -> None:
    """Replicas of one process train with the same weights at the same time."""
    stage = make()
    x = torch.randn(2, 12, 5, 6, dtype=torch.float64)
    expected = gradients(stage, stage(x))
    wrong: list[float] = []

    def train() -> None:
        for _ in range(20):
            got = gradients(stage, stage(x))
            wrong.extend(e for a, b in zip(got, expected, strict=True) if not (e := error(a, b)) < 1e-12)

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
