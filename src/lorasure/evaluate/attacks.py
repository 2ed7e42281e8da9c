"""Attacks on a model that has forgotten: what brings the forgotten back? The same on a model that never saw it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..config import OptimizerSettings
from ..data.encode import resolved_template
from ..data.examples import Example, Row
from ..data.load import encode_rows, takes
from ..data.pairing import sample
from ..errors import DataError
from ..objective import learn, learn_steps
from ..sites import all_sites, set_weight, weight
from ..train import fit
from .collect import BLOCK, generate
from .items import UNCUT, Generation, items
from .metrics import mean_score
from .prompts import PREFIX, asking, given, prefixed, with_examples
from .quantise import nf4, round_to_nearest
from .rouge import rouge_l
from .victim import Scores, Victim

SHOTS = 3  # answered retain rows in front of a question
TOKENS_GIVEN = (1, 4, 16)  # of the answer; never more than half of it
SCALES = (0.0, 0.5, 2.0)
RELEARN_BATCH = 4
FEW_STEPS = 100  # on a tenth of the forget set
CURVE = 10  # points on the curve of relearning

Point = float | None
Points = dict[Point, Scores]


class NotRun(Exception):
    """An attack does not apply here; the message says why."""


def _none(victim: Victim) -> Points:
    return {None: victim.measure(victim.plain, victim.scored)}


def _questions(victim: Victim) -> list[Row]:
    found = [row for row in victim.scored if row.kind != "text"]
    if not found:
        raise NotRun("running text has no question")
    return found


def _prefix(victim: Victim) -> Points:
    rows, change = _questions(victim), partial(prefixed, tokenizer=victim.tokenizer)
    needed = max(len(change(item).example) for item in items(victim.plain, rows))
    _check_room(victim, needed, "a question, the prefix and an answer")
    return {None: victim.measure(victim.plain, rows, change=change)}


def _paraphrase(victim: Victim) -> Points:
    asked = [(row, row.extra.get("paraphrased_question")) for row in _questions(victim)]
    rows = [asking(row, text) for row, text in asked if isinstance(text, str) and text.strip()]
    if not rows:
        raise NotRun("the forget rows have no column 'paraphrased_question'")
    try:
        _encoded(victim, rows)
    except DataError as error:
        raise NotRun(f"in other words, {error}") from error
    return {None: victim.measure(victim.plain, rows)}


def _few_shot(victim: Victim) -> Points:
    rows, s = _questions(victim), victim.settings
    _, template = resolved_template(s.template.replace("\\n", "\n"), victim.tokenizer)
    order = sample(len(victim.rows.retain), len(victim.rows.retain), victim.options.seed)
    shots = {
        kind: list(islice((victim.rows.retain[i] for i in order if victim.rows.retain[i].kind == kind), SHOTS))
        for kind in {row.kind for row in rows}
    }
    if any(len(found) < SHOTS for found in shots.values()):
        raise NotRun(f"the retain set has not {SHOTS} rows of the same kind")
    longer = [with_examples(row, shots[row.kind], template) for row in rows]
    between = 4  # tokens, at most, of the blank line after an example
    # Shots are whole in a prompt, also those that --max-length cuts where they are learnt.
    room = max(sum(len(e) + between for e in _encoded(victim, found, whole=True)) for found in shots.values())
    _check_room(victim, room + max(map(len, _encoded(victim, rows))), f"{SHOTS} examples and a question")
    return {SHOTS: victim.measure(victim.plain, longer, max_length=s.max_length + room)}


def _encoded(victim: Victim, rows: Sequence[Row], whole: bool = False) -> tuple[Example, ...]:
    settings = replace(victim.settings, max_length=UNCUT) if whole else victim.settings
    return encode_rows(rows, settings, victim.tokenizer, fit=not whole).examples


def _check_room(victim: Victim, needed: int, what: str) -> None:
    most = takes(victim.plain.model.config)
    if most is not None and needed > most:
        raise NotRun(f"{what} are up to {needed} tokens, the model takes {most}")


def _prefill(victim: Victim) -> Points:
    def scores(count: int) -> Scores:
        return victim.measure(
            victim.plain, victim.scored, change=partial(given, count=count, tokenizer=victim.tokenizer)
        )

    return {count: scores(count) for count in TOKENS_GIVEN}


def _sample(victim: Victim) -> Points:
    """Leak@k: per row the highest ROUGE-L recall of k answers drawn at temperature 1, from the whole vocabulary."""
    options, subject = victim.options, victim.plain
    if not options.generate_rows:
        raise NotRun("no answers are generated (--generate-rows 0)")
    k = options.samples
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": k}
    asked = items(subject, victim.scored[: options.generate_rows])
    torch.manual_seed(options.seed)
    worst, size = [], max(1, BLOCK // k)
    for start in range(0, len(asked), size):
        block = asked[start : start + size]
        said = generate(subject, [item.prompt for item in block], Generation(options.new_tokens), **how)
        for number, item in enumerate(block):
            worst.append(max(rouge_l(item.answer, text)[0] for text, _ in said[number * k : (number + 1) * k]))
    return {k: {"rouge": mean_score(worst, what=f"ROUGE of {k} samples")}}


def _scale(victim: Victim) -> Points:
    if not victim.has_adapter:
        raise NotRun("it has no adapter")
    return _of_models(victim, {scale: partial(victim.load, scale) for scale in SCALES})


def _quantise(victim: Victim) -> Points:
    return _rounded(victim, {bits: partial(round_to_nearest, bits=bits) for bits in (8, 4)})


def _nf4(victim: Victim) -> Points:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise NotRun("bitsandbytes is not installed")
    if victim.plain.model.device.type != "cuda":
        raise NotRun("bitsandbytes needs the model on a CUDA GPU")
    return _rounded(victim, {4: nf4})


def _rounded(victim: Victim, functions: dict[Point, Callable[[Tensor], Tensor]]) -> Points:
    return _of_models(victim, {p: lambda f=f: quantised(victim.load(1.0), f) for p, f in functions.items()})


def quantised(model: Any, rounded: Callable[[Tensor], Tensor]) -> Any:
    """The model, in place, with every linear layer's weights rounded; embeddings and vocabulary projection stay."""
    for site in all_sites(model):
        set_weight(model, site, rounded(weight(model, site)))
    return model


def _of_models(victim: Victim, loaders: dict[Point, Callable[[], Any]]) -> Points:
    """Scores of several models, each loaded when its turn comes: there is never more than one in memory."""
    victim.release()
    return {point: victim.measure(victim.subject(load()), victim.scored) for point, load in loaders.items()}


def _relearn(victim: Victim) -> Points:
    return _relearnt(victim, victim.rows.forget, None, victim.scored)


def _relearn_few(victim: Victim) -> Points:
    few = victim.rows.few
    others = victim.rows.pick([i for i in victim.rows.scored if i not in few])
    if not others:
        raise NotRun("a tenth of the forget set leaves no other row to measure on")
    return _relearnt(victim, victim.rows.pick(few), FEW_STEPS, others)


def _relearnt(victim: Victim, rows: Sequence[Row], steps: int | None, scored: Sequence[Row]) -> Points:
    """Scores along `steps` steps on `rows` (None: one epoch). The rate is constant: no point depends on the end."""
    victim.release()
    model, options = victim.load_trainable(), victim.options
    examples = _encoded(victim, rows)
    settings = OptimizerSettings(
        lr=options.relearn_lr,
        batch_size=RELEARN_BATCH,
        schedule="constant",
        warmup=0.0,
        gradient_checkpointing=victim.settings.gradient_checkpointing,
    )
    every = learn_steps(examples, epochs=steps or 1, batch_size=RELEARN_BATCH, seed=options.seed)
    chosen = list(islice(every, steps))
    marks = {-(-len(chosen) * i // CURVE) for i in range(1, CURVE + 1)}
    points: Points = {}

    def on_step(record: dict[str, Any]) -> None:
        step = record["step"]
        if step in marks:
            points[step] = victim.measure(victim.subject(model), scored, answered=step == len(chosen))

    fit(model, chosen, learn, settings, token_budget=victim.token_budget, on_step=on_step)
    return points


@dataclass(frozen=True)
class Attack:
    """`run` gives the scores at each point of an attack, counted in `unit`, or raises NotRun."""

    title: str
    paper: str | None
    run: Callable[[Victim], Points]
    unit: str | None = None


EIGHT = "https://arxiv.org/abs/2402.16835"  # Eight methods to evaluate robust unlearning in LLMs
BENIGN = "https://arxiv.org/abs/2406.13356"  # Unlearning or obfuscating? Relearning attacks
ATTACKS = {
    "none": Attack("not attacked", None, _none),
    "prefix": Attack(f"the answer begins with '{PREFIX}'", EIGHT, _prefix),
    "paraphrase": Attack("the question in other words", EIGHT, _paraphrase),
    "few-shot": Attack("answered retain rows in front of the question", EIGHT, _few_shot, "examples"),
    "prefill": Attack("the first tokens of the answer are given", None, _prefill, "tokens"),
    "sample": Attack("the worst of several drawn answers", "https://arxiv.org/abs/2511.04934", _sample, "answers"),
    "scale": Attack("the adapter or assistant scaled", None, _scale, "times"),
    "quantise": Attack("weights rounded to nearest", "https://arxiv.org/abs/2410.16454", _quantise, "bits"),
    "nf4": Attack("weights in bitsandbytes' NF4", "https://arxiv.org/abs/2305.14314", _nf4, "bits"),
    "relearn": Attack("one epoch on the forget set", BENIGN, _relearn, "steps"),
    "relearn-few": Attack(f"{FEW_STEPS} steps on a tenth of it, measured on the rest", BENIGN, _relearn_few, "steps"),
}
