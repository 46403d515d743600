"""Before anything is timed: every contender's results against the specification in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import seqconv_triton as sct
from bench import peers
from bench.cases import Case
from bench.contenders import Contender, Found, build
from bench.timing import unmarked

# Relative RMS error that is allowed beyond twice that of the plain code in the same precision. Our products in TF32 cut
# operands short where others may round them.
FLOOR = {"float32": 1e-3, "tf32": 5e-3, "bfloat16": 1e-2}
BLIND = 0.5  # never more than this, whatever the plain code's error: zeros are off by 1
NUDGE = 4.0  # deviations between the features and ReLU's corner, where a rounding turns a gradient on or off
PIECE = 2**20  # numbers that are compared at a time: in double precision whole networks' gradients are large
CHUNK = 16  # images whose exact evaluation is computed at a time


class Wrong(RuntimeError):
    """A contender's results are not those of the specification."""


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Relative RMS error; NaN where either holds one, infinite for another shape."""
    if got.shape != expected.shape:
        return math.inf
    pieces = zip(got.flatten().split(PIECE), expected.flatten().split(PIECE), strict=True)
    norms = [(torch.dist(one.double(), other.double()), other.double().norm()) for one, other in pieces]
    distance, scale = (torch.stack(values).norm().item() for values in zip(*norms, strict=True))
    return distance / scale if scale else distance


@dataclass(frozen=True)
class Expected:
    """Exact results, and how far plain code of the case's own precision is from them."""

    exact: dict[str, Tensor]
    own_error: dict[str, float]

    def check(self, found: dict[str, Tensor], precision: str) -> float:
        """The largest relative RMS error of a contender's results. Raises Wrong, which names result and error."""
        if missing := self.exact.keys() - found.keys():
            raise Wrong(f"no {', '.join(sorted(missing))}")
        errors = {name: relative_error(found[name], value) for name, value in self.exact.items()}
        for name, error in errors.items():
            allowed = min(2 * self.own_error[name] + FLOOR[precision], BLIND)
            if not error <= allowed:
                raise Wrong(f"{name} is off by {error:.1e} (allowed: {allowed:.1e})")
        return max(errors.values())


def precision_of(case: Case, device: torch.device) -> str:
    """What a case is computed in, as FLOOR names it."""
    return "tf32" if case.dtype == "float32" and device.type == "cuda" else case.dtype


def family(label: str) -> str:
    """Who is compared with whom: our network in all its forms, or a peer with itself."""
    who = label.split()[0]
    return who if who in peers.PEERS else "reference"


def expected(who: str, case: Case, base: nn.Module, x: Tensor) -> Expected:
    """From the concatenating reference, or from a peer in eager mode."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = exact_results(who, case, base, x)
    if precision_of(case, x.device) == "float32":
        return Expected(exact, dict.fromkeys(exact, 0.0))
    found = results_of(build(f"{who} eager", case, base, x), case)
    return Expected(exact, {name: relative_error(found[name], value) for name, value in exact.items()})


def exact_results(who: str, case: Case, base: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """In float32, whatever the case's precision.

    Large training batches, which the concatenating code has no memory for, go through the aten backend.
    """
    precise = replace(case, dtype="float32")
    if not case.training:
        module = build(f"{who} eager", precise, base, x[:1]).module
        assert module is not None
        with torch.no_grad(), sct.use_backend("reference" if who == "reference" else None):
            return {"output": torch.cat([module(part) for part in x.split(CHUNK)])}
    contender = build(f"{who} eager", precise, base, x)
    if who == "reference" and len(x) > 64:
        # `build` has chosen the reference backend around the run: choose again inside.
        own = contender.module
        assert own is not None
        forward = own.forward

        def through_aten(images: Tensor) -> Tensor:
            with sct.use_backend("aten"):
                return forward(images)

        own.forward = through_aten
    return results_of(contender, case)


def results_of(contender: Contender, case: Case) -> dict[str, Tensor]:
    """What a run computes, each result one tensor."""
    return joined(pieces_of(contender, case))


def joined(found: Found) -> dict[str, Tensor]:
    return {
        name: value if isinstance(value, Tensor) else torch.cat([piece.flatten() for piece in value])
        for name, value in found.items()
    }


def pieces_of(contender: Contender, case: Case) -> Found:
    """What a run computes, as the run left it in memory.

    Training runs with features away from ReLU's corner: else rounding, which turns single gradients on or off, drowns
    them, in a stage of 88 groups already (float32 errors of 1e-4 to 4e-3, the plain code's too). Single layers in
    float32 are checked as they are.
    """
    single = isinstance(contender.module, sct.SeqConv2d) and case.dtype == "float32"
    away = NUDGE if case.training and not single else 0.0
    nudge(contender.module, away)
    contender.run(unmarked)
    found = contender.found()
    nudge(contender.module, -away)
    return found


@torch.no_grad()
def nudge(module: nn.Module | None, by: float) -> None:
    """Move every BN's bias."""
    if not by:
        return
    for part in () if module is None else module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.bias.add_(by)
