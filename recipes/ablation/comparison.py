"""Every network trained from every seed, and the table of their errors."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import seqconv_triton
from recipes.ablation.data import check_root
from recipes.ablation.report import as_json, markdown
from recipes.ablation.runs import Result, finished, run
from recipes.ablation.settings import CONTESTANTS, Setting
from recipes.training import checkpoint
from recipes.training.distributed import usable_device
from recipes.training.loop import History
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
    from tqdm import tqdm

    unknown = [name for name in networks or () if name not in CONTESTANTS]
    if unknown:
        raise ValueError(f"unknown network {unknown[0]!r}; allowed are {', '.join(CONTESTANTS)}")
    if seeds < 1:
        raise ValueError(f"seeds ({seeds}) must be at least 1")
    epochs = setting.recipe.epochs
    place = usable_device(device)
    chosen = [one for one in CONTESTANTS.values() if networks is None or one.key in networks]
    folder = output / "runs"
    # Seed by seed, so that an interrupted run has compared all networks on some seeds.
    results: dict[tuple[str, int], Result | None] = {
        (one.key, seed): finished(folder, one, seed, setting) for seed in range(seeds) for one in chosen
    }
    missing = [place for place, result in results.items() if result is None]
    if len(missing) < len(results):
        print(f"{len(results) - len(missing)} of {len(results)} runs are finished already: {folder}")
    if missing:
        check_root(setting, root)
    with tqdm(total=len(missing) * epochs, unit="epoch", disable=not missing) as bar:
        for key, seed in missing:
            bar.set_description(f"{key}, seed {seed}")

            def on_epoch(history: History) -> None:
                bar.set_postfix(error=f"{100 * (1 - history.test_accuracy[-1]):.2f} %", refresh=False)
                bar.update()

            results[key, seed] = run(CONTESTANTS[key], seed, setting, root, folder, place, on_epoch)
    complete = [result for result in results.values() if result is not None]
    provenance = {
        "seqconv_triton": seqconv_triton.__version__,
        "torch": ", ".join(sorted({result.torch for result in complete})),
        "on": str(place),
        "date": datetime.now(UTC).date().isoformat(),
    }
    table = markdown(complete, setting, provenance)
    checkpoint.write(
        output / "results.json", json.dumps(as_json(complete, setting, provenance), indent=1).encode() + b"\n"
    )
    checkpoint.write(output / "table.md", table.encode())
    return table
