"""Fingerprints of results about kernels: the code of those that are launched, and how; nothing else outdates them."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import seqconv_triton as sct
from bench.results import version

if TYPE_CHECKING:
    from seqconv_triton.tools.ahead import Launch


def fingerprint(texts: Iterable[str], *about: object) -> str:
    """Of distinct launches as `described`, in any order, of Triton's version, and what else a result is about."""
    digest = hashlib.sha256(version("triton").encode())
    for text in sorted(set(texts)):
        digest.update(text.encode())
    digest.update(repr(about).encode())
    return digest.hexdigest()[:16]


def described(item: Launch) -> str:
    """All that the compilation of a launch depends on."""
    given = {name: value for name, value in vars(item).items() if name != "kernel"}
    return f"{device_code(item.kernel)}\n{given}"


@cache
def device_code(kernel: Any) -> str:
    """A kernel and the functions of ours that it calls, without comments and docstrings."""
    texts: dict[str, str] = {}
    waiting: list[Callable[..., Any]] = [kernel.fn]
    while waiting:
        function = waiting.pop()
        place = f"{function.__module__}.{function.__qualname__}"
        if place in texts:
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        assert isinstance(tree, ast.FunctionDef)
        if ast.get_docstring(tree) is not None:
            tree.body = tree.body[1:] or [ast.Pass()]
        texts[place] = ast.unparse(tree)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        globals_ = function.__globals__
        for value in (globals_[name] for name in sorted(names & globals_.keys())):
            called = getattr(value, "fn", value)
            if inspect.isfunction(called) and called.__module__.startswith(f"{sct.__name__}."):
                waiting.append(called)
    return "\n".join(texts[place] for place in sorted(texts))
