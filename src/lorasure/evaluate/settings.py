"""Settings of the commands that evaluate; as in config.py, flags and help texts are made from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import (
    ExportSettings,
    ImportanceSettings,
    InitSettings,
    ModelSettings,
    OutSettings,
    Settings,
    TrainSettings,
    option,
    required,
)


@dataclass(frozen=True, kw_only=True)
class JsonSettings(Settings):
    """How to print."""

    json: bool = option(False, "print one JSON object on standard output: score name -> value, n, low, high, ...")


@dataclass(frozen=True, kw_only=True)
class SuiteSettings(JsonSettings, ModelSettings):
    """What to evaluate on."""

    adapter: str | None = option(None, "a run folder, or the folder of a PEFT adapter", path=True)
    suite: str = option("own", "tofu, muse, wmdp, or own: the files of --forget and --retain")
    data: str | None = option(None, "the suite's data: a folder or hub id (default: its home on the hub)", path=True)
    split: str | None = option(None, "part of the suite: tofu: forget01, forget05 or forget10; muse: news or books")
    forget: str | None = option(None, "own: the rows to forget, any format of `lorasure forget`", path=True)
    retain: str | None = option(None, "own: rows to keep", path=True)
    holdout: str | None = option(
        None, "own: rows of the same kind that no model has seen, for membership inference", path=True
    )
    gradient_norm: bool = option(
        False, "own: with --holdout, attack by the gradient's norm too: a backward pass through all weights per row"
    )
    max_rows: int = option(
        300,
        "rows of a set at most; 300 is TOFU's own cap, 0 takes all, as the published figures of WMDP and MMLU need",
        low=0,
    )
    generate: bool = option(True, "let the model answer in its own words as well (ROUGE, refusals); takes longest")
    new_tokens: int = option(200, "tokens that a generated answer may have", low=1)
    keep_text: bool = option(False, "store questions, answers and the model's answers beside the numbers")
    reference: str | None = option(
        None, "the same evaluation (folder or log) of a model trained without the forget set", path=True
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(SuiteSettings):
    """All settings of `lorasure evaluate`."""

    out: str = required("the evaluation folder to make")
    overwrite: bool = option(False, "replace the earlier evaluation in --out, once the new one is complete")
    resume: bool = option(False, "go on with an evaluation that was interrupted")


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(JsonSettings):
    """All settings of `lorasure score`."""

    reference: str | None = option(
        None, "the same evaluation (folder or log) of a model trained without the forget set", path=True
    )
    write_log: str | None = option(None, "also write the scores as an open-unlearning *_EVAL.json file", path=True)
    overwrite: bool = option(False, "replace the file --write-log")


@dataclass(frozen=True, kw_only=True)
class AttackSettings(JsonSettings):
    """All settings of `lorasure attack`."""

    attacks: str = option(
        "all",
        "comma-separated: prefix, paraphrase, few-shot, prefill, sample, scale, quantise, nf4, relearn, relearn-few",
    )
    rows: int = option(
        100, "rows of the forget set to measure on, drawn at random: n = 100 gives +-0.1 at worst", low=2
    )
    retrained: str | None = option(
        None,
        "a model trained without the forget set, attacked in the same way: the difference is the finding",
        path=True,
    )
    gate: str = option(
        "",
        "comma-separated SCORE<=VALUE for the worst attack but scale, or ATTACK:SCORE<=VALUE; exit code 20 if one is "
        "exceeded or cannot be checked",
    )
    relearn_lr: float = option(2e-5, "learning rate of relearning; small models and LoRA need more", above=0)
    relearn_rank: int | None = option(
        None, "relearn with a LoRA adapter of this rank, for less memory (default: all weights, in float32)", low=1
    )
    generate_rows: int = option(20, "of --rows, those that the model answers in its own words (ROUGE); 0: none", low=0)
    new_tokens: int = option(64, "tokens that a generated answer may have", low=1)
    samples: int = option(8, "sample: answers per row, of which the worst counts", low=1)
    model: str | None = option(None, "the run's base model, if it is elsewhere now", path=True)
    forget: str | None = option(None, "the run's forget set, if it is elsewhere now", path=True)
    retain: str | None = option(None, "the run's retain set, if it is elsewhere now", path=True)
    dtype: str | None = option(None, "float32, bfloat16, float16 or auto (default: as in the run)")
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto: the accelerator if there is one")
    tokens_per_batch: int | None = option(
        None, "padded tokens in one forward pass; memory and speed, not the result (default: by device)", low=1
    )
    seed: int = option(0, "seed of the rows, of sampling and of the order of relearning", low=0)
    out: str | None = option(None, "the folder to make (default: beside the run, its name and -attacks)", path=True)
    overwrite: bool = option(False, "replace the earlier attacks in --out, once the new ones are complete")
    resume: bool = option(False, "go on with attacks that were interrupted")


@dataclass(frozen=True, kw_only=True)
class ProbeSettings(JsonSettings, ModelSettings):
    """All settings of `lorasure probe`."""

    text: str = required("what the model may know, any format of `lorasure forget --forget`")
    control: str | None = option(
        None, "rows of the same kind that it cannot know (default: the text with its answers exchanged)", path=True
    )
    rows: int = option(400, "examples to look at, drawn at random; more give narrower intervals", low=1)


@dataclass(frozen=True, kw_only=True)
class SequenceSettings(
    JsonSettings, OutSettings, ExportSettings, TrainSettings, InitSettings, ImportanceSettings, ModelSettings
):
    """All settings of `lorasure sequence`."""

    out: str = required("folder for the ledger and the runs; requests whose run is there are not applied again")
    retain: str | None = option(None, "rows to keep, at every request (--protocol: default raw/retain1)", path=True)
    protocol: str | None = option(
        None, "MUSE's data instead of requests: sust, one after another, or scal, growing, each from the original model"
    )
    reference: str | None = option(
        None, "--protocol: a MUSE evaluation of a model trained without the forget set, for PrivLeak", path=True
    )
