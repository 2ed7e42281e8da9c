"""The loop: what a step computes, against plain forward passes; and the original model as the reference."""

import math

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax, logsigmoid, softmax

from conftest import random_examples, tiny_llama
from lorasure import lora
from lorasure.config import OptimizerSettings
from lorasure.data.examples import collate
from lorasure.forward import answer_records
from lorasure.init.apply import INITS, Evidence, Request, initialise
from lorasure.losses.forget import FORGET_LOSSES
from lorasure.losses.retain import RETAIN_LOSSES
from lorasure.objective import ForgetObjective, ForgetSteps, learn, learn_steps, retain_penalty
from lorasure.sites import all_sites
from lorasure.train import fit

RANK, ALPHA = 2, 4.0
LAMBDA = 0.7
FORGET, RETAIN, REFUSALS = random_examples(5, 1), random_examples(7, 2), random_examples(5, 3)
# Every combination of inputs that a forget loss can have, and both retain losses.
LOSSES = [("ihl", "nll"), ("npo", "kl"), ("dpo", "nll"), ("idk", "kl"), ("kl", "kl"), ("catnip", "none")]
every_loss = pytest.mark.parametrize(("loss", "retain"), LOSSES)


def settings(**changes):
    return OptimizerSettings(
        **{"lr": 1e-2, "epochs": 1, "batch_size": 5, "schedule": "constant", "warmup": 0.0} | changes
    )


def adapted(model, init="pissa"):
    sites = all_sites(model)
    start, _ = initialise(model, sites, INITS[init], lambda _: Evidence(), Request(RANK, ALPHA / RANK), None)
    return lora.attach(model, start, RANK, ALPHA, compensate=init != "lora")


def prepared(loss="ihl", retain="nll", epochs=1, batch_size=5, model=None):
    """(wrapped model with a non-zero start, steps, objective that has observed the original)"""
    model = model or tiny_llama()
    objective = ForgetObjective(FORGET, RETAIN, REFUSALS, FORGET_LOSSES[loss].function, RETAIN_LOSSES[retain].function)
    steps = list(ForgetSteps(objective, epochs=epochs, batch_size=batch_size, pairing="random", seed=0))
    used = [unit.index for step in steps for unit in step if unit.term == "retain"]
    objective.observe_original(model, used, 64)
    return adapted(model), steps, objective


def run(loss="ihl", retain="nll", token_budget=10_000, epochs=1, batch_size=5, **changes):
    """(wrapped model, records) of a short training."""
    wrapped, steps, objective = prepared(loss, retain, epochs, batch_size)
    records = []
    fit(
        wrapped,
        steps,
        objective,
        settings(**changes),
        token_budget=token_budget,
        term_weights={"retain": LAMBDA},
        on_step=records.append,
    )
    return wrapped, records


def trained(wrapped):
    return {name: p.detach().clone() for name, p in wrapped.named_parameters() if p.requires_grad}


def step_by_hand(model, example):
    """Logits (answer tokens, vocab) and targets from a forward pass of this example alone, without padding."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0].double()
    first = max(example.answer_start, 1)
    return logits[first - 1 : -1], torch.tensor(example.input_ids[first:])


def nll(model, example):
    """(NLL in nats, tokens)"""
    logits, targets = step_by_hand(model, example)
    return float(-log_softmax(logits, -1).gather(1, targets[:, None]).sum()), len(targets)


def forget_by_hand(loss, model, original, row):
    answer, length = nll(model, FORGET[row])
    refusal, refusal_length = nll(model, REFUSALS[row])
    if loss == "kl":
        return -answer / length
    if loss == "idk":
        return refusal / refusal_length
    margin = answer - nll(original, FORGET[row])[0]
    if loss == "npo":
        return -2 / 0.1 * float(logsigmoid(torch.tensor(0.1 * margin)))
    if loss == "dpo":
        margin -= refusal - nll(original, REFUSALS[row])[0]
        return -float(logsigmoid(torch.tensor(0.1 * margin)))
    logits, targets = step_by_hand(model, FORGET[row])
    p = softmax(logits, -1)
    own = p.gather(1, targets[:, None])[:, 0]
    if loss == "catnip":
        return float((2 * (1 + own / (1 - own)).log()).mean())
    return float((1 + own - p.scatter(1, targets[:, None], 0).amax(1)).mean())


def retain_by_hand(retain, model, original, row):
    if retain == "nll":
        value, length = nll(model, RETAIN[row])
        return value / length
    (logits, targets), (reference, _) = step_by_hand(model, RETAIN[row]), step_by_hand(original, RETAIN[row])
    return float(kl_div(log_softmax(logits, -1), softmax(reference, -1), reduction="sum")) / len(targets)


# --- what a step is ---------------------------------------------------------------------------------------------------


@every_loss
def test_losses_of_a_step_equal_separate_forward_passes(loss, retain):
    """Of a model that has moved away from the original, forget and retain rows one by one."""
    wrapped, steps, objective = prepared(loss, retain, epochs=2)
    fit(wrapped, steps[:1], objective, settings(), token_budget=10_000)
    original, records = tiny_llama(), []
    expected = {
        "forget": [forget_by_hand(loss, wrapped, original, u.index) for u in steps[1] if u.term == "forget"],
        "retain": [retain_by_hand(retain, wrapped, original, u.index) for u in steps[1] if u.term == "retain"],
    }
    fit(wrapped, steps[1:], objective, settings(), token_budget=40, on_step=records.append)
    for term, values in expected.items():
        if values:
            assert records[0][term] == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-6)
    assert ("retain" in records[0]) == (retain != "none")
    assert abs(records[0].get("retain", 1)) > 1e-4  # the KL term too is far from 0 here


@every_loss
def test_cutting_a_step_changes_nothing_but_the_order_of_summation(loss, retain):
    whole, records = run(loss, retain, epochs=3)
    for token_budget in (1, 45):
        parts, found = run(loss, retain, token_budget, epochs=3)
        assert len(found) == len(records) == 3
        for name, value in trained(whole).items():
            torch.testing.assert_close(trained(parts)[name], value, atol=1e-5, rtol=0)
        for a, b in zip(found, records, strict=True):
            assert a["forget"] == pytest.approx(b["forget"], rel=1e-4)
    start = trained(prepared(loss, retain)[0])
    assert max(float((value - start[name]).abs().max()) for name, value in trained(whole).items()) > 1e-2


def test_a_micro_batch_stays_within_the_budget_although_preferences_bring_two_sequences(monkeypatch):
    wrapped, steps, objective = prepared("dpo", "nll")
    seen = []

    def counting(model, units):
        seen.append(collate([e for unit in units for e in unit.sequences]).input_ids.numel())
        return objective(model, units)

    fit(wrapped, steps, counting, settings(), token_budget=70)
    assert len(seen) > 1 and max(seen) <= 70


def test_the_weight_of_a_term_scales_its_gradient():
    """The gradient is that of forget alone plus lambda times that of retain alone."""
    gradients = {}
    for term in ("forget", "retain"):
        wrapped, steps, objective = prepared("ihl", "nll")
        (objective(wrapped, steps[0])[term] / len(FORGET)).backward()
        gradients[term] = torch.cat([p.grad.flatten() for p in wrapped.parameters() if p.grad is not None])
    expected = gradients["forget"] + LAMBDA * gradients["retain"]
    _, records = run(token_budget=45)
    assert records[0]["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-4)


def test_records_count_tokens_and_name_what_was_measured():
    _, records = run(epochs=2, batch_size=3)
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert all(r.keys() == {"step", "lr", "forget", "retain", "grad_norm", "tokens", "seconds"} for r in records)
    _, steps, _ = prepared(epochs=2, batch_size=3)
    assert [r["tokens"] for r in records] == [sum(len(s) for u in step for s in u.sequences) for step in steps]


# --- the original model as the reference ------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["npo", "dpo"])
def test_references_are_the_original_models(loss):
    """Although the adapter has a non-zero start: at the start the model's own NLL is the reference."""
    wrapped, steps, objective = prepared(loss, "kl")
    original = tiny_llama()
    for name, examples in (("reference", FORGET), ("refusal_reference", REFUSALS)):
        if name in objective.inputs:
            expected = torch.tensor([nll(original, e)[0] for e in examples])
            torch.testing.assert_close(objective.constants[name], expected, atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        sums = objective(wrapped, steps[0])
    at_zero_margin = (2 / 0.1 if loss == "npo" else 1) * math.log(2)
    assert float(sums["forget"]) / len(FORGET) == pytest.approx(at_zero_margin, rel=1e-4)
    assert abs(float(sums["retain"])) < 1e-4
    without = lora.attach(
        tiny_llama(), lora.trained_factors(wrapped, all_sites(original)), RANK, ALPHA, compensate=False
    )
    with torch.no_grad():
        assert float(objective(without, steps[0])["retain"]) > 0.1  # a start that is not compensated shows


def test_the_original_states_of_kl_are_the_original_models():
    seen = {}

    def watching(answers, original_states):
        seen["logits"], seen["original"] = answers.logits, answers.logits_of(original_states)
        return RETAIN_LOSSES["kl"].function(answers, original_states)

    wrapped, steps, objective = prepared("ihl", "kl", epochs=2)
    fit(wrapped, steps[:1], objective, settings(), token_budget=1000)
    objective.retain_function = watching
    with torch.no_grad():
        objective(wrapped, steps[1])
    rows = [u.index for u in steps[1] if u.term == "retain"]
    expected = torch.cat([step_by_hand(tiny_llama(), RETAIN[row])[0] for row in rows]).float()
    torch.testing.assert_close(seen["original"], expected, atol=1e-4, rtol=1e-4)
    assert float((seen["logits"] - expected).abs().max()) > 1e-2


# --- it works ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def memorised():
    """A model that knows both sets by heart, as a state dict."""
    model = tiny_llama(hidden_size=32, intermediate_size=48)
    model.requires_grad_(True)
    steps = list(learn_steps([*FORGET, *RETAIN], epochs=40, batch_size=12, seed=0))
    fit(model, steps, learn, settings(lr=2e-2), token_budget=10_000)
    return model.requires_grad_(False).state_dict()


def probability(model, examples):
    """Mean over examples of exp(-NLL per token)."""
    return sum(math.exp(-r.mean_nll) for r in answer_records(model, examples, 1000)) / len(examples)


@pytest.mark.parametrize("loss", ["ihl", "npo"])
def test_forgetting_forgets_and_keeps(memorised, loss):
    model = tiny_llama(hidden_size=32, intermediate_size=48)
    model.load_state_dict(memorised)
    assert probability(model, FORGET) > 0.8 and probability(model, RETAIN) > 0.8
    wrapped, steps, objective = prepared(loss, "nll", epochs=30, model=model)
    assert probability(wrapped, FORGET) > 0.8  # not the start forgets
    fit(wrapped, steps, objective, settings(lr=1e-2, schedule="linear", warmup=0.1), token_budget=10_000)
    assert probability(wrapped, FORGET) < 0.2 and probability(wrapped, RETAIN) > 0.8


def test_learning_lowers_the_loss_of_every_example():
    model = tiny_llama().requires_grad_(True)
    records = []
    steps = list(learn_steps(FORGET, epochs=10, batch_size=2, seed=0))
    assert [sorted(u.index for step in steps[3 * e : 3 * e + 3] for u in step) for e in range(10)] == [
        [0, 1, 2, 3, 4]
    ] * 10
    fit(model, steps, learn, settings(), token_budget=100, on_step=records.append)
    assert records[-1]["learn"] < 0.5 * records[0]["learn"] and not model.training


# --- the penalty ------------------------------------------------------------------------------------------------------


def test_the_penalty_equals_its_formula_and_is_trained_on():
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(n, 2, generator=generator), torch.randn(n, 3, generator=generator)) for n in (4, 6)]
    expected = 0.0
    for b, p in pairs:
        for i in range(2):
            for j in range(3):
                expected += 0.5 * sum(float(b[o, i] * p[o, j]) for o in range(len(b))) ** 2
    assert float(retain_penalty(pairs)) == pytest.approx(expected, rel=1e-5)
    assert float(retain_penalty(iter(pairs))) == pytest.approx(expected, rel=1e-5)
    wrapped, steps, objective = prepared(epochs=4)
    sites, records = all_sites(tiny_llama()), []

    def penalty():
        return retain_penalty((lora.trainable_b(wrapped, s), torch.eye(s.shape[0])) for s in sites)

    before = 0.5 * sum(float(f.B.square().sum()) for f in lora.trained_factors(wrapped, sites).values())
    fit(wrapped, steps, objective, settings(), token_budget=30, penalty=penalty, on_step=records.append)
    assert records[0]["penalty"] == pytest.approx(before, rel=1e-5)  # once a step, however the step is cut
    assert records[-1]["penalty"] < 0.99 * before


def test_what_a_launcher_leaves_in_the_environment_does_not_change_a_step(monkeypatch):
    """`accelerate launch --mixed_precision bf16`, with or without gradients to be accumulated: the step is ours."""
    (_, plain), environment = run(), {"MIXED_PRECISION": "bf16", "GRADIENT_ACCUMULATION_STEPS": "4"}
    for name, value in environment.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    _, launched = run()
    assert [r["grad_norm"] for r in launched] == [r["grad_norm"] for r in plain]


def test_steps_are_made_when_they_are_asked_for():
    """The same each time and in any order of asking, and as many as there are; nothing is kept of them."""
    _, steps, objective = prepared(epochs=3, batch_size=4)
    lazy = ForgetSteps(objective, epochs=3, batch_size=4, pairing="random", seed=0)
    assert len(lazy) == len(steps) == 3 * -(-len(FORGET) // 4)
    assert [lazy[i] for i in reversed(range(len(lazy)))] == steps[::-1]
    assert lazy[0] == lazy[0] and lazy[0] is not lazy[0]
    for outside in (-1, len(lazy)):
        with pytest.raises(IndexError):
            lazy[outside]
