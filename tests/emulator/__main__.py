"""`make emulate`: the whole table, every configuration and the mutations, and what was found into docs/results/.

PYTHONPATH=tests python -m emulator [--jobs 2] [--seeds 4] [--only TEXT] [--skip configurations …] [--minutes 60] …

Hours on two cores, so that every finished task is kept (docs/results/emulation-rows.jsonl.gz): a run goes on where the
last one ended. A row counts as long as its case and what it launches are what they were: code, configurations, values.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from emulator.build import compiler
from emulator.results import Results
from emulator.rows import ROWS, finished, keep
from emulator.work import PARTS, all_tasks, execute


def main() -> int:
    parser = argparse.ArgumentParser(prog="emulator", description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--seeds", type=int, default=4, help="orders of programs and warps that a case runs in")
    parser.add_argument("--only", default="", help="tasks whose name contains all of these words")
    parser.add_argument("--skip", nargs="*", choices=PARTS, default=[], help="parts to leave out")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file of finished tasks (.jsonl.gz)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after so many minutes")
    parser.add_argument("--fresh", action="store_true", help="begin that file anew")
    parser.add_argument("--dry", action="store_true", help="write no file")
    given = parser.parse_args()
    compiler()
    started, results = time.monotonic(), Results()
    tasks = {
        task.name: task
        for task in all_tasks(given.seeds)
        if task.part not in given.skip and all(word in task.name for word in given.only.split())
    }
    everything = len(tasks)
    if given.fresh:
        given.rows.unlink(missing_ok=True)
    for name, row in dict(finished(given.rows, tasks)).items():
        results.add(tasks.pop(name), row)
    for task, row in execute(list(tasks.values()), given.jobs, started + 60 * given.minutes):
        results.add(task, row)
        keep(given.rows, task, row)
        print(f"{len(results.rows)}/{everything} {time.monotonic() - started:6.0f} s  {task.name}: {row}", flush=True)
        for complaint in row.complaints[:5]:
            print(f"    {complaint}", flush=True)
    print(results.page())
    if not given.dry and not given.only:
        results.write(everything)
    return int(bool(results.complaints))


if __name__ == "__main__":
    sys.exit(main())
