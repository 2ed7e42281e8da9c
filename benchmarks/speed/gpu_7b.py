"""What forgetting costs at 7 B on one GPU: random weights of real shapes, TOFU forget10's row lengths.

    python benchmarks/speed/gpu_7b.py [--models llama-2-7b phi-1.5 llama-3.1-8b] [--compile] [--results FILE]
    python benchmarks/speed/gpu_7b.py --models llama-2-7b --four-bit --tokens 1280 --no-full
    python benchmarks/speed/gpu_7b.py --models llama-2-7b --gradient-checkpointing --no-full
    python benchmarks/speed/gpu_7b.py --tiny     # the same stages on the CPU with a small shape

Runs from a bare checkout where torch, transformers, peft and accelerate are installed. Prints, per model: seconds per
stage (importance in LoRA space, importance of all weights as far as memory allows, initialisation by `vila` and by
`contrast`, five epochs of NPO and of IHL), tokens per second, the share of the measured matrix rate that the least
arithmetic makes up (4 operations per frozen weight and token), peak memory and what `lorasure plan` says it is, and the
size of what importance stores. 32 forget rows and as many retain rows per step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import accelerate
import peft
import psutil
import torch
import transformers
from shapes import SHAPES, build, examples
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorasure import lora
from lorasure.config import OptimizerSettings
from lorasure.data.examples import Example
from lorasure.footprint import Footprint, Rows, Shapes, by_stage
from lorasure.importance.activations import InGroups, room_on, second_moments
from lorasure.importance.collect import Probe, moments
from lorasure.importance.measure import Importance, measure
from lorasure.init.apply import INITS, Evidence, Request, initialise, of_moments
from lorasure.init.low_rank import Factors
from lorasure.layers import checkpointed
from lorasure.losses.forget import FORGET_LOSSES
from lorasure.losses.retain import RETAIN_LOSSES
from lorasure.models import pick_token_budget
from lorasure.objective import ForgetObjective, ForgetSteps, Unit
from lorasure.sites import Site, all_sites
from lorasure.train import fit

RANK, ALPHA, SIGMA = 8, 16.0, 0.05


class Stages:
    """Times stages on a device, with the peak of its memory in each, and prints them. `rate`: see `matrix_rate`."""

    def __init__(self, device: torch.device, rate: float) -> None:
        self.device, self.rate = device, rate
        self.found: dict[str, dict[str, float]] = {}

    def run(self, name: str, work: Callable[[], Any], **about: float) -> Any:
        settle(self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        result = work()
        settle(self.device)
        self.found[name] = {"seconds": time.perf_counter() - began, **about}
        if self.device.type == "cuda":
            self.found[name]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.show(name)
        return result

    def show(self, name: str) -> None:
        """One line."""
        stage = self.found[name]
        line = f"  {name:38} {stage['seconds']:8.2f} s"
        if "tokens" in stage:
            line += f"  {stage['tokens'] / stage['seconds']:9.0f} tokens/s"
        if "operations" in stage:
            line += f"  {stage['operations'] / stage['seconds'] / self.rate:5.1%} of the rate"
        if "peak_gib" in stage:
            line += f"  peak {stage['peak_gib']:.1f} GiB"
        print(line, flush=True)


def settle(device: torch.device) -> None:
    """Wait for what was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        settle(device)
        began = time.perf_counter()
        for _ in range(5):
            a @ b
        settle(device)
        best = min(best, time.perf_counter() - began)
    return 5 * 2 * size**3 / best


def that_fit(sites: Sequence[Site], device: torch.device) -> list[Site]:
    """As many sites as three float32 maps leave room for: of one set on the device, of both sets on the host."""
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else 2**29
    room = min(0.8 * free, 0.8 * psutil.virtual_memory().available / 2)
    kept, used = [], 0
    for site in sites:
        used += site.size * 4 * 3
        if used > room:
            break
        kept.append(site)
    return kept


def measure_model(name: str, a: argparse.Namespace, device: torch.device, rate: float) -> dict[str, Any]:
    """All stages of one model."""
    stages = Stages(device, rate)
    print(name)
    model = stages.run("build", lambda: build(name, device, four_bit=a.four_bit))
    sites = all_sites(model)
    vocabulary = model.config.get_text_config().vocab_size
    sets = [examples(a.rows, vocabulary, seed) for seed in (0, 1)]
    tokens = sum(len(e) for part in sets for e in part)
    answers = sum(e.answer_length for part in sets for e in part)
    least = 4 * (tokens * sum(s.size for s in sites) + answers * vocabulary * model.config.hidden_size)
    weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())

    def importance(chosen: Sequence[Site], space: str, score: str) -> Importance:
        probe = Probe(space, RANK, SIGMA, ALPHA / RANK, 0)
        with checkpointed(model, a.gradient_checkpointing):
            return measure(model, chosen, *sets, score=score, probe=probe, token_budget=a.tokens)

    few = [part[:8] for part in sets]
    probe = Probe("lora", RANK, SIGMA, ALPHA / RANK, 0)
    stages.run("warm-up", lambda: [moments(model, sites, part, probe, token_budget=a.tokens) for part in few])
    found = stages.run(
        "importance, lora", lambda: importance(sites, "lora", "variance"), tokens=tokens, operations=least
    )
    stored = stored_bytes(found)
    start = stages.run(
        "init, vila", lambda: start_by("vila", lambda s: Evidence(found.weights(s, device)), model, sites)
    )
    read = InGroups(sites, "inputs", partial(directions, model, sets, a.tokens), room_on(device))
    stages.run("init, contrast", lambda: start_by("contrast", of_moments(read), model, sites))
    read.held = ({}, {})
    if a.full:
        chosen = that_fit(sites, device)
        stages.run(
            f"importance, full, {len(chosen)} of {len(sites)} layers",
            lambda: importance(chosen, "full", "fisher"),
            tokens=tokens,
        )
    for loss in a.losses:
        train(stages, model, start, sets, loss, a, tokens, least)
    said = {
        stage: size / 2**30 for stage, size in by_stage(footprint(name, a, sets, read.room).parts(), "device").items()
    }
    about = {"model": name, "weights_gib": weights / 2**30, "stored_map_mib": stored / 2**20, "said_gib": said}
    print(f"  weights {weights / 2**30:.2f} GiB, stored maps {stored / 2**20:.1f} MiB, said to need: ", end="")
    print(", ".join(f"{stage} {size:.1f}" for stage, size in said.items()) + " GiB", flush=True)
    return about | {"stages": stages.found}


def start_by(
    init: str, evidence: Callable[[Site], Evidence], model: PreTrainedModel, sites: Sequence[Site]
) -> dict[Site, Factors]:
    """The factors that training starts from."""
    return initialise(model, sites, INITS[init], evidence, Request(RANK, ALPHA / RANK), None)[0]


def directions(model: PreTrainedModel, sets: Any, tokens: int, sites: Sequence[Site]) -> list[dict[str, Any]]:
    """Second moments of what some sites read, of both sets."""
    return [second_moments(model, sites, rows, of_inputs=True, token_budget=tokens) for rows in sets]


def footprint(name: str, a: argparse.Namespace, sets: Sequence[Sequence[Example]], room: int) -> Footprint:
    """What `lorasure plan` says of such a run on a GPU, with steps of random rows."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[name]())
    sites = all_sites(model)
    rows = [Rows([len(e) for e in part], [e.answer_length for e in part]) for part in sets]
    both = Rows([*rows[0].lengths, *rows[1].lengths], [*rows[0].answers, *rows[1].answers])
    step = Rows([n for r in rows for n in r.lengths[:32]], [n for r in rows for n in r.answers[:32]])
    return Footprint(
        Shapes.of(model, sites, torch.bfloat16),
        measured=both,
        steps=[step],
        token_budget=a.tokens,
        rank=RANK,
        factors=2,
        probe=Probe("lora", RANK, SIGMA, ALPHA / RANK, 0),
        importance=True,
        directions="inputs",
        coverage=1.0,
        gradient_checkpointing=a.gradient_checkpointing,
        compile=False,
        four_bit=a.four_bit,
        on_cpu=False,
        shares=1,
        skipped=0,
        kept=0,
        room=room,
    )


def stored_bytes(found: Importance) -> int:
    """Of the moments of both sets."""
    kept = (m for part in (found.forget, found.retain) for site in part.values() for m in site.values())
    return sum(t.numel() * t.element_size() for m in kept for t in m.tensors().values())


def train(stages: Stages, model, start, sets, loss: str, a: argparse.Namespace, tokens: int, least: float) -> None:
    """The references and `a.epochs` epochs; the model is as before afterwards."""
    forget, retain = sets
    objective = ForgetObjective(forget, retain, (), FORGET_LOSSES[loss].function, RETAIN_LOSSES["nll"].function)
    steps = list(ForgetSteps(objective, epochs=a.epochs, batch_size=32, pairing="random", seed=0))
    if "reference" in objective.inputs:
        stages.run(
            f"{loss}, references",
            lambda: objective.observe_original(model, (), a.tokens),
            tokens=sum(map(len, forget)),
        )
    wrapped = lora.attach(model, start, RANK, ALPHA, compensate=True)

    def run(name: str, steps: Sequence[list[Unit]], compiled: bool, **about: float) -> None:
        how = {"compile": compiled, "gradient_checkpointing": a.gradient_checkpointing}
        settings = OptimizerSettings(lr=1e-4, epochs=a.epochs, batch_size=32, max_grad_growth=1e9, **how)
        stages.run(name, lambda: fit(wrapped, steps, objective, settings, token_budget=a.tokens), **about)

    whole = {"tokens": tokens * a.epochs, "operations": least * a.epochs}
    run(f"{loss}, {a.epochs} epochs", steps, False, **whole)
    if a.compile:
        run(f"{loss}, first and last step, compiling", [steps[0], steps[-1]], True)
        run(f"{loss}, {a.epochs} epochs, compiled", steps, True, **whole)
    wrapped.unload()
    model.requires_grad_(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["llama-2-7b", "phi-1.5", "llama-3.1-8b"])
    parser.add_argument("--four-bit", action="store_true", help="NF4 base, needs bitsandbytes")
    parser.add_argument("--compile", action="store_true", help="also train with torch.compile")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in importance and training")
    parser.add_argument("--losses", nargs="+", choices=list(FORGET_LOSSES), default=["npo", "ihl"])
    parser.add_argument("--rows", type=int, default=400, help="of each set")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--tokens", type=int, help="padded tokens in one forward pass (default: as `forget`)")
    parser.add_argument("--no-full", dest="full", action="store_false", help="leave out importance of all weights")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a small shape, few rows")
    a = parser.parse_args()
    if a.tiny:
        a.models, a.rows, a.epochs, a.tokens = ["tiny"], 32, 1, 1024
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a.tokens = pick_token_budget(a.tokens, device)
    rate = matrix_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: {rate / 1e12:.2f} T operations/s in matrix products", flush=True)
    results: dict[str, Any] = {"device": name, "torch": torch.__version__, "rate": rate, "four_bit": a.four_bit}
    results |= {"gradient_checkpointing": a.gradient_checkpointing, "tokens_per_pass": a.tokens}
    results |= {"rows": 2 * a.rows, "seed": 0}
    results["versions"] = {m.__name__: m.__version__ for m in (torch, transformers, peft, accelerate)}
    results["models"] = []
    for model in a.models:
        results["models"].append(measure_model(model, a, device, rate))
        if a.results:
            a.results.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
