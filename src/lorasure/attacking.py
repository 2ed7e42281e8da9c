"""`lorasure attack`: every attack on a run's model, and on a retrained one beside it; the results into a folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from . import artifacts, folders, lora
from .config import ForgetSettings
from .data.encode import resolved_template
from .data.load import DataSet, load_data
from .errors import DataError, NumericError, ResourceError
from .evaluate.attacks import ATTACKS, NotRun
from .evaluate.gate import Line, check, parse_gate, verdict
from .evaluate.settings import AttackSettings
from .evaluate.victim import AttackRows, Victim
from .evaluating import check_base, load_change, tokenizer_hash
from .finetuning import trainable
from .forward import base_of
from .models import dtype_name, fingerprint, load_model, load_tokenizer, pick_device, pick_dtype, pick_token_budget
from .outcome import ASSISTANT, change_files
from .progress import Reporter
from .registry import lookup
from .yaml_file import read_yaml

GATE_FAILED = 20  # exit code
MOVABLE = ("model", "forget", "retain")  # of the run: may be elsewhere now, but must be the same
NOT_IDENTITY = ("out", "overwrite", "resume", "json", "gate", "device", "tokens_per_batch", "retrained", *MOVABLE)


def attack(run: Path, settings: AttackSettings, reporter: Reporter | None = None) -> tuple[dict[str, Any], list[Line]]:
    """Attack the model that `run` made; returns what was done and the results, which are also in the attack folder.

    Results are one `Line` per attack, point and subject (`unlearned`, `retrained`), the unattacked models first.
    Weights are changed in memory only. Attacks that were interrupted go on with `resume`, each from its own beginning,
    and give the same results.
    """
    reporter = reporter or Reporter(quiet=True)
    chosen = chosen_attacks(settings.attacks)
    rules = parse_gate(settings.gate, chosen)
    run = run.resolve()
    out = Path(settings.out) if settings.out else run.with_name(f"{run.name}-attacks")
    reads = {"RUN": str(run), **folders.read_by(settings)}
    folders.check_new(out, settings.overwrite, settings.resume, reads, artifacts.ATTACK)
    artifacts.check_run(run, artifacts.CONFIG, artifacts.DATA, artifacts.SUMMARY, *change_files(run))
    bench = _Bench.of(run, settings)
    with reporter.held(), reporter.stage("load"):
        about = bench.about() | {"settings": settings.located() | {"out": str(out.absolute())}}
    options = {"resume": settings.resume, "overwrite": settings.overwrite, "note": reporter.note}
    with folders.resumable_folder(out, _identity(settings, about), **options) as folder:
        if bench.settings.quantize:
            reporter.note(
                f"The run's base was in 4 bits ({bench.settings.quantize}); attacks are on the whole weights."
            )
        lines, more = _all(bench.victims, chosen, folder, reporter)
        about |= more | {"titles": {name: ATTACKS[name].title for name in chosen}}
        about |= {"verdict": verdict(lines, bench.weights.parent.name), "gate": check(rules, lines, more["not_run"])}
        artifacts.write_json(folder / artifacts.ATTACK, about)
    return about, lines


def chosen_attacks(text: str) -> list[str]:
    """The attacks that --attacks names, in the order of ATTACKS; the unattacked model is always among them."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names != ["all"]:
        for name in names:
            lookup(ATTACKS, name, "attack in --attacks")
    return [name for name in ATTACKS if name == "none" or name in names or names == ["all"]]


@dataclass(frozen=True)
class _Bench:
    """A run's settings, data and tokenizer, as they were when it was made."""

    run: Path
    options: AttackSettings
    settings: ForgetSettings
    tokenizer: Any
    forget: DataSet
    retain: DataSet

    @classmethod
    def of(cls, run: Path, options: AttackSettings) -> _Bench:
        moved = {name: getattr(options, name) for name in MOVABLE if getattr(options, name)}
        with artifacts.as_written(run / artifacts.CONFIG):
            names = {f.name.rstrip("_") for f in fields(ForgetSettings)}
            given = read_yaml(run / artifacts.CONFIG).items()
            known = {name: value for name, value in given if name in names}  # a baseline has settings of its own
            settings = replace(ForgetSettings.from_dict(known), **moved)
        tokenizer = load_tokenizer(settings.model, settings.revision, allow_pickle=settings.allow_pickle)
        data = {name: load_data(getattr(settings, name), settings, tokenizer) for name in ("forget", "retain")}
        with artifacts.as_written(run / artifacts.DATA):
            stored = {name: about["sha256"] for name, about in artifacts.read_json(run / artifacts.DATA).items()}
        for name, part in data.items():
            if part.text_hash != stored.get(name):
                raise DataError(f"--{name} {part.source}: not the rows that {run} was made with.")
        return cls(run, options, settings, tokenizer, **data)

    @property
    def asked(self) -> str:
        """The --dtype of the arithmetic, that of the run unless given."""
        return self.options.dtype or self.settings.dtype

    @property
    def weights(self) -> Path:
        """The (first) file of what the run hands over."""
        return self.run / change_files(self.run)[0]

    @property
    def retrained(self) -> ForgetSettings | None:
        """The settings, with the retrained model for the base."""
        if self.options.retrained is None:
            return None
        return replace(self.settings, model=self.options.retrained, revision=None)

    @cached_property
    def victims(self) -> list[Victim]:
        """The run's model, and the retrained one if there is one. Each is loaded when it is needed."""
        if self.weights.parent.name == artifacts.MERGED:
            whole = replace(self.settings, model=str(self.weights.parent), revision=None)
            found = [self._victim("unlearned", whole, None)]
        else:
            found = [self._victim("unlearned", self.settings, self.weights.parent)]
        return found + ([self._victim("retrained", self.retrained, None)] if self.retrained else [])

    def _victim(self, name: str, settings: ForgetSettings, change: Path | None) -> Victim:
        o = self.options
        device = pick_device(o.device)

        def load(scale: float, dtype: str = self.asked) -> Any:
            options = {"revision": settings.revision, "allow_pickle": settings.allow_pickle}
            model = load_model(settings.model, dtype=pick_dtype(dtype, device), device=device, **options)
            changed = load_change(model, change, scale) if change else model
            return lora.merge(changed) if isinstance(changed, lora.PeftModel) else changed

        def load_trainable() -> Any:
            # Small updates vanish in half-precision weights, as in finetune: what the run was made in does not count.
            dtype = "float32" if o.relearn_rank is None and o.dtype in (None, "auto") else self.asked
            if o.relearn_rank and change and change.name == ASSISTANT:
                raise NotRun("a model with an assistant is relearnt with all weights only (no --relearn-rank)")
            return trainable(load(1.0, dtype), o.relearn_rank, 2.0 * (o.relearn_rank or 0), o.seed)

        budget = pick_token_budget(o.tokens_per_batch, device)
        rows = AttackRows.draw(self.forget.read.rows, self.retain.read.rows, o)
        return Victim(name, load, load_trainable, change is not None, self.tokenizer, settings, budget, rows, o)

    def about(self) -> dict[str, Any]:
        """attack.json as far as it is known before. Loads each model once, to see that it is the right one."""
        prints = {victim.name: self._fingerprint(victim) for victim in reversed(self.victims)}
        rows = self.victims[0].rows
        return {
            "kind": "attack",
            "run": str(self.run),
            "config": artifacts.sha256(self.run / artifacts.CONFIG),
            "adapter": {"source": str(self.weights.parent), "sha256": artifacts.sha256(self.weights)},
            "model": prints["unlearned"],
            "retrained": prints.get("retrained"),
            "template": resolved_template(self.settings.template, self.tokenizer)[0],
            "tokenizer": tokenizer_hash(self.tokenizer),
            "rows": {
                "forget": len(rows.forget),
                "sha256": self.forget.text_hash,
                "scored": list(rows.scored),
                "few": list(rows.few),
            },
            "dtype": dtype_name(pick_dtype(self.asked, pick_device(self.options.device))),
            "versions": artifacts.versions(),
        }

    def _fingerprint(self, victim: Victim) -> dict[str, Any]:
        s = victim.settings
        found = fingerprint(base_of(victim.plain.model), s.located()["model"])
        if victim.has_adapter:
            check_base(self.run, s.model, found)
            return found
        victim.release()
        own = load_tokenizer(s.model, s.revision, allow_pickle=s.allow_pickle)
        same = resolved_template(s.template, own)[0] == resolved_template(s.template, self.tokenizer)[0]
        if not same or tokenizer_hash(own) != tokenizer_hash(self.tokenizer):
            raise DataError(
                f"--retrained {s.model}: cannot be compared, its tokenizer or chat template is another one."
            )
        return found


def _identity(settings: AttackSettings, about: Mapping[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in settings.located().items() if key not in NOT_IDENTITY}
    own["dtype"] = about["dtype"]
    files = {name: about[name] and about[name]["files"] for name in ("model", "retrained")}
    return (
        own
        | files
        | {"adapter": about["adapter"]["sha256"], "config": about["config"], "data": about["rows"]["sha256"]}
    )


def _all(
    victims: Sequence[Victim], chosen: Sequence[str], folder: Path, reporter: Reporter
) -> tuple[list[Line], dict[str, Any]]:
    """Results of every attack on every victim, and `not_run` and `seconds`; what is in `folder` already is kept."""
    path = folder / artifacts.ATTACKS
    with artifacts.as_written(path):
        stored = path.read_text(encoding="utf-8") if path.is_file() else ""
        lines: list[Line] = [json.loads(line) for line in stored.splitlines()]
        seconds = dict(artifacts.read_json(folder / artifacts.ATTACK)["seconds"]) if lines else {}
        done = {(line["subject"], line["attack"]) for line in lines}
    not_run: list[Line] = []
    for victim in victims:
        for name in chosen:
            if (victim.name, name) in done:
                continue
            began = time.perf_counter()
            try:
                with reporter.stage(f"{victim.name}: {name}"):
                    points = ATTACKS[name].run(victim)
            except (NotRun, NumericError, ResourceError) as error:
                if name == "none":
                    raise
                not_run.append({"attack": name, "subject": victim.name, "reason": str(error).removesuffix(".")})
                reporter.note(f"{victim.name}: {name} was not run: {error}")
                continue
            for point, scores in points.items():
                plain = {key: score.to_json() for key, score in scores.items()}
                where = {"attack": name, "point": point, "unit": ATTACKS[name].unit, "subject": victim.name}
                lines.append(where | {"scores": plain})
            seconds[f"{victim.name} {name}"] = time.perf_counter() - began
            artifacts.write_json(folder / artifacts.ATTACK, {"seconds": seconds})
            artifacts.write_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
        victim.release()
    return lines, {"not_run": not_run, "seconds": seconds}
