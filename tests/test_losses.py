"""Losses against formulas written out again token by token, their gradients, and the contract of every registry row."""

import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from lorasure.data.examples import IGNORED, Example, collate, pack
from lorasure.errors import UsageError
from lorasure.losses.bigrams import Bigrams
from lorasure.losses.forget import FORGET_LOSSES, INPUTS, bga, bigram, bind, catnip, hyperparameters, ihl, needs, npo
from lorasure.losses.retain import RETAIN_LOSSES, kl
from lorasure.losses.tokens import Answers, answers, batch_answers, shift

VOCAB = 7
LABELS = torch.tensor(
    [
        [IGNORED, IGNORED, 3, 5, 1, 0],
        [IGNORED, 2, IGNORED, IGNORED, 6, IGNORED],
        [4, 4, 2, IGNORED, IGNORED, IGNORED],  # the first token is never predicted
    ]
)
PREVIOUS = [[2, 3, 5, 1], [1, 3], [4, 4]]  # the token before each answer token
EXAMPLES = [Example((6, 2, 3, 5, 1, 0), 2), Example((1, 2, 4), 1), Example((4, 4, 2), 0)]
KEPT = [Example((0, 2, 3, 3, 5), 2), Example((2, 3, 6), 0)]  # the first token is no answer of anything
REFUSAL_LABELS = torch.tensor([[IGNORED, 1, 1, 2], [IGNORED, IGNORED, 0, IGNORED], [IGNORED, 3, 3, 3]])
FUNCTIONS = {f"forget-{name}": row.function for name, row in FORGET_LOSSES.items()} | {
    f"retain-{name}": row.function for name, row in RETAIN_LOSSES.items() if row.function
}


def logits_for(labels, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*labels.shape, VOCAB, generator=generator, dtype=torch.float64).mul(2).to(dtype)


def constants():
    """The inputs that are numbers of the original model."""
    original = logits_for(LABELS, 9)[shift(LABELS)[0]]
    reference = torch.tensor([3.0, 9.0, 4.0], dtype=torch.float64)
    found = {"reference": reference, "refusal_reference": reference - 1.5, "original_states": original}
    return found | {"bigrams": Bigrams.of(KEPT, VOCAB)}


def call(function, logits, refusal_logits, labels=LABELS, refusal_labels=REFUSAL_LABELS, **settings):
    known = replace(answers(logits, labels), previous=torch.tensor([s for row in PREVIOUS for s in row]))
    available = constants() | {"answers": known, "refusals": answers(refusal_logits, refusal_labels)}
    available["original_states"] = available["original_states"].to(available["answers"].logits.dtype)
    return function(**{name: available[name] for name in needs(function)}, **settings)


# --- the reference: plain Python over tokens --------------------------------------------------------------------------


def token_rows(logits, labels):
    """For each example, a list of (probabilities, target), in Python floats."""
    found = []
    for row_logits, row_labels in zip(logits.tolist(), labels.tolist(), strict=True):
        tokens = []
        for t in range(1, len(row_labels)):
            if row_labels[t] == IGNORED:
                continue
            scores = row_logits[t - 1]
            total = sum(math.exp(x) for x in scores)
            tokens.append(([math.exp(x) / total for x in scores], row_labels[t]))
        found.append(tokens)
    return found


def nll_of(tokens):
    return [-math.log(p[y]) for p, y in tokens]


def average(values):
    return sum(values) / len(values)


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


def after(previous):
    """The bigram model of KEPT, by its definition."""
    pairs = [
        pair
        for e in KEPT
        for pair in list(zip(e.input_ids, e.input_ids[1:], strict=False))[max(0, e.answer_start - 1) :]
    ]
    found = [1 / VOCAB] * VOCAB
    for seen in (Counter(t for _, t in pairs), Counter(t for s, t in pairs if s == previous)):
        total, kinds = sum(seen.values()), max(1, len(seen))
        found = [(seen[t] + kinds * share) / (total + kinds) for t, share in enumerate(found)]
    return found


def by_hand(name, tokens, previous, refusal, reference, refusal_reference, original):
    forget_nll = nll_of(tokens)
    if name in ("forget-ga", "forget-gd", "forget-kl"):
        return -average(forget_nll)
    if name == "forget-npo":
        return -2 / 0.1 * log_sigmoid(0.1 * (sum(forget_nll) - reference))
    if name == "forget-simnpo":
        return -2 / 4.5 * log_sigmoid(4.5 * average(forget_nll))
    if name == "forget-ihl":
        return average([1 + p[y] - max(q for v, q in enumerate(p) if v != y) for p, y in tokens])
    if name == "forget-bga":
        return average([p[y] + 0.1 * max(0, math.log(p[y] * len(p))) for p, y in tokens])
    if name == "forget-bigram":
        known = [(p, y, after(s)) for (p, y), s in zip(tokens, previous, strict=True)]
        apart = [sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)) for p, _, q in known]
        return average(
            [p[y] + 0.1 * (d + max(0, 2 + math.log(p[y] / q[y]))) for (p, y, q), d in zip(known, apart, strict=True)]
        )
    if name == "forget-dpo":
        chosen, rejected = -(sum(nll_of(refusal)) - refusal_reference), -(sum(forget_nll) - reference)
        return -log_sigmoid(0.1 * chosen - 0.1 * rejected)
    if name == "forget-idk":
        return average(nll_of(refusal))
    if name == "forget-catnip":
        return average([-2 * log_sigmoid(-math.log(p[y] / (1 - p[y]))) for p, y in tokens])
    if name == "retain-nll":
        return average(forget_nll)
    assert name == "retain-kl", f"write the formula of {name} here"
    pairs = zip(tokens, original, strict=True)
    return average([sum(q * math.log(q / p) for p, q in zip(ps, qs, strict=True)) for (ps, _), (qs, _) in pairs])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_is_the_formula(name):
    logits, refusal_logits, fixed = logits_for(LABELS, 1), logits_for(REFUSAL_LABELS, 2), constants()
    rows = zip(
        token_rows(logits, LABELS),
        PREVIOUS,
        token_rows(refusal_logits, REFUSAL_LABELS),
        fixed["reference"].tolist(),
        fixed["refusal_reference"].tolist(),
        token_rows(logits_for(LABELS, 9), LABELS),
        strict=True,
    )
    expected = torch.tensor([by_hand(name, *row) for row in rows], dtype=torch.float64)
    rtol = 1e-6 if name == "forget-bigram" else 1e-10  # bigrams are float32
    torch.testing.assert_close(call(FUNCTIONS[name], logits, refusal_logits), expected, rtol=rtol, atol=1e-12)
    single = call(FUNCTIONS[name], logits.float(), refusal_logits.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "forget-catnip"])
def test_gradient_is_the_slope(name):
    inputs = [logits_for(LABELS, 1).requires_grad_(), logits_for(REFUSAL_LABELS, 2).requires_grad_()]
    used = needs(FUNCTIONS[name])
    for tensor, input_name in zip(inputs, ("answers", "refusals"), strict=True):
        tensor.requires_grad_(input_name in used)
    assert torch.autograd.gradcheck(lambda a, b: call(FUNCTIONS[name], a, b), inputs)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_catnip_gradient_is_the_published_weight(beta):
    """Its 1 - p is a constant, so finite differences do not apply: d loss / d log p = 2 p^b / (p^b + (1 - p)^b)."""
    logits = logits_for(LABELS, 1).requires_grad_()
    got = torch.autograd.grad(catnip(answers(logits, LABELS), beta=beta).sum(), logits)[0]
    plain = logits.detach().clone().requires_grad_()
    batch = answers(plain, LABELS)
    p = batch.log_probs.detach().exp()
    weighted = batch.mean(2 * p**beta / (p**beta + (1 - p) ** beta) * batch.log_probs)
    torch.testing.assert_close(got, torch.autograd.grad(weighted.sum(), plain)[0])


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_finite_value_per_example_with_a_gradient(name, dtype):
    logits, refusal = (logits_for(x, i, dtype).requires_grad_() for i, x in enumerate((LABELS, REFUSAL_LABELS)))
    values = call(FUNCTIONS[name], logits, refusal)
    assert values.shape == (len(LABELS),)
    assert values.isfinite().all()
    values.float().sum().backward()
    gradients = [x.grad for x in (logits, refusal) if x.grad is not None]
    assert gradients and all(g.isfinite().all() and g.any() for g in gradients)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_padding_and_masked_logits_do_not_matter(name):
    logits, refusal = logits_for(LABELS, 1), logits_for(REFUSAL_LABELS, 2)
    expected = call(FUNCTIONS[name], logits, refusal)
    noisy = [x.masked_fill(~shift(y)[0][..., None], 50.0) for x, y in ((logits, LABELS), (refusal, REFUSAL_LABELS))]
    torch.testing.assert_close(call(FUNCTIONS[name], *noisy), expected, rtol=0, atol=0)
    for left, right in ((3, 0), (0, 2)):
        wide = [torch.nn.functional.pad(x, (0, 0, left, right), value=7.0) for x in (logits, refusal)]
        labels = [torch.nn.functional.pad(y, (left, right), value=IGNORED) for y in (LABELS, REFUSAL_LABELS)]
        if left:  # a real first token, now with a token before it: still not part of the answer
            labels[0][2, left] = IGNORED
        torch.testing.assert_close(call(FUNCTIONS[name], *wide, *labels), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("size", [30.0, 1000.0, -1000.0])
def test_extreme_probabilities_stay_finite(name, size):
    """Targets with p -> 1 (loses every digit of 1 - p in float32) and p -> 0."""
    tensors = []
    for labels in (LABELS, REFUSAL_LABELS):
        mask, targets = shift(labels)
        logits = logits_for(labels, 3, torch.float32)
        at = mask.nonzero(as_tuple=True)
        logits[(*at, targets)] += size
        tensors.append(logits.requires_grad_())
    values = call(FUNCTIONS[name], *tensors)
    values.sum().backward()
    assert values.isfinite().all()
    assert all(x.grad.isfinite().all() for x in tensors if x.grad is not None)


@pytest.mark.parametrize("row", [*FORGET_LOSSES.values(), *RETAIN_LOSSES.values()], ids=lambda row: row.title)
def test_rows_are_documented(row):
    assert row.title and re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", row.paper)
    assert row.function is None or len(row.function.__doc__) > 40


@pytest.mark.parametrize("name", FORGET_LOSSES)
def test_forget_losses_ask_for_known_inputs_only(name):
    row = FORGET_LOSSES[name]
    assert row.retain in RETAIN_LOSSES
    assert needs(row.function) and set(needs(row.function)) <= set(INPUTS)


def test_needs_and_settings_are_read_off_the_signature():
    assert needs(npo) == ("answers", "reference")
    assert needs(FORGET_LOSSES["idk"].function) == ("refusals",)
    assert needs(kl) == ("answers", "original_states")
    assert hyperparameters(FORGET_LOSSES["simnpo"].function) == {"beta": 4.5, "delta": 0.0}
    assert hyperparameters(ihl) == {}


def test_bind_fixes_what_was_given_and_keeps_other_defaults():
    batch, reference = answers(logits_for(LABELS, 1), LABELS), constants()["reference"]
    bound = bind("npo", npo, {"beta": 0.3})
    torch.testing.assert_close(bound(answers=batch, reference=reference), npo(batch, reference, beta=0.3))
    unset = bind("npo", npo, {"beta": None, "delta": None})
    torch.testing.assert_close(unset(answers=batch, reference=reference), npo(batch, reference))
    assert needs(bound) == ("answers", "reference")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ihl", {"beta": 0.1}, "beta is not a setting of 'ihl'; its settings: none."),
        ("npo", {"delta": 0.1}, "delta is not a setting of 'npo'; its settings: beta."),
        ("npo", {"beta": 0.0}, "beta must be above 0, got 0.0"),
        ("npo", {"beta": -1.0}, "beta must be above 0, got -1.0"),
        ("simnpo", {"delta": math.nan}, "delta must be finite, got nan"),
    ],
)
def test_bind_refuses(name, settings, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        bind(name, FORGET_LOSSES[name].function, settings)


# --- properties of single losses --------------------------------------------------------------------------------------


def test_npo_tends_to_gradient_ascent_as_beta_vanishes():
    gradients = []
    for loss in (lambda a: npo(a, constants()["reference"], beta=1e-9), lambda a: -a.nll_sum):
        logits = logits_for(LABELS, 1).requires_grad_()
        gradients.append(torch.autograd.grad(loss(answers(logits, LABELS)).sum(), logits)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)


def test_ihl_sees_a_rival_that_ties_with_the_target():
    logits = torch.tensor([[[1.0, 1.0, -2.0], [0.0, 0.0, 0.0]]])
    assert ihl(answers(logits, torch.tensor([[IGNORED, 1]]))).item() == 1.0


def test_bga_pushes_likely_tokens_fully_rare_ones_by_beta_and_rarer_than_chance_only_by_their_probability():
    log_p = torch.tensor([math.log(0.9), math.log(0.2), math.log(0.01)], dtype=torch.float64, requires_grad=True)
    rest = (1 - log_p.detach().exp()).log()  # two tokens of a vocabulary of 3 share what the first leaves
    logits = torch.stack([log_p, rest - math.log(2), rest - math.log(2)], dim=-1)[None]
    labels = torch.tensor([[IGNORED, 0, 0, 0]])
    padded = torch.cat([logits, torch.zeros(1, 1, 3)], dim=1)
    for delta, pushed in ((0.0, [True, False, False]), (1.0, [True, True, False]), (9.0, [True, True, True])):
        loss = bga(answers(padded, labels), beta=0.5, delta=delta).sum() * 3
        got = torch.autograd.grad(loss, log_p, retain_graph=True)[0]
        p = log_p.detach().exp()
        # d log p / d logit = 1 - p
        expected = (p + 0.5 * torch.tensor(pushed)) * (1 - p)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_bigrams_add_up_to_one_and_after_an_unseen_token_comes_what_comes_at_all():
    bigrams = Bigrams.of(KEPT, VOCAB)
    found = bigrams.log_probs(torch.arange(VOCAB)).exp()
    torch.testing.assert_close(found.sum(-1), torch.ones(VOCAB))
    torch.testing.assert_close(found[6], bigrams.often)
    assert found.min() > 0 and found[2].argmax() == 3  # 2 was followed by 3 twice, and by nothing else


def test_bigram_rests_where_a_model_says_what_the_bigrams_say():
    """But for p: the truth, likelier by delta than wanted, is pushed on by beta until it is that much below."""
    previous = torch.tensor([s for row in PREVIOUS for s in row])
    bigrams = Bigrams.of(KEPT, VOCAB)
    states = bigrams.log_probs(previous).double().requires_grad_()
    known = Answers(states, torch.tensor([3, 5, 1, 0, 2, 6, 4, 2]), torch.arange(8), 8, previous=previous)
    for delta, slope in ((-1.0, 0.0), (1.0, 0.5)):
        p = known.log_probs.detach().exp()
        got = torch.autograd.grad(bigram(known, bigrams, beta=0.5, delta=delta).sum(), states, retain_graph=True)[0]
        expected = (p + slope) * (1 - p)  # d log p / d logit = 1 - p
        torch.testing.assert_close(got.gather(1, known.targets[:, None])[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_kl_is_zero_at_the_original_and_allows_ruled_out_tokens():
    logits = logits_for(LABELS, 1)
    logits[..., 4] = -math.inf  # in no answer of the first two rows
    batch = answers(logits[:2].requires_grad_(), LABELS[:2])
    values = kl(batch, batch.logits)
    torch.testing.assert_close(values, torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match=r"expected original_states \(tokens, d\) = \(6, 7\), got \(5, 7\)"):
        kl(batch, batch.logits[1:])


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_shift_marks_the_position_before_each_answer_token():
    mask, targets = shift(LABELS)
    assert mask.int().tolist() == [[0, 1, 1, 1, 1, 0], [1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert targets.tolist() == [3, 5, 1, 0, 2, 6, 4, 2]


def test_answers_of_packed_rows_are_those_of_padded_ones():
    """The token before each too; by other functions than those that place examples in rows."""
    for batch in (collate(EXAMPLES), pack(EXAMPLES, 16)):
        targets = shift(batch.labels)[1]
        found = batch_answers(torch.zeros(len(targets), 1), batch)
        assert found.targets.tolist() == [3, 5, 1, 0, 2, 4, 4, 2] and found.lengths.tolist() == [4, 2, 2]
        assert (
            found.previous.tolist() == [2, 3, 5, 1, 1, 2, 4, 4]
            and found.example.tolist() == [0] * 4 + [1] * 2 + [2] * 2
        )
    assert [part.previous.tolist() for part in found.split([1, 2])] == [[2, 3, 5, 1], [1, 2, 4, 4]]


@pytest.mark.parametrize("sizes", [[1, 2], [2, 1], [0, 3], [1, 1, 1], [3, 0, 0]])
def test_split_gives_the_answers_of_consecutive_rows(sizes):
    logits, first = logits_for(LABELS, 1), 0
    parts = answers(logits, LABELS).split(sizes)
    assert [part.count for part in parts] == sizes
    for part, size in zip(parts, sizes, strict=True):
        expected = answers(logits[first : first + size], LABELS[first : first + size])
        assert all(torch.equal(getattr(part, f), getattr(expected, f)) for f in ("logits", "targets", "example"))
        first += size


def test_logits_are_raised_to_float32_once_and_float64_stays():
    logits = logits_for(LABELS, 1)
    assert answers(logits.bfloat16(), LABELS).logits.dtype == torch.float32
    assert answers(logits, LABELS).nll_sum.dtype == torch.float64


def test_wrong_inputs_are_named():
    logits = logits_for(LABELS, 1)
    empty = LABELS.clone()
    empty[1] = IGNORED
    with pytest.raises(ValueError, match="example 1 of 3 has no answer token"):
        answers(logits, empty)
    with pytest.raises(ValueError, match=r"expected logits \(b, T, vocab\) and labels \(b, T\)"):
        answers(logits[:, 1:], LABELS)
    with pytest.raises(ValueError, match=r"got \(7, 7\), \(8,\) and \(8,\)"):
        batch_answers(torch.zeros(7, VOCAB), collate(EXAMPLES))
    with pytest.raises(ValueError, match=r"sizes must add up to 3 examples, got \[1, 1\]"):
        answers(logits, LABELS).split([1, 1])
    with pytest.raises(ValueError, match="has no answer token"):
        Answers(torch.zeros(0, VOCAB), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 1)
