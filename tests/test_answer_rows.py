"""The last layer at answer positions only: the same losses, gradients, moments and records on every kind of model."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from adapted_step import terms_and_gradients
from architectures import ARCHITECTURES, tiny_model
from conftest import random_examples, tiny_llama
from lorasure import answer_rows, lora, models
from lorasure.answer_rows import at_answers, find_free_layers
from lorasure.data.examples import collate
from lorasure.errors import NumericError
from lorasure.forward import answer_logits, answer_records, base_of
from lorasure.importance.activations import second_moments
from lorasure.importance.collect import Probe, moments
from lorasure.init.apply import INITS, Evidence, Request, initialise
from lorasure.layers import decoder_layers
from lorasure.losses.forget import FORGET_LOSSES
from lorasure.losses.retain import RETAIN_LOSSES
from lorasure.losses.tokens import shift
from lorasure.objective import ForgetObjective, ForgetSteps
from lorasure.prefix import find_prefix, lowest_layer
from lorasure.sites import all_sites

FORGET, RETAIN = random_examples(5, 1), random_examples(5, 2)
SAME = 3e-5  # of the largest value
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def free_layers(model):
    find_free_layers(model)
    return set(answer_rows._FREE[model][1])


def step_of(name, *, restricted, prefix=False, checkpointing=False):
    """Loss terms and gradients of a step with an adapter that is not the identity."""
    model = tiny_model(name)
    if restricted:
        find_free_layers(model)
    objective = ForgetObjective(FORGET, RETAIN, (), FORGET_LOSSES["npo"].function, RETAIN_LOSSES["kl"].function)
    (step,) = ForgetSteps(objective, epochs=1, batch_size=5, pairing="random", seed=0)
    sites = all_sites(model)
    if prefix:
        sites = [site for site in sites if lowest_layer(decoder_layers(model), model, [site]) == 1]
        objective.prefix = find_prefix(model, sites, [e for u in step for e in u.sequences], 1000, print)
        assert objective.prefix
    objective.observe_original(model, range(len(RETAIN)), 64)
    return terms_and_gradients(model, sites, objective, step, checkpointing)


def assert_same(found, expected):
    assert found.keys() == expected.keys() and len(found) > 2
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= SAME * value.abs().max(), name


@every_architecture
def test_losses_and_gradients_of_a_step(name):
    assert_same(step_of(name, restricted=True), step_of(name, restricted=False))


@every_architecture
def test_with_the_prefix_cached(name):
    assert_same(step_of(name, restricted=True, prefix=True), step_of(name, restricted=False, prefix=True))


def test_rows_are_left_out_of_a_step_and_of_importance(monkeypatch):
    counted, real = [], answer_rows._on_rows

    def counting(rows, place, forward):
        counted.append(len(rows) / len(place))
        return real(rows, place, forward)

    monkeypatch.setattr(answer_rows, "_on_rows", counting)
    step_of("llama", restricted=True)
    assert len(counted) >= 10 and max(counted) <= answer_rows.WORTH
    counted.clear()
    model = tiny_model("llama")
    find_free_layers(model)
    moments(model, all_sites(model), FORGET, Probe("lora", 2, 0.05, 2.0, 0), token_budget=40)
    assert len(counted) >= 10


def test_a_disabled_adapter_is_the_original():
    model, batch = tiny_model("llama"), collate(FORGET)
    expected = answer_logits(model, batch)[0].log_probs
    find_free_layers(model)
    start, _ = initialise(model, all_sites(model), INITS["pissa"], lambda _: Evidence(), Request(2, 2.0), None)
    wrapped = lora.attach(model, start, 2, 4.0, compensate=False)
    assert (answer_logits(wrapped, batch)[0].log_probs - expected).abs().max() > 0.1
    with wrapped.disable_adapter():
        torch.testing.assert_close(answer_logits(wrapped, batch)[0].log_probs, expected)


def test_activations_are_those_of_all_tokens():
    found = []
    for tried in (True, False):
        model = tiny_model("llama")
        if tried:
            find_free_layers(model)
        found.append(second_moments(model, all_sites(model), FORGET, of_inputs=False, token_budget=40))
    for site, value in found[0].items():
        torch.testing.assert_close(value, found[1][site])


def test_a_checkpointed_layer_is_computed_whole():
    assert_same(step_of("llama", restricted=True, checkpointing=True), step_of("llama", restricted=False))


@every_architecture
def test_moments_and_records(name):
    found = []
    for restricted in (True, False):
        model = tiny_model(name)
        if restricted:
            find_free_layers(model)
        sites = all_sites(model)
        measured = moments(model, sites, FORGET, Probe("lora", 2, 0.05, 2.0, 0), token_budget=40)
        records = answer_records(model, FORGET, 40)
        kept = [(f"{site} {factor}", m) for site, factors in measured.items() for factor, m in factors.items()]
        found.append({f"{title} {k}": t for title, m in kept for k, t in m.tensors().items()})
        found[-1]["records"] = torch.tensor([p for record in records for p in record.log_probs])
    one, other = found
    assert one.keys() == other.keys()
    largest = {key: float(value.abs().max()) for key, value in other.items()}
    assert all(float((one[key] - value).abs().max()) <= 1e-4 * (largest[key] + 1e-6) for key, value in other.items())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
        ("gpt-neox", {"attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}),
        ("gpt2", {"attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        ("phi3", {"self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}),
    ],
)
def test_which_layers_are_free(name, expected):
    assert free_layers(tiny_model(name)) == expected


def test_small_weights_do_not_pass_for_none():
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data.mul_(1e-12)
        layer.self_attn.k_proj.weight.data.zero_()
    assert not {"self_attn.v_proj", "self_attn.k_proj"} & free_layers(model)


class Reads(nn.Module):
    """Beside a layer: what it makes of earlier tokens, by a linear layer of its own, is added to the layer's output."""

    def __init__(self, layer, reads):
        super().__init__()
        self.own, layer.added = nn.Linear(16, 16), self
        self.reads = reads
        layer.register_forward_hook(lambda module, args, output: output + self(args[0]))

    def forward(self, hidden):
        return self.reads(self.own(hidden))


def far(found, distance=answer_rows.TOKENS):
    return nn.functional.pad(found, (0, 0, distance, 0))[:, : found.shape[1]]


def chosen(found):
    """The largest value so far decides, by its position only: NaN is the largest to it, and does not show."""
    return found.cummax(1).indices.float()


def faint(found):
    return found + 1e-9 * far(found, 1)


@pytest.mark.parametrize("reads", [far, chosen, faint, partial(far, distance=1)])
def test_what_hardly_shows_is_not_taken_for_free(reads):
    model, expected = tiny_model("llama"), free_layers(tiny_model("llama"))
    Reads(model.model.layers[1], reads)
    assert free_layers(model) == expected and len(expected) == 5


def test_a_layer_that_sees_some_of_the_tokens_is_not_free():
    """As an expert that is a linear layer: which tokens its outputs are of is not known."""

    def add(module, args, output):
        return output + torch.cat([module.expert(args[0][:1]), module.expert(args[0][1:])])

    model, expected = tiny_model("llama"), free_layers(tiny_model("llama"))
    layer = model.model.layers[1]
    layer.expert = nn.Linear(16, 16)
    layer.register_forward_hook(add)
    assert free_layers(model) == expected


def test_a_model_that_cannot_take_nan_is_computed_whole():
    def refusing(module, args):
        assert torch.isfinite(args[0]).all()

    model = tiny_model("llama")
    model.model.norm.register_forward_pre_hook(refusing)
    find_free_layers(model)
    assert model not in answer_rows._FREE
    answer_logits(model, collate(FORGET))


@pytest.mark.parametrize("name", ["self_attn.v_proj", "self_attn.k_proj"])
def test_a_layer_that_is_not_free_would_show(name):
    model, batch = tiny_model("llama"), collate(FORGET)
    expected = answer_logits(model, batch)[0].log_probs
    answer_rows._FREE[model] = "model.layers.1", [name]
    assert (answer_logits(model, batch)[0].log_probs - expected).abs().max() > 1e-3


def test_other_rows_are_left_out_and_finite():
    model, batch = tiny_model("llama"), collate(FORGET)
    mask, _ = shift(batch.labels)
    find_free_layers(model)
    seen = {}
    down = model.model.layers[1].mlp.down_proj
    inner = down.forward
    down.forward = lambda x: seen.setdefault("computed", inner(x))
    down.register_forward_hook(lambda _, args, output: seen.update(output=output))
    with at_answers(base_of(model), mask), torch.no_grad():
        model(**batch.inputs)
    assert len(seen["computed"]) == int(mask.sum()) < mask.numel()
    assert seen["output"].shape[:2] == mask.shape and torch.isfinite(seen["output"]).all()
    assert torch.equal(seen["output"][mask], seen["computed"])
    assert "forward" in vars(down)


def test_running_text_is_computed_whole():
    model = tiny_model("llama")
    find_free_layers(model)
    whole = torch.ones(2, 6, dtype=torch.bool)
    with at_answers(model, whole):
        assert "forward" not in vars(model.model.layers[1].mlp.up_proj)


def test_a_loaded_model_has_been_tried_and_a_broken_one_is_still_refused(model_folder, tmp_path):
    cpu = torch.device("cpu")
    model = models.load_model(str(model_folder), dtype=torch.float32, device=cpu)
    assert len(answer_rows._FREE[model][1]) == 5
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(NumericError):
        models.load_model(str(tmp_path / "broken"), dtype=torch.float32, device=cpu)
