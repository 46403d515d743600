"""Weights that are computed from other tensors: parametrizations, pruning, weight_norm and spectral_norm.

A pre-forward hook makes most of them anew whenever their module is called. Where a module of ours is used without being
called, that has to be done for it; where its weights are to be written, they must not be of this kind.
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


def refuse_computed(owner: str, module: nn.Module, purpose: str) -> None:
    """ValueError, with the name, where a weight or statistic of `module` itself is no parameter or buffer of its own.

    What were written into it would be lost when it is computed anew. `purpose` is what it cannot be: "be folded".
    """
    for name in HELD:
        if name not in module._parameters and name not in module._buffers and _holds(module, name):
            raise ValueError(
                f"{owner}: {name} is computed (parametrization, pruning) and cannot {purpose}; make it permanent "
                "first, with torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove"
            )


def _holds(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), Tensor)
