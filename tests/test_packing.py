"""Several examples in a row: each is there once, whole and in order, and no loss or gradient knows of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from adapted_step import terms_and_gradients
from architectures import ARCHITECTURES, tiny_model
from conftest import VOCAB, random_examples, tiny_llama
from lorasure import packing
from lorasure.data import examples as data
from lorasure.data.examples import IGNORED, Batch, Example, collate, pack
from lorasure.losses.forget import FORGET_LOSSES
from lorasure.losses.retain import RETAIN_LOSSES
from lorasure.objective import ForgetObjective, ForgetSteps
from lorasure.packing import batch_of, can_pack, find_packing
from lorasure.sites import all_sites

SAME = 3e-5  # of the largest value: some hundred roundings of float32


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    monkeypatch.setattr(data, "PACKED", 40)


@example([(4, 10)] * 3)  # packed, these would be larger than padded
@example([(4, 5)] * 5)
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


def step_of(model: Any, packed: bool) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Loss terms and gradients of a step with an adapter that is not the identity, and the rows of all passes."""
    packing._PACKS.clear()
    if packed:
        packing._PACKS.add(model)
    forget, retain, refusals = (random_examples(n, seed) for seed, n in enumerate((9, 9, 9)))
    objective = ForgetObjective(forget, retain, refusals, FORGET_LOSSES["dpo"].function, RETAIN_LOSSES["kl"].function)
    (step,) = ForgetSteps(objective, epochs=1, batch_size=9, pairing="random", seed=0)
    objective.observe_original(model, [u.index for u in step if u.term == "retain"], 64)
    rows: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(kwargs["input_ids"]), with_kwargs=True)
    try:
        return terms_and_gradients(model, all_sites(model), objective, step, False), rows
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


COMMON: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.2}
WIDE = COMMON | {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
ALONG_THE_ROW = {  # recurrent states, a convolution in one layer of two, distances to keys however far
    "mamba": lambda: MambaForCausalLM(MambaConfig(**COMMON, state_size=4)),
    "recurrent-gemma": lambda: RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**WIDE, lru_width=16)),
    "lfm2": lambda: Lfm2ForCausalLM(Lfm2Config(**WIDE, layer_types=["conv", "full_attention"])),
    "bloom": lambda: BloomForCausalLM(BloomConfig(**COMMON, n_head=2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALONG_THE_ROW)
def test_a_model_that_reads_along_the_row_is_not_packed(name, dtype):
    torch.manual_seed(0)
    model: Any = ALONG_THE_ROW[name]()
    assert not can_pack(model.eval().to(dtype))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_roundings_do_not_keep_a_model_from_it(name):
    assert can_pack(tiny_model(name, torch.bfloat16))


def test_without_positions_that_begin_again_it_would_show(monkeypatch):
    model = tiny_llama()
    expected, _ = step_of(model, packed=False)
    monkeypatch.setattr(Batch, "inputs", property(lambda batch: {"input_ids": batch.input_ids}))
    found, _ = step_of(tiny_llama(), packed=True)
    assert max((found[k] - expected[k]).abs().max() / expected[k].abs().max() for k in found) > 0.01


def test_no_row_is_longer_than_the_model_was_made_for():
    model = tiny_llama(max_position_embeddings=24)
    packing._PACKS.add(model)
    batch = batch_of(model, [Example((1,) * n, 1) for n in (12, 4, 4, 4, 4, 12)])
    packing._PACKS.clear()
    assert batch.input_ids.shape == (2, 24)
    assert pack([Example((1,) * n, 1) for n in (20, 5, 5, 5, 5)], 22).input_ids.shape == (2, 20)


def test_on_a_gpu_rows_are_packed_if_the_model_can(monkeypatch):
    class Model:
        device = torch.device("cuda")

    able, unable = Model(), Model()
    monkeypatch.setattr(packing, "can_pack", lambda model: model is able)
    for model in (able, unable):
        find_packing(model)
    assert able in packing._PACKS and unable not in packing._PACKS


def test_on_a_cpu_rows_stay_padded():
    model = tiny_llama()
    find_packing(model)
    assert can_pack(model) and len(batch_of(model, random_examples(3)).input_ids) == 3
