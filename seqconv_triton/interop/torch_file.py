"""Files of torch.save, read without running code of theirs; what is wrong with one is said in plain words."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import IO

import torch

Source = str | os.PathLike[str] | IO[bytes]


def read(source: Source) -> object:
    """What a file holds, tensors on the CPU.

    Raises ValueError, saying which, for a file that is empty, none of PyTorch's, cut off or damaged, or that holds
    more than tensors and plain values; OSError as open() does.
    """
    where = name_of(source)
    if isinstance(source, str | os.PathLike) and Path(source).is_file() and not Path(source).stat().st_size:
        raise ValueError(f"{where} is empty (0 bytes)")
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its text advises to run what the file holds
        raise ValueError(
            f"{where} is no PyTorch file, or holds other objects than tensors and plain values: code is not run"
        ) from error
    except Exception as error:  # the unpickler stumbles over foreign bytes in any way it likes
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # torch seeks before the start of a cut-off file
            raise
        # What torch says of a file helps; what the unpickler looked for (a KeyError's 101) does not.
        said = str(error) if isinstance(error, RuntimeError | EOFError | OSError) else ""
        reason = said.split("\n")[0].split(". ")[0]
        raise ValueError(
            f"{where} is damaged or was only half written, or is no PyTorch file{': ' if reason else ''}{reason}"
        ) from error


def name_of(source: Source) -> str:
    """A file's name in messages."""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else str(getattr(source, "name", "the file"))
