"""What the Triton backend launches and holds, counted on meta tensors: nothing runs, no GPU is needed."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="Triton is for Linux only")

import seqconv_triton as sct
from seqconv_triton.backend.triton import backward, forward
from seqconv_triton.kernels import launch
from seqconv_triton.nn.layers import Stage
from seqconv_triton.plan import Plan, Tail
from seqconv_triton.tools.ahead import stage_passes


class Memory(TorchDispatchMode):
    """Counts ops other than views and all their results, and follows the bytes of every storage that is born inside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.ops: Counter[str] = Counter()
        self.tensors = 0  # that ops gave, views included
        self.largest: Counter[str] = Counter()  # bytes of launches' arguments

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.ops[str(func)] += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.tensors += 1
                storage = tensor.untyped_storage()
                if storage._cdata not in given:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.forget_the_dead()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result

    def forget_the_dead(self) -> None:
        self.alive = {key: item for key, item in self.alive.items() if not item[0].expired()}


def counted(
    plan: Plan, training: bool, *, dropout: bool = False, recompute: bool = False, images: int = 4, size: int = 14
) -> list[tuple[Counter[str], Memory]]:
    """Launches by kernel, and memory, of the forward and (in training) the backward pass of a stage in bfloat16."""
    stage = Stage(plan, device="meta")
    stage.recompute = recompute
    x = torch.empty(images, plan.in_channels, size, size, device="meta", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    mask = x.new_empty((images, plan.mask_channels)) if dropout else None
    results = []
    for run in stage_passes(stage, x, training, mask=mask):
        names: Counter[str] = Counter()
        memory = Memory()

        def note(kernel: Any, grid: Any, arguments: Any, names: Counter[str] = names, memory: Memory = memory) -> None:
            names[kernel.__name__] += 1
            for name, value in arguments.items():
                if isinstance(value, torch.Tensor):
                    memory.largest[name] = max(memory.largest[name], value.nbytes)

        with launch.listen(note), memory:
            run()
        results.append((names, memory))
    return results


def plan_of(kind: str, blocks: int) -> Plan:
    tail = Tail(64, 3, 2, 4)
    if kind == "basic":
        return Plan.stage(32, 16, blocks, bottleneck=False, extension=32, tail=tail)
    return Plan.stage(32, 16, blocks, subgroups=4 if kind == "subgroups" else 1, extension=32, tail=tail)


@pytest.mark.parametrize("kind", ["bottleneck", "subgroups", "basic"])
def test_launches_grow_with_the_groups_alone(kind: str) -> None:
    """Evaluation: two a group (one in basic layers). Training: three forward and three backward (two and two).

    PyTorch's own ops do not grow with the depth at all.
    """
    basic = kind == "basic"
    for training in (True, False):
        per_group = (2 if basic else 3) if training else (1 if basic else 2)
        one, three = (counted(plan_of(kind, blocks), training) for blocks in (1, 3))
        more = len(plan_of(kind, 3).groups) - len(plan_of(kind, 1).groups)
        for (few, few_memory), (many, many_memory) in zip(one, three, strict=True):
            assert many.total() - few.total() == per_group * more
            assert few_memory.ops == many_memory.ops
        groups = len(plan_of(kind, 1).groups)
        forward = one[0][0]
        # Behind the last group and in front of the first: the tail, activations, the statistics of the input.
        assert forward.total() == per_group * groups + ((3 if basic else 4) if training else 2)
        if training:
            backward = one[1][0]
            convs = 1 if basic else 2
            assert backward["weight_gradient_kernel"] == 1 + convs
            # Those, the tail's other gradient, two tables of pixels, the input's pull and BN.
            assert backward.total() == per_group * groups + 1 + convs + 5


@pytest.mark.parametrize("kind", ["bottleneck", "subgroups", "basic"])
def test_a_replayed_pass_makes_no_view_of_a_group(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views cost the host more than the launches that they were for."""
    for direction in (forward, backward):
        monkeypatch.setattr(direction, "replayed", lambda name, memory, launches: None)
    for training, options in itertools.product((True, False), ({}, {"dropout": True}, {"recompute": True})):
        one, three = (counted(plan_of(kind, blocks), training, **options) for blocks in (1, 3))
        for (_, few), (_, many) in zip(one, three, strict=True):
            assert few.tensors == many.tensors > 0


@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
def test_nothing_outlives_a_pass(kind: str) -> None:
    """What a pass allocates dies with it: no tensor cached for later may lie in a CUDA graph's memory pool."""
    for _, memory in counted(plan_of(kind, 1), training=True):
        memory.forget_the_dead()
        assert not memory.alive


@pytest.mark.parametrize("name", ["seqresnet_b42", "seqresnext_24"])
def test_temporary_memory(name: str) -> None:
    """64 images of 224²: what docs/performance.md says lives in a pass, all named here, and little else."""
    for stage, size in zip(sct.create_model(name, device="meta").stages, (56, 28, 14, 7), strict=True):
        plan, pixels = stage.plan, 64 * size**2
        (_, forward_memory), (_, backward_memory) = counted(plan, training=True, images=64, size=size)
        groups, k, tail = len(plan.groups), plan.group_width, plan.tail
        repeats = 1 if tail is None else tail.repeats
        weights = [p for p in stage.parameters() if p.dim() > 1]
        out = 64 * plan.out_channels * plan.out_size(size) ** 2
        tables = 2 * 4 * pixels + 2 * 4 * plan.in_channels * (pixels // 64 + pixels // 2048 + 2)
        tables += 11 * 4 * 2 * (plan.total_channels + groups * k)  # statistics, gradients and coefficients of BNs

        kept = (plan.total_channels + groups * k) * pixels  # the buffer, z
        activated = (plan.total_channels + k) * pixels + (repeats > 1) * repeats * plan.read_channels * pixels
        laid_out = 9 * 128 * stage.transform_weight.numel() // stage.transform_weight[0].numel()  # in blocks of 128
        allowed = 2 * (kept + activated + out + laid_out + weights[-1].numel()) + tables
        assert 2 * (kept + activated) < forward_memory.peak <= allowed < 1.15 * forward_memory.peak

        features = ((2 * groups + 2) * k + repeats * plan.read_channels + plan.in_channels) * pixels
        repeated = (repeats > 1) * (repeats + 1) * plan.read_channels * pixels
        given = 2 * (out + repeated + sum(w.numel() for w in weights) + weights[-1].numel() + laid_out)
        sums = backward_memory.largest["partial_ptr"] + 4 * max(w.numel() for w in weights)
        assert 2 * features < backward_memory.peak <= 2 * features + given + sums + tables < 1.15 * backward_memory.peak


def test_kept_for_backward_in_bfloat16() -> None:
    """B42 keeps half of what it keeps in float32: 33 MiB an image of 224 × 224."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, int] = {}
    with FakeTensorMode(), sct.use_backend("triton"):
        model = sct.SeqResNetB42(dtype=torch.bfloat16)
        x = torch.randn(1, 3, 224, 224, dtype=torch.bfloat16)
        own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers(), x)}
        held = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            held.append(tensor)
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x)
    assert 30 * 2**20 < sum(kept.values()) < 34 * 2**20


# What a user writes, and what a float32 product may then be: these are convolutions, matmul's switches do not count.
TF32_SWITCHES = {
    "pass": "tf32",  # torch's default: convolutions may, matrix products may not
    "b.cuda.matmul.allow_tf32 = True": "tf32",
    "b.cudnn.allow_tf32 = False": "ieee",
    "b.cuda.matmul.allow_tf32 = True; b.cudnn.allow_tf32 = False": "ieee",
    "b.cuda.matmul.fp32_precision = 'ieee'": "tf32",
    "b.cudnn.conv.fp32_precision = 'ieee'": "ieee",
    "b.cuda.matmul.fp32_precision = 'tf32'; b.cudnn.conv.fp32_precision = 'ieee'": "ieee",
    "b.cudnn.fp32_precision = 'ieee'; b.cudnn.conv.fp32_precision = 'tf32'": "tf32",
    "torch.set_float32_matmul_precision('highest')": "tf32",
}


def test_tf32_only_where_torch_allows_it() -> None:
    """By either of torch's interfaces. No switch goes back to what it was: each case is a forked process."""
    program = f"""
import os, torch
from seqconv_triton.kernels.launch import precision
b = torch.backends
for case in {list(TF32_SWITCHES)}:
    if os.fork() == 0:
        exec(case)
        print(precision(torch.float32), precision(torch.bfloat16), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, case
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{expected} ieee" for expected in TF32_SWITCHES.values()]
