"""A model as plain data, {"name", "options"}: what a checkpoint keeps to build it again."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

import seqconv_triton as sct
from seqconv_triton.models.backbone import Backbone

CUSTOM = "cifar_custom"  # CifarSeqResNet with all its options free


def build(arch: dict[str, Any], **where: Any) -> Backbone:
    """The model of an `arch`; `where` is device or dtype.

    Raises ValueError for an unknown name or options that the model does not take.
    """
    name, options = arch["name"], dict(arch["options"])
    try:
        return sct.CifarSeqResNet(**options, **where) if name == CUSTOM else sct.create_model(name, **options, **where)
    except TypeError as error:
        parameters = inspect.signature(sct.CifarSeqResNet).parameters
        allowed = [parameter for parameter in parameters if parameter not in ("device", "dtype")]
        hint = f"; {CUSTOM} takes {', '.join(allowed)}" if name == CUSTOM else ""
        raise ValueError(f"model options {options} do not fit {name}: {error}{hint}") from error


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """`name=value` pairs; values are Python literals such as 8, 0.1, True or (1,2,1), or else text.

    Raises ValueError for anything that is no pair.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"model option {text!r} must be name=value, such as group_width=8")
        try:
            options[name] = ast.literal_eval(value.capitalize() if value in ("true", "false", "none") else value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Strictly. Raises ValueError where the weights are another model's."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"the checkpoint's weights are another model's: {str(error).splitlines()[1].strip()}"
        ) from error
