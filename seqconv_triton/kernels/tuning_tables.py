"""Tables of measured configurations as JSON files: those that ship with the package, and the user's own.

Reading never fails: what cannot be read or was written by another version is left where it is, with one warning, and
the heuristic decides. Writing merges with what is there, under a lock, and renames a complete file into place.
The user's own lie in the platform's cache directory: Triton's is what people delete when a compilation goes wrong, and
torch's is in the system's temporary directory, which does not outlive a reboot.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from seqconv_triton.kernels.configs import TWO_STAGES, Key, LaunchConfig, is_tile
from seqconv_triton.kernels.tuning_candidates import fits

# Raise it when a kernel changes such that what was measured before no longer holds.
FORMAT = 1
SHIPPED = Path(__file__).parent / "tuned"
LOCK_SECONDS = 10


@dataclass(frozen=True)
class Entry:
    """A measured configuration: median milliseconds of it and of the one it replaced, and where that was measured.

    None milliseconds: what it replaced did not compute rightly.
    """

    config: LaunchConfig
    milliseconds: float
    replaced: LaunchConfig
    replaced_milliseconds: float | None
    provenance: Mapping[str, str] = field(default_factory=dict)


Entries = dict[Key, Entry]


def cache_directory() -> Path:
    """Where the platform keeps what a user's programs can compute again."""
    base: str | Path
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME", "")
        if not os.path.isabs(base):  # as its specification asks
            base = Path.home() / ".cache"
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


def configurations(gpu: str, arch: str) -> dict[Key, LaunchConfig]:
    """What is stored for a GPU and fits it, the user's own before what ships; never raises, but may warn."""
    found: dict[Key, LaunchConfig] = {}
    for place in (shipped_file, user_file):
        try:
            found |= {key: entry.config for key, entry in read(place(gpu), gpu).items()}
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home directory; nested too deeply
            warnings.warn(f"tuned configurations are not used, the heuristic is: {error}", RuntimeWarning, stacklevel=2)
    return {key: config for key, config in found.items() if fits(config, key, arch)}


def shipped_file(gpu: str) -> Path:
    return SHIPPED / file_name(gpu)


def shipped(gpu: str) -> dict[Key, LaunchConfig]:
    """The table that ships for a GPU, empty if none does: for compiling ahead of time. Raises as `read` does."""
    return {key: entry.config for key, entry in read(shipped_file(gpu), gpu).items()}


def read(path: Path, gpu: str) -> Entries:
    """The entries of a file; none where there is no file.

    Raises OSError where it cannot be read, ValueError where it is no table of this version for this GPU.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return {}
    try:
        return parse(json.loads(text), gpu)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no table of configurations: {error}") from error


def parse(table: Any, gpu: str) -> Entries:
    """The inverse of `document`. Raises ValueError, KeyError or TypeError for anything else."""
    if table["format"] != FORMAT:
        raise ValueError(f"its format is {table['format']!r}, this version reads {FORMAT}")
    if table["gpu"] != gpu:
        raise ValueError(f"it was measured on {table['gpu']!r}, not on {gpu!r}")
    entries = {}
    for row in table["entries"]:
        key = Key(**row["key"])
        if key.kernel not in TWO_STAGES or not all(type(number) is int and number > 0 for number in key[1:]):
            raise ValueError(f"{row['key']} is no key")
        configs = [_config(row[name], key.block_n) for name in ("config", "replaced")]
        old = row["replaced_milliseconds"]
        times = float(row["milliseconds"]), None if old is None else float(old)
        entries[key] = Entry(configs[0], times[0], configs[1], times[1], dict(row["provenance"]))
    return entries


def _config(row: dict[str, Any], block_n: int) -> LaunchConfig:
    config = LaunchConfig(block_n=block_n, **row)
    right = all(type(number) is int for number in config) and is_tile(config.block_p) and is_tile(config.block_k)
    if not (right and config.num_warps in (1, 2, 4, 8, 16) and 1 <= config.num_stages <= 8):
        raise ValueError(f"{row} is no configuration")
    return config


def document(entries: Mapping[Key, Entry], gpu: str) -> str:
    """A table as JSON, one line an entry, always in the same order."""
    rows = []
    for key, entry in sorted(entries.items()):
        row = {"key": key._asdict(), **asdict(entry)}
        for name in ("config", "replaced"):
            row[name] = {part: number for part, number in row[name]._asdict().items() if part != "block_n"}
        rows.append(json.dumps(row))
    head = json.dumps({"format": FORMAT, "gpu": gpu})[:-1]
    return head + ', "entries": [\n' + ",\n".join(rows) + "\n]}\n"


def update(path: Path, gpu: str, new: Mapping[Key, Entry]) -> None:
    """Set entries in a file that others may be writing at the same time.

    A file that is no table is kept beside it, as `….unreadable`. Raises OSError (a full disk, a directory that cannot
    be written, a lock that is not given back in time), and the file is then what it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        try:
            entries = read(path, gpu)
        except (ValueError, RuntimeError) as error:
            aside = path.with_suffix(".unreadable")
            warnings.warn(f"{error}; it is now {aside}", RuntimeWarning, stacklevel=2)
            os.replace(path, aside)
            entries = {}
        _write(path, document({**entries, **new}, gpu))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    from filelock import FileLock

    lock = FileLock(f"{path}.lock", timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except NotImplementedError:  # a file system without locks: reading right before the rename must do
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _write(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
