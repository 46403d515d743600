"""Tables of measured configurations: JSON files, one a GPU, those that ship with the package and the user's own.

A row is {"key": …, "config": …, "milliseconds": …, "heuristic": …, "heuristic_milliseconds": …, "provenance": …};
what keys and configurations consist of is for `configs.py` to say. The user's own lie in the platform's cache
directory: Triton's is what people delete when a compilation goes wrong, and torch's does not outlive a reboot.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Raise it when a kernel changes such that what was measured before no longer holds.
FORMAT = 2
SHIPPED = Path(__file__).parent / "tuned"

Row = dict[str, Any]


def cache_directory() -> Path:
    """Where the platform keeps what a user's programs can compute again. Raises OSError without a home directory."""
    base: str | Path
    try:
        if sys.platform == "win32":
            base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = os.environ.get("XDG_CACHE_HOME", "")
            if not os.path.isabs(base):  # as its specification asks
                base = Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(f"there is no cache directory: {error}") from error
    return Path(base) / "seqconv_triton"


def triton_version() -> str:
    """Major and minor: another one may give the same tiles other registers."""
    try:
        import triton
    except ImportError:
        return "none"
    return ".".join(triton.__version__.split(".")[:2])


def file_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def user_file(gpu: str) -> Path:
    """The user's own table for a GPU under the installed version of Triton."""
    return cache_directory() / f"triton-{triton_version()}" / file_name(gpu)


def shipped_file(gpu: str) -> Path:
    return SHIPPED / file_name(gpu)


def read(path: Path, gpu: str) -> list[Row]:
    """The rows of a file; none where there is no file.

    Raises OSError where it cannot be read, ValueError where it is no table of this version for this GPU.
    """
    try:
        table = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no table of configurations: {error}") from error
    rows = table.get("entries") if isinstance(table, dict) else None
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise ValueError(f"{path} is no table of configurations: it has no list of entries")
    if table.get("format") != FORMAT:
        raise ValueError(f"{path} has format {table.get('format')!r}, this version reads {FORMAT}")
    if table.get("gpu") != gpu:
        raise ValueError(f"{path} was measured on {table.get('gpu')!r}, not on {gpu!r}")
    return rows


def document(rows: Iterable[Row], gpu: str) -> str:
    """A table as JSON, one line a row, always in the same order."""
    lines = sorted(json.dumps(row) for row in rows)
    head = json.dumps({"format": FORMAT, "gpu": gpu})[:-1]
    return head + ', "entries": [\n' + ",\n".join(lines) + "\n]}\n"


def write(path: Path, gpu: str, rows: Iterable[Row]) -> None:
    """Replace a file at one stroke; where that raises OSError it is what it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(document(rows, gpu))
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
