"""Every setting, once: a frozen dataclass per stage. Flags, YAML keys and help texts are made from these fields.

Imports nothing heavy. Names of registry entries appear in the help texts; a test compares them with the registries.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import UsageError

AUTO = "auto"  # of --lr and --stop
UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # a name that is not UTF-8 arrives with surrogates in it


def option(
    default: Any,
    text: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    path: bool = False,
) -> Any:
    """A field with a help text and bounds: low <= value <= high, above < value. `path`: may name a local file."""
    return field(default=default, metadata={"help": text, "low": low, "above": above, "high": high, "path": path})


def required(text: str) -> Any:
    """A field that the user must give. All of them name a file, a folder or something on the hub."""
    return field(metadata={"help": text, "path": True})


def flag(name: str) -> str:
    """The flag of a field. `lambda` is a Python keyword, so its field is called `lambda_`."""
    return "--" + name.rstrip("_").replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings: checks the bounds of every field."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value, meta = getattr(self, f.name), f.metadata
            if (value == "" and meta.get("path")) or (value is None and not str(f.type).endswith("None")):
                wanted = "name a file or folder" if meta.get("path") else "have a value"
                raise UsageError(f"{flag(f.name)} must {wanted}, got nothing.")
            if isinstance(value, str) and UNWRITABLE.search(value):
                raise UsageError(f"{flag(f.name)} holds a NUL or a byte that is not UTF-8, which no file can record.")
            if isinstance(value, str | Path) and meta.get("path"):  # a shell resolves `~` in flags; in YAML nobody does
                object.__setattr__(self, f.name, os.path.expanduser(value))
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            low, above, high = meta.get("low"), meta.get("above"), meta.get("high")
            if not math.isfinite(value):
                raise UsageError(f"{flag(f.name)} must be a finite number, got {value}.")
            if low is not None and value < low:
                raise UsageError(f"{flag(f.name)} must be at least {low}, got {value}.")
            if above is not None and value <= above:
                raise UsageError(f"{flag(f.name)} must be above {above}, got {value}.")
            if high is not None and value > high:
                raise UsageError(f"{flag(f.name)} must be at most {high}, got {value}.")

    def to_dict(self) -> dict[str, Any]:
        """Settings under their public names, ready for YAML."""
        return {name.rstrip("_"): value for name, value in asdict(self).items()}

    def located(self) -> dict[str, Any]:
        """`to_dict` with local paths made absolute, so that it means the same from everywhere. A hub id stays."""
        found = self.to_dict()
        for f in fields(self):
            value = getattr(self, f.name)
            if f.metadata.get("path") and value is not None:
                path = Path(value)
                found[f.name] = str(path.absolute()) if f.name == "out" or path.exists() else value
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Any:
        """Settings from public names. Unknown names are an error."""
        names = {f.name.rstrip("_"): f.name for f in fields(cls)}
        unknown = [name for name in values if name not in names]
        if unknown:
            raise UsageError(f"Unknown setting '{unknown[0]}'. Choose from: {', '.join(names)}.")
        return cls(**{names[name]: value for name, value in values.items()})


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Which model, and how text becomes tokens."""

    model: str = required("the base model: a folder or a hub id; its files are never changed")
    revision: str | None = option(None, "branch, tag or commit of a hub model")
    allow_pickle: bool = option(False, "read the tensors of pickled weights (*.bin) where there are no safetensors")
    dtype: str = option("auto", "float32, bfloat16, float16, or auto: bfloat16 on a GPU, float32 on a CPU")
    quantize: str | None = option(
        None, "nf4: hold the base's linear layers in 4 bits (bitsandbytes); --dtype is then that of the arithmetic"
    )
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto: the accelerator if there is one")
    template: str = option(
        "auto",
        "how a question becomes a prompt: auto (the model's chat template, else qa), qa, chat, tofu-phi, tofu-llama2, "
        "or your own text with {question} in it (\\n is a new line)",
    )
    max_length: int = option(512, "most tokens of an example, or all a model takes; the rest is cut and counted", low=2)
    stride: int | None = option(None, "new tokens per window of plain text (default: half of --max-length)", low=1)
    tokens_per_batch: int | None = option(
        None,
        "padded tokens in one pass: memory and speed, not the result (default: 448 or more on a CPU, 8192 elsewhere)",
        low=1,
    )
    prompt_key: str | None = option(None, "column with the question or prompt (default: recognised by its name)")
    answer_key: str | None = option(None, "column with the answer or completion (default: recognised by its name)")
    text_key: str | None = option(None, "column with plain text (default: recognised by its name)")
    group_key: str | None = option(None, "column that groups rows, for --pairing modular (default: group)")
    seed: int = option(0, "seed of everything random", low=0)


@dataclass(frozen=True, kw_only=True)
class DataSettings(ModelSettings):
    """What to forget and what to keep."""

    forget: str = required("the text that must go: JSONL, JSON, CSV, Parquet, plain text, or a hub data set id")
    retain: str = required("text that must stay, same formats")


@dataclass(frozen=True, kw_only=True)
class SiteSettings(Settings):
    """Which layers may get an adapter."""

    targets: str = option(
        "all", "layers to adapt, comma-separated globs such as q_proj,*.mlp.*; all: every linear layer"
    )
    exclude: str = option("", "layers to leave out, same form")


@dataclass(frozen=True, kw_only=True)
class ImportanceSettings(SiteSettings):
    """How to measure which weights carry the forget set."""

    init: str = option(
        "contrast", "how the adapter starts: contrast, lora, pissa, fila, vila, expila, absila, sketch, reglu or inputs"
    )
    rank: int = option(8, "rank of the adapter", low=1)
    alpha: float = option(16.0, "scaling of the adapter is alpha / rank", above=0)
    score: str | None = option(None, "importance: fisher, variance, expectation or absolute (default: that of --init)")
    space: str | None = option(None, "gradients of: full, lora or sketch (default: that of --init)")
    probe_rank: int | None = option(None, "rank of the random probe in lora and sketch space (default: --rank)", low=1)
    sigma: float = option(0.05, "standard deviation of the probe in lora space", above=0)
    retain_rows: int | None = option(
        None, "retain rows to measure on, drawn without replacement (default: as many as forget rows)", low=1
    )
    compat: str | None = option(None, "paper-code: the public scripts' importance (their start: --split published)")
    importance: str | None = option(
        None, "reuse the importance of this earlier run (same model, data and settings)", path=True
    )


@dataclass(frozen=True, kw_only=True)
class InitSettings(Settings):
    """How importance becomes the adapter's start."""

    solver: str = option("rows", "weighted low-rank solver: rows, rows-and-columns or elementwise")
    split: str | None = option(
        None, "how the start is split into B and A: balanced or published (default: that of --init)"
    )
    coverage: float = option(1.0, "share of the layers to adapt, the most important first", above=0, high=1)
    balance: float = option(
        0.7, "reglu, inputs, contrast: weight of the retain set against the forget set", low=0, high=1
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """AdamW, its schedule, and what a step is."""

    lr: float | str = option(
        AUTO, "learning rate; auto: found by a short calibration on the forget and retain rows", above=0
    )
    epochs: int = option(5, "passes over the rows to forget (finetune: to learn)", low=1)
    batch_size: int = option(
        32, "rows to forget (finetune: to learn) per step; as many retain rows come with them", low=1
    )
    schedule: str = option("linear", "learning rate: linear, cosine or constant, after the warm-up")
    warmup: float = option(0.2, "share of the steps that warm up", low=0, high=1)
    weight_decay: float = option(0.01, "AdamW's weight decay", low=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", above=0)
    gradient_checkpointing: bool | None = option(None, "recompute activations (default: on a GPU short of memory)")
    compile: bool = option(False, "torch.compile for the layers: pays on a GPU in all but short runs")
    max_grad_growth: float = option(
        1000.0, "stop when the gradient's norm is clipped and this many times the largest of all steps before", above=1
    )
    checkpoint_every: int | None = option(
        None, "steps between checkpoints; 0: only when interrupted (default: a minute, at most 2 % of the time)", low=0
    )

    def __post_init__(self) -> None:
        if isinstance(self.lr, str) and self.lr != AUTO:  # YAML reads 3e-4 as text, which is a number all the same
            try:
                object.__setattr__(self, "lr", float(self.lr))
            except ValueError:
                raise UsageError(f"--lr must be a number or {AUTO}, got '{self.lr}'.") from None
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class TrainSettings(OptimizerSettings):
    """How the adapter learns to forget."""

    loss: str = option("bga", "forget loss: ga, gd, kl, bga, bigram, npo, simnpo, ihl, dpo, idk or catnip")
    retain_loss: str | None = option(None, "retain loss: nll, kl or none (default: the one that goes with --loss)")
    lambda_: float = option(1.0, "weight of the retain loss", low=0)
    beta: float | None = option(
        None, "beta of bga, bigram, npo, simnpo, dpo, catnip (default: the loss's own)", above=0
    )
    delta: float | None = option(None, "margin of bga, bigram, simnpo in nats per token (default: the loss's own)")
    max_retain_rise: float | None = option(
        None, "stop when the retain loss has risen by this (default: ln(vocabulary), from certain to guessing)", above=0
    )
    min_utility: float | None = option(
        None,
        "share of the retain probability to keep: measure it after every epoch, hand over the last state that keeps it",
        above=0,
        high=1,
    )
    stop: str | None = option(
        None, "auto: leave the forget loss out while forget rows look like text that the model never saw (--unseen)"
    )
    unseen: str | None = option(
        None,
        "for --stop auto: text like the forget rows that the model never saw (default: their perturbed_answer)",
        path=True,
    )
    pairing: str = option("random", "which retain row meets a forget row: random, cyclic or modular (same group)")


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Settings):
    """What to hand over."""

    export_rank: int | None = option(None, "compress to this rank (default: exact, at most twice --rank)", low=1)
    export_scale: float = option(1.0, "share of what was trained to hand over; harm goes first", above=0, high=2)
    merge: bool = option(False, "also write the merged model")


@dataclass(frozen=True, kw_only=True)
class OutSettings(Settings):
    """Where to."""

    out: str = required("the run folder to make")
    overwrite: bool = option(False, "replace the earlier run in --out, once the new one is complete")
    resume: bool = option(False, "continue what was interrupted, with the same settings, data and model")
    allow_change: str = option("", "with --resume: comma-separated names that may differ now; recorded in the run")


PER_CALL = {"overwrite", "resume", "allow_change", "checkpoint_every"}  # say how to run, not what: never stored


@dataclass(frozen=True, kw_only=True)
class ForgetSettings(OutSettings, ExportSettings, TrainSettings, InitSettings, ImportanceSettings, DataSettings):
    """All settings of `lorasure forget`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compat not in (None, "paper-code"):
            raise UsageError(f"--compat must be paper-code, got '{self.compat}'.")


@dataclass(frozen=True, kw_only=True)
class PlanSettings(ForgetSettings):
    """All settings of `lorasure plan`."""

    out: str = option("runs/planned", "as for `forget`; a plan writes nothing", path=True)
    json: bool = option(False, "print one JSON object on standard output")


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(OutSettings, OptimizerSettings, ModelSettings):
    """All settings of `lorasure finetune`."""

    data: str = required("rows to learn, same formats as --forget")
    rank: int | None = option(None, "train a LoRA adapter of this rank and merge it (default: all weights)", low=1)
    alpha: float = option(16.0, "scaling of the adapter is alpha / rank", above=0)
    lr: float = option(1e-5, "learning rate; small models and LoRA need more", above=0)


@dataclass(frozen=True, kw_only=True)
class DemoSettings(Settings):
    """All settings of `lorasure demo`."""

    out: str = option("runs/demo", "folder for the models, data and run that the demo makes", path=True)
    overwrite: bool = option(True, "replace what an earlier demo left there")
    seed: int = option(0, "seed of everything random", low=0)
