"""What a launch costs on the host, in Python: the passes of a network of B42's groups, with a driver that does nothing.

The stages are B42's with an eighth of the channels on small images, so that PyTorch's own work, which a GPU would do
meanwhile, is small. The first pass launches through Triton's dispatch and is not timed; the rest are replayed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.nvidia.driver import CudaLauncher

from seqconv_triton.backend.triton import parts
from seqconv_triton.kernels import launch, replay
from seqconv_triton.models.imagenet import ImageNetNetwork, StageRow
from seqconv_triton.tools.ahead import stage_inputs, stage_passes

ROUNDS = 45


class Narrow(ImageNetNetwork):
    """B42's groups, an eighth of its channels."""

    rows = (StageRow(16, 4, 1, 3), StageRow(32, 8, 1, 4), StageRow(64, 8, 1, 5), StageRow(128, 16, 1, 3))


class Idle(CudaLauncher):  # type: ignore[misc] # Triton has no types
    """Triton's launcher in front of a driver that does nothing."""

    num_ctas = 1
    global_scratch_size = profile_scratch_size = 0
    global_scratch_align = profile_scratch_align = 1
    launch_cooperative_grid = launch_pdl = False
    arg_annotations = kernel_signature = None

    def __init__(self) -> None:
        self.replayed = self.dispatched = 0

    def launch(self, *_: Any) -> None:
        self.replayed += 1


@contextmanager
def idle_driver() -> Iterator[Idle]:
    """Launches on CPU tensors reach a driver that does nothing; those that are not replayed are only counted."""
    launcher = Idle()
    compiled = SimpleNamespace(run=launcher, function=None, packed_metadata=None)
    active = SimpleNamespace(get_current_stream=lambda device: 0, get_current_device=lambda: 0)

    def first(*_: Any) -> Any:
        launcher.dispatched += 1
        return compiled

    with (
        mock.patch.object(launch, "_launch", first),
        mock.patch.object(triton.runtime, "driver", SimpleNamespace(active=active)),
        mock.patch.object(replay, "replayable", return_value=True),
        mock.patch.object(parts, "INTERPRETED", True),
    ):
        yield launcher


def microseconds(training: bool) -> tuple[int, int, float]:
    """Launches of a pass, how many of them Triton dispatches, and the median of the processor's microseconds for each.

    The time of Triton's dispatch is not among them.
    """
    model = Narrow(10, device="meta")
    passes = []
    for stage, size in stage_inputs(model, (1, 3, 64, 64)):
        x = torch.zeros(size).contiguous(memory_format=torch.channels_last)
        passes += stage_passes(stage.to_empty(device="cpu"), x, training)
    seconds = []
    with idle_driver() as launcher:
        for _ in range(ROUNDS + 1):
            launcher.replayed, launcher.dispatched, start = 0, 0, time.thread_time()
            for run in passes:
                run()
            seconds.append(time.thread_time() - start)
    launches = launcher.replayed + launcher.dispatched
    return launches, launcher.dispatched, 1e6 * statistics.median(seconds[1:]) / launches
