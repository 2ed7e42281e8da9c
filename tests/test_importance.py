"""Measured moments against automatic differentiation of the real weights, one unpadded example at a time."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from architectures import tiny_model
from conftest import random_examples, tiny_llama, write_rows
from lorasure import pipeline
from lorasure.config import ForgetSettings
from lorasure.data.examples import Example, collate
from lorasure.errors import DataError, NumericError, UsageError
from lorasure.importance import collect, measure
from lorasure.importance.collect import Probe, moments
from lorasure.importance.measure import Importance
from lorasure.importance.scores import SCORES
from lorasure.layers import checkpointed, decoder_layers
from lorasure.sites import Site, all_sites, find_sites
from reference_gradients import KINDS, build, full_gradients, nll, of_site, parameter_name, tiny_mixtral

LORA = Probe("lora", rank=3, sigma=0.05, scaling=2.0, seed=7)
SKETCH = dataclasses.replace(LORA, space="sketch")
FULL = dataclasses.replace(LORA, space="full")
PROBES = {"full": FULL, "lora": LORA, "sketch": SKETCH}
EXAMPLES = random_examples(5)
FORMULAS = {
    "fisher": lambda g: g.square().mean(0),
    "variance": lambda g: g.square().mean(0) - g.mean(0).square(),
    "expectation": lambda g: g.mean(0).square(),
    "absolute": lambda g: g.abs().mean(0),
}


def double_factors(probe: Probe, site: Site) -> dict[str, Tensor]:
    return {name: f.double() for name, f in probe.factors(site, torch.device("cpu")).items()}


def lora_gradients(model, sites: list[Site], examples: list[Example]) -> dict[str, dict[str, Tensor]]:
    """Gradients of factors that are really in the model: W + s (B A - B0 A0), which changes no function at (B0, A0)."""
    start = {site.name: double_factors(LORA, site) for site in sites}
    leaves = {(n, f): t.clone().requires_grad_() for n, factors in start.items() for f, t in factors.items()}
    found: dict[str, dict[str, list[Tensor]]] = {site.name: {"A": [], "B": []} for site in sites}
    for example in examples:
        weights = {n: model.get_parameter(n).detach().clone() for n in {parameter_name(site) for site in sites}}
        for site in sites:
            a, b, fixed = leaves[site.name, "A"], leaves[site.name, "B"], start[site.name]
            of_site(site, weights[parameter_name(site)]).add_(LORA.scaling * (b @ a - fixed["B"] @ fixed["A"]))
        grads = torch.autograd.grad(
            nll(model, weights, example), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        for (name, factor), grad in zip(leaves, grads, strict=True):
            found[name][factor].append(grad)
    return {name: {f: torch.stack(g) for f, g in factors.items()} for name, factors in found.items()}


def reference(space: str, model, sites: list[Site]) -> dict[str, dict[str, Tensor]]:
    if space == "lora":
        return lora_gradients(model, sites, EXAMPLES)
    full = full_gradients(model, sites, EXAMPLES)
    if space == "full":
        return {name: {"W": g} for name, g in full.items()}
    factors = {site.name: double_factors(SKETCH, site) for site in sites}
    return {name: {"rows": g @ factors[name]["A"].T, "columns": factors[name]["B"].T @ g} for name, g in full.items()}


def assert_same(left, right, tolerance: float = 1e-5) -> None:
    """All moments equal, relative to the largest of each tensor."""
    assert left.keys() == right.keys()
    for name in left:
        for factor, kept in left[name].items():
            other = right[name][factor]
            assert kept.count == other.count
            for a, b in zip(kept.tensors().values(), other.tensors().values(), strict=True):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()) + 1e-30)


@pytest.mark.parametrize("space", PROBES)
@pytest.mark.parametrize("name", KINDS)
def test_every_score_equals_automatic_differentiation(name: str, space: str) -> None:
    model = build(name, torch.float64)
    sites = all_sites(model)
    measured = moments(model, sites, EXAMPLES, PROBES[space], token_budget=30)
    unreached = 0
    for site, factors in reference(space, model, sites).items():
        unreached += not any(g.any() for g in factors.values())
        for factor, gradients in factors.items():
            for score, formula in FORMULAS.items():
                expected, found = formula(gradients), SCORES[score].function(measured[site][factor]).double()
                scale = float(FORMULAS["fisher"](gradients).max() if score != "absolute" else expected.max())
                assert (found - expected).abs().max() <= 1e-5 * scale, (site, factor, score)
    assert unreached == (4 if name == "mixtral" else 0)  # the expert without tokens, in both layers and both maps


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_unchanged_by_batches_order_and_padding_side(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, torch.float64)
    sites = all_sites(model)
    for probe in PROBES.values():
        one_by_one = moments(model, sites, EXAMPLES, probe, token_budget=1)
        together = moments(model, sites, EXAMPLES, probe, token_budget=1000)
        reverse = moments(model, sites, EXAMPLES[::-1], probe, token_budget=30)
        with monkeypatch.context() as patch:
            patch.setattr(collect, "collate", functools.partial(collate, side="left"))
            left = moments(model, sites, EXAMPLES, probe, token_budget=1000)
        for other in (together, reverse, left):
            assert_same(other, one_by_one)
    with pytest.raises(AssertionError):  # the comparison can fail
        assert_same(moments(model, sites, EXAMPLES[1:] + EXAMPLES[1:2], SKETCH, token_budget=1), one_by_one)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt-oss"])
def test_checkpointed_layers_run_again_and_change_nothing(name: str) -> None:
    model = tiny_model(name, num_hidden_layers=3) if name != "gpt2" else tiny_model(name, n_layer=3)
    sites, calls = all_sites(model), []
    expected = moments(model, sites, EXAMPLES, LORA, token_budget=1000)
    layers = decoder_layers(model)
    handles = [layer.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, layer in enumerate(layers)]
    inner = next(m for m in layers[0].modules() if isinstance(m, torch.nn.Linear | Conv1D))
    handles.append(inner.register_forward_hook(lambda *_: calls.append("inner")))
    with checkpointed(model, True):
        found = moments(model, sites, EXAMPLES, LORA, token_budget=1000)
    assert calls.count("inner") == 2 and [calls.count(i) for i in range(3)] == [1, 1, 1]  # hooks are outside of it
    assert_same(found, expected)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("probe", [LORA, SKETCH])
@pytest.mark.parametrize("elements", [1, 300, 2**18])
def test_how_many_sites_share_their_sums_changes_nothing(probe: Probe, elements: int, monkeypatch) -> None:
    model = build("llama")
    sites = all_sites(model)
    expected = moments(model, sites, EXAMPLES, probe, token_budget=30)
    monkeypatch.setattr(collect, "together_limit", lambda on_cpu: elements)
    found = moments(model, sites, EXAMPLES, probe, token_budget=30)
    assert list(found) == [site.name for site in sites]
    assert_same(found, expected, 1e-6)
    tensors = [t for factors in found.values() for kept in factors.values() for t in kept.tensors().values()]
    assert all(t.is_contiguous() and t.untyped_storage().nbytes() == 4 * t.numel() for t in tensors)


def test_a_layer_that_a_pass_does_not_reach_has_gradients_of_zero_there() -> None:
    """Beside others of its group that are reached."""
    model = build("llama")
    sites, mlp, passes = all_sites(model), model.model.layers[1].mlp, []
    forward, first = mlp.forward, {site.name for site in all_sites(model) if "layers.1.mlp" in site.name}

    def sometimes(x: Tensor) -> Tensor:
        passes.append(len(passes) % 2 == 0)
        return forward(x) if passes[-1] else torch.zeros_like(x)

    mlp.forward = sometimes
    found = moments(model, sites, EXAMPLES, LORA, token_budget=1)
    mlp.forward = forward
    order = sorted(range(len(EXAMPLES)), key=lambda i: (len(EXAMPLES[i]), i))
    taken = {len(EXAMPLES[i]) for i, reached in zip(order, passes, strict=True) if reached}
    alone = moments(model, sites, [e for e in EXAMPLES if len(e) in taken], LORA, token_budget=1)
    assert passes.count(True) == 3
    for name in first:
        for factor, kept in alone[name].items():
            torch.testing.assert_close(found[name][factor].second, kept.second * 3 / 5)
            assert found[name][factor].count == 5


def test_chunks_of_full_gradients_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    sites = all_sites(model)
    whole = moments(model, sites, EXAMPLES, FULL, token_budget=1000)
    monkeypatch.setattr(collect, "FULL_CHUNK", 1)
    assert_same(moments(model, sites, EXAMPLES, FULL, token_budget=1000), whole)


@pytest.mark.parametrize("name", KINDS)
def test_measuring_leaves_the_model_as_it_was(name: str) -> None:
    """A model as a user may hand it over: training mode with dropout, weights that want gradients, its own experts."""
    model = (tiny_mixtral() if name == "mixtral" else tiny_model(name)).train().requires_grad_(True)
    model.lm_head.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    implementation = model.get_experts_implementation()
    ids = torch.arange(12)[None]
    logits = model.eval()(input_ids=ids).logits
    model.train().lm_head.eval()
    sites = all_sites(model)
    measured = moments(model, sites, EXAMPLES, LORA, token_budget=30)
    assert_same(measured, moments(build(name), sites, EXAMPLES, LORA, token_budget=30), 1e-4)  # no dropout in it
    assert model.training and model.base_model.training and not model.lm_head.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.get_experts_implementation() == implementation
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    assert not any(getattr(module, kind) for module in model.modules() for kind in hooks)
    assert torch.equal(model.eval()(input_ids=ids).logits, logits)


def test_the_model_is_restored_after_an_error_too() -> None:
    model = build("mixtral")
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericError):
        moments(model, all_sites(model), EXAMPLES, FULL, token_budget=30)
    assert model.get_experts_implementation() == {"": "eager"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_expert_without_tokens_measures_zero() -> None:
    model = build("mixtral")
    sites = find_sites(model, ["layers.1.mlp.experts.down_proj[5]"])
    (kept,) = moments(model, sites, EXAMPLES, FULL, token_budget=30)[sites[0].name].values()
    assert kept.count == len(EXAMPLES) and kept.mean.shape == sites[0].shape and not kept.second.any()


@pytest.mark.parametrize("probe", [LORA, SKETCH])
def test_without_full_space_nothing_of_the_size_of_a_weight_is_kept(probe: Probe) -> None:
    model = build("llama")
    sites = all_sites(model)
    for site in sites:
        out, features = site.shape
        factors = moments(model, [site], EXAMPLES, probe, token_budget=30)[site.name].values()
        shapes = {tuple(t.shape) for kept in factors for t in kept.tensors().values()}
        assert shapes == {(out, probe.rank), (probe.rank, features)}


def test_a_probe_depends_on_the_seed_and_the_site_alone() -> None:
    sites = all_sites(build("llama"))
    first = LORA.factors(sites[3], torch.device("cpu"))
    assert torch.equal(first["A"], LORA.factors(sites[3], torch.device("cpu"))["A"])
    for other in (
        LORA.factors(sites[4], torch.device("cpu")),
        dataclasses.replace(LORA, seed=8).factors(sites[3], torch.device("cpu")),
    ):
        assert other["A"].shape != first["A"].shape or not torch.equal(other["A"], first["A"])


def importance(space: str = "lora", score: str = "variance", **about: object) -> Importance:
    model = build("llama")
    sites = find_sites(model, ["q_proj", "down_proj"])
    forget, retain = EXAMPLES[:2], EXAMPLES[2:]
    return measure.measure(model, sites, forget, retain, score=score, probe=PROBES[space], token_budget=30, about=about)


@pytest.mark.parametrize("space", PROBES)
def test_a_saved_importance_is_read_back_exactly(space: str, tmp_path: Path) -> None:
    saved = importance(space, model="m", forget="f")
    saved.save(tmp_path / "importance.safetensors")
    loaded = Importance.load(tmp_path / "importance.safetensors")
    assert (loaded.score, loaded.probe, loaded.floor, loaded.about) == ("variance", PROBES[space], None, saved.about)
    for ours, theirs in ((saved.forget, loaded.forget), (saved.retain, loaded.retain)):
        assert ours.keys() == theirs.keys()
        for site in ours:
            for factor, kept in ours[site].items():
                assert kept.count == theirs[site][factor].count
                for name, tensor in kept.tensors().items():
                    assert torch.equal(tensor, theirs[site][factor].tensors()[name])


def test_importance_of_something_else_is_refused_in_one_line_that_names_it(tmp_path: Path) -> None:
    about = {"model": {"files": {"a": "1"}}, "forget": "f", "dtype": "float32"}
    found = importance(**about)
    found.save(tmp_path / "i.safetensors")
    found = Importance.load(tmp_path / "i.safetensors")
    sites = find_sites(build("llama"), ["q_proj"])
    found.check_reusable(sites, about, "variance", LORA)
    found.check_reusable(sites, about, "fisher", LORA)  # every score comes from the same moments
    more = all_sites(build("llama"))
    cases = {
        "another model ": (sites, about | {"model": {"files": {"a": "2"}}}, "variance", LORA),
        "another forget ": (sites, about | {"forget": "g"}, "variance", LORA),
        "another rank ": (sites, about, "variance", dataclasses.replace(LORA, rank=4)),
        "another space ": (sites, about, "variance", SKETCH),
        "another seed ": (sites, about, "variance", dataclasses.replace(LORA, seed=1)),
        "k_proj was not measured": (more, about, "variance", LORA),
    }
    for message, arguments in cases.items():
        with pytest.raises(DataError, match=message) as error:
            found.check_reusable(*arguments)
        assert "\n" not in str(error.value)
    published = dataclasses.replace(found, floor=1e-5)
    published.check_reusable(sites, about, "variance", LORA, paper_code=True)
    with pytest.raises(DataError, match="paper-code for --score variance"):
        published.check_reusable(sites, about, "fisher", LORA, paper_code=True)
    for other, paper_code in ((published, False), (found, True)):
        with pytest.raises(DataError, match="another --compat"):
            other.check_reusable(sites, about, "variance", LORA, paper_code=paper_code)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "absolute", "probe": SKETCH}, "--score absolute cannot be estimated with --space sketch"),
        ({"score": "varience"}, "variance"),
        ({"probe": dataclasses.replace(LORA, space="loar")}, "lora"),
        ({"score": "absolute", "paper_code": True}, "--compat paper-code covers"),
    ],
)
def test_settings_that_do_not_exist_are_refused(changes: dict, message: str) -> None:
    model = build("llama")
    settings = {"score": "variance", "probe": LORA, "token_budget": 30} | changes
    with pytest.raises(UsageError, match=message):
        measure.measure(model, all_sites(model), EXAMPLES, EXAMPLES, **settings)


def test_the_variance_of_one_row_is_refused_and_its_square_is_not() -> None:
    model = build("llama")
    sites = all_sites(model)[:1]
    settings = {"probe": LORA, "token_budget": 30}
    with pytest.raises(UsageError, match=r"--score variance needs 2 rows of each set, it has 1 of the retain set"):
        measure.measure(model, sites, EXAMPLES, EXAMPLES[:1], score="variance", **settings)
    found = measure.measure(model, sites, EXAMPLES, EXAMPLES[:1], score="fisher", **settings)
    with pytest.raises(UsageError, match="needs 2 rows"):
        dataclasses.replace(found, score="variance")


def test_values_that_are_not_finite_are_named_by_row_or_site() -> None:
    model = tiny_llama()
    sites = find_sites(model, ["v_proj"])
    with pytest.raises(NumericError, match=r"moments of site 'model\.layers\.\d\.self_attn\.v_proj'"):
        moments(model, sites, EXAMPLES, dataclasses.replace(LORA, scaling=1e30), token_budget=30)
    model.model.layers[1].mlp.down_proj.weight.data[2, 3] = float("nan")
    with pytest.raises(NumericError, match=r"loss on data\.jsonl:\d is nan"):
        moments(model, sites, EXAMPLES, LORA, token_budget=30)


def test_a_layer_used_twice_per_pass_is_refused() -> None:
    """Its gradient comes in two parts, whose squares do not add up to the square of the sum."""
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    with pytest.raises(UsageError, match="more than once per pass") as error:
        moments(model, all_sites(model), EXAMPLES, LORA, token_budget=30)
    assert "layers.0.mlp.up_proj" in str(error.value)


def test_a_layer_that_is_run_without_gradients_is_refused() -> None:
    """As models do that go through their layers several times and learn from the last time only."""
    model = tiny_llama()
    layer = model.model.layers[1]
    layer.mlp.forward = torch.no_grad()(layer.mlp.forward)
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.gate_proj' is also run without gradients"):
        moments(model, all_sites(model), EXAMPLES, LORA, token_budget=30)


def test_windows_of_another_stride_are_other_examples(model_folder, tmp_path):
    texts = {n: "".join(chr(97 + (i * k) % 26) for i in range(90)) for k, n in ((3, "forget"), (5, "retain"))}
    paths = {name: str(write_rows(tmp_path / f"{name}.jsonl", [{"text": text}])) for name, text in texts.items()}
    given: dict[str, Any] = {"model": str(model_folder), **paths, "init": "vila", "rank": 2, "max_length": 24}
    first = pipeline.importance_command(ForgetSettings(**given, retain_rows=2, out=str(tmp_path / "first")))
    again = {"importance": str(first), "retain_rows": 2, "epochs": 1, "lr": 1e-3}
    with pytest.raises(DataError, match="measured on another stride"):
        pipeline.forget(ForgetSettings(**given, **again, stride=6, out=str(tmp_path / "other")))
    pipeline.forget(ForgetSettings(**given, **again, stride=12, out=str(tmp_path / "same")))  # half, as by default
