"""CIFAR's archives for Python on disk: found, unpacked, checked. Nothing is downloaded."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

FILES = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
}


def layout(name: str, root: Path) -> str:
    """The files that `load` reads, in words."""
    folder, archive = FILES[name]
    return f"{name} reads {root}/{folder}/ or {root}/{archive} (the archive for Python); nothing is downloaded"


def load(name: str, root: Path) -> tuple[Any, Any]:
    """torchvision's data sets for training and for testing. An archive that is not unpacked yet is, beside itself.

    Raises FileNotFoundError where neither is there, ValueError for damaged files, ImportError without torchvision.
    """
    folder, archive = (root / file for file in FILES[name])
    if not folder.is_dir() and not archive.is_file():
        raise FileNotFoundError(f"there is no {name} in {root}; {layout(name, root)}")
    try:
        from torchvision import datasets

        kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        raise ImportError(f"CIFAR needs torchvision: pip install seqconv-triton[train] ({error})") from error
    if not folder.is_dir():
        unpack(archive, folder)
    try:
        return kind(str(root), train=True, download=False), kind(str(root), train=False, download=False)
    except RuntimeError as error:  # missing files, or checksums that are not the published ones
        raise ValueError(f"{folder} is incomplete or damaged: unpack {archive.name} again ({error})") from error


def unpack(archive: Path, folder: Path) -> None:
    """The archive's one folder, beside it; whole or not at all, also where several processes do it at once."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        try:
            with tarfile.open(archive) as file:
                file.extractall(temporary, filter="data")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"{archive} does not unpack: {error}") from error
        unpacked = Path(temporary) / folder.name
        if not unpacked.is_dir():
            raise ValueError(f"{archive} holds no folder {folder.name}")
        try:
            os.rename(unpacked, folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(unpacked)  # another process was first
