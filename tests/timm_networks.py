"""Our networks under timm, small ones for tests, and whether timm can be used here."""

from __future__ import annotations

import importlib

import pytest

from seqconv_triton.models.imagenet import StageRow

SMALL = ("seqresnet_b22", "cifar_seqresnet_r4_k8", "cifar_seqresnet_b_r7_k16")


def have_timm() -> str | None:
    """Why timm cannot be used here, or None: a torchvision beside another build of torch raises RuntimeError."""
    try:
        importlib.import_module("timm")
    except (ImportError, RuntimeError) as problem:
        return f"timm: {problem}"
    return None


MISSING = have_timm()
needs_timm = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def shrink() -> None:
    """A small ImageNet network under seqresnet_b22's name, until the fixture `timm` ends."""
    from seqconv_triton.interop.timm_network import TimmSeqResNetB22

    shapes = ((8, 4, 1, 1), (16, 8, 1, 1), (32, 8, 2, 2), (64, 16, 1, 1))
    TimmSeqResNetB22.rows = tuple(StageRow(*shape) for shape in shapes)
