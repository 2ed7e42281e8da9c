"""Several examples in a row: each is there once, whole and in order, and no loss or gradient knows of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MambaConfig, MambaForCausalLM

from adapted_step import terms_and_gradients
from architectures import ARCHITECTURES, tiny_model
from conftest import VOCAB, random_examples, tiny_llama
from lorasure import packing
from lorasure.data import examples as data
from lorasure.data.examples import IGNORED, Batch, Example, collate, pack
from lorasure.losses.forget import FORGET_LOSSES
from lorasure.losses.retain import RETAIN_LOSSES
from lorasure.objective import ForgetObjective, forget_steps
from lorasure.packing import batch_of, can_pack, find_packing
from lorasure.sites import all_sites

SAME = 3e-5  # of the largest value: some hundred roundings of float32


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    monkeypatch.setattr(data, "PACKED", 40)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), min_size=1, max_size=40))
def test_every_token_is_there_once_in_order(sizes):
    examples = [Example(tuple(range(100 * i, 100 * i + a + b)), a) for i, (a, b) in enumerate(sizes) if a + b > 1]
    if not examples:
        return
    packed, padded = pack(examples), collate(examples)
    assert packed.count == padded.count == len(examples)
    for name in ("input_ids", "position_ids", "labels", "example"):
        one, other = (getattr(b, name)[b.attention_mask.bool()] for b in (packed, padded))
        assert torch.equal(one, other), name
    assert packed.input_ids.shape[1] < max(data.PACKED, *map(len, examples)) + 8
    assert packed.input_ids.numel() <= padded.input_ids.numel()
    assert (packed.labels[~packed.attention_mask.bool()] == IGNORED).all()


def test_rows_by_hand():
    examples = [Example(tuple(range(1, n + 1)), 1) for n in (17, 15, 15, 3)]
    packed = pack(examples)
    assert packed.input_ids.shape == (2, 32)  # 17 + 15 and 15 + 3: as few rows as of 40 tokens, and no wider
    assert packed.position_ids[1].tolist() == [*range(15), *range(3), *[0] * 14]
    assert packed.inputs.keys() == {"input_ids", "position_ids"}


def step_of(model: Any, packed: bool) -> tuple[dict[str, torch.Tensor], list[Batch]]:
    """Loss terms and gradients of a step with an adapter that is not the identity."""
    packing._PACKS.clear()
    if packed:
        packing._PACKS.add(model)
    forget, retain, refusals = (random_examples(n, seed) for seed, n in enumerate((9, 9, 9)))
    objective = ForgetObjective(forget, retain, refusals, FORGET_LOSSES["dpo"].function, RETAIN_LOSSES["kl"].function)
    (step,) = forget_steps(objective, epochs=1, batch_size=9, pairing="random", seed=0)
    objective.observe_original(model, [u.index for u in step if u.term == "retain"], 64)
    batches: list[Batch] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: batches.append(kwargs["input_ids"]), with_kwargs=True)
    try:
        return terms_and_gradients(model, all_sites(model), objective, step, False), batches
    finally:
        packing._PACKS.clear()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_and_gradients_are_those_of_padded_rows(name):
    model = tiny_model(name)
    assert can_pack(model) == (name not in ("opt", "gpt-oss"))
    if not can_pack(model):
        return
    expected, padded = step_of(model, packed=False)
    found, packed = step_of(tiny_model(name), packed=True)
    assert packed[-1].numel() < 0.9 * padded[-1].numel() and len(packed[-1]) < len(padded[-1])
    assert expected.keys() == found.keys() and len(found) > 2
    for key in found:
        assert (found[key] - expected[key]).abs().max() <= SAME * expected[key].abs().max(), key


def test_a_model_that_reads_along_the_row_is_not_packed():
    common: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(**common, state_size=4)).eval()
    assert not can_pack(mamba)


def test_without_positions_that_begin_again_it_would_show(monkeypatch):
    model = tiny_llama()
    expected, _ = step_of(model, packed=False)
    monkeypatch.setattr(Batch, "inputs", property(lambda batch: {"input_ids": batch.input_ids}))
    found, _ = step_of(tiny_llama(), packed=True)
    assert max((found[k] - expected[k]).abs().max() / expected[k].abs().max() for k in found) > 0.01


def test_no_row_is_longer_than_the_model_was_made_for():
    model = tiny_llama(max_position_embeddings=24)
    packing._PACKS.add(model)
    batch = batch_of(model, random_examples(8))
    packing._PACKS.clear()
    assert len(batch.input_ids) < 8 and batch.input_ids.shape[1] <= 24


def test_on_a_cpu_rows_stay_padded():
    model = tiny_llama()
    find_packing(model)
    assert can_pack(model) and len(batch_of(model, random_examples(3)).input_ids) == 3
