"""The Triton backend on plans that no model has and tensors that no layer makes: the interpreter against float64."""

from __future__ import annotations

import pytest
import torch
from helpers import error
from torch import Tensor

pytest.importorskip("triton", reason="Triton is for Linux only")

import seqconv_triton as sct
from seqconv_triton.backend.contract import Convs, Norms, NormVectors
from seqconv_triton.kernels import launch, replay
from seqconv_triton.ops.stage import stage
from seqconv_triton.plan import Layer, Plan, Tail

PLANS = {
    # Conv groups that fill no tile of 128 together: all of them are one block-diagonal group.
    "subgroups-of-48": Plan((Layer(8, 144),), 144, True, 3, 144, True),
    "tail-groups-of-24": Plan((Layer(48, 48),), 24, True, 1, 48, True, Tail(192, 3, 2, 8)),
    "tail-groups-of-96": Plan((Layer(16, 16),), 16, True, 1, 32, True, Tail(192, 3, 2, 2)),
    "strided-1x1-tail": Plan((Layer(16, 16),), 16, True, 1, 32, True, Tail(16, 1, 2)),
    # What leaves begins inside a slot, or inside the input.
    "half-a-slot-leaves": Plan((Layer(16, 16),), 16, True, 1, 8, True),
    "half-the-input-leaves": Plan((Layer(16, 16),), 16, True, 1, 24, True),
    "half-a-slot-twice": Plan.stage(16, 16, 1, tail=Tail(16, 3, 2, 1, 2)),
    # A shortcut from a part of the input.
    "shortcut-from-16-of-24": Plan((Layer(24, 16), Layer(16, 16, True, True)), 16, True, 1, 16, True),
}


def gradients(plan: Plan, backend: str, dtype: torch.dtype, layout: str = "dense") -> list[Tensor]:
    """The output, and the gradients of x, every weight and the BNs' biases."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def weight(shape: tuple[int, ...] | None) -> Tensor | None:
        return None if shape is None else (0.2 * random(*shape)).requires_grad_()

    x = random(2, plan.in_channels, 3, 3).requires_grad_()
    convs = Convs(weight(plan.reduce_weight_shape), weight(plan.transform_weight_shape), weight(plan.tail_weight_shape))
    if layout == "transposed":
        assert convs.reduce is not None
        convs = convs._replace(reduce=convs.reduce.detach().t().contiguous().t().requires_grad_())
    norms = []
    for channels in (plan.normalized_channels, len(plan.groups) * plan.group_width):
        scale = torch.ones(1, dtype=dtype).expand(channels) if layout == "expanded" else 1 + 0.1 * random(channels)
        norms.append(NormVectors(scale, random(channels).requires_grad_()))
    with sct.use_backend(backend):
        out = stage(x, convs, Norms(norms[0], norms[1]), plan).out
    wave = torch.sin(torch.arange(out.numel())).to(dtype).view(out.shape)
    wanted = [x, *(w for w in convs if w is not None), *(norm.bias for norm in norms)]
    return [out.detach(), *torch.autograd.grad((out * wave).sum(), wanted)]


def assert_right(plan: Plan, layout: str = "dense") -> None:
    expected = gradients(plan, "reference", torch.float64, layout)
    for got, exact in zip(gradients(plan, "triton", torch.float32, layout), expected, strict=True):
        assert error(got, exact) < 2e-5


@pytest.mark.parametrize("name", PLANS)
def test_odd_plans(name: str) -> None:
    assert_right(PLANS[name])


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_parameters_with_gaps(layout: str) -> None:
    assert_right(Plan((Layer(16, 32),), 16, True, 1, 32, True), layout)


def test_launches_are_replayed_unless_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(replay.launch, "INTERPRETED", False)
    x = [torch.zeros(1)]
    assert replay.replayable(x)
    assert not replay.replayable([torch.zeros(1, device="meta")])
    with launch.listen(lambda *_: None):
        assert not replay.replayable(x)
    hooks = triton.knobs.runtime.launch_enter_hook
    if hasattr(hooks, "add"):  # a chain of them, which is never None
        hooks.add(print)
        try:
            assert not replay.replayable(x)
        finally:
            hooks.remove(print)
