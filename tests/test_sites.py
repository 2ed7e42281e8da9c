"""Sites, the tap and the shared forward pass, against what transformers' own layers and whole outputs give."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Llama4TextConfig,
    PreTrainedModel,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.pytorch_utils import Conv1D

from architectures import GROUPED
from conftest import VOCAB, random_examples, tiny_llama
from lorasure.data.examples import collate
from lorasure.errors import UsageError
from lorasure.forward import answer_hidden, answer_logits, answer_records
from lorasure.losses.tokens import shift
from lorasure.sites import Site, all_sites, find_sites, weight
from lorasure.tap import TAPPED_EXPERTS, tap
from reference_gradients import KINDS, build

EXAMPLES = random_examples(5, vocab=256)  # without padding tokens, whose embeddings are zero


def tiny_gpt_oss() -> PreTrainedModel:
    """Experts stored as (in, out), with biases and interleaved gates."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = GptOssConfig(
        **GROUPED, rope_parameters=rope, head_dim=4, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    )
    model = GptOssForCausalLM(config).eval().requires_grad_(False)
    model.set_experts_implementation("eager")
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            parameter.data.normal_()
    return model


def names(model: PreTrainedModel, *targets: str, exclude: tuple[str, ...] = ()) -> list[str]:
    return [site.name for site in find_sites(model, targets, exclude)]


@pytest.mark.parametrize(
    ("derived", "is_site"),
    [
        (lambda: FalconLinear(16, 24), True),  # the same product in its own words
        (lambda: DeepseekV4GroupedLinear(16, 24, 8), False),
        (lambda: DeepseekV4GroupedLinear(16, 24, 7), False),  # 7 rows are tried
        (lambda: Llama4Router(Llama4TextConfig(hidden_size=16, num_local_experts=4, num_experts_per_tok=2)), False),
    ],
    ids=["falcon", "groups", "as many groups as rows", "router"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_derives_from_a_linear_one_is_a_site_if_it_gives_the_same_shape(derived, is_site, dtype) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = derived()
    model.to(dtype)
    assert ("model.layers.1.mlp.up_proj" in names(model, "all")) is is_site


@pytest.mark.parametrize("name", KINDS)
def test_all_sites_are_the_linear_maps_but_the_head(name: str) -> None:
    model = build(name)
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    found = all_sites(model)
    assert [s.name for s in found if s.parameter is None] == linear
    assert not any("head" in s.name or "embed" in s.name or "wte" in s.name for s in found)
    assert sum(s.parameter is not None for s in found) == (2 * 2 * 6 if name == "mixtral" else 0)
    assert all(s.size == s.shape[0] * s.shape[1] == weight(model, s).numel() for s in found)


def test_patterns() -> None:
    model = build("llama")
    assert names(model, "all") == [s.name for s in all_sites(model)]
    assert names(model, "q_proj") == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert names(model, "layers.1.*", exclude=("self_attn.*",)) == [
        f"model.layers.1.mlp.{kind}_proj" for kind in ("gate", "up", "down")
    ]
    assert names(model, "*.mlp.*", "[qk]_proj", exclude=("layers.0.*", "down_proj")) == [
        f"model.layers.1.{end}" for end in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj")
    ]
    with pytest.raises(UsageError, match="No linear layer matches 'proj'"):  # the end of a name, not of a word
        names(model, "proj")
    assert not any("lm_head" in name for name in names(model, "*"))


def test_patterns_for_experts() -> None:
    model = build("mixtral")
    one = "model.layers.1.mlp.experts.gate_up_proj[3]"
    assert names(model, one) == names(model, "layers.1.mlp.experts.gate_up_proj[3]") == [one]
    assert len(names(model, "gate_up_proj")) == 12 and len(names(model, "experts")) == 24
    assert len(names(model, "down_proj", exclude=("down_proj[0]",))) == 10


@pytest.mark.parametrize(("targets", "exclude"), [(("q_prjo",), ()), (("all",), ("q_prjo",)), (("all", "q_prjo"), ())])
def test_a_misspelt_pattern_lists_the_choices(targets: tuple, exclude: tuple) -> None:
    with pytest.raises(UsageError) as error:
        names(build("llama"), *targets, exclude=exclude)
    text = str(error.value)
    assert "'q_prjo'" in text and "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in text
    with pytest.raises(UsageError, match="leave no layer"):
        names(build("llama"), "q_proj", exclude=("q_proj",))


def tapped(model: PreTrainedModel, sites: list[Site], forward=None) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """x, y and d of every site for the summed NLL of all examples in one batch."""
    seen: dict[str, list[Tensor]] = {}

    def see(site: Site, x: Tensor, y: Tensor) -> Tensor | None:
        seen[site.name] = [x.detach(), y.detach()]
        return forward(site, x, y) if forward else None

    def back(site: Site, x: Tensor, d: Tensor) -> None:
        assert torch.equal(x, seen[site.name][0])
        seen[site.name].append(d)

    with tap(model, sites, forward=see, backward=back):
        answers, _ = answer_logits(model, collate(EXAMPLES))
        answers.nll_sum.sum().backward()
    return {name: (x, y, d) for name, (x, y, d) in seen.items()}


@pytest.mark.parametrize("name", [*KINDS, "gpt-oss"])
def test_weight_and_tap_agree_with_the_layer(name: str) -> None:
    """y = x W^T + b in the layer's own arithmetic, in the layout (examples, tokens, features)."""
    model = tiny_gpt_oss() if name == "gpt-oss" else build(name)
    sites = all_sites(model)
    tokens = max(len(e) for e in EXAMPLES)
    for site in sites:
        module = model.get_submodule(site.module)
        if site.parameter is None:
            assert weight(model, site).shape == site.shape
            x = torch.randn(3, site.shape[1])
            bias = 0 if module.bias is None else module.bias
            torch.testing.assert_close(module(x), x @ weight(model, site).T + bias)
    for key, (x, y, d) in tapped(model, sites).items():
        site = next(s for s in sites if s.name == key)
        assert x.shape == (5, tokens, site.shape[1]) and y.shape == d.shape == (5, tokens, site.shape[0])
        module = model.get_submodule(site.module)
        bias = getattr(module, "bias", None)
        if site.parameter is not None:
            stored = getattr(module, f"{site.parameter}_bias", None)
            bias = None if stored is None else stored[site.expert]
        routed = x.abs().sum(-1, keepdim=True) > 0
        assert not d[~routed.expand_as(d)].any()
        expected = x @ weight(model, site).T + (0 if bias is None else bias)
        torch.testing.assert_close(y, expected * routed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build_moe", [lambda: build("mixtral"), tiny_gpt_oss])
def test_tapped_experts_give_the_models_own_logits(build_moe) -> None:
    model = build_moe()
    batch = collate(EXAMPLES)
    expected = model(**batch.inputs).logits
    with tap(model, all_sites(model)):
        found = model(**batch.inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert model.get_experts_implementation() == {"": "eager"} and TAPPED_EXPERTS not in ALL_EXPERTS_FUNCTIONS


@pytest.mark.parametrize("name", KINDS)
def test_what_forward_returns_is_added_to_the_output_and_to_nothing_else(name: str) -> None:
    """Adding c x U^T everywhere is the model with W + c U: the same logits, and the same d, so gradients see it too."""
    model, changed = build(name, torch.float64), build(name, torch.float64)
    torch.manual_seed(1)
    sites = all_sites(model)
    updates = {site.name: 0.1 * torch.randn(site.shape, dtype=torch.float64) for site in sites}
    for site in sites:
        stored = changed.get_parameter(f"{site.module}.{site.parameter or 'weight'}").data
        stored = stored if site.expert is None else stored[site.expert]
        stored += updates[site.name].T if site.transposed else updates[site.name]

    def add(site: Site, x: Tensor, y: Tensor) -> Tensor:
        return x @ updates[site.name].T

    found, expected = tapped(model, sites, add), tapped(changed, sites)
    for key, (x, y, d) in expected.items():
        torch.testing.assert_close(found[key][0], x)
        torch.testing.assert_close(found[key][2], d)
        routed = x.abs().sum(-1, keepdim=True) > 0
        torch.testing.assert_close(found[key][1] + (x @ updates[key].T) * routed, y)


def test_a_layer_that_does_not_see_whole_examples_is_refused() -> None:
    model = tiny_llama()
    layer = model.model.layers[0].mlp.down_proj
    site = find_sites(model, ["layers.0.mlp.down_proj"])
    for broken in (lambda t: t[:-1], lambda t: t.flatten(0, 1)[:10], lambda t: t.transpose(0, 1)):
        batch = collate(EXAMPLES)
        handle = model.model.layers[0].mlp.up_proj.register_forward_hook(
            lambda _, args, y, f=broken: layer(f(y)) if f else y  # called in the middle of a pass, on other tokens
        )
        with (
            pytest.raises(
                UsageError, match=r"'model\.layers\.0\.mlp\.down_proj' does not see whole examples .*--exclude"
            ),
            tap(model, site, backward=lambda *_: None),
        ):
            answer_logits(model, batch)
        handle.remove()
    assert not layer._forward_hooks


class Sentinel:
    """Lives as long as the node of the graph that it is hooked to."""

    def __call__(self, gradient: Tensor) -> None:
        return None


@pytest.mark.parametrize("leak", [False, True])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_nothing_keeps_the_graph_after_backward(name: str, leak: bool) -> None:
    """A hook that holds its own output would keep every activation until the garbage collector happens to run."""
    model = build(name)
    sentinels: list[weakref.ref] = []

    def watch(module: nn.Module, args: tuple, y: Tensor) -> None:
        sentinel = Sentinel()
        sentinels.append(weakref.ref(sentinel))
        y.register_hook(sentinel)
        if leak:  # the test can fail
            y.register_hook(lambda d: d.reshape(y.shape))

    gc.collect()
    gc.disable()
    try:
        with tap(model, all_sites(model), forward=lambda *_: None, backward=lambda *_: None):
            handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(watch)  # the bottom of the graph
            answers, _ = answer_logits(model, collate(EXAMPLES))
            loss = answers.nll_sum.sum()
            loss.backward()
            handle.remove()
            assert sentinels[0]() is not None
            del loss, answers
            assert (sentinels[0]() is not None) == leak
    finally:
        gc.enable()


HEADS = {
    "llama": tiny_llama,
    "gpt2": lambda: build("gpt2"),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=4, final_logit_softcapping=0.5)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**GROUPED, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**GROUPED, logits_scaling=8.0)),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", HEADS)
def test_logits_at_answers_are_those_of_the_whole_output(name: str, side: str) -> None:
    """Scaling and soft-capping after the head included; `reference` are the same through stored hidden states."""
    torch.manual_seed(0)
    model = HEADS[name]().eval().requires_grad_(False)
    batch = collate(EXAMPLES, side)
    whole = model(**batch.inputs).logits
    expected = whole[shift(batch.labels)[0]]
    raw = model.get_output_embeddings()(model.base_model(**batch.inputs).last_hidden_state)
    assert torch.allclose(raw, whole) == (name in ("llama", "gpt2"))  # the others do change logits after the head
    hidden = answer_hidden(model, batch)
    assert hidden.shape == (len(expected), 16) and expected.shape[1] == VOCAB
    answers, none = answer_logits(model, batch)
    assert none is None
    torch.testing.assert_close(answers.logits, expected)
    answers, reference = answer_logits(model, batch, hidden[2:])
    torch.testing.assert_close(answers.logits, expected)
    torch.testing.assert_close(answers.logits_of(reference), expected[2:])
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_reference_logits_stay_those_of_the_original_when_the_model_changes() -> None:
    model, batch = tiny_llama(), collate(EXAMPLES)
    hidden = answer_hidden(model, batch)
    original, _ = answer_logits(model, batch)
    model.model.layers[1].mlp.down_proj.weight.data += 1
    changed, reference = answer_logits(model, batch, hidden)
    torch.testing.assert_close(changed.logits_of(reference), original.logits)
    assert not torch.allclose(changed.logits, original.logits, rtol=0.01)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_records_do_not_depend_on_the_token_budget(name: str) -> None:
    model = build(name)
    steps: list[int] = []
    records = answer_records(model, EXAMPLES, 1, steps.append)
    assert sum(steps) == len(EXAMPLES) and len(steps) == len(EXAMPLES)
    for example, record in zip(EXAMPLES, records, strict=True):  # each against one plain forward pass
        ids = torch.tensor(example.input_ids)
        log_probs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)[example.answer_start - 1 :]
        targets = ids[example.answer_start :]
        assert record.tokens == example.answer_length == len(targets)
        assert record.nll == pytest.approx(-float(log_probs.gather(1, targets[:, None]).sum()), rel=1e-5)
        assert record.mean_nll == pytest.approx(record.nll / len(targets))
        assert record.correct == tuple((log_probs.argmax(-1) == targets).tolist())
    for budget in (30, 1000):
        for one, other in zip(records, answer_records(model, EXAMPLES, budget), strict=True):
            assert one.nll == pytest.approx(other.nll, rel=1e-5) and one.correct == other.correct
