"""How others work, written from the descriptions of their methods; none of their code is here.

`published`: the public VILA and FILA scripts. `typical`: what a well-kept unlearning code base does. Both keep whole
logits, run forget and retain rows in separate passes and a second model for NPO, four rows at a time, eight such passes
per step of the optimizer.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import PreTrainedModel, get_linear_schedule_with_warmup
from workload import Setting, with_lora

from lorasure.data.examples import IGNORED, Example
from lorasure.init.low_rank import Factors
from lorasure.sites import Site

EPSILON = 1e-5
Moments = dict[str, tuple[Tensor, Tensor]]  # parameter -> (mean of the gradient, mean of its square)


@dataclass(frozen=True)
class Style:
    """`width`: every row is padded to it (None: to the longest of its batch). `exact`: the probe is taken off the base
    again, and each layer's SVD is a full one."""

    title: str
    width: int | None
    exact: bool
    rows: int = 4


PUBLISHED = Style("the public VILA and FILA scripts", width=500, exact=False)
TYPICAL = Style("a well-kept code base", width=None, exact=True)


def padded(batch: Sequence[Example], width: int | None) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels (rows, width) for transformers."""
    width = width or max(map(len, batch))
    ids, mask = torch.zeros(len(batch), width, dtype=torch.int64), torch.zeros(len(batch), width, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for i, example in enumerate(batch):
        tokens, first = torch.tensor(example.input_ids), example.first
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
        labels[i, first : len(tokens)] = tokens[first:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def whole_logits(model, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (rows, width - 1, vocabulary) in float32 and the targets they predict (rows, width - 1)."""
    kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    logits = model(**kept, use_cache=False).logits.float()
    return logits[:, :-1].contiguous(), inputs["labels"][:, 1:].contiguous()


def summed_nll(model, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(NLL summed over each row's answer tokens, answer tokens of each row)."""
    logits, targets = whole_logits(model, inputs)
    nll = cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    return nll.sum(1), (targets != IGNORED).sum(1)


def mean_nll(model, inputs: Mapping[str, Tensor]) -> Tensor:
    """NLL per answer token of each row."""
    total, count = summed_nll(model, inputs)
    return total / count


def hinge(model, inputs: Mapping[str, Tensor]) -> Tensor:
    """IHL of each row, from the probabilities of the whole vocabulary at every position."""
    logits, targets = whole_logits(model, inputs)
    p, wanted = logits.softmax(-1), targets != IGNORED
    own = p.gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
    values, tokens = p.topk(2, dim=-1)
    rival = torch.where(tokens[..., 0] == targets, values[..., 1], values[..., 0])
    return ((1 + own - rival) * wanted).sum(1) / wanted.sum(1)


def importance(
    style: Style,
    model: PreTrainedModel,
    sites: Sequence[Site],
    forget: Sequence[Example],
    retain: Sequence[Example],
    setting: Setting,
    *,
    space: str = "lora",
    passes: int = 1,
) -> tuple[Moments, Moments]:
    """Moments of the gradient of each batch's mean loss, of LoRA factors or of the weights; spoils `model`."""
    names = [f"{site.module}.weight" for site in sites]
    if space == "lora":
        start = {s: Factors(f["B"], f["A"]) for s in sites for f in [setting.probe().factors(s, model.device)]}
        model = with_lora(model, start, setting, residual=style.exact)  # type: ignore[assignment]
        names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = {name: model.get_parameter(name).requires_grad_() for name in names}
    order = random.Random(setting.seed)
    found: list[Moments] = [{}, {}]
    weight = [0, 0]
    for _ in range(passes):
        chosen = order.sample(list(forget), len(forget))
        for start_row in range(0, len(chosen), style.rows):
            batch = chosen[start_row : start_row + style.rows]
            other = order.choices(retain, k=len(batch)) if not style.exact else retain[start_row:][: len(batch)]
            for which, rows in enumerate((batch, other)):
                model.zero_grad()
                mean_nll(model, padded(rows, style.width)).mean().backward()
                weight[which] += len(rows)
                for name, p in parameters.items():
                    assert p.grad is not None
                    _add(found[which], name, p.grad if style.exact else p.grad.detach().cpu(), len(rows))
    for moments, total in zip(found, weight, strict=True):
        for first, second in moments.values():
            first /= total
            second /= total
    return found[0], found[1]


def _add(moments: Moments, name: str, gradient: Tensor, count: int) -> None:
    """Both sums, weighted by the number of rows."""
    if name not in moments:
        moments[name] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    moments[name][0].add_(gradient, alpha=count)
    moments[name][1].add_(gradient.square(), alpha=count)


def initialise(
    style: Style, model: PreTrainedModel, sites: Sequence[Site], moments: tuple[Moments, Moments], setting: Setting
) -> dict[Site, Factors]:
    """VILA's start from LoRA-space moments: the whole (out, in) map, its row sums, the SVD of the weighted weight."""
    found = {}
    for site in sites:
        maps = []
        for part in moments:
            prefix = f"base_model.model.{site.module}.lora_"
            b, a = ((m[1] - m[0].square()).clamp_min(0) for m in (part[f"{prefix}{k}.default.weight"] for k in "BA"))
            maps.append(b @ a)
        rows = (maps[0] / (maps[1] + EPSILON)).sum(1).sqrt()
        weighted = rows[:, None] * model.get_parameter(f"{site.module}.weight").detach().float()
        if style.exact:
            u, s, vt = torch.linalg.svd(weighted, full_matrices=False)
            u, s, v = u[:, : setting.rank], s[: setting.rank], vt[: setting.rank].T
        else:
            u, s, v = torch.svd_lowrank(weighted, q=setting.rank, niter=2)
        root = (s / setting.scaling).sqrt()
        found[site] = Factors(u * root / (rows[:, None] + EPSILON), root[:, None] * v.T)
    return found


def train(
    style: Style,
    model: PreTrainedModel,
    start: dict[Site, Factors],
    forget: Sequence[Example],
    retain: Sequence[Example],
    pairs: Sequence[tuple[int, int]],
    loss: str,
    setting: Setting,
    *,
    on_step=None,
) -> None:
    """AdamW over `pairs` of (forget row, retain row), `setting.batch_size` of them per step; changes `model`.

    `on_step` gets the losses of each step (means over its rows), the gradient's norm, and the adapted model with its
    clipped gradients.
    """
    original = copy.deepcopy(model) if loss == "npo" else None
    model = with_lora(model, start, setting, residual=True)  # type: ignore[assignment]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=setting.lr, weight_decay=0.01)
    steps = -(-len(pairs) // setting.batch_size)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.2 * steps), steps)
    for first in range(0, len(pairs), setting.batch_size):
        step = pairs[first : first + setting.batch_size]
        sums = [0.0, 0.0]
        for at in range(0, len(step), style.rows):
            part = step[at : at + style.rows]
            gone = padded([forget[f] for f, _ in part], style.width)
            kept = padded([retain[r] for _, r in part], style.width)
            terms = _forget_loss(model, original, gone, loss, setting.beta), mean_nll(model, kept)
            ((terms[0].sum() + setting.lam * terms[1].sum()) / len(step)).backward()
            sums = [total + float(term.detach().sum()) / len(step) for total, term in zip(sums, terms, strict=True)]
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if on_step:
            on_step({"forget": sums[0], "retain": sums[1], "grad_norm": float(norm)}, model)
        optimizer.zero_grad()


def _forget_loss(model, original, inputs: Mapping[str, Tensor], loss: str, beta: float) -> Tensor:
    """The forget loss of each row; for NPO the second model runs over the same rows at every step."""
    if loss == "ihl":
        return hinge(model, inputs)
    with torch.no_grad():
        reference, _ = summed_nll(original, inputs)
    return -2 / beta * logsigmoid(beta * (summed_nll(model, inputs)[0] - reference))
