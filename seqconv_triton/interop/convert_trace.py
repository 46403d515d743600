"""Where a model has 3×3 conv → BN → ReLU and nothing in between: found by tracing its forward with torch.fx.

Only a trace shows that a conv's output goes to one BN, and that BN's output to one ReLU, and nowhere else. Both the
training and the evaluation graph are looked at, since a model may take other ways in them.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import fx, nn

from seqconv_triton.nn.computed import computed
from seqconv_triton.nn.layers import PackedSeqConv
from seqconv_triton.nn.watched import watched

RELU_FUNCTIONS = (nn.functional.relu, nn.functional.relu_, torch.relu, torch.relu_)
RELU_METHODS = ("relu", "relu_")


@dataclass(frozen=True, eq=False)
class Triple:
    """A 3×3 conv and its BN, and their ReLU if no other place calls it and no hook watches it."""

    name: str
    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    own_relu: nn.ReLU | None


def find_triples(model: nn.Module) -> tuple[list[Triple], dict[str, str]]:
    """The triples of a model, in its modules' order, and for every other 3×3 conv the reason why it is none.

    Raises ValueError for a model that torch.fx cannot trace, naming the parts that it can.
    """
    graphs = trace_both_modes(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {module: name for name, module in model.named_modules()}
    calls = [Counter(modules[str(n.target)] for n in graph.nodes if n.op == "call_module") for graph in graphs]
    used = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    aliases = Counter(modules.values())
    triples, reasons = [], {}
    for conv, name in names.items():
        if not isinstance(conv, nn.Conv2d) or not _is_3x3(conv):
            continue
        reason = _no_candidate(conv) or ("not called in forward" if not any(c[conv] for c in calls) else None)
        found: list[_Chain] = []
        for graph, count in zip(graphs, calls, strict=True):
            if reason is None and count[conv]:
                chain = _follow(graph, conv, modules, count)
                reason = chain if isinstance(chain, str) else None
                found += [chain] if isinstance(chain, _Chain) else []
        if reason is None and len({chain.norm for chain in found}) > 1:
            reason = "another BN in training than in evaluation"
        if reason is None and used[id(conv.weight)] > aliases[conv]:
            reason = "another module shares its weight"
        if reason is not None:
            reasons[name] = reason
            continue
        relus = {chain.relu for chain in found}
        relu = relus.pop() if len(relus) == 1 else None
        own = relu is not None and not watched(relu) and all(count[relu] <= 1 for count in calls)
        triples.append(Triple(name, conv, found[0].norm, relu if own else None))
    return triples, reasons


def _is_3x3(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)


def _no_candidate(conv: nn.Conv2d) -> str | None:
    """Why a 3×3 conv, wherever it stands, cannot be a SeqConv layer."""
    if type(conv) is not nn.Conv2d:
        return f"a {type(conv).__name__}, no plain Conv2d"
    if computed(conv) is not None:
        return "its weight is computed (parametrization, pruning)"
    if watched(conv):
        return "it has hooks"
    if conv.stride != (1, 1):
        return f"stride {conv.stride[0]}: a SeqConv layer keeps the image size"
    if conv.dilation != (1, 1):
        return f"dilation {conv.dilation[0]}: a SeqConv layer has none"
    if conv.padding not in ("same", (1, 1)):
        return f"padding {conv.padding}: a SeqConv layer keeps the image size"
    if conv.padding_mode != "zeros":
        return f"padding_mode {conv.padding_mode!r}: a SeqConv layer pads with zeros"
    if conv.groups > 1 and conv.groups == conv.in_channels:
        return "a depthwise conv"
    return None


@dataclass(frozen=True)
class _Chain:
    norm: nn.BatchNorm2d
    relu: nn.ReLU | None  # None: a function


def _follow(graph: fx.Graph, conv: nn.Conv2d, modules: dict[str, nn.Module], calls: Counter[nn.Module]) -> _Chain | str:
    """The BN and the ReLU behind a conv in one graph, or what stands there instead."""
    if calls[conv] > 1:
        return f"called {calls[conv]} times: its weights are shared"
    start = next(n for n in graph.nodes if n.op == "call_module" and modules[str(n.target)] is conv)
    if _read_directly(graph, start):
        return "its weight is also used directly"
    node = _only_user(start, modules)
    if isinstance(node, str):
        return f"its output {node}"
    norm = _module(node, modules)
    if hasattr(norm, "process_group"):
        return "its BN is synchronised over ranks: convert first, then call convert_sync_batchnorm"
    # Of other subclasses nothing is known; timm's BatchNormAct2d holds the activation.
    if not isinstance(norm, nn.BatchNorm2d) or not (type(norm) is nn.BatchNorm2d or hasattr(norm, "act")):
        return f"its output goes to {_what(node, modules)}, not to a BatchNorm2d"
    if _read_directly(graph, node):
        return "its BatchNorm2d's parameters are also used directly"
    if calls[norm] > 1:
        return "other convs share its BatchNorm2d"
    if norm.weight is None or norm.running_mean is None:
        return "its BatchNorm2d has no affine or no running statistics"
    if computed(norm) is not None:
        return "its BatchNorm2d's weight is computed (parametrization, pruning)"
    if watched(norm):
        return "its BatchNorm2d has hooks"
    fused = getattr(norm, "act", None)
    if fused is not None and not isinstance(fused, nn.Identity):
        if not isinstance(fused, nn.ReLU) or not isinstance(getattr(norm, "drop", nn.Identity()), nn.Identity):
            return f"its BN goes to {type(fused).__name__}, not to ReLU"
        return _Chain(norm, None)
    node = _only_user(node, modules)
    if isinstance(node, str):
        return f"its BN's output {node}"
    relu = _module(node, modules)
    if isinstance(relu, nn.ReLU):
        return _Chain(norm, relu)
    if (node.op == "call_function" and node.target in RELU_FUNCTIONS) or (
        node.op == "call_method" and node.target in RELU_METHODS
    ):
        return _Chain(norm, None)
    return f"its BN goes to {_what(node, modules)}, not to ReLU"


def _read_directly(graph: fx.Graph, call: fx.Node) -> bool:
    """Whether a graph reads tensors of a module that it also calls."""
    return any(n.op == "get_attr" and str(n.target).rpartition(".")[0] == str(call.target) for n in graph.nodes)


def _only_user(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | str:
    """The one node that reads this one's output, past identities."""
    users = list(node.users)
    if len(users) != 1:
        return f"goes to {len(users)} places"
    if isinstance(_module(users[0], modules), nn.Identity):
        return _only_user(users[0], modules)
    return users[0]


def _module(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    return modules[str(node.target)] if node.op == "call_module" else None


def _what(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    module = _module(node, modules)
    if module is not None:
        return type(module).__name__
    return "the model's output" if node.op == "output" else str(getattr(node.target, "__name__", node.target))


class _Tracer(fx.Tracer):
    """Opens everything, or (`coarse`) only modules that hold a 3×3 conv or a BN: others may have control flow."""

    def __init__(self, coarse: bool) -> None:
        super().__init__(param_shapes_constant=True)
        self.coarse = coarse

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, PackedSeqConv | nn.modules.batchnorm._BatchNorm | nn.Conv2d):
            return True
        if self.coarse and not any(_is_3x3(p) or isinstance(p, nn.modules.batchnorm._BatchNorm) for p in m.modules()):
            return True
        return super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """The model's graph, with arguments that have defaults left at them; raises whatever the model raises."""
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    try:
        return _Tracer(coarse=False).trace(model, defaults)
    except Exception:  # a model's own code meets a Proxy: it can raise anything
        return _Tracer(coarse=True).trace(model, defaults)


def trace_both_modes(model: nn.Module) -> list[fx.Graph]:
    """The training and the evaluation graph; afterwards the model is as before."""
    try:
        with _restored(model):
            return [trace(model.train(mode)) for mode in (True, False)]
    except Exception as error:  # of the model's own code
        parts = [name for name, part in model.named_children() if _traceable(part)]
        hint = f"; these parts of it can be: {', '.join(parts)}" if parts else ""
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"model ({type(model).__name__}) cannot be traced by torch.fx, so that what follows its convs is not known "
            f"({type(error).__name__}: {lines[0]}); convert a part of it, as in convert(model.part, …){hint}"
        ) from error


def _traceable(part: nn.Module) -> bool:
    if not any(_is_3x3(module) for module in part.modules()):
        return False
    try:
        with _restored(part):
            trace(part)
    except Exception:  # of the model's own code
        return False
    return True


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Tracing runs a model's own code: what that leaves in attributes and buffers, and the modes, is undone."""
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, values in attributes:
            module.__dict__.clear()
            module.__dict__.update(values)
        with torch.no_grad():
            for buffer, version, value in buffers:
                if buffer._version != version:
                    buffer.copy_(value)
