"""Larger cases of what smaller ones test too, marked slow: `make test` leaves them to `make slow`.

By test, the cases of it that have others beside them. `python -m pytest` without `-m` runs everything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pytest

HOOKS = [
    f"interpreter-{module}-one-pixel-{mode}"
    for module in ("basic", "bottleneck", "dense", "stage")
    for mode in ("train", "eval")
]
SLOW: dict[str, Collection[str]] = {
    "test_compile.py::test_whole_networks_are_one_graph": ("seqresnet_b42", "seqresnext_24"),
    "test_export.py::test_strictly_exported": (
        "imagenet-plain", "imagenet-folded", "cifar-plain", "cifar-dense-plain", "cifar-dense-folded",
    ),
    "test_export_constants.py::test_every_conv_has_constants": ("seqresnext-strict", "b22-strict"),
    "test_fx.py::test_traced_equals_the_model": (
        "eval-synchronised", "eval-recomputing", "eval-features", "train-imagenet",
    ),
    "test_models.py::test_full_network_equals_reference": ("seqresnet_b42-train", "seqresnext_24-train"),
    "test_models.py::test_reference_equals_the_oracle": ("seqresnext_24-train",),
    "test_onnx.py::test_files_load": ("seqresnet_b22-plain",),
    "test_saved_tensors.py::test_hooks": HOOKS,
    "test_triton.py::test_networks_follow_float64": ("cifar-basic-eval", "cifar-dense-eval", "imagenet-next-eval"),
}  # fmt: skip


LISTED = {f"{test}[{case}]" for test, cases in SLOW.items() for case in cases}
found: set[str] = set()  # of them, by the last collection
files: set[str] = set()  # that it looked in


def mark_slow(items: Iterable[pytest.Item]) -> None:
    for item in items:
        files.add(item.path.name)
        if (name := f"{item.path.name}::{item.name}") in LISTED:
            found.add(name)
            item.add_marker(pytest.mark.slow)


def missing() -> set[str]:
    """What of the files that were collected is listed and does not exist."""
    return {name for name in LISTED - found if name.partition("::")[0] in files}
