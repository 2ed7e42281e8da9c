"""What the promises cost: the share of one `lorasure forget` that goes into checks, hashes and syncing to the disk.

    python benchmarks/reliability/overhead.py [--rows 200] [--shared DIR]

TOFU forget05 on the small target model where `--shared` holds it, else the demo's data and an untrained model. The
guards' functions are timed from outside while the run goes on; time inside checkpoints is reported apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "overhead.json"


class Clock:
    """Seconds inside some functions, without those of timed functions that they call."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inner: list[float] = [0.0]

    def watch(self, owner: Any, name: str) -> None:
        """Replace `owner.name` by itself with its time taken."""
        real: Callable[..., Any] = getattr(owner, name)
        label = f"{getattr(owner, '__name__', '').removeprefix('lorasure.')}.{name}"

        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            self.inner.append(0.0)
            try:
                return real(*args, **options)
            finally:
                spent = time.perf_counter() - began
                self.seconds[label] = self.seconds.get(label, 0.0) + spent - self.inner.pop()
                self.inner[-1] += spent

        setattr(owner, name, timed)


def watch_guards(clock: Clock) -> None:
    """Everything in a run that is there for its promises only."""
    from lorasure import artifacts, checkpoint, folders, lora, pipeline, stages, train, workbench

    watched = (
        (folders, "check_new", "_publish", "_checked"),
        (artifacts, "finish", "write_json", "check_run"),
        (checkpoint.Keeper, "begin", "after_step", "finish", "save"),
        (train, "_finite_norm", "_check_divergence"),
        (pipeline, "identity", "_check_unsettled"),
        (workbench, "fingerprint", "check_model_folder", "check_disjoint"),
        (stages.Start, "check_finite"),
        (stages, "states_of", "check_export"),
        (lora, "check_fits"),
    )
    for owner, *names in watched:
        for name in names:
            clock.watch(owner, name)


def inputs(folder: Path, shared: Path, rows: int) -> dict[str, Any]:
    """Settings of the run."""
    target = shared / "models" / "tofu-mini-target"
    if target.is_dir():
        tofu = shared / "data" / "tofu"
        for name, source in (("forget", "forget05"), ("retain", "full")):
            (folder / f"{name}.jsonl").write_text("".join((tofu / f"{source}.json").open().readlines()[:rows]))
        model, options = target, {"init": "vila", "rank": 16, "alpha": 32.0, "lr": 2e-3, "batch_size": 16}
    else:
        from lorasure.demo import make_data, make_start

        make_data(folder, 0)
        make_start(folder, "model", 0)
        model, options = folder / "model", {"init": "vila", "rank": 8, "lr": 1e-3, "batch_size": 8, "epochs": 8}
    files = {name: str(folder / f"{name}.jsonl") for name in ("forget", "retain")}
    return {"model": str(model), **files, **options, "out": str(folder / "run")}


def main() -> int:
    """Run, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with data/tofu and models")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries underneath
    import torch

    from lorasure.artifacts import versions
    from lorasure.config import ForgetSettings
    from lorasure.pipeline import forget

    clock = Clock()
    watch_guards(clock)
    with tempfile.TemporaryDirectory() as name:
        settings = ForgetSettings(**inputs(Path(name), given.shared, given.rows))
        began = time.perf_counter()
        forget(settings)
        whole = time.perf_counter() - began
    checkpoints = clock.seconds.pop("Keeper.save", 0.0)
    guards = sum(clock.seconds.values())
    result = {
        "model": Path(settings.model).name,
        "seconds": round(whole, 2),
        "checkpoint_seconds": round(checkpoints, 3),
        "guard_seconds": round(guards, 3),
        "guard_share": round(guards / (whole - checkpoints), 5),
        "parts": {name: round(value, 4) for name, value in sorted(clock.seconds.items(), key=lambda p: -p[1])},
        "machine": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 0 if result["guard_share"] <= 0.03 else 1


if __name__ == "__main__":
    sys.exit(main())
