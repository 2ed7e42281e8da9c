"""TOFU (arXiv 2401.06121): its four sets, their scores, and the utility and forget quality made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from ..data.examples import Row
from ..data.readers import read_rows
from ..registry import lookup
from .behaviour import perplexity
from .evaluation import Evaluation
from .items import EvaluationSet, Generation
from .metrics import (
    Score,
    exact_memorisation,
    extraction_strength,
    forget_quality,
    mean_score,
    model_utility,
    normalised_probability,
    probability,
    truth_preference,
    truth_ratio,
    truth_ratio_values,
)
from .representation import similarity
from .settings import SuiteSettings

HUB = "locuslab/TOFU"
SPLIT = "forget10"  # unless another is named
SPLITS = {"forget01": 40, "forget05": 200, "forget10": 400}  # rows of each
KEPT = {"retain": "retain_perturbed", "real_authors": "real_authors_perturbed", "world_facts": "world_facts_perturbed"}
FACTS = ("real_authors", "world_facts")  # sets whose probability is that of the answer among the answers offered
SEEDS = {"forget": 0, "retain": 1, "real_authors": 2, "world_facts": 3}  # bootstrap: one per set
GENERATED = {  # score -> field of the records
    "refusal_rate": "refused",
    "repetition": "repetition",
    "ngram_entropy": "ngram_entropy",
    "compression_ratio": "compression_ratio",
}
NOT_GENERATED = "the model's own answers were not recorded (--no-generate)"
NO_REFERENCE = "no evaluation of a model trained without the forget set was given (--reference)"


def load(settings: SuiteSettings) -> list[EvaluationSet]:
    """The sets of --split from the hub, or from a folder of the same files (forget05_perturbed.json, ...)."""
    split = settings.split or SPLIT
    lookup(SPLITS, split, "--split")
    files = {"forget": f"{split}_perturbed", **KEPT}
    generation = Generation(settings.new_tokens) if settings.generate else None
    return [
        EvaluationSet(name, capped(rows_of(settings.data or HUB, file), settings.max_rows), generation)
        for name, file in files.items()
    ]


def rows_of(data: str, name: str) -> Sequence[Row]:
    """The rows of one of TOFU's files (`full`, `forget05`, ...), from a folder of them or the hub."""
    folder = Path(data).expanduser()
    return read_rows(str(folder / f"{name}.json") if folder.is_dir() else f"{data}:{name}").rows


def capped(rows: Sequence[Row], most: int) -> tuple[Row, ...]:
    """The first `most` rows; 0 takes all."""
    return tuple(islice(rows, most or None))


def ratios(evaluation: Evaluation, name: str, mean: str = "geometric") -> list[float]:
    """Truth ratio R per row of a set; `mean` as in `truth_ratio_values`."""
    columns = (evaluation.column(name, field) for field in ("paraphrase_nll", "wrong_nll"))
    return list(truth_ratio_values(*columns, mean=mean))


def set_scores(evaluation: Evaluation, name: str, mean: str = "geometric") -> dict[str, Score]:
    """Probability, ROUGE and truth ratio of one set, TOFU's three; undefined where the records do not have them.

    For the forget set also the truth preference, where there are wrong answers.
    """
    seed, n = SEEDS.get(name, 0), len(evaluation.records(name))
    offered = evaluation.has(name, "wrong_nll")
    nll = evaluation.column(name, "nll")
    if name in FACTS and offered:
        found = {"probability": normalised_probability(nll, evaluation.column(name, "wrong_nll"), seed=seed)}
    else:
        found = {"probability": probability(nll, seed=seed)}
    found["rouge"] = Score(None, n, reason=NOT_GENERATED)
    if evaluation.has(name, "rouge_recall"):
        found["rouge"] = mean_score(evaluation.column(name, "rouge_recall"), seed=seed, what=f"{name} ROUGE")
    found["truth_ratio"] = Score(None, n, reason=f"the set '{name}' has no wrong answers to compare with")
    if offered:
        found["truth_ratio"] = truth_ratio(ratios(evaluation, name, mean), forget=name == "forget", seed=seed)
    if offered and name == "forget":
        found["truth_preference"] = truth_preference(ratios(evaluation, name), seed=seed)
    return found


def utility(
    evaluation: Evaluation,
    mean: str = "geometric",
    *,
    kept: Sequence[str] = tuple(KEPT),
    without: Sequence[str] = (),
) -> Score:
    """Harmonic mean of probability, ROUGE and truth ratio over the sets `kept`, save for the parts `without`.

    `mean`: the truth ratio's. TOFU's tables take the geometric one, its in-training evaluation the arithmetic one: say
    which. Without "rouge" it is not TOFU's number, but needs no generation.
    """
    parts = {
        f"{name} {part}": score
        for name in kept
        for part, score in set_scores(evaluation, name, mean).items()
        if part not in without
    }
    return model_utility(parts)


def memorisation(evaluation: Evaluation, name: str) -> dict[str, Score]:
    """Exact memorisation and extraction strength of a set (arXiv 2506.12618)."""
    seed, n = SEEDS.get(name, 0), len(evaluation.records(name))
    if not evaluation.has(name, "correct"):
        unknown = Score(None, n, reason="the records do not say which tokens were predicted right")
        return {"exact_memorisation": unknown, "extraction_strength": unknown}
    correct = evaluation.correct(name)
    found = {
        "exact_memorisation": exact_memorisation(correct, seed=seed),
        "extraction_strength": extraction_strength(correct, seed=seed),
    }
    return found


def behaviour(evaluation: Evaluation, name: str) -> dict[str, Score]:
    """Perplexity of a set's answers; refusal rate and degeneration of the model's own, where it gave any."""
    seed = SEEDS.get(name, 0)
    unknown = Score(None, len(evaluation.records(name)), reason="the records do not say how many tokens an answer has")
    found = {"perplexity": unknown}
    if evaluation.has(name, "tokens"):
        nll, tokens = (np.array(evaluation.column(name, field)) for field in ("nll", "tokens"))
        found["perplexity"] = perplexity(nll * tokens, tokens, seed=seed)
    for title, field in GENERATED.items():
        if evaluation.has(name, field):
            found[title] = mean_score(evaluation.column(name, field), seed=seed, what=f"{name} {field}")
    return found


def quality(evaluation: Evaluation, reference: Evaluation | None) -> Score:
    """Forget quality; undefined without the evaluation of a model that never saw the forget set."""
    n = len(evaluation.records("forget"))
    if not evaluation.has("forget", "wrong_nll"):
        return Score(None, n, reason="the forget set has no wrong answers to compare with")
    if reference is None:
        return Score(None, n, reason=NO_REFERENCE)
    return forget_quality(ratios(evaluation, "forget"), ratios(reference, "forget"))


def common_scores(evaluation: Evaluation, reference: Evaluation | None) -> dict[str, Score]:
    """What every set is scored by, likeness inside, and forget quality."""
    found: dict[str, Score] = {}
    for name in evaluation.sets:
        found |= prefixed(name, set_scores(evaluation, name) | memorisation(evaluation, name))
        found |= prefixed(name, behaviour(evaluation, name))
    return found | similarity(evaluation, reference) | {"forget_quality": quality(evaluation, reference)}


def score(evaluation: Evaluation, reference: Evaluation | None) -> dict[str, Score]:
    """All scores of the suite; names are `<set>_<score>`, `forget_quality` and the utilities."""
    found = common_scores(evaluation, reference)
    found["model_utility"] = utility(evaluation)
    found["model_utility_arithmetic"] = utility(evaluation, "arithmetic")
    found["model_utility_without_rouge"] = utility(evaluation, without=["rouge"])
    return found


def prefixed(name: str, scores: Mapping[str, Score]) -> dict[str, Score]:
    """Scores of a set under their full names."""
    return {f"{name}_{key}": value for key, value in scores.items()}
