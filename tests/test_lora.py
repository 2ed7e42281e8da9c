"""Adapters on every kind of layer: the identity at the start, the untouched base, and a file that plain peft loads."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from architectures import ARCHITECTURES, tiny_model
from conftest import VOCAB
from lorasure import lora
from lorasure.init.low_rank import Factors
from lorasure.sites import all_sites, find_sites, weight

RANK, ALPHA = 2, 6.0
SCALING = ALPHA / RANK
IDS = torch.randint(0, VOCAB, (3, 9), generator=torch.Generator().manual_seed(5))

# architecture -> the sites to adapt; for mixtures also some of the experts only, and experts without any linear layer
CASES = {name: (name, lambda site: True) for name in ARCHITECTURES}
CASES["mixtral, some experts"] = ("mixtral", lambda site: site.expert in (None, 1, 3))
CASES["mixtral, experts only"] = ("mixtral", lambda site: site.expert in (0, 2) and site.parameter == "down_proj")
CASES["gpt-oss, some experts"] = ("gpt-oss", lambda site: site.expert in (None, 2))
every_case = pytest.mark.parametrize("case", CASES)


def sites_of(model, case):
    return [site for site in all_sites(model) if CASES[case][1](site)]


def random_start(sites, rank=RANK, seed=0, size=0.3):
    """As large as the weights themselves, so that a start that is not taken back cannot go unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        site: Factors(
            size * torch.randn(site.shape[0], rank, generator=generator),
            size * torch.randn(rank, site.shape[1], generator=generator),
        )
        for site in sites
    }


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits.float()


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def attached(case, compensate=True):
    """(base model, sites, start, wrapped)"""
    model = tiny_model(CASES[case][0])
    sites = sites_of(model, case)
    start = random_start(sites)
    return model, sites, start, lora.attach(model, start, RANK, ALPHA, compensate=compensate)


def trainable(wrapped):
    return {name: p for name, p in wrapped.named_parameters() if p.requires_grad}


def train(wrapped, steps=3):
    """A few steps of AdamW that make the given tokens likelier."""
    optimizer = torch.optim.AdamW(trainable(wrapped).values(), lr=0.02, weight_decay=0.1)
    for _ in range(steps):
        found = wrapped(input_ids=IDS, use_cache=False).logits[:, :-1]
        torch.nn.functional.cross_entropy(found.reshape(-1, VOCAB), IDS[:, 1:].reshape(-1)).backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(wrapped, model, folder, name="base"):
    """The baked adapter and its base as files: (adapter folder, base folder)."""
    lora.bake(wrapped)
    lora.save_adapter(wrapped, folder / "adapter", str(folder / name), None)
    wrapped.unload()
    model.save_pretrained(folder / name)
    return folder / "adapter", folder / name


def reloaded(adapter, base):
    """As any user loads it: nothing but transformers and peft."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


# --- the start --------------------------------------------------------------------------------------------------------


@every_case
def test_the_start_is_the_identity_only_because_it_is_compensated(case):
    model = tiny_model(CASES[case][0])
    expected = logits(model)
    start = random_start(sites_of(model, case))
    assert relative(logits(lora.attach(model, start, RANK, ALPHA, compensate=True)), expected) < 1e-5
    model = tiny_model(CASES[case][0])
    assert relative(logits(lora.attach(model, start, RANK, ALPHA, compensate=False)), expected) > 0.05


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_half_precision_base_keeps_float32_factors_and_starts_as_itself(name):
    model = tiny_model(name, torch.bfloat16)
    expected, start = logits(model), random_start(all_sites(model))
    wrapped = lora.attach(model, start, RANK, ALPHA, compensate=True)
    assert {p.dtype for p in trainable(wrapped).values()} == {torch.float32}
    assert relative(logits(wrapped), expected) < 4 * torch.finfo(torch.bfloat16).eps


@every_case
def test_base_weights_and_the_disabled_adapter_are_exactly_the_original(case):
    untouched = tiny_model(CASES[case][0])
    expected, before = logits(untouched), untouched.state_dict()
    model, _, _, wrapped = attached(case)
    train(wrapped)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), expected)
    assert relative(logits(wrapped), expected) > 1e-3  # training did change something
    lora.bake(wrapped).unload()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model), expected)


@every_case
def test_only_the_trainable_halves_are_trained(case):
    _, sites, start, wrapped = attached(case)
    tails = {name: t.clone() for name, t in wrapped.named_buffers() if name.endswith(".tail")}
    frozen = {name: p.clone() for name, p in wrapped.named_parameters() if not p.requires_grad}
    train(wrapped)
    assert len(tails) == 2 * len({(s.module, s.parameter) for s in sites})
    assert all(torch.equal(t, tails[name]) for name, t in wrapped.named_buffers() if name in tails)
    assert all(torch.equal(p, frozen[name]) for name, p in wrapped.named_parameters() if name in frozen)
    trained = lora.trained_factors(wrapped, sites)
    used = [site for site in sites if not torch.equal(trained[site].B, start[site].B)]
    assert len(used) >= len([site for site in sites if site.expert is None])
    assert all(not torch.equal(trained[site].A, start[site].A) for site in used)


@every_case
def test_number_of_trainable_parameters(case):
    """r (in + out) per site; peft keeps all experts of a parameter together, adapted or not."""
    _, sites, _, wrapped = attached(case)
    stored = {(s.module, s.parameter): s for s in sites}
    expected = sum(RANK * sum(s.shape) * (1 if s.expert is None else 4) for s in stored.values())
    assert sum(p.numel() for p in trainable(wrapped).values()) == expected


def test_experts_that_are_not_adapted_stay_out_of_training():
    _, sites, _, wrapped = attached("mixtral, some experts")
    train(wrapped)
    left_out = [site for site in all_sites(tiny_model("mixtral")) if site not in sites]
    assert {site.expert for site in left_out} == {0, 2}
    for factors in lora.trained_factors(wrapped, left_out).values():
        assert not factors.B.any() and not factors.A.any()


def test_set_trained_restores_what_trained_factors_gave():
    for compensate in (True, False):
        _, sites, start, wrapped = attached("mixtral, some experts", compensate)
        train(wrapped)
        expected, trained = logits(wrapped), lora.trained_factors(wrapped, sites)
        fresh = lora.attach(tiny_model("mixtral"), start, RANK, ALPHA, compensate=compensate)
        assert not torch.equal(logits(fresh), expected)
        lora.set_trained(fresh, trained)
        assert torch.equal(logits(fresh), expected)


def test_trainable_b_is_part_of_the_graph():
    _, sites, start, wrapped = attached("gpt-oss")
    for site in sites:
        b = lora.trainable_b(wrapped, site)
        assert torch.equal(b, start[site].B) and b.requires_grad


# --- export -----------------------------------------------------------------------------------------------------------


@every_case
def test_the_saved_adapter_works_with_transformers_and_peft_alone(case, tmp_path):
    model, _, _, wrapped = attached(case)
    original = logits(tiny_model(CASES[case][0]))
    train(wrapped)
    expected = logits(wrapped)
    assert relative(expected, original) > 1e-3
    adapter, base = saved(wrapped, model, tmp_path)
    found = reloaded(adapter, base)
    torch.testing.assert_close(logits(found), expected, atol=1e-4, rtol=0)
    with found.disable_adapter():
        assert torch.equal(logits(found), original)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in tensors)
    assert {p.suffix for p in adapter.iterdir()} <= {".safetensors", ".json", ".md"}


@every_case
def test_the_export_check_notices_a_flipped_tail(case, tmp_path):
    model, _, _, wrapped = attached(case)
    expected = logits(wrapped)
    for name, tail in wrapped.named_buffers():
        if name.endswith("lora_B.default.parametrizations.weight.0.tail"):
            tail.neg_()
    assert relative(logits(reloaded(*saved(wrapped, model, tmp_path))), expected) > 0.05


def test_the_exported_factors_are_head_and_negated_start(tmp_path):
    model, sites, start, wrapped = attached("llama")
    train(wrapped)
    trained = lora.trained_factors(wrapped, sites)
    adapter, _ = saved(wrapped, model, tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(sites)
    for site in sites:
        key = f"base_model.model.{site.module}"
        b = torch.cat([trained[site].B, -start[site].B], dim=1)
        a = torch.cat([trained[site].A, start[site].A])
        assert torch.equal(tensors[f"{key}.lora_B.weight"], b) and torch.equal(tensors[f"{key}.lora_A.weight"], a)


@pytest.mark.parametrize(("compensate", "rank"), [(True, 2 * RANK), (False, RANK)])
def test_the_configuration_keeps_rank_and_scaling(compensate, rank, tmp_path):
    model, _, _, wrapped = attached("llama", compensate)
    adapter, base = saved(wrapped, model, tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["r"] == rank and config["lora_alpha"] / config["r"] == SCALING
    assert isinstance(config["lora_alpha"], int)  # some servers read nothing else
    assert config["base_model_name_or_path"] == str(base) and config["inference_mode"]
    assert sorted(config["target_modules"]) == sorted({s.module.rsplit(".", 1)[-1] for s in all_sites(model)})


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("llama", ["layers.1.self_attn.q_proj", "layers.0.mlp.down_proj"]),
        ("gpt2", ["h.1.mlp.c_proj", "h.0.attn.c_attn"]),  # c_proj is also an attention layer's name
        ("mixtral", ["layers.0.mlp.experts.down_proj", "layers.1.self_attn.v_proj"]),
    ],
)
def test_a_partial_set_of_layers_is_exactly_that_after_reloading(name, patterns, tmp_path):
    model = tiny_model(name)
    sites = find_sites(model, patterns)
    wrapped = lora.attach(model, random_start(sites), RANK, ALPHA, compensate=False)
    expected = logits(wrapped)
    found = reloaded(*saved(wrapped, model, tmp_path))
    adapted = {
        f"{name}.{module.parameter_name}" if hasattr(module, "parameter_name") else name
        for name, module in found.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    }
    assert adapted == {s.module if s.parameter is None else f"{s.module}.{s.parameter}" for s in sites}
    torch.testing.assert_close(logits(found), expected, atol=1e-4, rtol=0)


@every_case
def test_merged_weights_equal_the_adapter(case):
    _, sites, _, wrapped = attached(case)
    before = {site: weight(tiny_model(CASES[case][0]), site) for site in sites}
    train(wrapped)
    expected = logits(wrapped)
    merged = lora.merge(lora.bake(wrapped))
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert any(not torch.equal(weight(merged, site), before[site]) for site in sites)
