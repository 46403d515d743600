"""Parameter groups for optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from seqconv_triton.nn.group_parameter import GroupParameter, PackedWeight
from seqconv_triton.nn.layers import PackedSeqConv
from seqconv_triton.nn.norm import Affine
from seqconv_triton.plan import Plan


def parameter_groups(model: nn.Module, weight_decay: float, *, per_group: bool = False) -> list[dict[str, Any]]:
    """Two groups for any torch.optim optimizer: weights with `weight_decay`, biases and BN affines without.

    Rules that go by a parameter's dimensions (one: no decay) are wrong for this package, whose packed weights are
    flat where windows differ. Frozen parameters are left out.

    With `per_group` every packed weight is handed out as the convs of its groups, 1×1 as [k, window], 3×3 as
    [k, …, 3, 3]: for optimizers that look at a weight as a matrix (Muon, Shampoo) or at its norm (LARS, LAMB, adaptive
    clipping), and would mix groups. These share memory and gradients with the packed weights, and take no hooks: those
    belong to the whole. Raises ValueError for a negative weight_decay.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay ({weight_decay}) must be at least 0")
    norms: set[int] = set()
    packed: dict[int, tuple[nn.Parameter, Plan, int]] = {}
    for module in model.modules():
        parts: tuple[nn.Module | None, ...] = ()
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm | Affine):
            parts = (module,)
        elif isinstance(module, PackedSeqConv):
            parts = (module.norm, module.reduce_norm)
            packed |= {id(weight): (weight, module.plan, kernel) for weight, kernel in _packed_weights(module)}
        norms |= {id(parameter) for part in parts if part is not None for parameter in part.parameters(recurse=False)}
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = id(parameter) in norms or name.rsplit(".", 1)[-1] == "bias"
            split = per_group and id(parameter) in packed
            groups[spared].extend(_groups(*packed[id(parameter)]) if split else [parameter])
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]


def _packed_weights(module: PackedSeqConv) -> Iterator[tuple[nn.Parameter, int]]:
    """Those of all groups, with the size of their kernels; none that is computed (parametrizations)."""
    for name, kernel in (("reduce_weight", 1), ("transform_weight", 3)):
        weight = module._parameters.get(name)
        if weight is not None:
            yield weight, kernel


def _groups(weight: nn.Parameter, plan: Plan, kernel: int) -> Iterator[GroupParameter]:
    packed = PackedWeight(weight)
    for j in range(len(plan.groups)):
        yield GroupParameter.of(packed, partial(_part, plan=plan, kernel=kernel, j=j))


def _part(weight: Tensor, plan: Plan, kernel: int, j: int) -> Tensor:
    k = plan.group_width
    if weight.dim() > 1:
        return weight[j * k : (j + 1) * k]
    start, stop = (offset * k * kernel**2 for offset in plan.window_offsets[j : j + 2])
    shape = (k, -1) if kernel == 1 else (k, -1, kernel, kernel)
    return weight[start:stop].view(shape)
