"""Checkpoints that are either whole or not there: written beside their place, flushed, then renamed."""

from __future__ import annotations

import errno
import io
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from seqconv_triton.interop import torch_file

FORMAT, VERSION = "seqconv_triton training", 1
KEYS = {"model", "arch", "classes", "epoch", "best_error", "preprocess"}


def save(state: dict[str, Any], path: Path) -> None:
    """torch.save into `path`, atomically: a failure or a kill at any moment leaves the old file as it was."""
    buffer = io.BytesIO()  # a full disk is then a plain OSError: the archive writer would hide it
    torch.save(state, buffer)
    write(path, buffer.getbuffer())


def write(path: Path, content: bytes | memoryview) -> None:
    """`content` into `path`, atomically. Raises OSError, with the path, where it cannot be written."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, and a file is to be written", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """What kills have left of unfinished writes in `folder`."""
    for name in ("last.pt", "best.pt", "log.csv"):
        for leftover in folder.glob(f".{name}.*"):
            leftover.unlink(missing_ok=True)


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
        held = (
            f"the keys {', '.join(map(str, list(state)[:4]))}, …" if isinstance(state, dict) else type(state).__name__
        )
        raise ValueError(
            f"{path} is no checkpoint of `train`: it holds {held} (those of `demo` and `ablation` are for `heatmap`, "
            "published weights for sct.load_published)"
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
