"""Every start, loss and way to hold the base on a GPU and on the CPU: the same adapter, and nothing that fails there.

    python benchmarks/reliability/gpu.py [--device cuda] [--rows 16] [--results FILE]

Small model and rows as in `make bench-speed`. In float32 the adapters of both are compared: the norm of the difference
of B A over the norm of what training added to it, the largest of any layer. In bfloat16 and 4 bits what is compared is
the forget and retain probability afterwards, with those of the same run on the CPU. Apart by more than SAME, or
SAME_ROUNDED, is an error. Then every other command once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import platform
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import torch
from safetensors.torch import load_file
from workload import find_workload

from lorasure import artifacts, cli, pipeline
from lorasure.config import ForgetSettings
from lorasure.init.apply import INITS
from lorasure.losses.forget import FORGET_LOSSES
from lorasure.losses.retain import RETAIN_LOSSES

ROOT = Path(__file__).resolve().parents[2]
EXACT = {
    **{f"init {name}": {"init": name} for name in INITS},
    **{f"loss {name}": {"loss": name} for name in FORGET_LOSSES},
    **{f"retain loss {name}": {"retain_loss": name} for name in RETAIN_LOSSES},
    "a quarter of the layers": {"init": "vila", "coverage": 0.25},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "many small passes": {"tokens_per_batch": 128},
}
SAME, SAME_ROUNDED = 1e-3, 1e-2  # of a probability
ROUNDED = {
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, vila, npo": {"dtype": "bfloat16", "init": "vila", "loss": "npo"},
    "float16": {"dtype": "float16"},
    "4 bits, bfloat16": {"quantize": "nf4", "dtype": "bfloat16"},
    "4 bits, vila, npo": {"quantize": "nf4", "dtype": "bfloat16", "init": "vila", "loss": "npo"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with data/tofu and models")
    a = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.cuda.get_device_name() if a.device.startswith("cuda") else a.device
    about = {"device": device, "cpu": platform.processor() or platform.machine(), "versions": artifacts.versions()}
    results: dict[str, Any] = {"about": about, "rows": a.rows, "float32": {}, "rounded": {}, "commands": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = find_workload(a.shared, folder).subset(a.rows)
        forget, retain = map(str, work.write(folder))
        common = ForgetSettings(model=str(work.folder), forget=forget, retain=retain, out=str(folder / "run"))
        common = replace(common, epochs=2, batch_size=8, lr=1e-3, rank=4, max_grad_growth=1e9, max_retain_rise=1e9)

        def keep(kind: str, title: str, found: dict[str, Any]) -> None:
            results[kind][title] = found
            print(f"{kind:8} {title:28} {json.dumps(found)}", flush=True)
            if a.results:
                a.results.write_text(json.dumps(results, indent=1) + "\n")

        for kind, cases in (("rounded", ROUNDED), ("float32", EXACT)):
            for title, changes in cases.items():
                keep(kind, title, attempted(common, {"dtype": "float32"} | changes, a.device, folder))
        for title, argv in commands(work, folder, a.device).items():
            keep("commands", title, command(argv))
    failed = [t for kind in ("float32", "rounded", "commands") for t, r in results[kind].items() if "error" in r]
    print(f"{len(failed)} failed" + "".join(f"\n  {title}" for title in failed))
    return bool(failed)


def attempted(common: ForgetSettings, changes: dict[str, Any], device: str, folder: Path) -> dict[str, Any]:
    """What `compared` finds, or the error."""
    try:
        return compared(replace(common, **changes), device, folder)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def compared(settings: ForgetSettings, device: str, folder: Path) -> dict[str, Any]:
    """The same run on the CPU and on the device."""
    runs, seconds = {}, {}
    for name in ("cpu", device):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=folder) as out, contextlib.redirect_stderr(io.StringIO()):
            done = pipeline.forget(replace(settings, device=name, out=f"{out}/run"))
            after = {part: done.summary["after"][part]["value"] for part in ("forget", "retain")}
            runs[name] = products(done.folder), after
        seconds[name] = round(time.perf_counter() - began, 2)
    (theirs, after_cpu), (ours, after) = runs["cpu"], runs[device]
    away = max(float((ours[k] - theirs[k]).norm() / theirs[k].norm().clamp(min=1e-12)) for k in theirs)
    moved = {part: [round(after_cpu[part], 5), round(after[part], 5)] for part in after}
    found = {"away": float(f"{away:.2g}"), "cpu and device": moved, "seconds": list(seconds.values())}
    apart = max(abs(one - other) for one, other in moved.values())
    bound = SAME if settings.dtype == "float32" else SAME_ROUNDED
    return found if apart <= bound and away < math.inf else found | {"error": f"apart by {apart:.2g}, at most {bound}"}


def products(run: Path) -> dict[str, torch.Tensor]:
    """Layer -> B A of the exported adapter, which is 0 where training has changed nothing."""
    tensors = load_file(run / artifacts.ADAPTER / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {name: tensors[f"{name}.lora_B.weight"].float() @ tensors[f"{name}.lora_A.weight"].float() for name in names}


def commands(work: Any, folder: Path, device: str) -> dict[str, list[str]]:
    """Every command that a user would run on one run, by name."""
    run, model = str(folder / "whole"), ["--model", str(work.folder), "--device", device]
    data = ["--forget", str(folder / "forget.jsonl"), "--retain", str(folder / "retain.jsonl")]
    return {
        "plan": ["plan", *model, *data, "--out", run],
        "forget, all defaults": ["forget", *model, *data, "--out", run],
        "evaluate": ["evaluate", *model, "--adapter", run, *data, "--out", f"{run}-evaluated"],
        "attack": ["attack", run, "--device", device, "--rows", "8"],
        "probe": ["probe", *model, "--text", data[1]],
        "report": ["report", run],
    }


def command(argv: list[str]) -> dict[str, Any]:
    """Seconds, and the last line of what went wrong, if anything did."""
    began, out, err = time.perf_counter(), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(argv)
    found: dict[str, Any] = {"seconds": round(time.perf_counter() - began, 2)}
    return found | ({"error": f"exit code {code}: {err.getvalue().strip().splitlines()[-1:]}"} if code else {})


if __name__ == "__main__":
    sys.exit(main())
