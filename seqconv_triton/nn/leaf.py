"""What reads a network's Python code, torch.fx and TorchScript, where ours asks for shapes, dtypes and modes.

For torch.fx a module of ours is one node, as PyTorch's own are; torch.jit.script gets an error that names a way out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec, TypeVar

from torch import fx, nn
from torch.fx._symbolic_trace import ProxyableClassMeta

Given = ParamSpec("Given")
Result = TypeVar("Result")


def leaf(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """A function, or a module's method, that is one node of a torch.fx graph, whatever the tracer.

    The node of a `forward` calls the module (call_module) and has its name. Other methods are called on the module as
    an attribute of the graph module, and so is the forward of a module with hooks, which fx has traced already.
    """

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        for value in (*args, *kwargs.values()):
            if isinstance(value, fx.Proxy):
                return _node(value.tracer, call, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def _node(tracer: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    owner = args[0]
    if isinstance(owner, Shell):  # also when what was traced is traced again, as a part of another network
        kwargs["training"] = tracer.create_proxy("get_attr", f"{_path(tracer, owner, kwargs)}training", (), {})
    if not isinstance(owner, nn.Module):
        return tracer.create_proxy("call_function", function, args, kwargs)
    name, path, inputs = function.__name__, tracer.path_of_module(owner), args[1:]
    if not path:
        shell, parts = hollow(owner)
        return _node(tracer, call_filled, shell, name, *inputs, **kwargs, **parts)
    if name == "forward" and not (owner._forward_hooks or owner._forward_pre_hooks):
        return tracer.create_proxy("call_module", path, inputs, kwargs)
    return tracer.create_proxy("call_method", name, (tracer.create_proxy("get_attr", path, (), {}), *inputs), kwargs)


def _path(tracer: Any, shell: Shell, parts: dict[str, Any]) -> str:
    """Where the module lies whose parts these are: "" for the traced network itself, "backbone.0." for a part of it."""

    def own(part: Any) -> Any:
        if isinstance(part, fx.Proxy) and part.node.op == "get_attr":
            return functools.reduce(getattr, str(part.node.target).split("."), tracer.root)
        return part

    present = {name: own(parts[name]) for name in shell.parts if parts[name] is not None}
    for path, module in tracer.root.named_modules():
        if all(getattr(module, name, None) is part for name, part in present.items()):
            return f"{path}." if path else ""
    return ""


class Shell(metaclass=ProxyableClassMeta):
    """The root of a trace without its parameters, buffers and modules, which a graph module has under their own names.

    A graph can call every module but its root. The metaclass lets fx keep a shell as a constant.
    """

    def __init__(self, kind: type[nn.Module], attributes: dict[str, Any], parts: tuple[str, ...]) -> None:
        self.kind, self.attributes, self.parts = kind, attributes, parts


def hollow(module: nn.Module) -> tuple[Shell, dict[str, Any]]:
    """A module's shell, and what was in it."""
    parts = {**module._parameters, **module._buffers, **module._modules}
    common = nn.Module().__dict__
    attributes = {
        name: value
        for name, value in module.__dict__.items()
        if name not in common and not isinstance(value, Shell)  # fx puts its constants there
    }
    return Shell(type(module), attributes, tuple(parts)), parts


@leaf
def call_filled(shell: Shell, method: str, *args: Any, **kwargs: Any) -> Any:
    """A method of the root, whose parts and mode are among `kwargs`."""
    module = object.__new__(shell.kind)
    nn.Module.__init__(module)
    module.__dict__.update(shell.attributes)
    for name in shell.parts:
        setattr(module, name, kwargs.pop(name))
    module.training = kwargs.pop("training")
    return getattr(module, method)(*args, **kwargs)


def refuse_script(module: nn.Module) -> NoReturn:
    """What torch.jit.script calls first, under the name `__prepare_scriptable__`."""
    raise NotImplementedError(
        f"torch.jit.script cannot compile {type(module).__name__}; torch.export.export(model.eval(), (x,)) and "
        "torch.jit.trace(model.eval(), x) can"
    )
