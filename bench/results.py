"""Results files: provenance, ceilings and one row a contender and part, written as soon as a row is there."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import seqconv_triton as sct

FORMAT = 2
FOLDER = Path(__file__).parent / "results"
Row = dict[str, Any]


def write_json(path: Path, contents: Any) -> None:
    """Whole, or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """What a file holds; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


class BadResults(ValueError):
    """A file that is no results file of this format."""


def cpuinfo() -> dict[str, str]:
    """What Linux says of a core; elsewhere nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}


def processor() -> str:
    return cpuinfo().get("model name") or platform.processor() or platform.machine()


def processor_model() -> str:
    """What tells processors of one name apart: "family 25, model 17"; empty where the system does not say."""
    found = cpuinfo()
    return f"family {found['cpu family']}, model {found['model']}" if {"cpu family", "model"} <= found.keys() else ""


def vectors() -> str:
    """The vector instructions that PyTorch uses, and which half precisions have instructions for products."""
    # Not in every PyTorch.
    has: Mapping[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    halves = [text for name, text in (("avx512_bf16", "AVX512-BF16"), ("amx_bf16", "AMX")) if has.get(name)]
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *halves])


def revision() -> str:
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def provenance(device: torch.device) -> Row:
    """Machine, versions, date and revision: what a number means nothing without."""
    found: Row = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "processor_model": processor_model(),
        "vectors": vectors(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "seqconv_triton": sct.__version__,
        "revision": revision(),
        "date": datetime.date.today().isoformat(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory": properties.total_memory, "cuda": torch.version.cuda}
    return found


class Results:
    """A results file that grows; every change is on disk, whole, before the next."""

    def __init__(self, path: Path | None, contents: dict[str, Any]) -> None:
        self.path = path
        self.contents: dict[str, Any] = {"format": FORMAT, **contents}
        self.contents.setdefault("rows", [])
        self.contents.setdefault("notes", [])
        self.save()

    @classmethod
    def reopen(cls, path: Path) -> Results:
        return cls(path, load(path))

    def save(self) -> None:
        if self.path is not None:
            write_json(self.path, self.contents)

    def add(self, row: Row) -> None:
        self.contents["rows"].append(row)
        self.save()

    def extend(self, rows: list[Row]) -> None:
        self.contents["rows"] += rows
        self.save()

    def note(self, text: str) -> None:
        if text not in self.contents["notes"]:
            self.contents["notes"].append(text)
            self.save()

    def set(self, **entries: Any) -> None:
        self.contents.update(entries)
        self.save()


def load(path: Path) -> dict[str, Any]:
    """A results file's contents. Raises BadResults, which says what is wrong with it."""
    try:
        contents = json.loads(path.read_text())
    except OSError as error:
        raise BadResults(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise BadResults(f"{path} is no JSON: {error}") from error
    if not isinstance(contents, dict) or "rows" not in contents or "provenance" not in contents:
        raise BadResults(f"{path} is no results file: it has no rows and provenance (python -m bench run writes them)")
    if contents.get("format") != FORMAT:
        raise BadResults(f"{path} has format {contents.get('format')}, this program reads format {FORMAT}")
    return contents


def key(row: Row) -> tuple[Any, ...]:
    """What tells rows apart; the same in two files means the same measurement."""
    return tuple(row[name] for name in ("subject", "part", "batch", "dtype", "contender"))


def median(row: Row) -> float | None:
    """Median seconds of a row, or None where nothing was timed."""
    return statistics.median(row["seconds"]) if row.get("seconds") else None


def timed(rows: Iterable[Row]) -> dict[tuple[Any, ...], Row]:
    """Rows with times, by key; of two with one key the later one, whose case has more contenders in its rounds."""
    return {key(row): row for row in rows if row.get("seconds")}
