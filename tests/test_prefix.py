"""The frozen prefix: the same losses and gradients as without it, on every kind of model that can do with it."""

from __future__ import annotations

from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, GPTJConfig, GPTJForCausalLM

from adapted_step import terms_and_gradients
from architectures import ARCHITECTURES, GROUPED, tiny_model
from conftest import VOCAB, random_examples, tiny_llama
from lorasure import artifacts, pipeline, prefix, train_stage
from lorasure.config import ForgetSettings
from lorasure.data.examples import collate
from lorasure.forward import answer_logits
from lorasure.layers import decoder_layers
from lorasure.losses.forget import FORGET_LOSSES
from lorasure.losses.retain import RETAIN_LOSSES
from lorasure.objective import ForgetObjective, ForgetSteps
from lorasure.prefix import Prefix, find_prefix, lowest_layer
from lorasure.sites import all_sites

LAYERS, FIRST = 4, 2
SAME = 3e-5  # of the largest value: some hundred roundings of float32
FORGET, RETAIN, REFUSALS = random_examples(5, 1), random_examples(7, 2), random_examples(5, 3)


def gptj():
    """Its layers return tuples."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": LAYERS, "n_head": 4, "rotary_dim": 4}
    config = GPTJConfig(**sizes, initializer_range=0.2, n_positions=128, bos_token_id=None, eos_token_id=256)
    return GPTJForCausalLM(config).eval().requires_grad_(False)


def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    if name == "gptj":
        return gptj().to(dtype)
    return tiny_model(name, dtype, **{"n_layer" if name == "gpt2" else "num_hidden_layers": LAYERS})


def upper_sites(model, first=FIRST):
    layers = decoder_layers(model)
    return [site for site in all_sites(model) if lowest_layer(layers, model, [site]) >= first]


def behind_attention(model):
    """The upper sites but for those of the lowest layer's attention."""
    layers = decoder_layers(model)
    return [s for s in upper_sites(model) if "att" not in s.name or lowest_layer(layers, model, [s]) > FIRST]


def step_of(
    model, *, cached: bool, checkpointing: bool = False, spoil: Any = None, behind: bool = False
) -> tuple[dict[str, Tensor], ForgetObjective]:
    """(loss terms and gradients of a step with an adapter that is not the identity, the objective)."""
    sites, notes = (behind_attention if behind else upper_sites)(model), []
    objective = ForgetObjective(FORGET, RETAIN, REFUSALS, FORGET_LOSSES["dpo"].function, RETAIN_LOSSES["kl"].function)
    (step,) = ForgetSteps(objective, epochs=1, batch_size=5, pairing="random", seed=0)
    if cached:
        objective.prefix = find_prefix(model, sites, [e for u in step for e in u.sequences], 1000, notes.append)
        assert objective.prefix and not notes
    objective.observe_original(model, [u.index for u in step if u.term == "retain"], 64)
    if spoil:
        objective.prefix.states = spoil(objective.prefix)
    return terms_and_gradients(model, sites, objective, step, checkpointing), objective


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of all terms and gradients, each by its own largest value."""
    assert one.keys() == other.keys() and len(one) > 2
    return max(float((one[k] - other[k]).abs().max() / one[k].abs().max()) for k in one)


@pytest.mark.parametrize("behind", [False, True], ids=["layers", "layers and attention"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "gptj"])
def test_losses_and_gradients_are_the_same_on_every_kind_of_model(name, behind, monkeypatch):
    expected, _ = step_of(model_of(name), cached=False, behind=behind)
    model, runs = model_of(name), []
    layers = decoder_layers(model)
    names = ("self_attn", "attn", "attention", "self_attention")
    attentions = [next(child for name, child in layer.named_children() if name in names) for layer in layers]
    forward = type(attentions[0]).forward

    @wraps(forward)
    def counted(self, *args, **given):
        runs.append(attentions.index(self))
        return forward(self, *args, **given)

    monkeypatch.setattr(type(attentions[0]), "forward", counted)
    model.get_input_embeddings().register_forward_hook(lambda *_: runs.clear())
    found, objective = step_of(model, cached=True, behind=behind)
    assert largest_difference(expected, found) < SAME
    kept = objective.prefix
    assert kept and kept.attention is (attentions[FIRST] if behind else None)
    assert len(kept.states) == 15 and all(len(e) == len(s) for e, s in kept.states.items())
    hidden = model.config.hidden_size * (2 if behind else 1)
    rows = sum(len(e) for e in kept.states)
    assert kept.about() == {"layer": FIRST, "of": LAYERS, "bytes": rows * hidden * 4}
    assert runs == list(range(FIRST + behind, LAYERS))  # in the step, as the embeddings began it


@pytest.mark.parametrize("behind", [False, True], ids=["layers", "layers and attention"])
@pytest.mark.parametrize("name", ["llama", "gptj", "gpt-oss"])
def test_checkpointing_goes_with_it(name, behind):
    expected, _ = step_of(model_of(name), cached=False, behind=behind)
    model = model_of(name)
    found, _ = step_of(model, cached=True, checkpointing=True, behind=behind)
    assert largest_difference(expected, found) < SAME
    assert not any("forward" in vars(layer) for layer in decoder_layers(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_are_kept_in_the_dtype_of_the_base(dtype):
    expected, _ = step_of(model_of("llama", dtype), cached=False)
    found, objective = step_of(model_of("llama", dtype), cached=True)
    assert objective.prefix and {state.dtype for state in objective.prefix.states.values()} == {dtype}
    assert largest_difference(expected, found) < 20 * torch.finfo(dtype).eps


def of_another_layer(kept):
    lower = Prefix(kept.layers, FIRST - 1, kept.rows)
    examples = list(kept.rows)
    model = model_of("llama")
    lower.layers, batch = decoder_layers(model), collate(examples)
    with torch.no_grad(), lower.recording(examples, batch):
        answer_logits(model, batch)
    return lower.states


def of_a_token_before(kept):
    return {e: state.roll(1, 0) for e, state in kept.states.items()}


def of_another_row(kept):
    longest = max(kept.states.values(), key=len)
    return {e: longest[: len(e)] for e in kept.states}


@pytest.mark.parametrize("spoil", [of_another_layer, of_a_token_before, of_another_row])
def test_other_states_would_show(spoil):
    expected, _ = step_of(model_of("llama"), cached=False)
    found, _ = step_of(model_of("llama"), cached=True, spoil=spoil)
    assert largest_difference(expected, found) > 0.1


# --- where it begins --------------------------------------------------------------------------------------------------


def test_the_lowest_layer_of_sites():
    model = tiny_llama(layers=4)
    layers, sites = decoder_layers(model), all_sites(model)
    assert layers == list(model.model.layers)
    for number in range(4):
        own = [site for site in sites if f".{number}." in site.name]
        assert [lowest_layer(layers, model, [site]) for site in own] == [number] * 7
        assert lowest_layer(layers, model, [*own, *(s for s in sites if ".3." in s.name)]) == number
    assert lowest_layer([], model, sites[-1:]) == 0  # no stack of layers


def test_a_module_that_layers_share_counts_for_the_lowest():
    model = tiny_llama(layers=4)
    shared = [site for site in all_sites(model) if "layers.3.mlp" in site.name]
    model.model.layers[1].mlp = model.model.layers[3].mlp
    assert lowest_layer(decoder_layers(model), model, shared) == 1


def test_a_site_outside_of_the_layers_leaves_nothing_constant():
    model = tiny_model("opt", num_hidden_layers=4, word_embed_proj_dim=8)
    outside = [site for site in all_sites(model) if ".layers." not in site.name]
    assert outside and find_prefix(model, [*outside, *upper_sites(model)], FORGET, 1000, pytest.fail) is None


def test_layers_that_are_compiled_keep_their_attention():
    model = tiny_llama(layers=4)
    kept = find_prefix(model, behind_attention(model), FORGET, 1000, pytest.fail, compiled=True)
    assert kept and kept.attention is None


def test_nothing_is_skipped_or_said_when_the_first_layer_is_adapted():
    model = tiny_llama()
    assert find_prefix(model, all_sites(model), FORGET, 1000, pytest.fail) is None


# --- models that cannot do with it ------------------------------------------------------------------------------------


def passing_by(model):
    """A layer above reads what one below has computed."""
    kept = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: kept.append(output))
    model.model.layers[3].register_forward_pre_hook(lambda module, args: (args[0] + kept[-1], *args[1:]))
    return upper_sites(model)


def failing(model):
    """The same, and what it reads is not even there when the layer below is skipped."""
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: setattr(model, "kept", output))
    model.model.layers[3].register_forward_pre_hook(lambda module, args: (args[0] + vars(model).pop("kept"), *args[1:]))
    return upper_sites(model)


def test_attention_that_comes_after_what_is_adapted_is_computed():
    model = tiny_llama(layers=4)
    layer = model.model.layers[FIRST]
    change = lambda _, args, given: (args, given | {"hidden_states": layer.mlp(given["hidden_states"])})  # noqa: E731
    layer.self_attn.register_forward_pre_hook(change, with_kwargs=True)
    kept = find_prefix(model, behind_attention(model), FORGET, 1000, pytest.fail)
    assert kept and kept.first == FIRST and kept.attention is None


def several_stacks(model):
    model.other = torch.nn.ModuleList(model.model.layers[:1])
    return upper_sites(tiny_llama(layers=4))


@pytest.mark.parametrize(("change", "said"), [(passing_by, 1), (failing, 1), (several_stacks, 0)])
def test_a_model_that_cannot_skip_layers_does_without(change, said):
    model, notes = tiny_llama(layers=4), []
    sites = change(model)
    assert find_prefix(model, sites, FORGET, 1000, notes.append) is None
    assert len(notes) == said and all("2 layers below the adapter are computed at every step" in n for n in notes)
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_layers_that_reuse_keys_of_layers_below():
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * 3
    shape = GROUPED | {"num_hidden_layers": 6, "head_dim": 4, "layer_types": kinds, "sliding_window": 8}
    shape |= {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 4, "num_kv_shared_layers": 2}
    model = Gemma4ForCausalLM(Gemma4TextConfig(**shape)).eval().requires_grad_(False)
    notes = []
    below, above = (find_prefix(model, upper_sites(model, n), FORGET, 1000, notes.append) for n in (2, 4))
    assert below and below.first == 2  # the keys are those of layers 2 and 3
    assert above is None and len(notes) == 1


def test_out_of_memory_is_not_taken_for_it(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = tiny_llama(layers=4)
    monkeypatch.setattr(Prefix, "feeding", full)
    with pytest.raises(torch.OutOfMemoryError):
        find_prefix(model, upper_sites(model), FORGET, 1000, pytest.fail)


def test_states_that_would_take_too_much_memory_are_not_kept(monkeypatch):
    model, notes = tiny_llama(layers=4), []
    monkeypatch.setattr(prefix, "ROOM", 0)
    needed = sum(map(len, FORGET)) * 16 * 4
    monkeypatch.setattr(model, "get_memory_footprint", lambda: needed)
    assert find_prefix(model, upper_sites(model), [*FORGET, *FORGET], 1000, pytest.fail)
    kept = find_prefix(model, behind_attention(model), FORGET, 1000, pytest.fail)
    assert kept and kept.attention is None  # it would take as much again
    monkeypatch.setattr(model, "get_memory_footprint", lambda: needed - 1)
    assert find_prefix(model, upper_sites(model), FORGET, 1000, notes.append) is None
    assert len(notes) == 1 and "to keep what they give for 5 rows would take 0.0 GiB" in notes[0]


# --- in the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(model_folder, data_files, tmp_path):
    """Settings of a short run with the upper of two layers adapted."""
    common: dict[str, Any] = {
        "model": str(model_folder),
        "forget": str(data_files[0]),
        "retain": str(data_files[1]),
        "rank": 2,
    }
    common |= {
        "init": "vila",
        "targets": "layers.1.*",
        "epochs": 2,
        "batch_size": 2,
        "lr": 1e-2,
        "loss": "npo",
        "retain_loss": "kl",
    }

    def make(out="run", **options):
        given: dict[str, Any] = common | {"out": str(tmp_path / out)} | options
        return ForgetSettings(**given)

    return make


def test_a_run_gives_the_same_with_and_without(settings, monkeypatch):
    found = pipeline.forget(settings())
    about = found.summary["prefix"]
    assert (about["layer"], about["of"]) == (1, 2) and about["bytes"] > 1000
    with monkeypatch.context() as patch:
        patch.setattr(train_stage, "find_prefix", lambda *_, **__: None)
        expected = pipeline.forget(settings("without"))
    assert "prefix" not in expected.summary
    for part in ("before", "after"):
        for name in ("forget", "retain"):
            values = [run.summary[part][name]["value"] for run in (found, expected)]
            assert values[0] == pytest.approx(values[1], rel=1e-4)
    factors = [artifacts.read_tensors(run.folder / artifacts.TRAINED)[0] for run in (found, expected)]
    for key, value in factors[0].items():
        torch.testing.assert_close(value, factors[1][key], atol=1e-5, rtol=1e-4)


def test_no_row_is_computed_twice_before_training(settings, monkeypatch):
    """Neither for scores, references and the prefix together, nor once more in training below the adapter."""
    rows, real = [], train_stage.find_prefix

    def watching(model, *args, **options):
        found = real(model, *args, **options)
        model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: rows.append(len(output)))
        return found

    monkeypatch.setattr(train_stage, "find_prefix", watching)
    pipeline.forget(settings())
    assert sum(rows) == 6 + 10 + 3 * 8  # forget and retain rows; the check: trained, original, handed over


@pytest.mark.parametrize("options", [{"targets": "all"}, {"epochs": 1}], ids=str)
def test_where_nothing_would_be_saved_nothing_is_kept(settings, options):
    assert "prefix" not in pipeline.forget(settings(**options)).summary


def test_padding_and_order_of_a_batch_do_not_matter():
    """Fed from either side, in another order and with other neighbours than at the recording."""
    model = tiny_llama(layers=4)
    kept = find_prefix(model, upper_sites(model), FORGET, 1000, pytest.fail)
    assert kept
    with torch.no_grad():
        for examples in (FORGET[:2], FORGET[2:]):
            batch = collate(examples)
            with kept.recording(examples, batch, alone=True):
                answer_logits(model, batch)
        for side in ("left", "right"):
            examples = [FORGET[i] for i in (4, 0, 3)]
            batch = collate(examples, side)
            expected = answer_logits(model, batch)[0].log_probs
            with kept.feeding(examples, batch):
                found = answer_logits(model, batch)[0].log_probs
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
