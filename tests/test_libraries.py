"""Other libraries' own helpers called on our models, where those libraries are installed."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import error, guided_gradient, python_blocks, randomise, small_imagenet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import seqconv_triton as sct
from seqconv_triton.interop import counters
from seqconv_triton.nn.plain import PlainGroup

facility = pytest.mark.facility


def library(name: str) -> ModuleType:
    """The module, or a skip: a torchvision beside another build of torch raises RuntimeError."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as problem:
        pytest.skip(f"{name}: {problem}")


@facility("timm's freeze_batch_norm_2d and unfreeze_batch_norm_2d, torchvision's FrozenBatchNorm2d")
def test_frozen_by_timm() -> None:
    utils = library("timm.utils.model")
    model = randomise(small_imagenet(), layer_b=0.3)
    x = torch.randn(2, 3, 40, 40)
    evaluated = model.eval()(x)
    frozen = utils.freeze_batch_norm_2d(model).train()
    state = {name: value.clone() for name, value in frozen.state_dict().items()}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
    assert error(frozen(x), evaluated) < 1e-5
    frozen(x).sum().backward()
    assert all(torch.equal(value, state[name]) for name, value in frozen.state_dict().items())
    assert error(sct.fuse(frozen)(x), evaluated) < 1e-5
    thawed = utils.unfreeze_batch_norm_2d(frozen)
    assert error(thawed.train()(x), evaluated) > 0.1
    assert error(thawed.eval()(x), evaluated) > 1e-3  # its statistics have moved


def test_frozen_by_torchvision() -> None:
    frozen = library("torchvision.ops").FrozenBatchNorm2d
    layer = randomise(sct.SeqConv2d(6, 12, 4, bottleneck=True))
    x = torch.randn(2, 6, 5, 5)
    expected = layer.eval()(x)
    for name in ("norm", "reduce_norm"):
        norm = getattr(layer, name)
        new = frozen(norm.num_features, norm.eps)
        new.load_state_dict(norm.state_dict())
        setattr(layer, name, new)
    assert error(layer.train()(x), expected) < 1e-5


def test_split_by_timm() -> None:
    split = library("timm.layers").convert_splitbn_model(small_imagenet(), 3)
    for training in (True, False):
        with pytest.raises(TypeError, match="norm is a SplitBatchNorm2d, which computes otherwise"):
            split.train(training)(torch.randn(6, 3, 40, 40))


@facility("torchvision's create_feature_extractor, by the names of stages, evaluation and training")
def test_features_by_torchvision() -> None:
    extraction = library("torchvision.models.feature_extraction")
    model = randomise(small_imagenet(), layer_b=0.3)
    x = torch.randn(2, 3, 40, 40)
    nodes = {"stem.4": "stem", "stages.0": "first", "stages.3": "last", "relu": "features", "classifier": "logits"}
    training, evaluation = extraction.get_graph_node_names(model)
    assert training == evaluation and nodes.keys() <= set(training)
    for mode in (True, False):
        twin, seen = copy.deepcopy(model).train(mode), []
        hooked = [name for name in nodes if name != "relu"]
        for name in hooked:
            twin.get_submodule(name).register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        twin(x)
        expected = {nodes[name]: out for name, out in zip(hooked, seen, strict=True)}
        expected["features"] = copy.deepcopy(model).train(mode).forward_features(x)
        features = extraction.create_feature_extractor(copy.deepcopy(model), return_nodes=nodes).train(mode)(x)
        assert features.keys() == expected.keys()
        assert all(error(features[key], expected[key]) < 1e-6 for key in expected)
    short = extraction.create_feature_extractor(model, return_nodes=["stages.1"])
    short.train()(x)["stages.1"].sum().backward()
    assert all(p.grad is not None for p in short.parameters()) and not hasattr(short.stages, "2")


@facility("accelerate's offloading: cpu_offload, disk_offload")
def test_offloaded_by_accelerate(tmp_path: Path) -> None:
    """Weights are on the meta device but for a module's own forward, which those of a stage's BNs never see."""
    accelerate = library("accelerate")
    model = randomise(small_imagenet(), layer_b=0.3).eval()
    x = torch.randn(2, 3, 40, 40)
    cpu = torch.device("cpu")
    with torch.no_grad():
        expected, features = model(x), model.forward_intermediates(x, intermediates_only=True)
        ran = model.stages[0].run(feed := torch.randn(2, model.stages[0].plan.in_channels, 8, 8)).out
        offloaded = accelerate.cpu_offload(copy.deepcopy(model), cpu, offload_buffers=True)
        on_disk = accelerate.disk_offload(copy.deepcopy(model), str(tmp_path), cpu, offload_buffers=True)
        for twin in (offloaded, on_disk):
            for _ in range(2):
                assert torch.equal(twin(x), expected)
                for one, other in zip(twin.forward_intermediates(x, intermediates_only=True), features, strict=True):
                    assert torch.equal(one, other)
                assert torch.equal(twin.stages[0].run(feed).out, ran)
                for part in (twin.stages[0], twin.stages[0].norm):
                    assert all(p.is_meta for p in part.parameters(recurse=False))


def test_cast_by_accelerate() -> None:
    """Of convs and linear layers; a stage's weights, which are in neither, stay as they are."""
    accelerate = library("accelerate")
    model, x = randomise(small_imagenet()).eval(), torch.randn(2, 3, 40, 40)
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.to(torch.bfloat16).to(torch.float32)
    with torch.no_grad():
        expected = rounded(x)
        accelerate.big_modeling.attach_layerwise_casting_hooks(
            model, torch.bfloat16, torch.float32, skip_modules_pattern=[]
        )
        assert model.stem[0].weight.dtype == torch.bfloat16
        assert error(model(x), expected) < 1e-6


def test_hooks_of_accelerate_on_a_bn() -> None:
    """They see what it returns, and cannot change it; weights that others bring are there."""
    accelerate = library("accelerate")
    seen = []

    class Collect(accelerate.hooks.ModelHook):
        factor = 1.0

        def post_forward(self, module: torch.nn.Module, output: torch.Tensor) -> torch.Tensor:
            seen.append(output)
            return output * self.factor

    layer = randomise(sct.SeqConv2d(6, 12, 4)).eval()
    x, expected = torch.randn(2, 6, 4, 5), []
    layer.norm.register_forward_hook(lambda module, args, out: expected.append(out))
    with torch.no_grad():
        out = layer(x)
        layer.norm._forward_hooks.clear()
        for offloaded in (False, True):
            twin = copy.deepcopy(layer)
            if offloaded:
                accelerate.cpu_offload(twin, torch.device("cpu"), offload_buffers=True)
            accelerate.hooks.add_hook_to_module(twin.norm, hook := Collect(), append=offloaded)
            assert error(twin(x), out) < 1e-6
            assert error(seen.pop(), expected[0]) < 1e-6 and not seen
            hook.factor = 2.0
            with pytest.raises(RuntimeError, match="a hook on norm"):
                twin(x)
            seen.clear()


def test_features_of_timm_from_an_offloaded_model() -> None:
    accelerate, timm = library("accelerate"), library("timm")
    importlib.import_module("seqconv_triton.interop.timm")
    model = timm.create_model("cifar_seqresnet_b_r7_k16", features_only=True).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        twin = accelerate.cpu_offload(copy.deepcopy(model), torch.device("cpu"), offload_buffers=True)
        assert all(torch.equal(one, other) for one, other in zip(twin(x), expected, strict=True))


def test_what_needs_offloaded_weights_is_refused() -> None:
    accelerate = library("accelerate")
    model = accelerate.cpu_offload(sct.CifarSeqResNet(4, 1).eval(), torch.device("cpu"), offload_buffers=True)
    published = sct.export_published(sct.CifarSeqResNet(4, 1))
    for call, purpose in (
        (lambda: sct.fuse(model), "folded"),
        (lambda: sct.load_published(model, published), "loaded"),
        (lambda: sct.export_published(model), "exported"),
        (lambda: sct.convert(model, 4), "converted"),
        (lambda: sct.convert_sync_batchnorm(model), "synchronised"),
    ):
        with pytest.raises(ValueError, match=f"its weights are offloaded by accelerate and cannot be {purpose}"):
            call()
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    sct.load_published(model, published)
    assert sct.fuse(model)(torch.randn(2, 3, 8, 8)).isfinite().all()
    assert "forward" not in sct.convert_sync_batchnorm(model).norm.__dict__  # accelerate had left it


@facility("Multiply-adds by fvcore; by ptflops and torch.profiler under the reference backend")
def test_counters() -> None:
    """As docs/facilities.md says, beside FlopCounterMode, which tests/test_tools.py compares with plain convs."""
    model = small_imagenet().eval()
    x = torch.randn(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    expected = counter.get_total_flops() / 2
    fvcore = library("fvcore.nn").FlopCountAnalysis(model, x).unsupported_ops_warnings(False)
    convs = sum(fvcore.uncalled_modules_warnings(False).by_operator()[kind] for kind in ("conv", "linear"))
    ptflops = library("ptflops").get_model_complexity_info
    with sct.use_backend("reference"), torch.no_grad():
        counted, _ = ptflops(model, (3, 64, 64), as_strings=False, print_per_layer_stat=False, backend="aten")
        with torch.profiler.profile(with_flops=True) as profiler:
            model(x)
    profiled = sum(event.flops for event in profiler.key_averages() if event.key in ("aten::conv2d", "aten::addmm")) / 2
    assert convs == expected and profiled == expected
    assert expected <= counted < 1.05 * expected  # with what BNs do


@facility("Multiply-adds by thop and ptflops, with the hooks of interop.counters; as they are once fused")
def test_counters_by_types_of_modules() -> None:
    model = small_imagenet().eval()
    x = torch.randn(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    expected, parameters = counter.get_total_flops() / 2, sum(p.numel() for p in model.parameters())

    def by_thop(model: nn.Module, **options: object) -> tuple[float, float]:
        return library("thop").profile(copy.deepcopy(model), (x,), verbose=False, **options)

    def by_ptflops(model: nn.Module, **options: object) -> tuple[float, float]:
        count = library("ptflops").get_model_complexity_info
        return count(copy.deepcopy(model), (3, 64, 64), as_strings=False, print_per_layer_stat=False, **options)

    for count, hooks in (
        (by_thop, {"custom_ops": counters.THOP}),
        (by_ptflops, {"custom_modules_hooks": counters.PTFLOPS}),
    ):
        counted, found = count(model, **hooks)
        assert expected <= counted < 1.05 * expected and found == parameters  # with what BNs outside the stages do
        counted, _ = count(sct.fuse(model, plain=True))
        assert expected <= counted < 1.1 * expected  # with ReLUs


@facility("safetensors: save_model and load_model, plain and fused")
@pytest.mark.parametrize("folded", [False, True], ids=["plain", "fused"])
def test_files_of_safetensors(tmp_path: Path, folded: bool) -> None:
    files = library("safetensors.torch")
    first, second = (randomise(small_imagenet(), seed, layer_b=0.3).eval() for seed in (0, 1))
    if folded:
        first, second = sct.fuse(first), sct.fuse(second)
    x = torch.randn(2, 3, 40, 40)
    assert error(second(x), first(x)) > 0.1
    files.save_model(first, str(tmp_path / "model.safetensors"))
    files.load_model(second, str(tmp_path / "model.safetensors"))
    assert torch.equal(second(x), first(x))


@facility("captum's GuidedBackprop and DeepLift on sct.fuse(model, plain=True)")
def test_attributions_by_captum() -> None:
    attr = library("captum.attr")
    model = randomise(small_imagenet(), layer_b=0.3).double().eval()
    plain, x = sct.fuse(model, plain=True), torch.randn(2, 3, 40, 40, dtype=torch.float64, requires_grad=True)
    guided = attr.GuidedBackprop(plain).attribute(x, target=1)
    assert error(guided, guided_gradient(model, x, 1)) < 1e-10
    # DeepLift's attributions add up to what the logit has gained over the baseline.
    attributions = attr.DeepLift(plain).attribute(x, baselines=0.0, target=1)
    gained = (model(x) - model(torch.zeros_like(x)))[:, 1]
    assert error(attributions.flatten(1).sum(1), gained) < 1e-10


@facility("torch-pruning: the 1×1 convs of sct.fuse(model, plain=True) lose output channels")
def test_inner_channels_pruned() -> None:
    """By the code of docs/facilities.md."""
    library("torch_pruning")
    model = randomise(small_imagenet(), layer_b=0.3).double().eval()
    (code,) = (block for block in python_blocks("facilities.md") if "torch_pruning" in block)
    smaller = {"sct.SeqResNetB22()": "model", "224, 224": "40, 40, dtype=torch.float64", "0.25": "0.5"}
    for name, value in smaller.items():
        assert name in code
        code = code.replace(name, value)
    names = {"model": model}
    exec(compile(code, "facilities.md", "exec"), names)
    plain, before, x = names["plain"], sct.fuse(model, plain=True), torch.randn(2, 3, 40, 40, dtype=torch.float64)
    pairs = list(zip(inner_groups(before), inner_groups(plain), strict=True))
    for old, new in pairs:
        assert 2 * new.reduce.out_channels == old.reduce.out_channels == old.transform.in_channels
        same = (old.reduce.weight[:, None] == new.reduce.weight[None]).flatten(2).all(2)
        kept = same.any(1).view(old.transform.groups, 1, -1, 1, 1)
        with torch.no_grad():  # what the pruned channels were multiplied with
            old.transform.weight.unflatten(0, (old.transform.groups, -1)).mul_(kept)
    assert len(pairs) > 4 and error(plain(x), before(x)) < 1e-10
    assert error(plain(x), model(x)) > 0.1


def inner_groups(model: nn.Module) -> list[PlainGroup]:
    return [module for module in model.modules() if isinstance(module, PlainGroup)]
