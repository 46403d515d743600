"""`python -m bench`: the table of cases, on the screen and as JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

import seqconv_triton as sct
from bench.cpu import CASES, run_case


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def revision() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def provenance() -> dict[str, object]:
    """Machine, versions, date and revision: what a number means nothing without."""
    return {
        "processor": processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seqconv_triton": sct.__version__,
        "revision": revision(),
        "date": datetime.date.today().isoformat(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--model", default="seqresnet_b42", choices=sct.list_models("seqresne*"))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--compile", action="store_true", help="evaluation of 8 images also under torch.compile, cold")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--gpu", action="store_true", help="GPU tests and the first table of a GPU, in nine minutes")
    parser.add_argument("--gpu-warm", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--launches", action="store_true", help="count the Triton backend's launches; needs no GPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.launches:
        from bench import launches

        write(arguments.output, {**provenance(), "launches": launches.main()})
        return 0
    if arguments.gpu or arguments.gpu_warm:
        if not torch.cuda.is_available():
            print("--gpu needs a GPU, and torch sees none", file=sys.stderr)
            return 2
        from bench import gpu

        if arguments.gpu_warm:
            gpu.warm(arguments.gpu_warm)
            return 0
        write(arguments.output, {**provenance(), **gpu.main()})
        return 0

    source = provenance()
    print("  ".join(f"{key} {value}" for key, value in source.items()))
    print(f"{arguments.model}, 224², float32, channels_last; median [quartiles], speed against the eager reference\n")
    results = []
    for case in CASES:
        result = run_case(case, arguments.model, arguments.compile and case.compiled)
        print("\n".join(result.pop("rows")), flush=True)
        for label, seconds in result["compile_seconds"].items():
            print(f"{case.name:<14} {case.batch:>5}  {label} compiled in {seconds:.0f} s, cold, first step included")
        results.append(result)
    write(arguments.output, {**source, "model": arguments.model, "cases": results})
    return 0


def write(output: Path | None, figures: dict[str, object]) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
