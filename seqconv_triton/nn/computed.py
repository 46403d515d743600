"""Weights that are computed from other tensors: parametrizations, pruning, weight_norm and spectral_norm.

A pre-forward hook makes most of them anew whenever their module is called. Where a module of ours is used without being
called, that has to be done for it; where its weights are to be written, they must not be of this kind. Nor may they be
elsewhere, as accelerate's offloading has them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

MAKERS = (BasePruningMethod, SpectralNorm, WeightNorm)
HELD = ("reduce_weight", "transform_weight", "tail_weight", "weight", "bias", "running_mean", "running_var")


def make_weights(module: nn.Module) -> None:
    """What calling `module` would do first: its weights that a hook computes are made anew."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, MAKERS):
            maker: Any = hook
            maker(module, ())


def computed(module: nn.Module) -> str | None:
    """The first weight or statistic of `module` itself that is no parameter or buffer of its own."""
    names = (name for name in HELD if name not in module._parameters and name not in module._buffers)
    return next((name for name in names if isinstance(getattr(module, name, None), Tensor)), None)


def refuse_computed(owner: str, module: nn.Module, purpose: str) -> None:
    """ValueError, with the name, where a weight or statistic is computed: what were written into it would be lost.

    `purpose` is what it cannot be: "be folded".
    """
    if (name := computed(module)) is not None:
        raise ValueError(
            f"{owner}: {name} is computed (parametrization, pruning) and cannot {purpose}; make it permanent "
            "first, with torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove"
        )


def refuse_offloaded(model: nn.Module, purpose: str) -> None:
    """ValueError where accelerate holds weights of `model` elsewhere, so that they cannot `purpose` ("be folded")."""
    for name, module in model.named_modules():
        if "_hf_hook" in module.__dict__ and any(p.is_meta for p in module.parameters()):
            raise ValueError(
                f"{name or 'model'}: its weights are offloaded by accelerate and cannot {purpose}; bring them back "
                "first, with accelerate.hooks.remove_hook_from_module(model, recurse=True)"
            )
