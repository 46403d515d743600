"""Packages that only some parts need: the error about a missing one names the extra that brings it."""

from __future__ import annotations

from importlib import import_module


def require(who: str, extra: str, *packages: str) -> None:
    """Raise ImportError, "`who` needs …: pip install …", if one of the packages cannot be imported."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            system = " (Linux)" if extra == "triton" else ""
            missing = error.name or package
            raise ImportError(f"{who} needs {missing}: pip install seqconv-triton[{extra}]{system}") from error
