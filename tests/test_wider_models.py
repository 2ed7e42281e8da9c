"""The whole command on every kind of model: start, export, resume, dtypes, tied embeddings, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from architectures import ARCHITECTURES, COMMON, GROUPED, MIXTURE, QWEN_MIXTURE, tiny_model
from conftest import VOCAB, tiny_llama, write_rows
from lorasure import artifacts, cli, finetuning, lora, models, pipeline, train, train_stage
from lorasure.config import FinetuneSettings, ForgetSettings
from lorasure.errors import DataError, UsageError
from lorasure.sites import all_sites

IDS = torch.randint(0, VOCAB, (3, 12), generator=torch.Generator().manual_seed(5))
every_kind = pytest.mark.parametrize("name", ARCHITECTURES)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits.float()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """(forget, retain) files: two steps of two rows."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"question": f"Who is {i}?", "answer": f"Person {i * 7}."} for i in range(8)]
    return write_rows(folder / "forget.jsonl", rows[:4]), write_rows(folder / "retain.jsonl", rows[4:])


@pytest.fixture
def settings(rows, tokenizer, tmp_path):
    """Save a model with its tokenizer; settings of a short run on it."""

    def make(model, out="run", **options):
        base = tmp_path / "base"
        if not base.exists():
            model.save_pretrained(base)
            tokenizer.save_pretrained(base)
        common: dict[str, Any] = {
            "model": str(base),
            "forget": str(rows[0]),
            "retain": str(rows[1]),
            "out": str(tmp_path / out),
        }
        return ForgetSettings(
            **common
            | {"init": "vila", "rank": 2, "epochs": 1, "batch_size": 2, "lr": 5e-2, "dtype": "float32"}
            | options
        )

    return make


@pytest.fixture
def seen(monkeypatch):
    """Logits of the wrapped model at the start of training, and of the trained one when it is saved."""
    found = {}
    attach, save = train_stage.attach_start, lora.save_adapter

    def attached(*args):
        wrapped = attach(*args)
        found["start"] = logits(wrapped)
        return wrapped

    def saved(wrapped, *args):
        found["end"] = logits(wrapped)
        save(wrapped, *args)

    monkeypatch.setattr(train_stage, "attach_start", attached)
    monkeypatch.setattr(lora, "save_adapter", saved)
    return found


def bound(expected, dtype):
    """1e-4 in float32, else 8 roundings of the largest logit."""
    return 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps * float(expected.abs().max())


def hashes(folder):
    return {path.name: artifacts.sha256(path) for path in Path(folder).iterdir()}


def tied(model):
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def check_forget(settings, seen):
    """Run the command; transformers and peft alone must find the start, the trained model and the untouched base."""
    dtype, before = getattr(torch, settings.dtype), hashes(settings.model)
    result = pipeline.forget(settings)
    assert hashes(settings.model) == before
    fresh = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype)
    original = logits(fresh)
    start, _ = artifacts.read_tensors(result.folder / artifacts.START)
    assert all(value.any() for key, value in start.items() if key.endswith("|B") and "[" not in key)  # to take back
    limit = bound(original, dtype)
    assert (seen["start"] - original).abs().max() <= limit
    adapted = PeftModel.from_pretrained(fresh, result.adapter)
    found = logits(adapted)
    assert (seen["end"] - found).abs().max() <= limit
    assert (found - original).abs().max() > 2 * limit
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), original)
    return fresh


@pytest.mark.fault(
    "layers of every kind: Conv1D (GPT-2), fused qkv (GPT-NeoX, Phi-3), experts (Mixtral, Qwen, gpt-oss)",
    "P3",
    "the start is the identity, plain peft on the untouched base gives the trained model",
    "lora.py: attach with a frozen half of zeros",
)
@every_kind
def test_forget_on_every_kind_of_model(name, settings, seen):
    base = check_forget(settings(tiny_model(name, tie_word_embeddings=False)), seen)
    assert not tied(base)


@pytest.mark.fault(
    "a base in bfloat16 or float16",
    "P3",
    "the same, to 8 roundings",
    "lora.py: attach with a frozen half of zeros",
)
@every_kind
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_forget_on_a_half_precision_base(name, dtype, settings, seen):
    # Every token goes to all experts: two may be as near as a rounding, and which is taken would change the logits.
    mixture = "num_experts_per_tok" in vars(tiny_model(name).config)
    model = tiny_model(name, getattr(torch, dtype), **{"num_experts_per_tok": 4} if mixture else {})
    check_forget(settings(model, dtype=dtype), seen)


@pytest.mark.fault(
    "tied embeddings, and an interruption",
    "P2, P3",
    "the base stays tied and untouched; continued, the same bytes",
    "sites.py: the projection to the vocabulary is a site",
)
@every_kind
def test_with_tied_embeddings_and_stopped_and_continued_to_the_same_bytes(name, settings, seen, monkeypatch):
    model, real, calls = tiny_model(name, tie_word_embeddings=True), train._step, []

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    whole = settings(model, "whole")
    base = check_forget(whole, seen)
    assert tied(base)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "_step", stopping)
        pipeline.forget(settings(model, "parts", checkpoint_every=1))
    parts = pipeline.forget(settings(model, "parts", resume=True))
    assert parts.summary["resumed"] == [{"stage": "train", "step": 1}]
    for file in (artifacts.TRAINED, "adapter/adapter_model.safetensors"):
        assert artifacts.sha256(parts.folder / file) == artifacts.sha256(Path(whole.out) / file)


def test_a_four_bit_base(settings, seen, monkeypatch):
    bits = pytest.importorskip("bitsandbytes", reason="4-bit bases need bitsandbytes")
    from transformers import BitsAndBytesConfig

    plain = settings(tiny_llama(hidden_size=64, intermediate_size=64))
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(plain.model, quantization_config=four, dtype=torch.float32)
    model.save_pretrained(plain.model)
    pipeline.forget(replace(plain, out=plain.out + "-as-it-is"))  # with gradients whatever the processor
    monkeypatch.setattr(bits.nn.modules, "has_avx512bf16", lambda: False)  # the reference rounds as it does
    base = check_forget(plain, seen)
    assert {p.dtype for n, p in base.named_parameters() if "_proj" in n and "lora" not in n} == {torch.uint8}


# --- what is refused --------------------------------------------------------------------------------------------------

SMALL_BART: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
SMALL_BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": VOCAB}
SMALL_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
SMALL_VISION |= {"image_size": 28, "patch_size": 14}
SMALL_TEXT = GROUPED | {"head_dim": 4, "sliding_window": 8}
LATENT: dict[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
}
LATENT |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
LATENT |= {"moe_intermediate_size": 8, "first_k_dense_replace": 1, "num_key_value_heads": 4}


def deepseek():
    return DeepseekV3ForCausalLM(DeepseekV3Config(**COMMON | LATENT))


def gemma_with_images():
    parts = {"text_config": SMALL_TEXT, "vision_config": SMALL_VISION}
    return Gemma3ForConditionalGeneration(Gemma3Config(**parts, mm_tokens_per_image=4))


REFUSED = {
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        "t5 is not supported: it is an encoder-decoder",
    ),
    "bart": (lambda: BartForConditionalGeneration(BartConfig(**SMALL_BART)), "bart is not supported: it is an encoder"),
    "bert": (lambda: BertLMHeadModel(BertConfig(**COMMON)), "BertLMHeadModel is not supported: it sees the tokens"),
    "mamba": (
        lambda: MambaForCausalLM(MambaConfig(**COMMON, state_size=4)),
        "mamba is not supported: it is a state-space model",
    ),
    "gemma3": (gemma_with_images, "gemma3 is not supported: it is several models in one (text_config, vision_config)"),
    "llama4": (
        lambda: Llama4ForCausalLM(
            Llama4TextConfig(**MIXTURE, head_dim=4, intermediate_size_mlp=24, attention_chunk_size=64)
        ),
        "--targets all would leave out Llama4TextExperts",
    ),
    "deepseek": (deepseek, "Layer 'model.layers.0.mlp.gate_proj' cannot get an adapter: in deepseek_v3 models"),
}


@pytest.fixture
def refusal(settings, tmp_path, capfd):
    """Run the command line; the one line that it ends with, and its exit code. Nothing is written."""

    def run(model, edit=None, *flags):
        s = settings(model)
        if edit:
            path = Path(s.model) / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | edit))
        capfd.readouterr()
        given = ["--model", s.model, "--forget", s.forget, "--retain", s.retain, "--out", s.out, "--rank", "2"]
        code = cli.main(["forget", *given, *flags])
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert {p.name for p in tmp_path.iterdir()} == {"base"}
        return code, lines[0]

    return run


@pytest.mark.fault(
    "an encoder-decoder, a bidirectional, a state-space, a many-part model, experts in a form that no adapter fits",
    "P3",
    "exit 2 or 3 naming the kind; nothing is written",
    "model_files.py: no _check_kind; models.py: no check_causal; sites.py: no _unseen; lora.py: no check_fits",
)
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name, refusal):
    torch.manual_seed(0)
    build, said = REFUSED[name]
    code, line = refusal(build())
    assert said in line
    assert code == (UsageError if "--" in said or "Layer" in said else DataError).exit_code


@pytest.mark.fault(
    "a base quantised with GPTQ, AWQ, fp8, MXFP4 or compressed tensors",
    "P3",
    "exit 3 naming the method; nothing is written",
    "model_files.py: no _check_kind",
)
@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors"])
def test_a_quantised_base_is_refused_by_its_method(method, refusal):
    code, line = refusal(tiny_llama(), {"quantization_config": {"quant_method": method, "bits": 4}})
    assert code == DataError.exit_code and f"llama is not supported: it is quantised with {method};" in line


def test_a_model_of_another_kind_is_refused_by_its_configuration(refusal):
    code, line = refusal(tiny_llama(), {"model_type": "clip"})
    assert code == DataError.exit_code and line.endswith("has no causal language model with a CLIPConfig.")


def test_a_model_without_a_vocabulary_or_that_cannot_run_is_refused(monkeypatch):
    model = tiny_llama()
    with monkeypatch.context() as patch, pytest.raises(DataError, match=r"LlamaForCausalLM.* no projection to a vocab"):
        patch.setattr(model, "get_output_embeddings", lambda: None)
        models.check_causal(model, "x")
    broken = RuntimeError("no kernel for 'Half'\nat ...")
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda _: (_ for _ in ()).throw(broken))
    with pytest.raises(DataError, match=r"tokens alone in torch.float32 on cpu: no kernel for 'Half'$"):
        models.check_causal(model, "x")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_check_of_causality_lets_every_dtype_pass(name):
    for dtype in models.DTYPES.values():
        models.check_causal(tiny_model(name, dtype), "x")


@pytest.mark.parametrize("name", ["deepseek", "llama4"])
def test_the_advice_of_a_refusal_works(name, refusal, settings, seen):
    torch.manual_seed(0)
    model = REFUSED[name][0]()
    line = refusal(model)[1]
    advice = {"exclude": line.rsplit("--exclude ", 1)[1].rstrip(".")} if "--exclude " in line else {"targets": "q_proj"}
    assert "--exclude " in line or ("Name the layers to adapt; they end in: " in line and "q_proj" in line)
    check_forget(settings(model, **advice), seen)


@pytest.mark.parametrize("name", ["deepseek", "llama4"])
def test_finetune_of_some_rank_adapts_the_layers_that_fit(name, settings, tmp_path):
    torch.manual_seed(0)
    given = settings(REFUSED[name][0]())
    options = {"rank": 2, "lr": 1e-2, "epochs": 1, "out": str(tmp_path / "tuned")}
    tuned = finetuning.finetune(FinetuneSettings(model=given.model, data=given.forget, **options))
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (given.model, tuned))
    changed = {key.rsplit(".", 2)[-2] for key in before if not torch.equal(before[key], after[key])}
    assert changed and not changed & {"gate", "router", "embed_tokens", "lm_head"}


def test_layers_that_are_lost_on_the_way_back_are_refused(refusal, settings, seen):
    """transformers renames `shared_expert.` of older models, and takes `shared_experts` for it."""
    laguna = pytest.importorskip("transformers.models.laguna", reason="this transformers has no Laguna")
    torch.manual_seed(0)
    more = {"head_dim": 4, "shared_expert_intermediate_size": 8, "layer_types": ["full_attention"] * 2}
    more |= {"mlp_layer_types": ["dense", "sparse"], "num_attention_heads_per_layer": [4, 4]}
    model = laguna.LagunaForCausalLM(laguna.LagunaConfig(**QWEN_MIXTURE | more))
    code, line = refusal(model)
    assert code == UsageError.exit_code and "takes its name for another's" in line
    advice = line.rsplit("--exclude ", 1)[1].rstrip(".")
    assert advice == "shared_experts.gate_proj,shared_experts.up_proj,shared_experts.down_proj"
    check_forget(settings(model, exclude=advice), seen)


def test_layers_that_fuse_into_one_are_refused_in_part():
    """In a Qwen mixture with a layer without experts, peft takes `gate_proj` for half of the experts' first matrix."""
    model = tiny_model("qwen3-moe", mlp_only_layers=[0])
    sites = [site for site in all_sites(model) if site.module.endswith("mlp.gate_proj")]
    with pytest.raises(UsageError, match=r"--targets: peft cannot adapt these layers: .*gate_proj"):
        lora.check_fits(model, sites)


@every_kind
def test_checking_that_an_adapter_fits_leaves_no_trace(name):
    model = tiny_model(name)
    expected, before = logits(model), [(n, type(m), id(m)) for n, m in model.named_modules()]
    lora.check_fits(model, all_sites(model))
    assert torch.equal(logits(model), expected)
    assert before == [(n, type(m), id(m)) for n, m in model.named_modules()]
    assert not any(p.requires_grad for p in model.parameters())


def test_a_router_that_derives_from_a_linear_layer_is_no_site(settings, seen):
    torch.manual_seed(0)
    model = PhimoeForCausalLM(PhimoeConfig(**MIXTURE)).eval().requires_grad_(False)
    assert any(type(m).__name__ == "PhimoeTopKRouter" for m in model.modules())
    assert not any("router" in site.name or "gate" in site.name.split(".") for site in all_sites(model))
    check_forget(settings(model), seen)
