"""One group's conv out of a packed weight, as a parameter: for optimizers that look at a weight as a matrix."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

_data: Any = Tensor.data
_grad: Any = Tensor.grad
_dtype: Any = Tensor.dtype
_device: Any = Tensor.device
_NO_HOOKS = (
    "this is one group's part of a packed weight, whose gradient is made for all groups at once; register the hook on "
    "the model's own parameter (model.named_parameters())"
)


class PackedWeight:
    """A packed weight whose parts are handed out, and those whose gradient was set to None while others keep theirs."""

    def __init__(self, whole: nn.Parameter) -> None:
        self.whole = whole
        self._grad: Tensor | None = None  # in which they were cleared
        self._cleared: dict[int, Callable[[Tensor], Tensor]] = {}  # by where they begin
        self._left = 0  # values of the others
        if whole.requires_grad:
            handle = whole.register_hook(partial(_begin_anew, weakref.ref(self)))
            weakref.finalize(self, handle.remove)

    def __reduce__(self) -> Any:
        return PackedWeight, (self.whole,)

    def grad(self, part_of: Callable[[Tensor], Tensor]) -> Tensor | None:
        """A part of the gradient, or None where it was cleared."""
        if (grad := self.whole.grad) is None:
            return None
        part = part_of(grad)
        return None if self._grad is grad and int(part.storage_offset()) in self._cleared else part

    def add(self, part_of: Callable[[Tensor], Tensor], value: Tensor, *, replace: bool = False) -> None:
        """To a part of the gradient, or in its place."""
        self.settle()
        if self.whole.grad is None:
            self.whole.grad = self.whole.detach().new_zeros(self.whole.shape)
        part = part_of(self.whole.grad)
        part.copy_(value) if replace else part.add_(value)

    def clear(self, part_of: Callable[[Tensor], Tensor]) -> None:
        """None for a part, and for the whole when no other part is left. The memory stays as it is: it may be kept."""
        if (grad := self.whole.grad) is None:
            return
        if self._grad is not grad:
            self._grad, self._cleared, self._left = grad, {}, grad.numel()
        part = part_of(grad)
        if (start := int(part.storage_offset())) not in self._cleared:
            self._cleared[start] = part_of
            self._left -= part.numel()
        if not self._left:
            self.whole.grad = self._grad = None

    def settle(self) -> None:
        """Before something is added: what was cleared is zero, in a gradient of its own."""
        if self._grad is not None and self._grad is self.whole.grad:
            self.whole.grad = self._grad.detach().clone()
            for part_of in self._cleared.values():
                part_of(self.whole.grad).zero_()
        self._grad = None


def _begin_anew(packed: weakref.ref[PackedWeight], _: Tensor) -> None:
    """The hook of a whole: a backward pass is about to add to its gradient."""
    if (owner := packed()) is not None:
        owner.settle()


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
        Tensor.register_post_accumulate_grad_hook(new, _hand_over)  # type: ignore[no-untyped-call]
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
        """Values of its shape: the memory stays the whole's. Raises ValueError for another shape."""
        if value.shape != self.shape:
            raise ValueError(f"data must be of shape {tuple(self.shape)}, a group's part, not {tuple(value.shape)}")
        self.data.copy_(value)

    def _follow(self) -> None:
        part = self.part_of(self.packed.whole.detach())
        same = _dtype.__get__(self) == part.dtype and _device.__get__(self) == part.device
        if not same or not (part.is_meta or self.is_set_to(part)):
            _data.__set__(self, part)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        self._follow()
        return _dtype.__get__(self)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        self._follow()
        return _device.__get__(self)

    @property
    def grad(self) -> Tensor | None:
        self._follow()
        return self.packed.grad(self.part_of)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        """Its part of the whole's gradient, which is None once all parts are. ValueError for another shape."""
        if value is None:
            self.packed.clear(self.part_of)
        elif self.grad is not value:
            if value.shape != self.shape:
                raise ValueError(f"grad must be of shape {tuple(self.shape)}, a group's part, not {tuple(value.shape)}")
            self.packed.add(self.part_of, value, replace=True)

    @grad.deleter
    def grad(self) -> None:
        self.grad = None

    def register_hook(self, hook: Any) -> NoReturn:
        """Raises NotImplementedError: gradients come to the whole."""
        raise NotImplementedError(_NO_HOOKS)

    def register_post_accumulate_grad_hook(self, hook: Any) -> NoReturn:
        """Raises NotImplementedError: gradients come to the whole."""
        raise NotImplementedError(_NO_HOOKS)


def _hand_over(part: Tensor) -> None:
    """A loss on the part itself has its gradient there: it belongs to the whole."""
    assert isinstance(part, GroupParameter)
    given = _grad.__get__(part)
    _grad.__set__(part, None)
    part.packed.add(part.part_of, given)
