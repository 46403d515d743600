"""The processes of a run: one, or those that torchrun started (NCCL between GPUs, gloo between CPUs)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

SETTLE = 0.2  # seconds


@dataclass(frozen=True)
class Ranks:
    """This process among all: its rank, their number, its device."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    @property
    def sums_dtype(self) -> torch.dtype:
        """What losses and counts are added up in: float64, where the device has it."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def sum_(self, values: Tensor) -> Tensor:
        """`values`, summed over all processes in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def union(self, lines: Sequence[str]) -> list[str]:
        """The lines of all processes, in the order of their ranks, each once."""
        every: list[Sequence[str]] = [lines] * self.world
        if self.world > 1:
            dist.all_gather_object(every, lines)
        return list(dict.fromkeys(line for rank_lines in every for line in rank_lines))

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, in DistributedDataParallel where there are several processes."""
        if self.world == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def share_buffers(self, model: nn.Module) -> None:
        """The main process's buffers to all: without synchronised BN every process has its own running statistics."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def usable_device(name: str | None = None) -> torch.device:
    """The device of that name, by default cuda where there is one. Raises ValueError for one that is not here."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":  # without a context on the first GPU, which may be another process's
            if not torch.cuda.is_available():
                raise ValueError(f"device ({name}): there is no GPU that PyTorch {torch.__version__} can use here")
            if (device.index or 0) >= torch.cuda.device_count():
                raise ValueError(f"device ({name}): there are {torch.cuda.device_count()} GPUs, counted from 0")
        else:
            torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device ({name}): PyTorch {torch.__version__} cannot use it here: {reason}") from error
    return device


@contextmanager
def processes(device: str | None = None) -> Iterator[Ranks]:
    """Join the processes that torchrun started, or be the only one. `device` defaults to cuda where there is one.

    Raises ValueError for a device that is not here, or for more processes than GPUs.
    """
    kind = usable_device(device)
    if not dist.is_torchelastic_launched():
        yield Ranks(kind)
        return
    local = int(os.environ["LOCAL_RANK"])
    if kind.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}")
        kind = torch.device("cuda", local)
        torch.cuda.set_device(kind)
    _meet("nccl" if kind.type == "cuda" else "gloo")
    try:
        yield Ranks(kind, dist.get_rank(), dist.get_world_size())
        dist.barrier()
    finally:
        # Where DDP used it, the group's threads outlive it. One that drops the last collectives' tensors only while
        # Python ends aborts the process (it waits for an interpreter that is gone), so let them come to rest.
        time.sleep(SETTLE)
        dist.destroy_process_group()


def _meet(backend: str) -> None:
    """Join the process group; after torchrun has restarted the processes, under names of that attempt alone.

    torchrun keeps one store over its restarts, where gloo would find the addresses of processes that are gone. Several
    machines count their restarts apart, so there the plain names stay.
    """
    if int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        dist.init_process_group(backend)
        return
    store, rank, world = next(iter(rendezvous("env://")))
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    prefixed = dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=prefixed, rank=rank, world_size=world)
