"""Training checkpoints: written whole, read with checks."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recipes import files
from seqconv_triton.interop import torch_file

FORMAT, VERSION = "seqconv_triton training", 1
KEYS = {"model", "arch", "classes", "epoch", "best_error", "preprocess"}


def save(state: dict[str, Any], path: Path) -> None:
    """torch.save into `path`, as files.write does it."""
    buffer = io.BytesIO()  # a full disk is then a plain OSError: the archive writer would hide it
    torch.save(state, buffer)
    files.write(path, buffer.getbuffer())


def load(path: Path) -> dict[str, Any]:
    """A training checkpoint, on the CPU; nothing but tensors and plain values is unpickled.

    Raises OSError where there is no such file, and ValueError, saying which, for an empty, a damaged or a foreign one.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a checkpoint in it, such as {path / 'best.pt'}")
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    state = torch_file.read(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        keys = f"the keys {', '.join(map(str, list(state)[:4]))}, …" if isinstance(state, dict) else ""
        raise ValueError(
            f"{path} is no checkpoint of `train`: it holds {keys or type(state).__name__} (those of `demo` and "
            "`ablation` are for `heatmap`, published weights for sct.load_published)"
        )
    if state.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {state.get('version')} of the checkpoint format; this package reads {VERSION}"
        )
    if missing := KEYS - state.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")
    return state


def mismatch(before: Sequence[str], now: Sequence[str]) -> str:
    """How two lists of class names differ."""
    if len(before) != len(now):
        return f"the checkpoint has {len(before)} classes, the data {len(now)}"
    pair = next((a, b) for a, b in zip(before, now, strict=True) if a != b)
    return f"the checkpoint's classes are not the data's: {pair[0]!r} there, {pair[1]!r} here"
