"""The loop's options and its guards: schedules, seeds, weight decay, checkpointing, non-finite numbers, memory."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from architectures import tiny_model
from conftest import random_examples, tiny_llama
from lorasure.config import OptimizerSettings
from lorasure.errors import NumericError, ResourceError, UsageError
from lorasure.train import SCHEDULES, fit, learn, learn_steps
from test_train import adapted, prepared, run, settings, trained

# --- schedules, seeds, decay ------------------------------------------------------------------------------------------


def rates(schedule, warmup, steps=10):
    """Learning rates of a run of `steps` steps over one weight."""
    model = nn.Linear(1, 1, bias=False)
    records = []
    options = OptimizerSettings(lr=0.5, schedule=schedule, warmup=warmup)
    examples = random_examples(steps)
    fit(
        model,
        list(learn_steps(examples, epochs=1, batch_size=1, seed=0)),
        lambda model, units: {"learn": model.weight.square().sum()},
        options,
        token_budget=100,
        on_step=records.append,
    )
    return [r["lr"] for r in records]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule_warms_up_to_the_given_rate(schedule):
    found = rates(schedule, warmup=0.2)
    assert found[:3] == pytest.approx([0.0, 0.25, 0.5]) and max(found) == 0.5
    assert rates(schedule, warmup=0.0)[0] == 0.5


def test_the_schedule_after_the_warm_up():
    assert rates("linear", 0.2)[2:] == pytest.approx([0.5 * (10 - i) / 8 for i in range(2, 10)])
    assert rates("constant", 0.2)[2:] == [0.5] * 8
    cosine = rates("cosine", 0.2)
    assert cosine == sorted(cosine[:3]) + sorted(cosine[3:], reverse=True) and cosine[6] == pytest.approx(0.25)


def test_the_same_seed_trains_the_same_factors_bit_by_bit():
    first, second = (trained(run("npo", "kl", epochs=2, batch_size=2)[0]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = trained(run("npo", "kl", epochs=2, batch_size=3)[0])
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_weight_decay_pulls_at_the_trainable_half_only():
    wrapped, steps, _ = prepared()

    def nothing(model, units):
        return {"forget": 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad)}

    before, tails = trained(wrapped), {n: t.clone() for n, t in wrapped.named_buffers() if n.endswith(".tail")}
    others = {n: p.clone() for n, p in wrapped.named_parameters() if not p.requires_grad}
    fit(wrapped, steps, nothing, settings(lr=0.1, weight_decay=0.5), token_budget=10_000)
    for name, value in trained(wrapped).items():
        torch.testing.assert_close(value, (1 - 0.1 * 0.5) * before[name])
    assert tails and all(torch.equal(t, tails[n]) for n, t in wrapped.named_buffers() if n in tails)
    assert all(torch.equal(p, others[n]) for n, p in wrapped.named_parameters() if n in others)


def test_gradients_are_clipped_to_the_norm():
    """Adam divides by |g| + 1e-8: with a gradient of norm 1e-9 its step is a small part of the learning rate."""
    wrapped, steps, objective = prepared()
    records, before = [], trained(wrapped)
    options = settings(max_grad_norm=1e-9, weight_decay=0.0, lr=1e-3)
    fit(wrapped, steps, objective, options, token_budget=10_000, on_step=records.append)
    moved = max(float((value - before[name]).abs().max()) for name, value in trained(wrapped).items())
    assert records[0]["grad_norm"] > 1e-3 and 0 < moved < 2e-4


# --- checkpointing ----------------------------------------------------------------------------------------------------


@contextmanager
def counted(model):
    """One entry for each time that the first adapted layer runs. (The recomputation ends before the last one does.)"""
    calls, name = [], next(n for n, m in model.named_modules() if hasattr(m, "lora_A"))
    handle = model.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def one_step(architecture, checkpointing):
    """(wrapped model, record, calls of a layer) of one step on a model whose dropout would be seen."""
    model = tiny_model(architecture)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attention_dropout") and not isinstance(module.attention_dropout, nn.Module):
            module.attention_dropout = 0.5
    wrapped, records = adapted(model), []
    steps = list(learn_steps(random_examples(4), epochs=1, batch_size=4, seed=0))
    options = settings(gradient_checkpointing=checkpointing, weight_decay=0.0)
    torch.manual_seed(1)
    with counted(wrapped.get_base_model()) as calls:
        fit(wrapped, steps, learn, options, token_budget=1000, on_step=records.append)
    return wrapped, records[0], len(calls)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "phi", "mixtral", "gpt-oss"])
def test_checkpointing_gives_the_same_step_without_dropout(architecture):
    plain, expected, once = one_step(architecture, False)
    saving, found, twice = one_step(architecture, True)
    assert (once, twice) == (1, 2)  # the layer did run again in the backward pass
    assert found["learn"] == pytest.approx(expected["learn"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    for name, value in trained(plain).items():
        torch.testing.assert_close(trained(saving)[name], value, atol=1e-5, rtol=0)
    assert not any(module.training for module in saving.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in saving.modules())


def test_the_dropout_of_this_test_would_be_seen():
    model = tiny_model("gpt2")
    ids = torch.arange(12)[None]
    assert not torch.equal(model(input_ids=ids).logits, model.train()(input_ids=ids).logits)


def test_a_model_without_checkpointing_is_named():
    steps = list(learn_steps(random_examples(1), epochs=1, batch_size=1, seed=0))
    with pytest.raises(UsageError, match="--gradient-checkpointing: Linear does not support it"):
        fit(nn.Linear(1, 1), steps, learn, settings(gradient_checkpointing=True), token_budget=10)


# --- guards -----------------------------------------------------------------------------------------------------------


def broken_run(spoil, message, error=NumericError, **options):
    """Train three steps; `spoil(call number, model, sums)` breaks the second. Nothing may change at that step."""
    wrapped, steps, objective = prepared(epochs=3)
    records, states, calls = [], [], []

    def spoiled(model, units):
        calls.append(1)
        return spoil(len(calls), model, objective(model, units))

    def on_step(record):
        records.append(record)
        states.append(trained(wrapped))

    with pytest.raises(error, match=message) as caught:
        fit(wrapped, steps, spoiled, settings(**options), token_budget=10_000, on_step=on_step)
    assert len(records) == 1
    assert all(torch.equal(value, states[0][name]) for name, value in trained(wrapped).items())
    return caught.value


@pytest.mark.parametrize("term", ["forget", "retain"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_is_named(term, value):
    def spoil(call, model, sums):
        return sums | ({term: sums[term] + float(value)} if call == 2 else {})

    broken_run(spoil, f"train: the {term} loss is {value} at step 2")


def test_a_gradient_that_is_not_finite_is_named_and_not_its_neighbours():
    """Clipping would turn one NaN into NaN everywhere and then blame the first parameter."""
    planted = []

    def spoil(call, model, sums):
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        parameter = dict(model.named_parameters())[names[7]]
        planted.append(names[7])
        if call == 2:
            parameter.register_hook(lambda g: torch.full_like(g, float("nan")))
        return sums

    error = broken_run(spoil, "is not finite at step 2")
    assert f"the gradient of {planted[0]} is not finite" in str(error)


def test_a_base_weight_that_is_not_finite_shows_as_the_loss():
    wrapped, steps, objective = prepared()
    before = trained(wrapped)
    wrapped.get_base_model().model.norm.weight[3] = float("nan")
    with pytest.raises(NumericError, match="train: the forget loss is nan at step 1"):
        fit(wrapped, steps, objective, settings(), token_budget=10_000)
    assert all(torch.equal(value, before[name]) for name, value in trained(wrapped).items())


def test_a_penalty_that_is_not_finite_is_named():
    wrapped, steps, objective = prepared()

    def penalty():
        return sum(p.sum() for p in wrapped.parameters() if p.requires_grad) * float("inf")

    with pytest.raises(NumericError, match=r"train: the penalty loss is -?(inf|nan) at step 1"):
        fit(wrapped, steps, objective, settings(), token_budget=10_000, penalty=penalty)


def test_out_of_memory_says_what_to_do():
    def spoil(call, model, sums):
        if call == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sums

    message = r"out of memory at step 2 with --tokens-per-batch 10000\. Halve it .* --gradient-checkpointing true"
    error = broken_run(spoil, message, ResourceError)
    assert error.exit_code == 5


def test_out_of_memory_in_the_optimizer_is_caught_too(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    wrapped, steps, objective = prepared()
    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(ResourceError, match="out of memory at step 1"):
        fit(wrapped, steps, objective, settings(), token_budget=10_000)


def test_training_a_model_without_an_adapter_changes_every_weight():
    model = tiny_llama().requires_grad_(True)
    before = trained(model)
    steps = list(learn_steps(random_examples(4), epochs=2, batch_size=4, seed=0))
    fit(model, steps, learn, settings(), token_budget=1000)
    assert all(not torch.equal(value, before[name]) for name, value in trained(model).items())
