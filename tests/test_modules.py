"""The modules in unusual hands: meta device, BN settings changed, no images, PyTorch's checkpoints around a stage."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import error, randomise
from plain import VECTORS, pair
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import seqconv_triton as sct
from seqconv_triton.plan import Plan, Tail


def small() -> nn.Module:
    return randomise(sct.CifarSeqResNet(8, 1, bottleneck=True, dropout=0.0), layer_b=0.3)


def test_built_on_the_meta_device() -> None:
    model, x = small().eval(), torch.randn(2, 3, 8, 8)
    for assign in (True, False):
        empty = sct.CifarSeqResNet(8, 1, bottleneck=True, dropout=0.0, device="meta").eval()
        assert empty(x.to("meta")).shape == (2, 10)
        empty = empty if assign else empty.to_empty(device="cpu")
        empty.load_state_dict(model.state_dict(), assign=assign)
        assert torch.equal(empty(x), model(x))


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_bn_settings_of_the_user(backend: str) -> None:
    """eps and momentum as the BNs have them now; without running statistics the batch's serve in evaluation too."""
    layer, plain = sct.SeqConv2d(3, 4, 4, bottleneck=True), nn.BatchNorm2d(4, eps=0.5, momentum=None)
    for norm in (layer.norm, layer.reduce_norm):
        norm.eps, norm.momentum = 0.5, None
    with sct.use_backend(backend):
        for _ in range(3):
            raw, out = layer.forward_raw(torch.randn(4, 3, 5, 5))
            assert error(out, plain(raw).relu()) < 1e-5
        for name, value in plain.state_dict().items():
            assert error(getattr(layer.norm, name), value) < 1e-5, name
        model, x = small(), torch.randn(2, 3, 8, 8)
        expected = model(x)
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        for training in (True, False):
            assert error(model.train(training)(x), expected) < 1e-6
            assert error(model.forward_head(model.forward_intermediates(x)[0]), expected) < 1e-6
    layer.reduce_norm.eps = 0.1
    with pytest.raises(ValueError, match=r"norm\.eps \(0\.5\) and reduce_norm\.eps \(0\.1\)"):
        layer(x)
    layer.norm.eval()
    with pytest.raises(ValueError, match="both be in training or both in evaluation"):
        layer(x)


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_images(backend: str, training: bool) -> None:
    """N = 0: an empty output, gradients of zero, statistics as they were, and in training one more batch."""
    model = small().train(training)
    before = {name: value.clone() for name, value in model.named_buffers()}
    with sct.use_backend(backend):
        out = model(torch.randn(0, 3, 8, 8))
    out.sum().backward()
    assert out.shape == (0, 10)
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in model.parameters())
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name] + (training and "tracked" in name)), name


def test_no_images_between_others() -> None:
    """A cumulative average counts the batches; hooks on the BNs are called for every one."""
    (layer, plain), called = pair(bottleneck=True), []
    for module in (layer, plain):
        for norm in (part for part in module.modules() if isinstance(part, nn.BatchNorm2d)):
            norm.momentum = None
            norm.reset_running_stats()
    for module in (layer, plain):
        for images in (2, 0, 3):
            torch.manual_seed(images)
            module(torch.randn(images, 6, 4, 5, dtype=torch.float64))
    for name in ("norm", "reduce_norm"):
        for vector in VECTORS:
            assert error(getattr(getattr(layer, name), vector), plain.vector(name, vector)) < 1e-10
        getattr(layer, name).register_forward_hook(lambda _, args, out: called.append(args[0].shape))
    layer(torch.randn(0, 6, 4, 5, dtype=torch.float64))
    assert called == [(0, 12, 4, 5)] * 2 and layer.norm.num_batches_tracked == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_torch_checkpoint_around_a_stage(reentrant: bool) -> None:
    """The same gradients; running statistics move once, and twice with reentrant checkpoints, as those of any BN."""
    stage = randomise(sct.Stage(Plan.stage(8, 8, 1, extension=8, tail=Tail(16, 3, 2, 2))))
    x = torch.randn(2, 8, 4, 5, requires_grad=True)
    plain = copy.deepcopy(stage)
    (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
    checkpoint(stage, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected)
    assert stage.norm.num_batches_tracked == 1 + reentrant
    assert reentrant or torch.equal(stage.norm.running_var, plain.norm.running_var)


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_code_behind_a_layer_may_view_it(backend: str) -> None:
    """`x.view(n, -1)`, as behind an nn.Conv2d of a contiguous input; also where gradients come back."""
    layer = sct.SeqConv2d(4, 8, 4).train()
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with sct.use_backend(backend):
        layer(x).view(2, -1).square().sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
        assert layer(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("make", [lambda: sct.SeqConv2d(3, 8, 4), lambda: sct.CifarSeqResNet(4, 1)])
def test_gradients_of_images_may_be_viewed(make: Callable[[], nn.Module]) -> None:
    """As attacks and saliency maps do; of images in channels-last they are so too."""
    module, x = make().eval(), torch.randn(2, 3, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x)
    assert gradient.view(2, -1).norm() > 0 and not x._backward_hooks
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    (same,) = torch.autograd.grad(module(last).square().sum(), last)
    assert same.is_contiguous(memory_format=torch.channels_last) and error(same, gradient) < 1e-5


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.to(memory_format=torch.channels_last).transpose(2, 3),
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x.to(memory_format=torch.channels_last)[:1].expand(3, -1, -1, -1),
        lambda x: x.to(memory_format=torch.channels_last)[:, :, ::2, 1:],
        lambda x: x.to(memory_format=torch.channels_last)[:, :, :1, :1],
        lambda x: x[:, :, :1, :1],
        lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, ::2],
        lambda x: x.permute(0, 3, 2, 1),
    ],
)
def test_memory_format_is_that_of_a_conv(layout: Callable[[Tensor], Tensor]) -> None:
    x = layout(torch.randn(3, 4, 5, 4))
    conv, layer = nn.Conv2d(4, 8, 3, padding=1), sct.SeqConv2d(4, 8, 4).eval()
    with torch.no_grad():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            found, expected = (module(x).is_contiguous(memory_format=memory_format) for module in (layer, conv))
            assert found == expected


def test_hooks_on_the_last_bn() -> None:
    """A forward hook sees the BN's own output, a full backward hook works: nothing rectifies it in place."""
    model, seen = small(), {}
    model.norm.register_forward_hook(lambda module, args, output: seen.update(input=args[0], output=output))
    model.norm.register_full_backward_hook(lambda module, given, got: seen.update(gradient=got[0]))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    expected = nn.functional.batch_norm(seen["input"], None, None, model.norm.weight, model.norm.bias, True)
    assert error(seen["output"], expected) < 1e-6 and seen["output"].min() < 0
    assert seen["gradient"].shape == seen["output"].shape
    model.forward_intermediates(torch.randn(2, 3, 8, 8))
    assert seen["output"].min() < 0
