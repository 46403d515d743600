"""Parameter groups for optimizers."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from seqconv_triton.nn.layers import PackedSeqConv
from seqconv_triton.nn.norm import Affine
from seqconv_triton.plan import Plan

_data: Any = Tensor.data
_NO_HOOKS = (
    "this is one group's part of a packed weight, whose gradient is made for all groups at once; register the hook on "
    "the model's own parameter (model.named_parameters())"
)


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


class PackedWeight:
    """A packed weight whose parts are handed out, and which of their gradients were cleared since the last backward."""

    def __init__(self, whole: nn.Parameter) -> None:
        self.whole = whole
        self._cleared: set[int] = set()  # where they begin
        self._left = 0  # values
        self._last: tuple[weakref.ref[Tensor], int] | None = None  # the gradient then, and its version

    def __reduce__(self) -> Any:
        return PackedWeight, (self.whole,)

    def clear(self, part_of: Callable[[Tensor], Tensor]) -> None:
        """Zeros in a part of the gradient; None for all of it when no other part is left."""
        grad = self.whole.grad
        if grad is None:
            return
        if self._last is None or self._last[0]() is not grad or self._last[1] != grad._version:
            self._cleared, self._left = set(), grad.numel()
        part = part_of(grad)
        if (start := int(part.storage_offset())) not in self._cleared:
            self._cleared.add(start)
            self._left -= part.numel()
        part.zero_()
        self._last = weakref.ref(grad), grad._version
        if not self._left:
            self.whole.grad, self._last = None, None


class GroupParameter(nn.Parameter):
    """One group's conv out of a packed weight: the same memory, and the same part of its gradient.

    Where the whole gets other memory (`model.double()`, `vector_to_parameters`), its parts follow as soon as somebody
    asks for their `grad` or `data`, as every optimizer does before it steps.
    """

    packed: PackedWeight
    part_of: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, packed: PackedWeight, part_of: Callable[[Tensor], Tensor]) -> GroupParameter:
        new = cls(part_of(packed.whole.detach()))
        new.packed, new.part_of = packed, part_of
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupParameter:
        """Part of a copy of the whole: with `copy.deepcopy((model, optimizer))`, of the model's copy."""
        new = GroupParameter.of(copy.deepcopy(self.packed, memo), self.part_of)
        memo[id(self)] = new
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        return GroupParameter.of, (self.packed, self.part_of)

    @property
    def data(self) -> Tensor:
        self._follow()
        return _data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        """Values of its shape: the memory stays the whole's."""
        if value.shape != self.shape:
            raise ValueError(f"data must be of shape {tuple(self.shape)}, a group's part, not {tuple(value.shape)}")
        self.data.copy_(value)

    def _follow(self) -> None:
        if not torch.compiler.is_compiling() and not self.is_set_to(part := self.part_of(self.packed.whole.detach())):
            _data.__set__(self, part)

    @property
    def grad(self) -> Tensor | None:
        self._follow()
        whole = self.packed.whole
        return None if whole.grad is None else self.part_of(whole.grad)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        """None is zero until all parts have been set to it, which is None for the whole."""
        whole = self.packed.whole
        if value is None:
            self.packed.clear(self.part_of)
        elif self.grad is not value:
            if whole.grad is None:
                whole.grad = whole.detach().new_zeros(whole.shape)
            self.part_of(whole.grad).copy_(value)

    def register_hook(self, hook: Any) -> NoReturn:
        raise NotImplementedError(_NO_HOOKS)

    def register_post_accumulate_grad_hook(self, hook: Any) -> NoReturn:
        raise NotImplementedError(_NO_HOOKS)


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
