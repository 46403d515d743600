"""`make emulate`: the whole table, every configuration and the mutations, and what was found into docs/results/.

PYTHONPATH=tests python -m emulator [--jobs 2] [--seeds 4] [--only TEXT] [--skip configurations …] [--dry]
"""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from emulator.build import compiler
from emulator.results import Results
from emulator.work import PARTS, all_tasks, execute


def main() -> int:
    parser = argparse.ArgumentParser(prog="emulator", description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--seeds", type=int, default=4, help="orders of programs and warps that a case runs in")
    parser.add_argument("--only", default="", help="tasks whose name contains all of these words")
    parser.add_argument("--skip", nargs="*", choices=PARTS, default=[], help="parts to leave out")
    parser.add_argument("--dry", action="store_true", help="write no file")
    given = parser.parse_args()
    compiler()
    started, results = time.monotonic(), Results()
    tasks = [
        task
        for task in all_tasks(given.seeds)
        if task.part not in given.skip and all(word in task.name for word in given.only.split())
    ]
    for number, (task, row) in enumerate(execute(tasks, given.jobs), 1):
        results.add(task, row)
        print(f"{number}/{len(tasks)} {time.monotonic() - started:6.0f} s  {task.name}: {row}", flush=True)
        for complaint in row.complaints[:5]:
            print(f"    {complaint}", flush=True)
    print(results.page())
    if not given.dry and not given.only and not given.skip:
        results.write(seconds=time.monotonic() - started)
    return int(bool(results.complaints))


if __name__ == "__main__":
    sys.exit(main())
