"""The backend that the current thread or asyncio task has chosen: `chosen.name`, None for the default.

An attribute of the module, because torch.compile traces and guards those in the thread that calls, and refuses
ContextVar.get and thread idents. Blocks inside of a compiled function live while it is traced only.
"""

from __future__ import annotations

from contextvars import ContextVar

import torch

_blocks: ContextVar[tuple[str | None, ...]] = ContextVar("seqconv_triton_backends", default=())
_traced_blocks: list[str | None] = []


def __getattr__(attribute: str) -> str | None:
    if attribute != "name":
        raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
    blocks = _blocks.get()
    return blocks[-1] if blocks else None


def traced_or(name: str | None) -> str | None:
    """What a block inside of the function being traced has chosen, or `name`."""
    return _traced_blocks[-1] if _traced_blocks else name


def enter(name: str | None) -> None:
    if torch.compiler.is_dynamo_compiling():
        _traced_blocks.append(name)
    else:
        _blocks.set((*_blocks.get(), name))


def leave() -> None:
    if torch.compiler.is_dynamo_compiling():
        _traced_blocks.pop()
    else:
        _blocks.set(_blocks.get()[:-1])
