"""The table of cases: what runs, on how many images, who takes part, for how many rounds; the important ones first.

A contender is "who how": who is ours, reference (the concatenating code) or a peer of `peers.py`; how is eager,
compiled, max-autotune (torch.compile), fused (sct.fuse; evaluation only), graph (a CUDA graph), or plain for kernels. A
subject is a model's name, a stage of it ("seqresnet_b42 stage 3"), a layer or a kernel of the tables below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

MODELS = ("seqresnet_b42", "seqresnet_b22", "seqresnext_24")
FIRST = "seqresnet_b42"

OURS = ("ours eager", "ours compiled")
REFERENCE = ("reference eager", "reference compiled")
PLAIN = ("reference eager", "ours eager")
FUSED = (*PLAIN, "reference fused", "ours fused")
RESNETS = ("resnet50 compiled", "resnet101 compiled", "resnet152 compiled")
PEERS = (*RESNETS, "resnext50_32x4d compiled", "densenet169 compiled")
GRAPHS = ("ours graph", "resnet50 graph", "resnet152 graph", "reference graph")

# (in_channels, out_channels, group width, image), then options: one layer of every kind, from the ImageNet networks.
LAYERS: dict[str, tuple[tuple[int, int, int, int], dict[str, object]]] = {
    "layer bottleneck": ((512, 512, 64, 14), {"bottleneck": True}),
    "layer subgroups": ((512, 512, 64, 28), {"bottleneck": True, "subgroups": 8}),
    "layer basic": ((64, 64, 8, 32), {}),
    "layer dense": ((64, 64, 8, 32), {"windowed": False}),
}
BLOCKS = (1, 2, 4, 8)  # of a stage: time against depth
GROUPS = (2, 4, 8, 16, 32)  # of a layer whose window stays: time against width
KERNELS = (
    "convolution 1×1",
    "convolution 3×3",
    "convolution tail",
    "pull 1×1",
    "transposed 3×3",
    "transposed tail",
    "weight gradient 1×1",
    "weight gradient 3×3",
    "weight gradient tail",
    "elementwise",
    "statistics",
)


@dataclass(frozen=True)
class Case:
    """One entry: `training` times forward, backward and the step of SGD, otherwise one evaluation is timed."""

    subject: str
    training: bool
    batch: int
    contenders: tuple[str, ...]
    rounds: int = 7
    image: int = 224
    dtype: str = "float32"
    minutes: float = 0.5  # no less must be left of a run's time for this case to begin
    processes: int = 2  # of an eager contender on a CPU, which divide the rounds

    @property
    def name(self) -> str:
        return f"{self.subject}, {'training' if self.training else 'eval'}, batch {self.batch}, {self.dtype}"

    @property
    def identity(self) -> str:
        """Its name, and who takes part."""
        return f"{self.name}: {', '.join(self.contenders)}"


def stages(model: str, batch: int, training: bool, **options: object) -> list[Case]:
    return [Case(f"{model} stage {i}", training, batch, PLAIN, **options) for i in (1, 2, 3, 4)]  # type: ignore[arg-type]


def growth(batch: int, **options: object) -> list[Case]:
    """Time against depth and width; the dense layers' windows grow, ours stay."""
    names = [f"depth {b}" for b in BLOCKS] + [f"width {g}" for g in GROUPS] + [f"dense width {g}" for g in GROUPS]
    return [Case(name, False, batch, PLAIN, **options) for name in names]  # type: ignore[arg-type]


def layers(batch: int, **options: object) -> list[Case]:
    return [Case(name, training, batch, PLAIN, **options) for name in LAYERS for training in (False, True)]  # type: ignore[arg-type]


def cpu(full: bool = False) -> list[Case]:
    """Float32 on a CPU. The default fits ten minutes on two cores; B42's compiled reference comes last, if it can.

    In training B22's last stage stands for it; `full` adds B42's, max-autotune, the peers' training, and larger
    batches: about an hour.
    """
    b42, b22, next24 = FIRST, "seqresnet_b22", "seqresnext_24"
    cases = [
        Case(b42, False, 8, (*FUSED, *RESNETS), 6, minutes=1),
        Case(b42, True, 4, PLAIN, 6, minutes=1.5, processes=3),
        Case(b42, False, 1, FUSED, 8),
        *(Case(b42, False, batch, PLAIN, 8) for batch in (2, 4)),
        Case(b42, True, 2, PLAIN, 6),
        Case(b22, False, 8, (*REFERENCE, *OURS), 9, minutes=3, processes=3),
        *growth(4, rounds=6, minutes=0.1),
        Case(f"{b22} stage 4", True, 4, (*REFERENCE, *OURS), 6, minutes=1.5),
        *stages(b42, 8, False, rounds=6, minutes=0.2),
        *layers(4, rounds=6, minutes=0.1),
        Case(next24, False, 8, PLAIN, 6),
        Case(b22, True, 4, PLAIN, 6, processes=3),
        *stages(b42, 4, True, rounds=4, minutes=0.3),
        Case(b42, False, 8, (*REFERENCE, *OURS), 9, minutes=3.5, processes=3),
    ]
    if full:
        cases += [
            Case(next24, True, 4, PLAIN, 5),
            Case(b42, False, 32, (*PLAIN, "ours compiled"), 5),
            Case(b22, False, 1, PLAIN, 9),
            Case(next24, False, 1, PLAIN, 9),
            Case(b42, True, 4, ("ours compiled", "resnet50 compiled", "resnet101 compiled"), 5),
            Case(b42, False, 8, (*REFERENCE, *OURS, "ours max-autotune", *PEERS), 9, processes=3),
            Case(b42, True, 4, (*REFERENCE, *OURS), 6, processes=3),
        ]
    return cases


def halves() -> list[Case]:
    """Float32 and bfloat16 on a CPU in one run: five minutes on two cores."""
    found = []
    for model, training, batch, peers in (
        (FIRST, False, 8, ("resnet50 eager", "resnet101 eager")),
        (FIRST, True, 4, ("resnet50 eager", "resnet101 eager")),
        ("seqresnet_b22", False, 8, ()),
        ("seqresnet_b22", True, 4, ()),
        ("seqresnext_24", False, 8, ()),
        ("seqresnext_24", True, 4, ()),
        (FIRST, False, 1, ("resnet50 eager", "resnet101 eager")),
    ):
        found += [Case(model, training, batch, (*PLAIN, *peers), 6, dtype=dtype) for dtype in ("float32", "bfloat16")]
    return found


def quick() -> list[Case]:
    """A minute's check that everything works; its times mean nothing."""
    name = "cifar_seqresnet_b_r7_k16"
    return [
        Case(name, False, 2, ("reference eager", *OURS), 2, 32),
        Case(name, False, 4, ("reference eager", *OURS), 2, 32),
        Case(name, True, 4, ("reference eager", "ours eager", "resnet50 compiled"), 2, 32),
        *(Case(f"{name} stage {i}", training, 2, PLAIN, 2, 32) for i in (1, 2, 3) for training in (False, True)),
        *growth(1, rounds=2),
        *layers(1, rounds=2),
    ]


def gpu() -> list[Case]:
    """Bfloat16 on a GPU: the rows that decide come first, what takes minutes to compile last."""
    b42, others = FIRST, MODELS[1:]
    kernels = [
        Case(f"kernel {kernel}, {b42} stage {i}", False, 256, ("torch plain", "ours plain"), 20)
        for kernel in KERNELS
        for i in (1, 2, 3, 4)
    ]
    cases = [
        Case(b42, False, 256, ("ours eager", "reference eager", "ours graph"), 10),
        Case(b42, True, 256, PLAIN, 5),
        Case(b42, False, 1, ("ours graph", "reference graph"), 20),
        *(Case(name, training, 256, PLAIN, 5) for name in others for training in (False, True)),
        Case(b42, False, 256, ("ours compiled", *RESNETS), 10),
        Case(b42, False, 1, GRAPHS, 20),
        Case(b42, True, 256, ("ours compiled", *RESNETS[:2]), 5),
        *kernels,
        *stages(b42, 256, False, rounds=10),
        *stages(b42, 256, True, rounds=5),
        Case("seqresnet_b22", False, 256, (*REFERENCE, *OURS), 10),
        Case(b42, False, 256, (*REFERENCE, *OURS), 10),
        Case("seqresnet_b22", True, 256, (*REFERENCE, *OURS), 5),
        Case(b42, True, 256, (*REFERENCE, *OURS), 5),
        *(Case(b42, False, batch, PLAIN, 10) for batch in (8, 32)),
        Case(b42, True, 64, PLAIN, 5),
        *growth(32, rounds=10),
        *layers(32, rounds=10),
        *(Case("seqresnext_24", training, 256, (*REFERENCE, *OURS), 5) for training in (False, True)),
        Case(b42, False, 256, ("ours max-autotune", "reference max-autotune", *PEERS[3:]), 10),
    ]
    for name in others:
        cases += stages(name, 256, False, rounds=10) + stages(name, 256, True, rounds=5)
        cases += [Case(name, False, batch, PLAIN, 10) for batch in (1, 8, 32)]
        cases.append(Case(name, True, 64, PLAIN, 5))
    mixed = [replace(case, dtype="bfloat16") for case in cases]
    return mixed + [Case(b42, training, 64, PLAIN, 5) for training in (False, True)]


def chosen(table: str, only: Sequence[str]) -> list[Case]:
    """The cases of a table that have one of the texts in their names."""
    return [case for case in TABLES[table]() if any(text in case.name for text in only)]


TABLES = {"cpu": cpu, "cpu-full": lambda: cpu(full=True), "cpu-bf16": halves, "quick": quick, "gpu": gpu}
