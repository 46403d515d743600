"""What people have reported of BN folding, exports, torch.compile and memory-saving DenseNets, tried on ours.

Each test names the report. It holds what should have happened there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import error, everything, randomise, small_imagenet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import seqconv_triton as sct
from seqconv_triton.plan import Plan


def dense() -> nn.Module:
    return randomise(sct.CifarSeqResNet(8, 1, bottleneck=True, windowed=False), layer_b=0.3)


def test_statistics_move_once_under_checkpoint() -> None:
    """https://github.com/gpleiss/efficient_densenet_pytorch/issues/73: BN's statistics moved twice."""
    stage, x = randomise(sct.Stage(Plan.stage(16, 4, 1))), torch.randn(2, 16, 9, 9, requires_grad=True)
    again, recomputed = copy.deepcopy(stage), copy.deepcopy(stage)
    recomputed.recompute = True
    stage(x).sum().backward()
    checkpoint(again, x, use_reentrant=False).sum().backward()
    recomputed(x).sum().backward()
    for twin in (again, recomputed):
        for name, buffer in stage.named_buffers():
            assert error(dict(twin.named_buffers())[name].float(), buffer.float()) < 1e-6, name


def test_every_parameter_has_its_gradient_when_memory_is_saved() -> None:
    """https://github.com/pytorch/vision/pull/2421: DenseNet(memory_efficient=True) lost gradients of parameters."""
    plain, saving = (dense().double().train() for _ in range(2))
    saving.set_grad_checkpointing()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)  # which needs no gradient itself
    for model in (plain, saving):
        torch.manual_seed(0)  # dropout
        model(x).square().sum().backward()
    for (name, expected), parameter in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert parameter.grad is not None and error(parameter.grad, expected.grad) < 1e-8, name


def test_folded_is_the_same_function() -> None:
    """https://github.com/open-mmlab/mmcv/issues/747: a fused conv-BN gave other values (it was asked in training)."""
    model, x = dense().train(), torch.randn(2, 3, 8, 8)
    folded = sct.fuse(model)
    assert model.training and error(folded(x), model.eval()(x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folding_in_half_precision(dtype: torch.dtype) -> None:
    """https://github.com/ultralytics/ultralytics/pull/24480 and
    https://github.com/Megvii-BaseDetection/YOLOX/pull/1246: a model in half precision could not be fused."""
    model, x = dense().eval(), torch.randn(2, 3, 8, 8)
    expected = model.double()(x.double())
    folded = sct.fuse(model.to(dtype))
    assert {tensor.dtype for tensor in folded.state_dict().values()} == {dtype}
    assert error(folded(x.to(dtype)), expected) < 0.1


def test_cumulative_average_in_one_graph() -> None:
    """https://github.com/pytorch/pytorch/issues/194504: BN with momentum=None fails under fullgraph=True."""
    torch._dynamo.reset()
    stage, x = randomise(sct.Stage(Plan.stage(16, 4, 1), momentum=None)), torch.randn(2, 16, 9, 9)
    twin = copy.deepcopy(stage)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert error(compiled(x), stage(x)) < 1e-5
    assert error(twin.norm.running_mean, stage.norm.running_mean) < 1e-6


def test_evaluation_under_inductor() -> None:
    """https://github.com/pytorch/pytorch/issues/181696: BN in evaluation mode, compiled, gave wrong values."""
    torch._dynamo.reset()
    model, x = randomise(small_imagenet(), layer_b=0.3).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert error(torch.compile(model)(x), model(x)) < 1e-5


def permuted(x: Tensor) -> Tensor:
    return x.permute(0, 1, 3, 2)


def strided(x: Tensor) -> Tensor:
    return torch.cat([x, x], 3)[..., ::2]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("lay", [permuted, strided, channels_last])
def test_strides_of_what_is_compiled_and_exported(lay: object) -> None:
    """https://github.com/pytorch/pytorch/issues/192668 and https://github.com/pytorch/pytorch/issues/174963:
    strides that the tracer believed were not those of the run."""
    torch._dynamo.reset()
    model, x = nn.Sequential(randomise(sct.SeqConv2d(6, 12, 4))).eval(), lay(torch.randn(2, 6, 8, 8))
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager")(x)
        assert error(compiled, expected) < 1e-6 and compiled.stride() == expected.stride()
        for exported in (model, sct.fuse(model)):
            assert error(torch.export.export(exported, (x,)).module()(x), expected) < 1e-5


def test_mode_of_a_compiled_model() -> None:
    """https://github.com/pytorch/pytorch/issues/132986: eval() and train() of a compiled model had no effect."""
    torch._dynamo.reset()
    model, x = dense(), torch.randn(4, 3, 8, 8)
    compiled = torch.compile(model, backend="aot_eager")
    before = copy.deepcopy(model.state_dict())
    evaluated = compiled.eval()(x)
    assert error(evaluated, model.eval()(x)) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert error(compiled.train()(x), evaluated) > 1e-2


def test_hooks_of_a_model_whose_features_are_taken() -> None:
    """https://github.com/pytorch/vision/issues/1895: a getter of features called modules in order, not the forward."""
    model, x = dense().eval(), torch.randn(2, 3, 8, 8)
    seen: list[Tensor] = []
    model.norm.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    last, features = model.forward_intermediates(x)
    assert error(last, seen[0].relu()) < 1e-6 and len(features) == len(model.stages)
    assert error(model.forward_head(last), model(x)) < 1e-6


ABOVE: dict[str, Callable[[Tensor], Tensor]] = {
    "cat": lambda y: torch.cat([y.new_ones(y.shape), y, y], 1).sin(),  # a view of a wider gradient
    "sum": lambda y: y.sum((2, 3)),  # an expanded one, of stride 0
    "transpose": lambda y: y.transpose(1, 3).contiguous().sin(),
    "every second row": lambda y: y[:, :, ::2].sin(),
}


@pytest.mark.parametrize("place", ["cpu", "interpreter", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("above", ABOVE)
def test_gradients_of_any_layout_from_above(place: torch.device, above: str) -> None:
    """https://github.com/pytorch/pytorch/issues/194719, 64529: a backward took its gradient for an output's twin."""
    layer = randomise(sct.SeqConv2d(8, 12, 4, bottleneck=True)).to(place)
    x = torch.randn(2, 8, 4, 6, device=place)

    def loss(module: nn.Module, t: Tensor) -> list[Tensor]:
        return [ABOVE[above](module(t))]

    got = everything(copy.deepcopy(layer), x, loss)
    with sct.use_backend("reference"):
        expected = everything(layer.double(), x.double(), loss)
    assert {name for name, value in expected.items() if not error(got[name], value) < 1e-5} == set()
