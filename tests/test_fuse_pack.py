"""Weights of fused models on a CPU: laid out for oneDNN with `pack`, and outputs that follow them in any case."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable

import pytest
import torch
from helpers import error, randomise
from torch import Tensor, nn

import seqconv_triton as sct
from seqconv_triton.backend.aten import packed as aten_packed
from seqconv_triton.plan import Plan


@pytest.mark.parametrize(
    "block", [{}, {"bottleneck": False}, {"subgroups": 2}], ids=["bottleneck", "basic", "subgroups"]
)
def test_packed_weights_follow_the_weights(block: dict[str, object]) -> None:
    """On a CPU weights are packed at the first evaluation: changes, other sizes and copies must not meet old ones."""
    fused = sct.fuse(randomise(sct.Stage(Plan.stage(32, 16, 1, entry_channels=16, **block))), pack=True)

    def check(model: nn.Module, x: Tensor) -> None:
        with torch.no_grad():
            got = model(x)
            with sct.use_backend("reference"):
                assert error(got, copy.deepcopy(model).double()(x.double())) < 1e-5
            assert torch.equal(model(x), got)

    x = torch.randn(2, 16, 7, 9)
    check(fused, x)
    check(fused, torch.randn(1, 16, 12, 5))
    assert not list(fused.parameters())
    for name, weight in fused.state_dict(keep_vars=True).items():
        if name.endswith("norm.weight"):  # folded: ones, by which nothing is multiplied again
            continue
        with torch.no_grad():
            weight.add_(torch.randn_like(weight), alpha=0.1)
            changed = fused(x)
        check(fused, x)
        weight.data = weight.data * 1.5
        check(fused, x)
        with torch.no_grad():
            assert not torch.equal(fused(x), changed), name
    check(copy.deepcopy(fused), x)
    state = {name: value if "norm.weight" in name else value * 0.9 for name, value in fused.state_dict().items()}
    fused.load_state_dict(state)
    check(fused, x)
    state = {name: value if "norm.weight" in name else value * 0.9 for name, value in state.items()}
    fused.load_state_dict(state, assign=True)
    check(fused, x)
    with torch.no_grad():
        expected = fused(x)
    with torch.inference_mode():
        assert torch.equal(fused(x), expected)


def test_nan_stays_nan_in_packed_weights() -> None:
    fused, x = small_fused(), torch.randn(2, 16, 7, 9)
    x[1] = torch.nan
    with torch.no_grad():
        out = fused(x)
    assert out[0].isfinite().all() and out[1].isnan().all()


def small_fused() -> nn.Module:
    return sct.fuse(randomise(sct.Stage(Plan.stage(32, 16, 1, entry_channels=16))), pack=True)


def test_packed_weights_know_weights_apart_that_lay_in_the_same_place() -> None:
    """Temporary weights, those of functional_call, get the ids and the memory of those before them."""
    seen = []
    for _ in range(20):
        weight = torch.ones(1000)
        identity = aten_packed.identity(weight)
        assert identity not in seen
        seen.append(identity)
        del weight
    assert len({identity[1:] for identity in seen}) < 20


def by_numpy(weights: list[nn.Parameter]) -> None:
    for weight in weights:
        array = weight.detach().numpy()
        array *= 1.5


def by_data(weights: list[nn.Parameter]) -> None:
    for weight in weights:
        weight.data.mul_(1.5)


def by_vector(weights: list[nn.Parameter]) -> None:
    """The parameters are views of the vector from then on."""
    vector = nn.utils.parameters_to_vector(weights)
    nn.utils.vector_to_parameters(vector, weights)
    vector.mul_(1.5)


def by_fused_adam(weights: list[nn.Parameter]) -> None:
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    torch.optim.Adam(weights, lr=0.1, fused=True).step()


def by_another_process(weights: list[nn.Parameter]) -> None:
    for weight in weights:
        weight.data.share_memory_()
    if (child := os.fork()) == 0:
        by_numpy(weights)
        os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.parametrize("road", [by_numpy, by_data, by_vector, by_fused_adam, by_another_process])
def test_outputs_follow_weights_changed_uncounted(road: Callable[[list[nn.Parameter]], None]) -> None:
    """By roads that pass PyTorch's count of changes by: without `pack` nothing is kept from call to call."""
    fused, x = sct.fuse(randomise(sct.Stage(Plan.stage(32, 16, 1, entry_channels=16)))), torch.randn(2, 16, 7, 9)
    with torch.no_grad():
        before = fused(x)
        road([fused.reduce_weight, fused.transform_weight])
        with sct.use_backend("reference"):
            expected = fused(x)
        assert error(fused(x), expected) < 1e-5 and error(before, expected) > 1e-3


def test_outputs_follow_tensors_of_ones_own() -> None:
    """Those of functional_call are no parameters, and are packed for nobody who has not asked for it."""
    stage = randomise(sct.Stage(Plan.stage(32, 16, 1, entry_channels=16)))
    for fused in (sct.fuse(stage), sct.fuse(stage, pack=True)):
        x, state = torch.randn(2, 16, 7, 9), {k: v.detach().clone() for k, v in fused.state_dict().items()}
        with torch.no_grad():
            before = torch.func.functional_call(fused, state, (x,))
            for name in ("reduce_weight", "transform_weight"):
                state[name].data.mul_(0.5)
            with sct.use_backend("reference"):
                expected = torch.func.functional_call(fused, state, (x,))
            assert error(torch.func.functional_call(fused, state, (x,)), expected) < 1e-5
            assert error(before, expected) > 1e-3


def test_packed_models_are_packed_wherever_they_go() -> None:
    """Copied, cast or moved, and compiled; what has come in by assignment is not, and right."""
    fused, x = small_fused(), torch.randn(2, 16, 7, 9)

    def packs(model: nn.Module) -> bool:
        aten_packed.forget()
        with torch.no_grad():
            assert error(model(x), fused(x)) < 1e-5
            aten_packed.forget()
            model(x)
        return len(aten_packed._remembered) > 0

    expected = torch.backends.mkldnn.is_available()
    for road in (copy.deepcopy, lambda model: copy.deepcopy(model).double().float(), torch.compile):
        assert packs(road(fused)) == expected
    assigned = small_fused()
    assigned.load_state_dict(fused.state_dict(), assign=True)
    assert not packs(assigned)


def test_packed_models_have_no_parameters_to_train() -> None:
    """Nor do their state dicts differ; what is no layer of ours keeps its parameters."""
    model = randomise(sct.CifarSeqResNet(4, 1, bottleneck=True))
    packed, plain = sct.fuse(model, pack=True), sct.fuse(model)
    names = {name for name, _ in packed.named_parameters()}
    assert names == {"stem.0.weight", "norm.weight", "norm.bias", "classifier.weight", "classifier.bias"}
    packed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert error(packed(x), plain(x)) < 1e-5
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))


def test_packed_weights_can_be_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch swaps no weight that somebody refers to weakly."""
    fused, x = small_fused(), torch.randn(2, 16, 7, 9)
    with torch.no_grad():
        expected = fused(x)
        monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
        assert error(fused.double()(x.double()), expected) < 1e-5


def test_packed_weights_die_with_the_model() -> None:
    gc.collect()
    before = len(aten_packed._remembered)
    fused = sct.fuse(randomise(sct.Stage(Plan.stage(32, 16, 1))), pack=True)
    with torch.no_grad():
        fused(torch.randn(2, 32, 7, 9))
    assert len(aten_packed._remembered) == before + (1 if torch.backends.mkldnn.is_available() else 0)
    del fused
    gc.collect()
    assert len(aten_packed._remembered) == before
