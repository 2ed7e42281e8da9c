"""The loop's options and its guards: schedules, seeds, weight decay, checkpointing, non-finite numbers, memory."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from architectures import tiny_model
from conftest import random_examples, tiny_llama
from lorasure.config import OptimizerSettings
from lorasure.errors import NumericError, ResourceError, UsageError
from lorasure.objective import learn, learn_steps
from lorasure.schedule import SCHEDULES
from lorasure.train import Training, fit
from test_train import LAMBDA, adapted, prepared, run, settings, trained

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


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_only_warms_up_reaches_the_given_rate_at_its_last_step(schedule):
    """Also where that is its first, which would otherwise take a rate of 0."""
    for steps, expected in ((1, [0.5]), (2, [0.0, 0.5]), (3, [0.0, 0.25, 0.5])):
        assert rates(schedule, warmup=1.0, steps=steps) == pytest.approx(expected)


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


# --- float16 ----------------------------------------------------------------------------------------------------------


def gradient_of_a_step(dtype, weight):
    """(gradient of the factors, passes) of one step whose loss is multiplied by `weight`, the base in `dtype`."""
    wrapped, steps, objective = prepared(model=tiny_llama(initializer_range=0.1).to(dtype))
    found, passes = [], []

    def counted_pass(model, units):
        passes.append(1)
        return objective(model, units)

    def on_step(record):
        found.append(torch.cat([p.grad.flatten() for p in wrapped.parameters() if p.grad is not None]))

    weights = {"forget": weight, "retain": weight}
    options = {"token_budget": 10_000, "term_weights": weights, "on_step": on_step}
    fit(wrapped, steps, counted_pass, settings(max_grad_norm=1e9), **options)
    return found[0] / weight, len(passes)


@pytest.mark.parametrize(
    ("exponent", "passes"),
    [
        (-16, 1),  # gradients like those of rows that are known well, which vanish in float16
        (0, 1),
        (12, 2),  # so large that they overflow with the loss scaled
    ],
)
def test_gradients_through_a_float16_base_are_those_through_a_float32_one(exponent, passes):
    expected, once = gradient_of_a_step(torch.float32, 2.0**exponent)
    found, taken = gradient_of_a_step(torch.float16, 2.0**exponent)
    assert torch.cosine_similarity(found, expected, 0) > 0.999
    assert float(found.norm() / expected.norm()) == pytest.approx(1, abs=0.01)
    assert (once, taken) == (1, passes)


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

    more = {"ceilings": options.pop("ceilings", None), "on_step": on_step}
    with pytest.raises(error, match=message) as caught:
        fit(wrapped, steps, spoiled, settings(**options), token_budget=10_000, **more)
    assert len(records) == 1
    assert all(torch.equal(value, states[0][name]) for name, value in trained(wrapped).items())
    return caught.value


@pytest.mark.fault(
    "NaN or infinity in the forget loss or the retain loss only",
    "P4",
    "exit code 4 naming the term and the step; no weight has changed",
    "train.py: _finite_norm does not look at losses",
)
@pytest.mark.parametrize("term", ["forget", "retain"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_is_named(term, value):
    def spoil(call, model, sums):
        return sums | ({term: sums[term] + float(value)} if call == 2 else {})

    broken_run(spoil, f"train: the {term} loss is {value} at step 2")


@pytest.mark.fault(
    "NaN in one gradient",
    "P4",
    "exit code 4 naming the parameter and the step; no weight has changed",
    "train.py: _finite_norm does not look at gradients",
)
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


@pytest.mark.fault(
    "NaN in a base weight after loading",
    "P4",
    "exit code 4 at the first step; no weight has changed",
    "train.py: _finite_norm does not look at losses",
)
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


@pytest.mark.fault(
    "out of memory with a single row",
    "P5",
    "exit code 5 with advice; nothing has changed",
    "memory.py: no limit, so it never ends",
)
def test_out_of_memory_with_a_single_row_says_what_to_do():
    def spoil(call, model, sums):
        if call >= 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sums

    message = r"train, step 2: out of memory with a single row of 12 tokens\. .* --gradient-checkpointing true"
    error = broken_run(spoil, message, ResourceError)
    assert error.exit_code == 5


@pytest.mark.fault(
    "out of memory at a step, after gradients were added",
    "P5",
    "the same step in smaller pieces, recorded; the same result up to rounding",
    "train.py: no zero_grad before an attempt; memory.py: the attempt is not repeated",
)
@pytest.mark.parametrize("failing", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't a")])
def test_out_of_memory_at_a_step_is_the_same_step_in_smaller_pieces(failing):
    """It strikes in the second half of the step's only pass, after backward: gradients are there and must go."""
    expected, records = run("npo", "kl", epochs=3)
    wrapped, steps, objective = prepared("npo", "kl", epochs=3)
    found, guards, widths, failures = [], [], [], []

    def tight(model, units):
        widths.append(len(units))
        sums = objective(model, units)
        if len(found) == 1 and len(units) > 2:
            sum(sums.values()).backward()
            failures.append(1)
            raise failing
        return sums

    options = {"token_budget": 10_000, "term_weights": {"retain": LAMBDA}}
    fit(wrapped, steps, tight, settings(), **options, on_step=found.append, on_guard=guards.append)
    assert len(failures) >= 2 and len(guards) == len(failures) and widths[0] == len(steps[0])
    assert all(g["guard"] == "out of memory" and g["where"] == "train, step 2" for g in guards)
    budgets = [g["tokens_per_batch"] for g in guards]
    assert budgets == sorted(budgets, reverse=True) and len(found) == 3
    for a, b in zip(found, records, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    for name, value in trained(expected).items():
        torch.testing.assert_close(trained(wrapped)[name], value, atol=1e-5, rtol=0)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def spoil(call, model, sums):
        if call == 2:
            raise RuntimeError("shapes do not match")
        return sums

    broken_run(spoil, "shapes do not match", RuntimeError)


# --- divergence -------------------------------------------------------------------------------------------------------


@pytest.mark.fault(
    "the retain loss jumps up", "P4", "exit code 4 naming the step", "train.py: _check_divergence without ceilings"
)
def test_a_retain_loss_that_rises_too_far_stops_the_run():
    def spoil(call, model, sums):
        return sums | ({"retain": sums["retain"] + 5 * 4.0} if call == 2 else {})

    message = r"the retain loss is .* at step 2, more than 3 above the first step's; .* --max-retain-rise"
    assert broken_run(spoil, message, ceilings={"retain": 3.0}).exit_code == 4
    run("ihl", "nll", epochs=3)  # without the jump there is none


@pytest.mark.fault(
    "a gradient explodes", "P4", "exit code 4 naming the step", "train.py: _check_divergence without growth"
)
def test_a_gradient_that_explodes_stops_the_run():
    def spoil(call, model, sums):
        return sums | ({"forget": sums["forget"] * 1e7} if call == 2 else {})

    assert broken_run(spoil, r"the gradient's norm is .* at step 2, .* --max-grad-growth").exit_code == 4
    wrapped, steps, objective = prepared(epochs=3)
    fit(wrapped, steps, objective, settings(max_grad_growth=1e6), token_budget=10_000)


def test_a_gradient_that_is_not_even_clipped_is_no_explosion():
    """At a start where the losses have no slope, as of KL and of SimNPO on text that is not known, all is rounding."""

    wrapped, steps, objective = prepared(epochs=3)
    records = []

    def flat_at_first(model, units):
        return {name: value * (1e-3 if records else 1e-9) for name, value in objective(model, units).items()}

    fit(wrapped, steps, flat_at_first, settings(), token_budget=10_000, on_step=records.append)
    norms = [record["grad_norm"] for record in records]
    assert max(norms[1:]) > 1e4 * norms[0] and max(norms) < settings().max_grad_norm


def test_out_of_memory_in_the_optimizer_is_caught_too(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    wrapped, steps, objective = prepared()
    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(ResourceError, match="step 1: out of memory in the optimizer"):
        fit(wrapped, steps, objective, settings(), token_budget=10_000)


def test_training_a_model_without_an_adapter_changes_every_weight():
    model = tiny_llama().requires_grad_(True)
    before = trained(model)
    steps = list(learn_steps(random_examples(4), epochs=2, batch_size=4, seed=0))
    fit(model, steps, learn, settings(), token_budget=1000)
    assert all(not torch.equal(value, before[name]) for name, value in trained(model).items())


# --- state ------------------------------------------------------------------------------------------------------------


def test_what_a_checkpoint_holds_is_all_that_a_step_changes():
    """Put into a training at another place, it gives the same tensors and numbers, and the same learning rate."""
    wrapped, steps, objective = prepared("npo", "kl", epochs=4)
    taken = []

    class Watch:
        def begin(self, training):
            self.training = training

        def due(self, step):
            return False

        def after_step(self, training, record):
            tensors = {name: t.clone() for name, t in training.tensors().items()}
            taken.append((tensors, training.numbers(), training.scheduler.get_last_lr()))

        def finish(self, training):
            tensors, numbers, rates = taken[1]
            training.restore(tensors, numbers)
            assert training.numbers() == numbers and training.numbers()["largest"] > 0 and numbers["first"]
            assert (
                training.scheduler.get_last_lr() == rates == [group["lr"] for group in training.optimizer.param_groups]
            )
            found = training.tensors()
            assert found.keys() == tensors.keys() and all(torch.equal(t, tensors[name]) for name, t in found.items())

    fit(wrapped, steps, objective, settings(schedule="cosine"), token_budget=10_000, keeper=Watch())
    assert len(taken) == 4 and any(name.startswith("exp_avg_sq|") for name in taken[0][0])
    other, *_ = prepared(epochs=4)
    with pytest.raises(KeyError):
        training = Training.begin(other, settings(), 4, 100)
        training.restore({}, taken[0][1])


def test_a_state_from_a_machine_with_more_gpus_is_restored_and_one_with_fewer_too(monkeypatch):
    """The random states of those that are in both."""
    wrapped, *_ = prepared()
    training, states, put = Training.begin(wrapped, settings(), 4, 100), {i: torch.tensor([i]) for i in range(3)}, {}
    tensors = training.tensors() | {f"random|cuda:{i}": state for i, state in states.items()}
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: put.update({device: state}))
    for here, there in ((2, 3), (3, 3), (5, 3), (0, 3)):
        put.clear()
        monkeypatch.setattr(torch.cuda, "device_count", lambda here=here: here)
        training.restore(tensors, training.numbers())
        assert put == {i: states[i] for i in range(min(here, there))}
