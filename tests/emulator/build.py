"""The machine's C++ source, compiled with the system's compiler when it is first asked for, and its vocabulary."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent / "machine"
COMPILERS = ("g++", "clang++", "c++")
# No contraction: a fused multiply-add is one only where the PTX says so.
FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")


class NoCompiler(RuntimeError):
    """No C++ compiler is on the path."""


def compiler() -> str:
    """The first C++ compiler on the path; raises NoCompiler without one."""
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        raise NoCompiler(f"the emulator needs a C++ compiler on the path ({', '.join(COMPILERS)})")
    return found


@cache
def folder() -> Path:
    """Where what is compiled for the emulator lies: below the temporary folder, one for every user.

    Raises PermissionError where it is somebody else's: what lies there is executed.
    """
    path = Path(tempfile.gettempdir()) / f"seqconv_triton_emulator_{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to another user")
    return path


@cache
def library() -> ctypes.CDLL:
    """The machine, built anew where its source, the compiler or the CPU is another one. Raises NoCompiler."""
    command = [compiler(), *FLAGS]
    target = subprocess.run([*command, "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, check=True).stdout
    texts = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    digest = hashlib.sha256(b"\0".join([" ".join(command).encode(), target, *texts])).hexdigest()[:16]
    path = folder() / f"machine_{digest}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder()) as fresh:  # two processes may build at the same time
            built = Path(fresh) / path.name
            subprocess.run([*command, "-o", str(built), str(SOURCES / "machine.cpp")], check=True)
            built.rename(path)
    loaded = ctypes.CDLL(str(path))
    loaded.names.restype = ctypes.c_char_p
    loaded.launch.restype = ctypes.c_int64
    return loaded


@cache
def names(of: str) -> tuple[str, ...]:
    """A list of the machine's names in the order of their numbers: ops, fields, flags, types, kinds, comparisons,
    specials, findings, notes."""
    lists = (line.split("\t") for line in library().names().decode().splitlines())
    return next(tuple(rest) for first, *rest in lists if first == of)


@cache
def numbers(of: str) -> dict[str, int]:
    """The number of every name of a list."""
    return {name: number for number, name in enumerate(names(of)) if name}
