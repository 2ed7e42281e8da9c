"""`--compat paper-code` against a slow transcription of its description with adapters that are really in the model."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor, nn

from conftest import random_examples
from lorasure.data.examples import Example
from lorasure.errors import UsageError
from lorasure.importance import paper_code
from lorasure.importance.collect import Probe
from lorasure.importance.measure import Importance, measure
from lorasure.sites import Site, find_sites
from reference_gradients import build, tiny_mixtral

PROBE = Probe("lora", rank=2, sigma=0.05, scaling=2.0, seed=3)
FULL = dataclasses.replace(PROBE, space="full")
FORGET, RETAIN = random_examples(6, seed=1), random_examples(9, seed=2)
BATCH = 4


def batch_loss(model, batch: list[Example]) -> Tensor:
    """Cross-entropy over all answer tokens of a batch, padded here, averaged by torch."""
    width = max(len(e.input_ids) for e in batch)
    ids, mask = torch.zeros(2, len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), width), -100)
    for i, e in enumerate(batch):
        ids[i, : len(e.input_ids)] = torch.tensor(e.input_ids)
        mask[i, : len(e.input_ids)] = 1
        labels[i, e.answer_start : len(e.input_ids)] = ids[i, e.answer_start : len(e.input_ids)]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


class Adapter(nn.Module):
    """Adds s B A x to a layer's output; nothing is taken off the base."""

    def __init__(self, layer: nn.Module, factors: dict[str, Tensor]) -> None:
        super().__init__()
        self.A, self.B = (nn.Parameter(factors[name].double()) for name in "AB")
        layer.register_forward_hook(
            lambda _, args, y: y + PROBE.scaling * nn.functional.linear(nn.functional.linear(args[0], self.A), self.B)
        )


def transcription(space: str, names: list[str], batch_size: int = BATCH) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(M per layer, its row sums) by the published arithmetic."""
    model = build("llama", torch.float64)
    layers = {name: model.get_submodule(name) for name in names}
    if space == "lora":
        cpu = torch.device("cpu")
        adapters = {
            n: Adapter(layer, PROBE.factors(Site(n, (layer.out_features, layer.in_features)), cpu))
            for n, layer in layers.items()
        }
        parameters = {(n, f): getattr(adapter, f) for n, adapter in adapters.items() for f in "AB"}
    else:
        parameters = {(n, "W"): layer.weight.requires_grad_() for n, layer in layers.items()}
    first = {s: {k: torch.zeros_like(p) for k, p in parameters.items()} for s in ("forget", "retain")}
    second = {s: {k: torch.zeros_like(p) for k, p in parameters.items()} for s in ("forget", "retain")}
    tokens = {"forget": 0, "retain": 0}
    order = random.Random(PROBE.seed)
    for _ in range(10):
        shuffled = order.sample(range(len(FORGET)), len(FORGET))
        for start in range(0, len(shuffled), batch_size):
            forget = [FORGET[i] for i in shuffled[start : start + batch_size]]
            retain = order.choices(RETAIN, k=len(forget))
            for name, batch in (("forget", forget), ("retain", retain)):
                count = sum(len(e.input_ids) - e.answer_start for e in batch)
                gradients = torch.autograd.grad(batch_loss(model, batch), list(parameters.values()))
                tokens[name] += count
                for key, gradient in zip(parameters, gradients, strict=True):
                    first[name][key] += count * gradient
                    second[name][key] += count * gradient**2

    def score(s: str, layer: str) -> Tensor:
        if space == "full":
            return second[s][layer, "W"] / tokens[s]
        variance = {f: second[s][layer, f] / tokens[s] - (first[s][layer, f] / tokens[s]) ** 2 for f in "AB"}
        return variance["B"] @ variance["A"] / tokens[s]  # the second division

    maps = {n: score("forget", n) / (1e-5 + score("retain", n)) for n in names}
    return maps, {n: m.sum(1) for n, m in maps.items()}


def measured(space: str, *, paper: bool = True, token_budget: int = 100) -> tuple[Importance, list[Site]]:
    model = build("llama", torch.float64)
    sites = find_sites(model, ["q_proj", "down_proj"])
    score, probe = ("variance", PROBE) if space == "lora" else ("fisher", FULL)
    found = measure(model, sites, FORGET, RETAIN, score=score, probe=probe, token_budget=token_budget, paper_code=paper)
    return found, sites


@pytest.mark.parametrize("space", ["lora", "full"])
def test_published_arithmetic_equals_its_transcription(space: str) -> None:
    found, sites = measured(space)
    maps, rows = transcription(space, [site.name for site in sites])
    default, _ = measured(space, paper=False)
    for site in sites:
        weights = found.weights(site)
        torch.testing.assert_close(weights.block(0, site.shape[0]), maps[site.name], rtol=1e-4, atol=0)
        torch.testing.assert_close(weights.rows, rows[site.name], rtol=1e-4, atol=0)
        # and it is not the default measure, not even up to a constant
        ours, theirs = (w.rows / w.rows.sum() for w in (default.weights(site), weights))
        assert ((ours - theirs).abs() / theirs).max() > 0.05


@pytest.mark.parametrize("space", ["lora", "full"])
def test_published_arithmetic_depends_on_the_batch_size_and_the_default_does_not(
    space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, sites = measured(space)
    default, _ = measured(space, paper=False)
    monkeypatch.setattr(paper_code, "BATCH_SIZE", 1)
    single, _ = measured(space)
    default_single, _ = measured(space, paper=False, token_budget=1)
    _, rows = transcription(space, [site.name for site in sites], batch_size=1)
    for site in sites:
        torch.testing.assert_close(single.weights(site).rows, rows[site.name], rtol=1e-4, atol=0)
        assert ((single.weights(site).rows / found.weights(site).rows) - 1).abs().max() > 0.05
        torch.testing.assert_close(default_single.weights(site).rows, default.weights(site).rows, rtol=1e-4, atol=0)


def test_combinations_that_were_not_published_are_refused() -> None:
    model = build("llama")
    sites = find_sites(model, ["q_proj"])
    for score, probe in (("variance", FULL), ("fisher", PROBE), ("fisher", dataclasses.replace(PROBE, space="sketch"))):
        with pytest.raises(UsageError, match="covers --score fisher --space full or --score variance --space lora"):
            measure(model, sites, FORGET, RETAIN, score=score, probe=probe, token_budget=50, paper_code=True)


def test_an_expert_without_tokens_scores_zero() -> None:
    model = tiny_mixtral().eval()
    sites = find_sites(model, ["layers.0.mlp.experts.gate_up_proj"])
    found = measure(model, sites, FORGET, RETAIN, score="fisher", probe=FULL, token_budget=100, paper_code=True)
    rows = [found.weights(site).rows for site in sites]
    assert rows[0].any() and not rows[5].any() and rows[5].shape == sites[5].shape[:1]
