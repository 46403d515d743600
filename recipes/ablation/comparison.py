"""Every network trained from every seed, and the table of their errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

import seqconv_triton
from recipes import files
from recipes.ablation.data import check_root
from recipes.ablation.report import as_json, markdown
from recipes.ablation.runs import Result, finished, run
from recipes.ablation.settings import CONTESTANTS, Contestant, Setting
from recipes.training.distributed import usable_device
from recipes.training.fit import History
from seqconv_triton.optional import require


def compare(
    setting: Setting,
    output: Path,
    *,
    seeds: int = 3,
    networks: list[str] | None = None,
    root: Path | None = None,
    device: str | None = None,
) -> str:
    """Train what is not finished yet, write table.md and results.json into `output`, and return the table.

    Raises ValueError for unknown networks, no seeds, a missing or superfluous root, or results of another setting in
    `output`.
    """
    require("the ablation", "demo", "scipy", "sklearn", "tqdm")
    unknown = [name for name in networks or () if name not in CONTESTANTS]
    if unknown:
        raise ValueError(f"unknown network {unknown[0]!r}; allowed are {', '.join(CONTESTANTS)}")
    if seeds < 1:
        raise ValueError(f"seeds ({seeds}) must be at least 1")
    processor = usable_device(device)
    contestants = [CONTESTANTS[key] for key in CONTESTANTS if networks is None or key in networks]
    results = _train_missing(contestants, range(seeds), setting, root, output / "runs", processor)
    provenance = {
        "seqconv_triton": seqconv_triton.__version__,
        "torch": ", ".join(sorted({result.torch for result in results})),
        "on": str(processor),
        "date": datetime.now(UTC).date().isoformat(),
    }
    table = markdown(results, setting, provenance)
    figures = json.dumps(as_json(results, setting, provenance), indent=1)
    files.write(output / "results.json", figures.encode() + b"\n")
    files.write(output / "table.md", table.encode())
    return table


def _train_missing(
    contestants: Sequence[Contestant],
    seeds: Sequence[int],
    setting: Setting,
    root: Path | None,
    folder: Path,
    device: torch.device,
) -> list[Result]:
    """All results, seed by seed, so that an interrupted comparison has all networks on some seeds."""
    from tqdm import tqdm

    total_epochs = setting.recipe.epochs
    results = {(c.key, seed): finished(folder, c, seed, setting) for seed in seeds for c in contestants}
    missing = [key_and_seed for key_and_seed, result in results.items() if result is None]
    if len(missing) < len(results):
        print(f"{len(results) - len(missing)} of {len(results)} runs are finished already: {folder}")
    if missing:
        check_root(setting, root)
    with tqdm(total=len(missing) * total_epochs, unit="epoch", disable=not missing) as bar:

        def on_epoch(history: History) -> None:
            bar.set_postfix(error=f"{100 * (1 - history.test_accuracy[-1]):.2f} %", refresh=False)
            bar.update()

        for key, seed in missing:
            bar.set_description(f"{key}, seed {seed}")
            results[key, seed] = run(CONTESTANTS[key], seed, setting, root, folder, device, on_epoch)
    return [result for result in results.values() if result is not None]
