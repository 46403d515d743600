"""`fuse`: a model for deployment, every BN folded into the weights before it, or into a scale and a shift.

Folded are the 1×1 convs' BNs, and those of the 3×3 convs without a shortcut behind them; the others keep their scale.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from seqconv_triton.backend.aten.packed import mark
from seqconv_triton.backend.contract import StageArguments
from seqconv_triton.backend.folding import foldable_groups
from seqconv_triton.backend.packing import transform_weights, window_weights
from seqconv_triton.backend.traced import constants
from seqconv_triton.models.backbone import Backbone
from seqconv_triton.nn.classifier import PublishedClassifier
from seqconv_triton.nn.computed import refuse_computed, refuse_offloaded
from seqconv_triton.nn.layers import PackedSeqConv, Stage
from seqconv_triton.nn.norm import Affine, read
from seqconv_triton.nn.plain import PlainSeqConv
from seqconv_triton.nn.plain import conv as plain_conv
from seqconv_triton.nn.stem import StemConv2d
from seqconv_triton.nn.watched import watched

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def fuse(model: Model, *, pack: bool = False, plain: bool = False) -> Model:
    """A copy of `model` for evaluation, with the BNs of all its seqconv_triton layers and networks folded.

    Its state dict has no statistics; it loads into `fuse` of a model of the same kind. Dropout is gone, and `train()`
    changes nothing in a folded layer. No parameter takes a gradient, but for those of a network's classifier and of
    modules that are not ours: train the model it was made from. Fold in float32 and convert afterwards:
    `fuse(model).bfloat16()`.

    With `plain` every conv is an nn.Conv2d with a weight and a bias of its own, and every activation an nn.ReLU: for
    torch.export, ONNX, quantizers, pruners and whatever else looks for PyTorch's own modules. No kernel of ours and no
    backend has a part in such a model, which concatenates its windows.

    With `pack` the weights are meant to stay as they are, and become buffers. On a CPU the first evaluation in float32
    then lays them out for oneDNN and keeps that second copy, which makes small batches faster. `copy_`,
    `load_state_dict` and other in-place ops are still seen; writes to `weight.data`, to a NumPy view, or by another
    process into shared memory are not. Tensors of your own, from `functional_call` or `load_state_dict(assign=True)`,
    are not laid out.

    Raises TypeError for anything but a module, and for BNs that compute otherwise than BatchNorm2d does; ValueError for
    a model that is folded already, holds nothing to fold, computes its weights (parametrizations, pruning), has BNs
    without running statistics or hooks on modules that would be gone, and for `pack` and `plain` together.
    """
    if pack and plain:
        raise ValueError("pack and plain exclude one another: plain convs are not packed")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    packed = [module for module in model.modules() if isinstance(module, PackedSeqConv)]
    if not packed:
        raise ValueError(f"model ({type(model).__name__}) has no seqconv_triton layers to fold")
    if any(isinstance(module.norm, Affine) for module in packed):
        raise ValueError(f"model ({type(model).__name__}) is folded already")
    refuse_offloaded(model, "be folded")
    for name, part in _touched(model, plain):
        refuse_computed(name, part, "be folded")
        if (plain or not isinstance(part, PackedSeqConv)) and watched(part):
            raise ValueError(
                f"{name}: a {type(part).__name__} that would be gone has hooks, or a forward put in the place of its "
                "own; fuse first, hook afterwards"
            )
    for name, module in model.named_modules():
        if any(isinstance(value, Tensor) and not value.is_leaf for value in vars(module).values()):
            refuse_computed(name or type(module).__name__, module, "be copied")
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, PackedSeqConv):
            _fold_packed(module)
            module.requires_grad_(False)
            if pack:
                _freeze(module)
        elif isinstance(module, Backbone):
            if not isinstance(module.norm, nn.Identity):  # timm's feature networks end without one
                module.norm = _affine("norm", module.norm, next(module.parameters())).requires_grad_(False)
            _fold_stem(module.stem)
    return _replaced(model, {}) if plain else model  # type: ignore[return-value] # a layer alone is another kind then


def _replaced(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """`module`, or what stands for it in plain PyTorch; a module that is shared is replaced by one."""
    if module in done:
        return done[module]
    new = module
    if isinstance(module, PackedSeqConv):
        (norms, statistics), convs = module.norms(), module.convs()
        stage = StageArguments(module.plan, convs, norms, statistics, module.eps)
        features = module.feature_channels if isinstance(module, Stage) else (0, 0)
        new = PlainSeqConv(module.plan, constants(stage, convs.transform.dtype), features).eval()
    elif isinstance(module, StemConv2d) and _is_conv(module):
        new = plain_conv(
            module.in_channels, module.out_channels, 3, module.stride[0], 1, module.weight, module.bias
        ).eval()  # fmt: skip
    elif type(module) is PublishedClassifier:
        # Which it is but for its start: hooks, and what computes its weight, stay.
        module.__class__ = nn.Linear  # type: ignore[assignment]
    done[module] = new
    if new is module:
        for name, child in list(module._modules.items()):
            module._modules[name] = None if child is None else _replaced(child, done)
    return new


def _freeze(module: PackedSeqConv) -> None:
    """Parameters become buffers of the same names, marked as what stays."""
    for part in list(module.modules()):
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                del part._parameters[name]
                part.register_buffer(name, parameter.detach())
                mark(part.get_buffer(name))


def _affine(name: str, norm: nn.Module, like: Tensor) -> Affine:
    """The scale and shift of a BN in evaluation, computed in float64."""
    (weight, bias, mean, var), statistics, eps, _ = read(name, norm, like)
    if mean is None or var is None:
        raise ValueError(f"{name}: a BN without running statistics (track_running_stats=False) cannot be folded")
    if statistics == "batch":
        raise ValueError(f"{name}: a {type(norm).__name__} that eval() leaves in training mode cannot be folded")
    scale = weight.double() * (var.double() + eps).rsqrt()
    shift = bias.double() - scale * mean.double()
    return Affine(scale.to(weight.dtype), shift.to(bias.dtype))


def _touched(model: nn.Module, plain: bool) -> Iterator[tuple[str, nn.Module]]:
    """What is folded: the modules that will be others, and the packed layers, which are that only if `plain`."""
    for prefix, module in model.named_modules():
        parts: dict[str, nn.Module] = {}
        if isinstance(module, PackedSeqConv):
            parts = {"": module, **dict(module.named_children())}
        elif isinstance(module, Backbone):
            parts = {f"stem.{i}": part for i, part in enumerate(module.stem) if isinstance(part, _BatchNorm)}
            parts |= {f"stem.{i - 1}": module.stem[i - 1] for i in _behind_convs(module.stem)}
            parts |= {} if isinstance(module.norm, nn.Identity) else {"norm": module.norm}
        elif plain and isinstance(module, StemConv2d) and _is_conv(module):
            parts = {"": module}
        for name, part in parts.items():
            yield ".".join(filter(None, (prefix, name))) or type(part).__name__, part


def _behind_convs(stem: nn.Sequential) -> list[int]:
    """The BNs of a stem that are folded into the conv before them."""
    pairs = pairwise(stem)
    return [i for i, (a, b) in enumerate(pairs, 1) if _is_conv(a) and isinstance(b, _BatchNorm)]


def _is_conv(module: nn.Module) -> bool:
    """A Conv2d that computes as PyTorch's does: one that standardises its weight, say, cannot take up a BN."""
    if not isinstance(module, nn.Conv2d) or type(module)._conv_forward is not nn.Conv2d._conv_forward:
        return False
    return type(module).forward in (nn.Conv2d.forward, StemConv2d.forward)


def _fold_stem(stem: nn.Sequential) -> None:
    convs = _behind_convs(stem)
    for i, norm in enumerate(stem):
        if isinstance(norm, _BatchNorm):
            like = next(stem.parameters())
            stem[i] = _affine(f"stem.{i}", norm, like)  # which refuses what cannot be folded
            if i in convs:
                stem[i - 1], stem[i] = fuse_conv_bn_eval(stem[i - 1], norm), nn.Identity()  # type: ignore[type-var]
    stem.requires_grad_(False)


def _fold_packed(module: PackedSeqConv) -> None:
    """Into weights of its own: other layers may share those it had."""
    plan, k = module.plan, module.plan.group_width
    module.dropout = 0.0
    if module.reduce_norm is not None:
        assert module.reduce_weight is not None
        inner = _affine("reduce_norm", module.reduce_norm, module.reduce_weight)
        reduce = module.reduce_weight.clone()
        for weight, scale in zip(window_weights(reduce, plan, 1), inner.weight.split(k), strict=True):
            weight.mul_(scale[:, None, None, None])
        inner.weight.fill_(1)
        module.reduce_weight, module.reduce_norm = nn.Parameter(reduce), inner
    module.norm = norm = _affine("norm", module.norm, module.transform_weight)
    if plan.is_single_layer:
        return  # its raw output may be asked for, and shortcuts added to it
    transform = module.transform_weight.clone()
    weights = transform_weights(transform, plan)
    missing = plan.total_channels - plan.normalized_channels
    for j in foldable_groups(plan):
        scale = norm.weight[plan.slot(j) - missing :][:k]
        weights[j].mul_(scale[:, None, None, None])
        scale.fill_(1)
    module.transform_weight = nn.Parameter(transform)
