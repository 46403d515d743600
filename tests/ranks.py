"""What the tests of data parallelism run in every rank: `torchrun tests/ranks.py what folder device`; writes JSON."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import error, exact_kernels, randomise
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import seqconv_triton as sct
from recipes.training import checkpoint
from seqconv_triton.plan import Plan, Tail

DEVICE = torch.device(sys.argv[3])


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    return randomise(sct.CifarSeqResNet(8, 1, bottleneck=True, dropout=0.0), layer_b=0.3).to(DEVICE, dtype)


def small(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A stage in between a conv and a classifier: what an interpreter of kernels gets through in time."""
    stage = sct.Stage(Plan.stage(8, 8, 1, tail=Tail(8, 3, 2, 1)))
    layers = nn.Conv2d(3, 8, 3, 2, bias=False), stage, nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 10)
    return randomise(nn.Sequential(*layers)).to(DEVICE, dtype)


def batch(images: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The same images, and upstream gradients, in every rank."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images, 3, 8, 8, generator=generator, dtype=torch.float64)
    upstream = torch.randn(images, 10, generator=generator, dtype=torch.float64)
    return x.to(DEVICE, dtype), upstream.to(DEVICE, dtype)


def step(model: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Gradients of the parameters and of x, statistics afterwards."""
    x = x.clone().requires_grad_()
    (model(x) * upstream).sum().backward()
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    found = {f"gradient of {name}": p.grad for name, p in plain.named_parameters()}
    return found | {"gradient of x": x.grad} | dict(plain.named_buffers())


def worst(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    errors = [error(got[name], value) for name, value in expected.items() if value.is_floating_point()]
    return max(e if math.isfinite(e) else math.inf for e in errors)  # max() alone would pass over a NaN


def own_half(images: int) -> slice:
    half = images // 2
    return slice(half * dist.get_rank(), half * (dist.get_rank() + 1))


def synchronised(
    backend: str, images: int, split: int, dtype: torch.dtype, make: Callable[[torch.dtype], nn.Module], **options: bool
) -> float:
    """Two ranks with [:split] and [split:] of a batch against one process with all of it: the worst error."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, upstream = batch(images, dtype)
    with sct.use_backend("reference"):
        expected = step(make(torch.float64), *batch(images))
    own = slice(0, split) if rank == 0 else slice(split, None)
    with sct.use_backend(backend):
        model = sct.convert_sync_batchnorm(make(dtype))
        # DistributedDataParallel averages gradients, and the loss is a sum.
        got = step(DistributedDataParallel(model, **options), x[own], ranks * upstream[own])
    got["gradient of x"] = got["gradient of x"] / ranks
    expected["gradient of x"] = expected["gradient of x"][own]
    return worst(got, expected)


def plain(backend: str) -> float:
    """Plain DDP: each rank's BN sees its own images, gradients are the ranks' mean."""
    rank = dist.get_rank()
    x, upstream = batch(8)
    halves = []
    with sct.use_backend(backend):
        for own in (slice(0, 4), slice(4, None)):
            halves.append(step(network(), x[own], upstream[own]))
        own = own_half(8)
        got = step(DistributedDataParallel(network(), broadcast_buffers=False), x[own], upstream[own])
    expected = {
        name: (halves[0][name] + halves[1][name]) / 2 if name.startswith("gradient") else halves[rank][name]
        for name in halves[0]
        if name != "gradient of x"
    }
    return worst(got, expected)


def accumulated() -> float:
    """Two micro-batches under no_sync and then one with it: the gradients add up."""
    x, upstream = batch(8)
    own = own_half(8)
    model = DistributedDataParallel(network().eval())
    with model.no_sync():
        (model(x[own][:2]) * upstream[own][:2]).sum().backward()
    (model(x[own][2:]) * upstream[own][2:]).sum().backward()
    whole = network().eval()
    (whole(x) * upstream).sum().backward()
    expected = {name: p.grad / 2 for name, p in whole.named_parameters()}
    return worst({name: p.grad for name, p in model.module.named_parameters()}, expected)


def sharded(training: bool) -> float:
    """FSDP2: one step of SGD on sharded parameters equals the step of a whole model."""
    x, upstream = batch(8)
    model, whole = sct.convert_sync_batchnorm(network()).train(training), network().train(training)
    mesh = torch.distributed.init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    for stage in model.stages:
        fully_shard(stage, mesh=mesh)
    fully_shard(model, mesh=mesh)
    own = own_half(8)
    for module, inputs, gradient in ((model, x[own], 2 * upstream[own]), (whole, x, upstream)):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        (module(inputs) * gradient).sum().backward()
        optimizer.step()
    got = {name: p.full_tensor() for name, p in model.named_parameters()}
    return worst(got | dict(model.named_buffers()), dict(whole.named_parameters()) | dict(whole.named_buffers()))


def three_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x, upstream = batch(8)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x[own_half(8)]) * upstream[own_half(8)]).sum().backward()
        optimizer.step()


def sharded_optimizer() -> float:
    """ZeroRedundancyOptimizer under DDP: three steps of momentum equal those of a whole optimizer."""
    models = [DistributedDataParallel(network().eval()) for _ in range(2)]
    options = {"lr": 0.01, "momentum": 0.9}
    optimizers = [
        ZeroRedundancyOptimizer(models[0].parameters(), torch.optim.SGD, **options),
        torch.optim.SGD(models[1].parameters(), **options),
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        three_steps(model, optimizer)
    return worst(*(dict(model.module.named_parameters()) for model in models))


def unused() -> float:
    """find_unused_parameters: a stage that the loss does not reach gets no gradient, the others the usual one."""

    def step_of_two_stages(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        (model(x[own_half(8)]) * 1.0).sum().backward()
        plain = model.module if isinstance(model, DistributedDataParallel) else model
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in plain.named_parameters()}

    x, _ = batch(8)
    model = network().eval()
    model.forward = lambda x: model.stages[0](model.forward_stem(x))
    expected = {name: value.clone() for name, value in step_of_two_stages(model).items()}
    for value in expected.values():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return worst(step_of_two_stages(DistributedDataParallel(model, find_unused_parameters=True)), expected)


def compiled() -> float:
    """torch.compile around a synchronised model in DDP: the same gradients."""
    x, upstream = batch(4)
    own = own_half(4)
    eager, other = (DistributedDataParallel(sct.convert_sync_batchnorm(network())) for _ in range(2))
    expected = step(eager, x[own], upstream[own])
    x = x[own].clone().requires_grad_()
    (torch.compile(other)(x) * upstream[own]).sum().backward()
    got = {f"gradient of {name}": p.grad for name, p in other.module.named_parameters()}
    return worst(got, {name: value for name, value in expected.items() if name in got})


def hooked(everywhere: bool) -> float:
    """Hooks on the BNs of the first rank alone, as for logging: no rank waits; on all ranks: a loss on what they see.

    Against one process with the whole batch.
    """
    x, upstream = batch(4)
    own, seen = own_half(4), []

    def stepped(model: nn.Module, inputs: Tensor, gradient: Tensor, hook: bool) -> dict[str, Tensor]:
        norms = [norm for stage in model.stages for norm in (stage.norm, stage.reduce_norm) if norm is not None]
        for norm in norms if hook else ():
            norm.register_forward_hook(lambda module, args, out: seen.append(out))
        loss = (model(inputs) * gradient).sum()
        for out in seen if everywhere else ():
            loss = loss + out.pow(3).sum()
        seen.clear()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())

    expected = stepped(network(), x, upstream, hook=everywhere)
    model = sct.convert_sync_batchnorm(network())
    got = stepped(model, x[own], upstream[own], hook=everywhere or dist.get_rank() == 0)
    for _, parameter in model.named_parameters():
        dist.all_reduce(parameter.grad)
    return worst(got, expected)


def in_parts() -> float:
    """DDP of a model whose weights an optimizer has group by group: the steps of the whole weights."""
    models = [DistributedDataParallel(network().eval(), gradient_as_bucket_view=True) for _ in range(2)]
    for model, per_group in zip(models, (False, True), strict=True):
        groups = sct.parameter_groups(model.module, weight_decay=0.1, per_group=per_group)
        three_steps(model, torch.optim.SGD(groups, 0.01, momentum=0.9))
    return worst(*(dict(model.module.named_parameters()) for model in models))


def parallel(folder: Path) -> None:
    results = {}
    for backend, dtype, make in (
        ("reference", torch.float64, network),
        ("aten", torch.float64, network),
        ("triton", torch.float32, small),
    ):
        if backend == "triton" and not runs_triton():
            continue
        results[f"sync {backend} halves"] = synchronised(backend, 4, 2, dtype, make)
        results[f"sync {backend} uneven"] = synchronised(backend, 4, 1, dtype, make)
    results["static graph"] = synchronised("aten", 4, 2, torch.float64, network, static_graph=True)
    results["plain"] = plain("aten")
    results["no_sync"] = accumulated()
    results["hooks on one rank"], results["hooks on all ranks"] = hooked(False), hooked(True)
    results["parts"] = in_parts()
    results["unused"] = unused()
    results["zero"] = sharded_optimizer()
    results["fsdp train"], results["fsdp eval"] = sharded(True), sharded(False)
    results["compiled"] = compiled()
    copies = copy.deepcopy(sct.convert_sync_batchnorm(network()))
    results["keys"] = float(set(copies.state_dict()) != set(network().state_dict()))
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(results))


def runs_triton() -> bool:
    """On a GPU, or where a test has asked for the interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    return DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def elastic(folder: Path) -> None:
    """Three epochs with a checkpoint each; with a file `kill` one rank dies once, in the middle of the second."""
    rank = dist.get_rank()
    model = DistributedDataParallel(sct.convert_sync_batchnorm(network(torch.float32)))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True)
    path, first = folder / "last.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=DEVICE)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epochs"]
    with (folder / f"starts-{rank}").open("a") as file:
        file.write(f"{first}\n")
    for epoch in range(first, 3):
        generator = torch.Generator().manual_seed(10 * epoch + rank)
        for number in range(3):
            x = torch.randn(4, 3, 8, 8, generator=generator).to(DEVICE)
            labels = torch.randint(10, (4,), generator=generator).to(DEVICE)
            if (folder / "kill").exists() and rank == 1 and (epoch, number) == (1, 1) and first == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
        if rank == 0:
            state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epoch + 1}
            checkpoint.save(state, path)
        dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    work, folder = {"parallel": parallel, "elastic": elastic}[sys.argv[1]], Path(sys.argv[2])
    # A meeting place for every attempt: in the agent's own store, gloo finds the addresses of ranks that are gone.
    meeting = folder.resolve() / f"ranks-meet-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    dist.init_process_group(
        "nccl" if DEVICE.type == "cuda" else "gloo", init_method=f"file://{meeting}",
        rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]), timeout=timedelta(minutes=5),
    )  # fmt: skip
    with exact_kernels():
        work(folder)
    if work is parallel:  # once there are two processes: what one that is killed should come to
        undisturbed = folder / "undisturbed"
        undisturbed.mkdir(exist_ok=True)
        elastic(undisturbed)
    dist.destroy_process_group()
