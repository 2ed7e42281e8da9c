"""What all stages of one command share: the checked settings, the data, and the base model, loaded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import artifacts, lora, processes
from .config import AUTO, ForgetSettings, flag
from .data.encode import QUESTION, TEMPLATES, refusal_rows
from .data.examples import Example
from .data.load import DataSet, encode_rows, load_data, load_unseen
from .data.pairing import PAIRINGS, sample
from .data.readers import check_disjoint
from .errors import UsageError
from .importance.collect import Probe
from .importance.paper_code import check_published
from .importance.scores import SCORES, SPACES, check_pair
from .init.apply import INITS, Init, Request, check_rank
from .init.low_rank import SOLVERS, SPLITS
from .losses.bigrams import Bigrams
from .losses.forget import FORGET_LOSSES, LossFunction, bind, needs
from .losses.retain import RETAIN_LOSSES
from .memory import Result, note_guard, within_memory
from .model_files import check_model_folder
from .models import (
    check_quantize,
    dtype_name,
    fingerprint,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    pick_token_budget,
)
from .objective import ForgetObjective, ForgetSteps
from .progress import Reporter
from .registry import lookup
from .schedule import SCHEDULES
from .sites import Site, find_sites


class Workbench:
    """Settings checked, data read and model loaded, each when first needed. Raises before anything is written."""

    def __init__(self, settings: ForgetSettings, reporter: Reporter | None = None) -> None:
        self.settings = settings
        self.reporter = (reporter or Reporter(quiet=True)).of_own()
        check_names(settings)
        check_model_folder(settings.model, settings.allow_pickle)
        self.device = pick_device(settings.device)
        self.dtype = pick_dtype(settings.dtype, self.device)
        self.token_budget = pick_token_budget(settings.tokens_per_batch, self.device)
        self.checkpointing = bool(settings.gradient_checkpointing)
        self.run: Path | None = None

    def prepare(self) -> None:
        """Read the data and load the model now: everything that can be wrong with the input shows here, on one line."""
        s = self.settings
        with self.reporter.held():
            _ = self.data, self.unseen, self.sites, self.fingerprint
            ForgetSteps(self.objective(), epochs=1, batch_size=1, pairing=s.pairing, seed=s.seed).order(0)

    def fired(self, guard: dict[str, Any]) -> None:
        """Say that a guard has acted, and add it to the run's summary at once."""
        note_guard(self.reporter, self.run and self.run / artifacts.SUMMARY, guard)

    def within_memory(self, attempt: Callable[..., Result], examples: Sequence[Example], what: str) -> Result:
        """`attempt(token_budget=...)` over examples, in smaller passes when memory runs out."""
        lengths = [len(e) for e in examples]
        return within_memory(lambda n: attempt(token_budget=n), self.token_budget, lengths, what, self.fired)[0]

    @property
    def init(self) -> Init:
        """The row of INITS."""
        return INITS[self.settings.init]

    @property
    def score(self) -> str | None:
        """The score to use: the user's, else the initialisation's own."""
        return self.settings.score or self.init.score

    @property
    def probe(self) -> Probe:
        """How gradients are measured."""
        s = self.settings
        space = s.space or self.init.space or "lora"
        return Probe(space, s.probe_rank or s.rank, s.sigma, s.alpha / s.rank, s.seed)

    @property
    def measures_importance(self) -> bool:
        """Importance is needed for the start itself or to rank layers."""
        return self.init.evidence == "importance" or self.settings.coverage < 1

    @property
    def request(self) -> Request:
        """What is wanted of a start."""
        s = self.settings
        return Request(s.rank, s.alpha / s.rank, s.solver, s.balance, s.compat is not None, s.seed)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer."""
        return load_tokenizer(self.settings.model, self.settings.revision, allow_pickle=self.settings.allow_pickle)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base, loaded once."""
        with self.reporter.stage("load model"):
            return self.fresh_model()

    def borrow(self, other: Workbench) -> None:
        """Use the model, tokenizer and data that another workbench of the same model and data settings has loaded."""
        self.__dict__.update({name: getattr(other, name) for name in ("model", "tokenizer", "data", "fingerprint")})

    def release_model(self) -> None:
        """Give the loaded model's memory back; `model` would load it again."""
        self.__dict__.pop("model", None)

    def fresh_model(self) -> PreTrainedModel:
        """The base, read anew from its files."""
        s = self.settings
        options = {"revision": s.revision, "allow_pickle": s.allow_pickle, "quantize": s.quantize}
        return load_model(s.model, dtype=self.dtype, device=self.device, **options)

    @cached_property
    def sites(self) -> list[Site]:
        """The layers that --targets and --exclude leave, each large enough for --rank."""
        found = self.sites_of(self.model)
        check_rank(found, self.settings.rank)
        lora.check_fits(self.model, found)
        return found

    def sites_of(self, model: PreTrainedModel) -> list[Site]:
        """Those layers of any model that --targets and --exclude leave."""
        return find_sites(model, _patterns(self.settings.targets), _patterns(self.settings.exclude))

    @cached_property
    def data(self) -> tuple[DataSet, DataSet]:
        """(forget, retain), checked to have no row in common."""
        with self.reporter.stage("read data"):
            s = self.settings
            forget, retain = (load_data(source, s, self.tokenizer) for source in (s.forget, s.retain))
            check_disjoint(forget.read.rows, retain.read.rows)
        for name, part in (("forget", forget), ("retain", retain)):
            for line in part.notes(name):
                self.reporter.note(line)
        return forget, retain

    @cached_property
    def unseen(self) -> DataSet | None:
        """Text that --stop auto takes its level from: the rows of --unseen, or the forget rows with wrong answers."""
        s = self.settings
        return None if s.stop is None else load_unseen(s.unseen, self.data[0], s, self.tokenizer)

    @property
    def measured_retain(self) -> list[Example]:
        """The retain examples that importance and activations are measured on, seeded."""
        forget, retain = (part.examples for part in self.data)
        count = min(len(retain), self.settings.retain_rows or len(forget))
        return [retain[i] for i in sample(len(retain), count, self.settings.seed)]

    @property
    def scored_retain(self) -> list[Example]:
        """The retain examples whose probability is reported, seeded: as many as forget rows, but 100 at least."""
        forget, retain = (part.examples for part in self.data)
        return [retain[i] for i in sample(len(retain), min(len(retain), max(100, len(forget))), self.settings.seed + 1)]

    def about(self) -> dict[str, Any]:
        """Fingerprints of model and data: what importance depends on."""
        forget, retain = self.data
        return {
            "model": {k: v for k, v in self.fingerprint.items() if k != "source"},
            "forget": forget.text_hash,
            "retain": retain.text_hash,
            "retain rows": len(self.measured_retain),
            "template": forget.encoded.template,
            "max length": forget.encoded.most,
            "stride": self.settings.stride or forget.encoded.most // 2,
            "dtype": dtype_name(self.dtype),
        }

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Which model this is."""
        return fingerprint(self.model, self.settings.located()["model"])

    @cached_property
    def bigrams(self) -> Bigrams:
        """Of the retain answers."""
        return Bigrams.of(self.data[1].examples, self.model.config.get_text_config().vocab_size, self.device)

    @cached_property
    def refusals(self) -> Sequence[Example]:
        """The forget rows with an answer that says nothing."""
        rows = refusal_rows(self.data[0].read.rows, seed=self.settings.seed)
        return encode_rows(rows, self.settings, self.tokenizer).examples

    def objective(self, *, bigrams: bool = True) -> ForgetObjective:
        """The forget and retain loss over the data, with what the forget loss wants besides.

        `bigrams` False: without these, for who asks about its steps alone; to know the vocabulary the model is loaded.
        """
        forget, retain = self.data
        function, retain_function = loss_functions(self.settings)
        found = self.bigrams if bigrams and "bigrams" in needs(function) else None
        refusals = self.refusals if "refusals" in needs(function) else ()
        return ForgetObjective(forget.examples, retain.examples, refusals, function, retain_function, found)


def _patterns(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def loss_functions(settings: ForgetSettings) -> tuple[LossFunction, LossFunction | None]:
    """The forget loss with its settings bound, and the retain loss (None for none)."""
    row = lookup(FORGET_LOSSES, settings.loss, "--loss")
    retain = lookup(RETAIN_LOSSES, settings.retain_loss or row.retain, "--retain-loss")
    return bind(settings.loss, row.function, {"beta": settings.beta, "delta": settings.delta}), retain.function


def check_template(template: str) -> None:
    """A name in TEMPLATES, or the user's own text."""
    if QUESTION not in template:
        lookup(TEMPLATES, template, "--template")


def check_names(settings: ForgetSettings) -> None:
    """Every name in the settings is one we know, and they go together. Raises UsageError."""
    init = lookup(INITS, settings.init, "--init")
    _, retain_loss = loss_functions(settings)
    for table, name, what in (
        (SCORES, settings.score, "--score"),
        (SPACES, settings.space, "--space"),
        (SPLITS, settings.split, "--split"),
        (SOLVERS, settings.solver, "--solver"),
        (PAIRINGS, settings.pairing, "--pairing"),
        (SCHEDULES, settings.schedule, "--schedule"),
    ):
        if name is not None:
            lookup(table, name, what)
    if settings.stop not in (None, AUTO):
        raise UsageError(f"--stop must be {AUTO}, or not be given, got '{settings.stop}'.")
    if settings.unseen and not settings.stop:
        raise UsageError("--unseen is for --stop auto.")
    for name in ("stop", "max_retain_rise"):
        if retain_loss is None and getattr(settings, name) is not None:
            raise UsageError(f"{flag(name)} goes by the retain loss, and there is none; add --retain-loss nll.")
    check_template(settings.template)
    check_quantize(settings.quantize)
    if settings.quantize and settings.merge:
        raise UsageError(
            f"Merged weights (--merge, sequence) cannot be made of a base in 4 bits (--quantize {settings.quantize})."
        )
    if settings.merge and processes.sharded():
        raise UsageError("--merge needs the base as a whole: run `lorasure export RUN --merge` in one process.")
    score, space = settings.score or init.score, settings.space or init.space
    if score and space:
        check_pair(score, space)
    if settings.compat:
        if not (score and space):
            raise UsageError(f"--compat paper-code is about importance, which --init {settings.init} does not measure.")
        check_published(score, space)
        if settings.solver != "rows":
            raise UsageError(f"--compat paper-code solves by rows; --solver {settings.solver} does not go with it.")
    exact = settings.rank * (2 if init.compensated else 1)
    if settings.export_rank and settings.export_rank > exact:
        raise UsageError(f"--export-rank must be in [1, {exact}] (the exact rank), got {settings.export_rank}.")
    if settings.coverage < 1 and not (score and space):
        raise UsageError(
            f"--coverage below 1 ranks layers by importance, which --init {settings.init} does not measure; "
            "add for example --score variance --space lora."
        )


def ignored(settings: ForgetSettings) -> dict[str, Any]:
    """What was asked for and the start makes no use of, with the values that ask for nothing."""
    s, init = settings, INITS[settings.init]
    unused = {
        "importance": s.importance is not None and init.evidence != "importance" and s.coverage == 1,
        "solver": s.solver != ForgetSettings.solver and init.evidence != "importance",
        "split": s.split not in (None, init.split) and not init.compensated,
    }
    return {name: getattr(ForgetSettings, name) for name, found in unused.items() if found}


def check_used(settings: ForgetSettings) -> None:
    """Refuse what the start of a new run would ignore: the run would record it as if it had been used."""
    for name, nothing in ignored(settings).items():
        users = [init for init in INITS if name not in ignored(replace(settings, init=init))]
        more = ", --coverage below 1" if name == "importance" else ""
        raise UsageError(
            f"--{name} {getattr(settings, name)}: --init {settings.init} makes no use of it; choose --init "
            f"{', '.join(users)}{more}, or leave it out (--{name} {nothing or 'null'})."
        )
