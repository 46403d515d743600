"""Folded layers: packed weights for evaluation here, and every conv's share of them for whoever exports.

Converters and quantizers pass convs by whose weights are computed. So each conv is a module that exports call, and
evaluations where a hook waits for it. Its weight, as every scale and shift, is a buffer: a view of the packed weights,
without memory of its own. The packed weights are plain attributes then, in the state dict but not registered, since
exported programs hold all that is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from seqconv_triton.backend.contract import Convs, Norms, StageArguments
from seqconv_triton.backend.traced import GroupConstants, GroupSteps, StageConstants, StageSteps, constants
from seqconv_triton.plan import Plan


class Group(nn.Module):
    """A group's convs as modules, since there are quantizers that know no others."""

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, plan: Plan, window: int) -> None:
        super().__init__()
        k = plan.group_width
        self.reduce = nn.Conv2d(window, k, 1, device="meta") if plan.bottleneck else None
        self.inner_relu = nn.ReLU()
        inside, groups = (k, plan.subgroups) if plan.bottleneck else (window, 1)
        self.transform = nn.Conv2d(inside, k, 3, padding=1, groups=groups, device="meta")
        self.relu = nn.ReLU()

    def put(self, group: GroupConstants) -> None:
        if self.reduce is not None:
            _put(self.reduce, weight=group.reduce, bias=group.reduce_shift)
        _put(self.transform, weight=group.transform, bias=group.transform_shift)
        _put(self, scale=group.scale, shift=group.shift)

    def steps(self) -> GroupSteps:
        return GroupSteps(self.reduce, self.inner_relu, self.transform, self.scale, self.shift, self.relu)


class Links:
    """Buffers and hooks where they are registered; no plain list, because torch.export copies those of modules."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.places = [(part._buffers, name, buffer) for part in modules for name, buffer in part._buffers.items()]
        self.hooks = [hooks for part in modules for hooks in (part._forward_hooks, part._forward_pre_hooks)]


class Constants(nn.Module):
    """A folded layer's weights, conv by conv, as views in buffers that are in no state dict."""

    entry_scale: Tensor | None
    entry_shift: Tensor | None

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.entry_relu = nn.ReLU()
        self.groups = nn.ModuleList(Group(plan, group.window_width) for group in plan.groups)
        self.tail = None
        if (tail := plan.tail) is not None:
            channels, size = plan.read_channels * tail.repeats, tail.kernel_size
            self.tail = nn.Conv2d(
                channels, plan.out_channels, size, tail.stride, size // 2, groups=tail.groups, device="meta"
            )

    def put(self, stage: StageConstants) -> None:
        _put(self, entry_scale=stage.entry_scale, entry_shift=stage.entry_shift)
        for module, group in zip(self.groups, stage.groups, strict=True):
            assert isinstance(module, Group)
            module.put(group)
        if self.tail is not None:
            assert stage.tail is not None
            _put(self.tail, weight=stage.tail.detach(), bias=None)  # a view like the others, no parameter
        self.linked = Links(list(self.modules()))

    def drop(self) -> None:
        for part in self.modules():
            part._buffers.clear()

    def steps(self) -> StageSteps:
        groups = tuple(group.steps() for group in self.groups if isinstance(group, Group))
        return StageSteps(self.entry_scale, self.entry_shift, self.entry_relu, groups, self.tail)

    def watched(self) -> bool:
        """Whether a hook waits for one of the convs to be called, as those of counters do."""
        return any(self.linked.hooks)

    def replaced(self) -> bool:
        """Whether somebody put other values here, where nothing but exports would see them (functional_call)."""
        changed = [now[name] for now, name, buffer in self.linked.places if now[name] is not buffer]
        return any(a is not None and not a.is_meta for a in changed)


def _put(module: nn.Module, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        module._parameters.pop(name, None)
        module.register_buffer(name, tensor, persistent=False)


class Apart(nn.Module):
    """Until `set_apart`, a module like any other."""

    PACKED: ClassVar = ("reduce_weight", "transform_weight", "tail_weight")
    plan: Plan
    sources: tuple[int, ...]  # addresses of the packed weights that the views belong to

    def convs(self) -> Convs:
        raise NotImplementedError

    def norms(self) -> tuple[Norms, Any]:
        raise NotImplementedError

    @property
    def is_apart(self) -> bool:
        return "constants" in self._modules

    def set_apart(self) -> None:
        """For layers that are folded: into the views nothing can be multiplied any more."""
        self.constants = Constants(self.plan)
        self.register_load_state_dict_post_hook(_link)  # type: ignore[no-untyped-call]
        _link(self)

    def exported_steps(self) -> StageSteps:
        """Raises RuntimeError where packed weights have been replaced since the layer was last called."""
        if not torch.compiler.is_dynamo_compiling() and self.sources[:3] != _addresses(self.convs()):
            raise RuntimeError(
                "weights of a folded layer have been replaced, not changed in place: call the model once, then export"
            )
        return self.constants.steps()

    def follow(self, norms: Norms) -> None:
        """Every conv gets its share of the packed weights anew where those were replaced.

        Raises RuntimeError where the shares were instead, by functional_call.
        """
        if self.constants.replaced():
            raise RuntimeError(
                "buffers in `constants` of a folded layer are for exports; replace its packed weights, which are in "
                "its state dict, or change the buffers in place"
            )
        main, inner = norms
        if self.sources != _addresses((*self.convs(), *main[:2], *(inner or ())[:2])):
            _link(self)

    def unhide(self) -> None:
        for name in self.PACKED:
            if self.__dict__.get(name) is not None:
                weight = self.__dict__.pop(name)
                (self._parameters if isinstance(weight, nn.Parameter) else self._buffers)[name] = weight

    def hide(self) -> None:
        for name in self.PACKED:
            for registered in (self._parameters, self._buffers):
                if registered.get(name) is not None:
                    self.__dict__[name] = registered.pop(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if not self.is_apart:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.constants.drop()  # or each would get memory of its own
        self.unhide()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        _link(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.is_apart:
            _link(self)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.unhide()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_apart:
            self.hide()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.unhide()
        super()._load_from_state_dict(*arguments)
        if self.is_apart:
            self.hide()


@torch.no_grad()
def _link(module: Apart, *_: Any) -> None:
    module.hide()
    norms, _statistics = module.norms()
    convs, (main, inner) = module.convs(), norms
    module.constants.put(constants(StageArguments(module.plan, convs, norms, "folded", 0.0), convs.transform.dtype))
    module.sources = _addresses((*convs, *main[:2], *(inner or ())[:2]))


def _addresses(tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    """Of memory; zero where there is none (meta and fake tensors, functorch's)."""
    return tuple(0 if t is None else _address(t) for t in tensors)


def _address(tensor: Tensor) -> int:
    if type(tensor) not in (Tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return 0
    return tensor.data_ptr()
