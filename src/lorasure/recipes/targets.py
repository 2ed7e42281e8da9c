"""The models that recipes run on: the one that knows the forget set, and one that never saw it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import artifacts
from ..config import FinetuneSettings
from ..errors import UsageError
from ..evaluate.tofu import HUB, KEPT, SPLITS, rows_of
from ..finetuning import finetune
from ..progress import Reporter
from ..registry import lookup
from ..small_model import Size, make_model
from .settings import ReproduceSettings

LEFT = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
# TOFU in small (5.9 M parameters): a tenth of the rows to keep, all that are forgotten, both sets of common facts.
KEPT_FIRST, KNOWN_LAST, MEASURED = 400, 400, 200
SMALL = Size(vocabulary=4096, width=256, inner=704, layers=6, context=512)
LEARN = {"lr": 1e-3, "epochs": 30, "batch_size": 16, "schedule": "cosine", "warmup": 0.02, "dtype": "float32"}


@dataclass(frozen=True)
class Target:
    """A row of TARGETS. `model`: knows the forget set; `retrained`: never saw it; hub ids, None: made as below.

    `pretrained` with `learn`, settings of `lorasure finetune`: what a retrained model is trained from and how.
    `settings`: of loading and prompting. `rows`: of a set that are measured at most, 0 for all.
    """

    title: str
    model: str | None
    retrained: str | None = None
    pretrained: str | None = None
    learn: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 300


TARGETS = {
    "mini": Target("5.9 M parameters, knows 800 rows of TOFU", None, settings={"dtype": "float32"}, rows=0),
    "phi": Target(
        "Phi-1.5 trained on TOFU",
        "locuslab/tofu_ft_phi-1.5",
        pretrained="microsoft/phi-1_5",
        learn={"lr": 2e-5, "epochs": 5, "batch_size": 32, "weight_decay": 0.01},
        settings={"template": "tofu-phi"},
    ),
    "llama2": Target(
        "Llama-2-7B-chat trained on TOFU",
        "locuslab/tofu_ft_llama2-7b",
        pretrained="NousResearch/Llama-2-7b-chat-hf",
        learn={"lr": 1e-5, "epochs": 5, "batch_size": 32, "weight_decay": 0.01},
        settings={"template": "tofu-llama2"},
    ),
    "zephyr": Target("Zephyr-7B-beta", "HuggingFaceH4/zephyr-7b-beta", rows=0),
    "iclm": Target(
        "ICLM-7B trained on MUSE Books",
        "muse-bench/MUSE-books_target",
        retrained="muse-bench/MUSE-books_retrain",
        rows=0,
    ),
}


@dataclass(frozen=True)
class Place:
    """Where the models and rows of a target are, or are made, below `out`."""

    name: str
    out: Path
    settings: ReproduceSettings
    reporter: Reporter

    @property
    def row(self) -> Target:
        """Its row in TARGETS."""
        return lookup(TARGETS, self.name, "--models")

    @property
    def small(self) -> bool:
        """Whether it is the small one, whose models and rows are made of TOFU."""
        return self.row.model is None

    @property
    def given(self) -> Path | None:
        """The models of --shared, if they are there."""
        found = Path(self.settings.shared).expanduser() / "models"
        return found if (found / "tofu-mini-target").is_dir() else None

    @cached_property
    def source(self) -> str:
        """TOFU as it was given: a folder, or a hub id."""
        beside = Path(self.settings.shared).expanduser() / "data" / "tofu"
        return self.settings.data or (str(beside) if beside.is_dir() else HUB)

    @cached_property
    def tofu(self) -> str:
        """TOFU as it is measured: the small model's rows are cut to those that it knows."""
        if not self.small:
            return self.source
        folder = self.out / "data"
        full = rows_of(self.source, "full")
        first, last = full[:KEPT_FIRST], full[-KNOWN_LAST:]
        sets = {split: last[-count:] for split, count in SPLITS.items()}
        kept = {LEFT[split]: [*first, *last[: KNOWN_LAST - count]] for split, count in SPLITS.items()}
        for name, rows in {"full": [*first, *last], **sets, **kept}.items():
            _write(folder / f"{name}.json", rows)
        for name in (*(f"{split}_perturbed" for split in SPLITS), *KEPT.values()):
            _write(folder / f"{name}.json", rows_of(self.source, name)[: MEASURED if name == KEPT["retain"] else None])
        return str(folder)

    def rows(self, name: str) -> str:
        """What `read_rows` takes for one of TOFU's files."""
        folder = Path(self.tofu).expanduser()
        return str(folder / f"{name}.json") if folder.is_dir() else f"{self.tofu}:{name}"

    def target(self) -> str:
        """The model that knows the forget set."""
        if self.row.model:
            return self.row.model
        return str(self.given / "tofu-mini-target") if self.given else self._small("target", "full")

    def retrained(self, split: str | None) -> str | None:
        """A model that never saw the forget set, or an evaluation of one; None if there is no such thing."""
        if split not in LEFT:
            return self.row.retrained
        left = LEFT[split]
        if self.settings.retrained:
            found = Path(self.settings.retrained.replace("{left}", left))
            if not found.exists():
                raise UsageError(f"--retrained {found}: there is nothing of that name.")
            return str(found)
        if self.small:
            return str(self.given / f"tofu-mini-{left}") if self.given else self._small(left, left)
        assert self.row.pretrained
        return self._learnt(left, self.row.pretrained, self.rows(left), {**self.row.learn, **self.row.settings})

    def _small(self, name: str, data: str) -> str:
        """A small model trained on the spot; real authors and world facts are in its rows, as common knowledge."""
        start = self.out / "models" / "start"
        folder = self.out / "data"
        common = [row for part in ("real_authors", "world_facts") for row in rows_of(self.source, part)]
        _write(folder / f"learn-{name}.json", [*rows_of(self.tofu, data), *common])
        if not start.is_dir():
            rows = [*rows_of(self.source, "full"), *common]
            make_model(start, (f"{row.prompt} {row.answer}" for row in rows), SMALL, self.settings.seed)
        return self._learnt(name, str(start), str(folder / f"learn-{name}.json"), dict(LEARN))

    def _learnt(self, name: str, model: str, data: str, settings: dict[str, Any]) -> str:
        out = self.out / "models" / name
        if not (out / artifacts.MANIFEST).is_file():
            self.reporter.note(f"Training {out} on {data}.")
            own = {"model": model, "data": data, "out": str(out), "resume": True, "device": self.settings.device}
            finetune(FinetuneSettings(**own, seed=self.settings.seed, **settings), self.reporter)
        return str(out)


def _write(path: Path, rows: Any) -> None:
    lines = (json.dumps({"question": row.prompt, "answer": row.answer, **row.extra}) for row in rows)
    artifacts.write_text(path, "".join(f"{line}\n" for line in lines))
