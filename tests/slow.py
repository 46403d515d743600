"""Larger cases of what smaller ones test too, marked slow: `make test` leaves them to `make slow`.

By test, all of its cases (no names) or those named. `python -m pytest` without `-m` runs everything.
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
    "test_bench_roofline.py::test_dry_run_counts_what_it_compiles": (),
    "test_compile.py::test_cold_compilation_is_cheap": (),
    "test_compile.py::test_generated_code_asks_for_no_shape": (),
    "test_compile.py::test_whole_networks_are_one_graph": ("seqresnet_b42", "seqresnext_24"),
    "test_demo.py::test_digits_accuracy": (),
    "test_docs.py::test_example_runs": ("export_checkpoint", "train_digits"),
    "test_export.py::test_aot_inductor": ("plain",),
    "test_export.py::test_strictly_exported": (
        "imagenet-plain", "imagenet-folded", "cifar-plain", "cifar-dense-plain", "cifar-dense-folded",
    ),
    "test_export_constants.py::test_every_conv_has_constants": ("seqresnext-", "seqresnext-strict", "b22-strict"),
    "test_fx.py::test_traced_equals_the_model": (
        "eval-synchronised", "eval-recomputing", "eval-features", "train-imagenet",
    ),
    "test_models.py::test_full_network_equals_reference": ("seqresnet_b42-train", "seqresnext_24-train"),
    "test_models.py::test_reference_equals_the_oracle": ("seqresnext_24-train",),
    "test_onnx.py::test_dynamic_sizes": ("imagenet-fused",),
    "test_onnx.py::test_files_load": ("seqresnet_b22-plain",),
    "test_parallel.py::test_killed_rank_resumes": (),
    "test_precision.py::test_bfloat16_training_follows_float32": (),
    "test_saved_tensors.py::test_hooks": HOOKS,
    "test_train_bad_input.py::test_full_disk_keeps_the_last_checkpoint": ("log.csv", "best.pt"),
    "test_train_commands.py::test_compiled_training": (),
    "test_triton.py::test_networks_follow_float64": ("cifar-basic-eval", "cifar-dense-eval", "imagenet-next-eval"),
}  # fmt: skip


# What of it the last collection had, and in which files it looked.
found: set[tuple[str, str]] = set()
files: set[str] = set()


def mark_slow(items: Iterable[pytest.Item]) -> None:
    for item in items:
        name = f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
        case = item.name.partition("[")[2].removesuffix("]")
        files.add(item.path.name)
        if name in SLOW and (not SLOW[name] or case in SLOW[name]):
            found.add((name, case if SLOW[name] else ""))
            item.add_marker(pytest.mark.slow)


def missing() -> set[tuple[str, str]]:
    """What of the files that were collected is listed and does not exist."""
    listed = {(name, case) for name, cases in SLOW.items() for case in cases or ("",)}
    return {(name, case) for name, case in listed - found if name.partition("::")[0] in files}
