"""Networks of timm or torchvision, with random weights, and the published ImageNet error of every network here."""

from __future__ import annotations

import importlib
import importlib.metadata
from functools import cache
from typing import Any, NamedTuple

from torch import nn


class Published(NamedTuple):
    """Top-1 error in %, single 224² crop, and whose figure it is."""

    error: float
    source: str


SEQCONV = "Huang et al., Sequentially Aggregated Convolutional Networks, 2019"
PUBLISHED = {
    "seqresnet_b22": Published(23.67, SEQCONV),
    "seqresnet_b42": Published(22.06, SEQCONV),
    "seqresnext_24": Published(21.92, SEQCONV),
    "resnet50": Published(24.01, f"{SEQCONV} (their table)"),
    "resnet101": Published(22.44, f"{SEQCONV} (their table)"),
    "resnet152": Published(22.16, f"{SEQCONV} (their table)"),
    "resnext50_32x4d": Published(22.2, "Xie et al., Aggregated Residual Transformations, 2017, Table 3"),
    "densenet169": Published(23.80, "Huang et al., Densely Connected Convolutional Networks, 2017, Table 3"),
}
PEERS = tuple(name for name, published in PUBLISHED.items() if not name.startswith("seq"))


class NotInstalled(ImportError):
    """Why there is no peer here."""


@cache
def package() -> tuple[Any, str]:
    """A function that makes a network by name, and "timm 1.0" or the like. Raises NotInstalled with every reason."""
    reasons = []
    for name, module, maker in (
        ("timm", "timm", "create_model"),
        ("torchvision", "torchvision.models", "get_model"),
    ):
        try:
            make = getattr(importlib.import_module(module), maker)
            return make, f"{name} {importlib.metadata.version(name)}"
        except ModuleNotFoundError as error:
            missing = "is not installed" if error.name == name else f"needs {error.name}, which is not installed"
            reasons.append(f"{name} {missing}")
        except Exception as error:  # a torchvision built for another torch raises what it likes
            reasons.append(f"{name} cannot be imported: {str(error).splitlines()[0]}")
    raise NotInstalled("; ".join(reasons))


def create(name: str) -> nn.Module:
    """A peer with random weights. Raises NotInstalled."""
    make, _ = package()
    network: nn.Module = make(name)
    return network


def label() -> str:
    """The package and version that peers come from. Raises NotInstalled."""
    return package()[1]
