"""Tiny random models of every kind of layer that an adapter must fit: name -> function that makes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    FalconForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GemmaForCausalLM,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    GptOssForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    OPTForCausalLM,
    Phi3ForCausalLM,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3MoeForCausalLM,
)

from conftest import VOCAB, random_examples
from lorasure.importance.collect import Probe, moments
from lorasure.sites import all_sites

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
GROUPED: dict[str, Any] = COMMON | {"num_key_value_heads": 2}
MIXTURE: dict[str, Any] = GROUPED | {"num_local_experts": 4}
QWEN_MIXTURE = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
GEMMA = GROUPED | {"head_dim": 4}
LOCAL_GEMMA = GEMMA | {"sliding_window": 8, "query_pre_attn_scalar": 4}  # shorter than the tests' rows
SMALL_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
SMALL_OPT = COMMON | {"ffn_dim": 24, "word_embed_proj_dim": 16, "init_std": 0.2, "dropout": 0.5}


def _kind(model: Any, settings: dict[str, Any]) -> Callable[..., PreTrainedModel]:
    return lambda **overrides: model(model.config_class(**settings | overrides))


ARCHITECTURES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": _kind(LlamaForCausalLM, GROUPED),  # grouped-query attention
    "mistral": _kind(MistralForCausalLM, GROUPED | {"sliding_window": 8}),
    "gpt2": _kind(GPT2LMHeadModel, SMALL_GPT2),  # Conv1D
    "gpt-neox": _kind(GPTNeoXForCausalLM, COMMON),  # fused qkv, head called embed_out
    "opt": _kind(OPTForCausalLM, SMALL_OPT),
    "falcon": _kind(FalconForCausalLM, COMMON | {"ffn_hidden_size": 24}),  # one layer's output is added to in place
    "phi": _kind(PhiForCausalLM, COMMON),
    "qwen2": _kind(Qwen2ForCausalLM, GROUPED),  # biases
    "gemma": _kind(GemmaForCausalLM, GEMMA),  # scaled embeddings
    "gemma2": _kind(Gemma2ForCausalLM, LOCAL_GEMMA),  # soft-capped logits
    "gemma3": _kind(Gemma3ForCausalLM, LOCAL_GEMMA),  # normalised queries and keys
    "phi3": _kind(Phi3ForCausalLM, GROUPED),  # fused projections
    "mixtral": _kind(MixtralForCausalLM, MIXTURE),  # experts in one (experts, out, in) parameter
    "qwen2-moe": _kind(Qwen2MoeForCausalLM, QWEN_MIXTURE | {"shared_expert_intermediate_size": 8}),
    "qwen3-moe": _kind(Qwen3MoeForCausalLM, QWEN_MIXTURE | {"head_dim": 4}),
    "gpt-oss": _kind(GptOssForCausalLM, MIXTURE | {"head_dim": 4}),  # experts in (experts, in, out)
}


def tiny_model(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A model of ARCHITECTURES, the same at every call: frozen, in evaluation mode. `overrides`: of its settings."""
    torch.manual_seed(0)
    model: Any = ARCHITECTURES[name](**overrides)
    return model.to(dtype).eval().requires_grad_(False)


def assert_same_gradients(model: PreTrainedModel, before: PreTrainedModel) -> None:
    """Mean squares of every site's gradients, to 1e-4 of their largest."""
    probe = Probe("lora", 2, 0.05, 2.0, 0)
    found, expected = (moments(m, all_sites(m), random_examples(4), probe, token_budget=99) for m in (model, before))
    for site, factors in expected.items():
        for factor, kept in factors.items():
            scale = float(kept.second.max())
            torch.testing.assert_close(found[site][factor].second, kept.second, atol=1e-4 * scale, rtol=0)
