"""`convert`: an existing model's 3×3 conv → BN → ReLU triples become SeqConv layers of the same width.

A windowed basic layer has as many weights as the conv it stands for (paper, section 3.2), so that a converted model is
as large as before; each group now also sees the groups before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from seqconv_triton.interop.convert_trace import Triple, find_triples
from seqconv_triton.nn.computed import refuse_offloaded
from seqconv_triton.nn.layers import SeqConv2d

Model = TypeVar("Model", bound=nn.Module)
Width = int | Callable[[str, nn.Conv2d], int]
# By name: importing them is slow, and not every build of torch has them all.
WRAPPERS = {"OptimizedModule", "ScriptModule", "DataParallel", "DistributedDataParallel", "FSDPModule"}
Selection = str | Iterable[str] | Callable[[str, nn.Conv2d], bool] | None


@dataclass(frozen=True)
class Replaced:
    """A triple that became a SeqConv layer: what it was and is, and the parameters of both."""

    name: str
    before: str
    after: str
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class Kept:
    """A 3×3 conv that stays, and why."""

    name: str
    what: str
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did; `parameters_before` and `parameters_after` count the whole model. Printed, it is a table."""

    replaced: tuple[Replaced, ...]
    kept: tuple[Kept, ...]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        header = ("replaced", "before", "after", "parameters")
        rows = [(r.name, r.before, r.after, f"{r.parameters_before:,} → {r.parameters_after:,}") for r in self.replaced]
        lines = _table([header, *rows])
        if self.kept:
            lines += ["", *_table([("kept", "3×3 conv", "because"), *((k.name, k.what, k.reason) for k in self.kept)])]
        total = f"parameters of the model: {self.parameters_before:,} → {self.parameters_after:,}"
        return "\n".join([*lines, "", total])


def convert(
    model: Model,
    group_width: Width,
    *,
    select: Selection = None,
    bottleneck: bool = False,
    windowed: bool = True,
    dropout: float = 0.0,
) -> tuple[Model, ConversionReport]:
    """Replace the 3×3 conv → BN → ReLU triples of a model by SeqConv2d layers of the same width: (model, report).

    Works on the model in place and returns it, as torch's convert_sync_batchnorm does; convert before building an
    optimizer, compiling or wrapping in DistributedDataParallel. A SeqConv2d takes the conv's place and name, in its
    mode, dtype and device; an Identity that of the BN, and that of the ReLU where nothing else calls it (a ReLU
    that a block shares stays, and changes nothing: the layer's output is activated). The new layers are freshly
    initialised and trainable; every other weight keeps its bits.

    Replaced are convs with stride 1, padding 1, no dilation, whose output goes to one BatchNorm2d, and from there to
    one ReLU, alone. A grouped conv (ResNeXt) becomes a bottleneck layer whose subgroups are as wide as its groups.
    A conv with fewer input channels than group_width (an image's) stays where windowed, since windows would skip
    channels; so does one that is not wider than a group, and any depthwise conv.

    Args:
        model: a network that torch.fx can trace; its class, methods and attributes stay.
        group_width: k, channels per group, or a function (name, conv) -> k.
        select: which triples: names or shell patterns, or a function (name, conv) -> bool; None for all.
        bottleneck: a 1×1 conv to k channels before each group's 3×3 conv (fewer parameters); grouped convs always.
        windowed: a group sees the last in_channels channels only; otherwise everything before it.
        dropout: probability with which whole channels of what a group sees are dropped in training.

    Raises, with the model unchanged: TypeError for arguments of a wrong kind; ValueError where the model cannot be
    traced, a pattern names no 3×3 conv, a group width does not divide a layer, or nothing would be replaced.
    """
    _check_model(model)
    triples, reasons = find_triples(model)
    chosen = _chooser(select, [triple.name for triple in triples] + list(reasons))
    before = _count(model)
    widths: dict[Triple, int] = {}
    for triple in triples:
        if not chosen(triple.name, triple.conv):
            reasons[triple.name] = "not selected"
            continue
        k = _width_for(triple, group_width)
        reason = _too_narrow(triple.conv, k, windowed)
        if reason is None:
            widths[triple] = k
        else:
            reasons[triple.name] = reason
    _check_widths(widths)
    layers = {triple: _layer(triple, k, bottleneck, windowed, dropout) for triple, k in widths.items()}
    replaced = tuple(
        Replaced(t.name, _describe(t.conv), _after(layer), _count(t.conv, t.norm), _count(layer))
        for t, layer in layers.items()
    )
    kept = tuple(
        Kept(name, _describe(module), reasons[name])
        for name, module in model.named_modules()
        if name in reasons and isinstance(module, nn.Conv2d)
    )
    if not layers:
        found = "\n".join(f"  {row.name}: {row.reason}" for row in kept) or "  it has no 3×3 convs"
        raise ValueError(f"nothing in model ({type(model).__name__}) can be replaced\n{found}")
    _install(model, layers)
    return model, ConversionReport(replaced, kept, before, _count(model))


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    kinds = {kind.__name__ for kind in type(model).__mro__} & WRAPPERS
    if kinds:
        raise TypeError(f"model is a {kinds.pop()}; convert the model itself, before compiling or wrapping it")
    refuse_offloaded(model, "be converted")


def _chooser(select: Selection, names: list[str]) -> Callable[[str, nn.Conv2d], bool]:
    if select is None:
        return lambda name, conv: True
    if callable(select):
        return select
    patterns = [select] if isinstance(select, str) else list(select) if isinstance(select, Iterable) else [select]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"select must be names, patterns or a function, not {type(pattern).__name__}")
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"select: no 3×3 conv is named {pattern!r}; there are {', '.join(names) or 'none'}")
    return lambda name, conv: any(fnmatchcase(name, pattern) for pattern in patterns)


def _width_for(triple: Triple, group_width: Width) -> int:
    k = group_width(triple.name, triple.conv) if callable(group_width) else group_width
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"group_width must be an int, or a function that gives one, not {type(k).__name__}")
    if k < 1:
        raise ValueError(f"group_width ({k}) must be at least 1")
    return k


def _too_narrow(conv: nn.Conv2d, k: int, windowed: bool) -> str | None:
    if conv.out_channels <= k:
        return f"not wider than one group ({k}): nothing to aggregate"
    if windowed and conv.in_channels < k:
        return f"in_channels ({conv.in_channels}) below group_width ({k}): windows would skip channels"
    return None


def _check_widths(widths: dict[Triple, int]) -> None:
    """Every layer's group width divides its width, and holds whole groups of a grouped conv."""
    problems = []
    for triple, k in widths.items():
        conv, width = triple.conv, triple.conv.out_channels // triple.conv.groups
        if conv.out_channels % k:
            problems.append(f"  {triple.name}: out_channels ({conv.out_channels}) is no multiple of group_width ({k})")
        elif conv.groups > 1 and k % width:
            problems.append(f"  {triple.name}: group_width ({k}) is no multiple of the width of its groups ({width})")
    if problems:
        raise ValueError(
            "group_width does not fit every layer; give another, or a function (name, conv) -> group_width, or leave "
            "layers out with select\n" + "\n".join(problems)
        )


def _layer(triple: Triple, k: int, bottleneck: bool, windowed: bool, dropout: float) -> SeqConv2d:
    conv, norm = triple.conv, triple.norm
    layer = SeqConv2d(
        conv.in_channels,
        conv.out_channels,
        k,
        bottleneck=bottleneck or conv.groups > 1,
        windowed=windowed,
        subgroups=1 if conv.groups == 1 else k * conv.groups // conv.out_channels,
        dropout=dropout,
        eps=norm.eps,
        momentum=norm.momentum,  # type: ignore[arg-type]
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    for packed in (layer.norm, layer.reduce_norm):
        if packed is not None:
            packed.to(norm.weight.dtype)
    return layer


def _install(model: nn.Module, layers: dict[Triple, SeqConv2d]) -> None:
    """Put the new modules in the old ones' places, under every name that these have."""
    new: dict[nn.Module, nn.Module] = {}
    for triple, layer in layers.items():
        new[triple.conv], new[triple.norm] = layer, nn.Identity()
        if triple.own_relu is not None:
            new[triple.own_relu] = nn.Identity()
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, name, new[child].train(child.training))


def _count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _describe(conv: nn.Conv2d) -> str:
    groups = f", {conv.groups} groups" if conv.groups > 1 else ""
    return f"{conv.in_channels}→{conv.out_channels}{groups}"


def _after(layer: SeqConv2d) -> str:
    plan = layer.plan
    kind = (
        f", bottleneck, {plan.subgroups} subgroups" if plan.subgroups > 1 else ", bottleneck" if plan.bottleneck else ""
    )
    return f"{len(plan.groups)} groups of {plan.group_width}{kind}"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
