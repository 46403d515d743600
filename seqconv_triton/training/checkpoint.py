"""Checkpoints that are either whole or not there: written beside their place, flushed, then renamed."""

from __future__ import annotations

import io
import os
import secrets
from pathlib import Path
from typing import Any

import torch


def save(state: dict[str, Any], path: Path) -> None:
    """torch.save into `path`, atomically: a failure or a kill at any moment leaves the old file as it was."""
    buffer = io.BytesIO()  # a full disk is then a plain OSError: the archive writer would hide it
    torch.save(state, buffer)
    write(path, buffer.getbuffer())


def write(path: Path, content: bytes | memoryview) -> None:
    """`content` into `path`, atomically. Raises OSError, with the path, where it cannot be written."""
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
