"""Hooks on a whole network: on every module, on stages wherever they are called, on the stem's BN."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from helpers import error, randomise, small_imagenet
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import seqconv_triton as sct


def test_hooks_on_every_module_of_a_network() -> None:
    """As summaries and profilers register them: every BN is called once a pass, and the output is the same."""
    model = randomise(small_imagenet(), layer_b=0.3).eval()
    x = torch.randn(2, 3, 40, 40)
    expected, called = model(x), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: called.append(name))
    assert error(model(x), expected) < 1e-6
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(called.count(name) == 1 for name in norms)


def test_hooks_of_a_stage_wherever_it_is_called() -> None:
    """What a hook makes of a stage's output, the model goes on with; where features are asked for, it sees both."""
    model = randomise(sct.CifarSeqResNet(8, 1, bottleneck=True), layer_b=0.3).eval()
    x, kinds = torch.randn(2, 3, 8, 8), []

    def halve(_: nn.Module, args: tuple[Tensor], out: Tensor | tuple[Tensor, Tensor]) -> object:
        kinds.append(type(out))
        return 0.5 * out if isinstance(out, Tensor) else (0.5 * out[0], out[1])

    untouched = model(x)
    for folded in (model, sct.fuse(model, plain=True)):
        folded.stages[0].register_forward_hook(halve)
        expected = folded(x)
        assert error(expected, untouched) > 1e-2
        last, features = folded.forward_intermediates(x)
        assert error(folded.forward_head(last), expected) < 1e-6 and len(features) == 3
    assert kinds == [torch.Tensor, tuple] * 2


def test_features_of_a_stage_that_is_wrapped() -> None:
    """By PyTorch's checkpoint_wrapper, or compiled by itself."""
    model = randomise(sct.CifarSeqResNet(8, 1, bottleneck=True, dropout=0.0), layer_b=0.3).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model.forward_intermediates(x, intermediates_only=True)
    model.stages[0] = checkpoint_wrapper(model.stages[0])
    model.stages[1] = torch.compile(model.stages[1], backend="eager")
    for one, other in zip(model.forward_intermediates(x, intermediates_only=True), expected, strict=True):
        assert error(one, other) < 1e-6


def test_the_stems_bn_is_seen_as_it_is() -> None:
    """No ReLU works in place behind it: hooks keep what they saw, and backward hooks are called."""
    model, seen = randomise(small_imagenet(), layer_b=0.3), SimpleNamespace(gradients=0)
    norm = model.stem[1]

    def note(_: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        seen.input, seen.out = args[0].detach().clone(), out

    def count(*_: object) -> None:
        seen.gradients += 1

    norm.register_forward_hook(note)
    norm.register_full_backward_hook(count)
    model(torch.randn(2, 3, 40, 40)).sum().backward()
    expected = nn.functional.batch_norm(seen.input, None, None, norm.weight, norm.bias, True)
    assert seen.out.min() < 0 and error(seen.out, expected) < 1e-5 and seen.gradients == 1
