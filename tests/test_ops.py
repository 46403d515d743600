"""The registered ops as PyTorch sees them: opcheck, strides, autocast, compilation, derivatives."""

from __future__ import annotations

import pytest
import torch
from helpers import error, everything, randomise
from torch import Tensor
from torch.autograd import forward_ad

import seqconv_triton as sct
from seqconv_triton.backend import backend_for
from seqconv_triton.backend.contract import Needs, Norms, StageArguments
from seqconv_triton.ops import registered
from seqconv_triton.ops.registered import BACKWARD_NAMES, FORWARD_NAMES, FlatOutputs, flatten, named
from seqconv_triton.plan import Plan, Tail

facility = pytest.mark.facility("opcheck with all its tests, every op, every dtype")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

STAGES = {
    "stage": (Plan.stage(8, 4, 1, extension=8, tail=Tail(16, 3, 2, 4)), 0.0),
    "basic-entry": (Plan.stage(8, 4, 1, entry_channels=3, bottleneck=False, tail=Tail(8, 1)), 0.2),
    "quirk-subgroups": (Plan.stage(8, 4, 1, extension=8, subgroups=2, tail=Tail(16, 3, 2, 4, repeats=2)), 0.0),
    "layer": (Plan.layer(6, 8, 4, bottleneck=True), 0.2),
}
# Every dtype in one stage, the other stages in float32.
CHECKED = [("stage", dtype) for dtype in DTYPES] + [(case, torch.float32) for case in STAGES if case != "stage"]


def arguments_of(case: str, training: bool, dtype: torch.dtype, keep: bool = True) -> tuple[object, ...]:
    plan, dropout = STAGES[case]
    stage = randomise(sct.nn.layers.PackedSeqConv(plan, dropout=dropout)).train(training)
    stage = stage.double() if dtype == torch.float64 else stage
    for name in ("reduce_weight", "transform_weight", "tail_weight"):
        if getattr(stage, name) is not None:
            setattr(stage, name, torch.nn.Parameter(getattr(stage, name).to(dtype)))
    norms, statistics = stage.norms()
    x = torch.randn(2, plan.in_channels, 5, 4).to(dtype).requires_grad_()
    shortcut = torch.randn(2, 8, 5, 4).to(dtype).requires_grad_() if case == "layer" else None
    if statistics == "batch":
        norms = Norms(*(None if norm is None else norm._replace(mean=None, var=None) for norm in norms))
    arguments = StageArguments(plan, stage.convs(), norms, statistics, mask=stage.draw_mask(x))
    return (x, shortcut, *flatten(arguments, "", "aten").values(), keep, keep)


@facility
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("case", "dtype"), CHECKED, ids=str)
def test_opcheck_forward(case: str, dtype: torch.dtype, training: bool) -> None:
    torch.library.opcheck(
        torch.ops.seqconv_triton.stage_forward.default,
        arguments_of(case, training, dtype),
        atol=torch.finfo(dtype).eps * 100,
        rtol=torch.finfo(dtype).eps * 100,
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", STAGES)
def test_opcheck_inference(case: str, training: bool) -> None:
    arguments = [a.detach() if isinstance(a, Tensor) else a for a in arguments_of(case, training, torch.float32, False)]
    torch.library.opcheck(torch.ops.seqconv_triton.stage_forward.default, tuple(arguments))


@facility
@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("case", "dtype"), CHECKED, ids=str)
def test_opcheck_backward(case: str, dtype: torch.dtype, training: bool, needed: bool) -> None:
    arguments = [a.detach() if isinstance(a, Tensor) else a for a in arguments_of(case, training, dtype)]
    result = FlatOutputs(*torch.ops.seqconv_triton.stage_forward(*arguments))
    call = named(FORWARD_NAMES, arguments) | result._asdict() | {"needs": [needed] * len(Needs._fields)}
    if not training:
        call |= {
            name: value for name, value in named(FORWARD_NAMES, arguments).items() if name.endswith(("mean", "var"))
        }
    call["d_out"] = torch.randn_like(result.out)
    call["d_buffer"] = torch.randn_like(result.buffer) if needed else None
    torch.library.opcheck(
        torch.ops.seqconv_triton.stage_backward.default,
        tuple(call[name] for name in BACKWARD_NAMES),
        atol=torch.finfo(dtype).eps * 100,
        rtol=torch.finfo(dtype).eps * 100,
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["packed", "channels-last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("place", ["cpu", "interpreter", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("case", STAGES)
def test_results_are_laid_out_as_the_fakes_say(
    case: str, place: torch.device, training: bool, layout: torch.memory_format
) -> None:
    """Sizes, strides, dtypes: a compiled graph believes the fakes."""
    arguments = [
        a.detach().to(place) if isinstance(a, Tensor) else a for a in arguments_of(case, training, torch.float32)
    ]
    arguments = [a.contiguous(memory_format=layout) if isinstance(a, Tensor) and a.dim() == 4 else a for a in arguments]
    call = named(FORWARD_NAMES, arguments) | {"backend": backend_for(arguments[0])}

    def laid_out(tensors: tuple[Tensor, ...]) -> list[tuple[object, ...]]:
        return [(t.shape, t.stride() if t.numel() else (), t.dtype) for t in tensors]

    operands = tuple(call[name] for name in FORWARD_NAMES)
    result = FlatOutputs(*torch.ops.seqconv_triton.stage_forward(*operands))
    assert laid_out(result) == laid_out(registered._fake_forward(*operands))
    if training:
        call |= result._asdict()
    call |= {"buffer": result.buffer, "z": result.z, "counts": result.counts, "needs": [True] * len(Needs._fields)}
    call["needs"][1] = call["shortcut"] is not None
    call |= {"d_out": torch.randn_like(result.out), "d_buffer": torch.randn_like(result.buffer)}
    operands = tuple(call[name] for name in BACKWARD_NAMES)
    gradients = torch.ops.seqconv_triton.stage_backward(*operands)
    assert laid_out(gradients) == laid_out(registered._fake_backward(*operands))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bottleneck": True, "subgroups": 2}, {"windowed": False}, {"bottleneck": True, "windowed": False}],
    ids=["basic", "bottleneck", "dense", "dense-bottleneck"],
)
def test_gradcheck_layer(options: dict[str, bool], training: bool) -> None:
    layer = randomise(sct.SeqConv2d(3, 4, 2, dtype=torch.float64, **options)).train(training)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, shortcut: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(_Raw(layer), {f"layer.{n}": p for n, p in named.items()}, (x, shortcut))

    x = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    shortcut = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, shortcut, *layer.parameters()))


class _Raw(torch.nn.Module):
    def __init__(self, layer: sct.SeqConv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, shortcut: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer.forward_raw(x, shortcut)


@pytest.mark.parametrize("end", [{"tail": Tail(4, 1)}, {"extension": 4, "tail": Tail(8, 3, 2, 2)}], ids=["1x1", "down"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradcheck_stage(end: dict[str, object], training: bool) -> None:
    stage = randomise(sct.Stage(Plan.stage(4, 2, 1, **end), dtype=torch.float64)).train(training)
    names = [name for name, _ in stage.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(stage, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *stage.parameters()), fast_mode=True)


def test_second_derivative_names_the_reference_backend() -> None:
    layer = randomise(sct.SeqConv2d(4, 4, 2, dtype=torch.float64))
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='use_backend\\("reference"\\)'):
        grad.sum().backward()
    with sct.use_backend("reference"):
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad.isfinite().all()


def test_forward_mode_and_functorch_name_the_reference_backend() -> None:
    """PyTorch itself would drop the tangent of a custom op without a word."""
    layer = randomise(sct.SeqConv2d(4, 4, 2)).eval()
    x = torch.randn(2, 4, 3, 3)

    def dual(t: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(t, t))).tangent

    for transform in (lambda t: torch.func.jvp(layer, (t,), (t,))[1], torch.func.grad(lambda t: layer(t).sum()), dual):
        with pytest.raises(NotImplementedError, match='use_backend\\("reference"\\)'):
            transform(x)
        with sct.use_backend("reference"):
            assert transform(x).norm() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_autocast_casts_convs_and_keeps_statistics(dtype: torch.dtype, backend: str) -> None:
    plan, _ = STAGES["stage"]
    stage = randomise(sct.Stage(plan))
    x = torch.randn(4, 8, 6, 6)
    exact = everything(stage, x, lambda m, t: [m(t)])
    with sct.use_backend(backend), torch.autocast("cpu", dtype):
        got = everything(stage, x, lambda m, t: [m(t)])
    assert got["output 0"].dtype == dtype
    for name, value in got.items():
        if name != "output 0":
            assert value.dtype == exact[name].dtype, name
    assert 1e-6 < error(got["norm.running_mean"], exact["norm.running_mean"]) < 1e-2
    assert error(got["output 0"], exact["output 0"]) < 5e-2


def test_backends_nest_and_come_back() -> None:
    x = torch.zeros(1)
    with sct.use_backend("reference"):
        with sct.use_backend("aten"):
            assert backend_for(x) == "aten"
        assert backend_for(x) == "reference"
        with pytest.raises(RuntimeError, match="inner"), sct.use_backend(None):
            raise RuntimeError("inner")
        assert backend_for(x) == "reference"
    assert backend_for(x) == "aten"
