"""Tiny random models of every kind of layer that an adapter must fit: name -> function that makes one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from conftest import VOCAB

COMMON = {
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
GROUPED = COMMON | {"num_key_value_heads": 2}
MIXTURE = GROUPED | {"num_local_experts": 4}
SMALL_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.2,
}

ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),  # grouped-query attention
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SMALL_GPT2, bos_token_id=256, eos_token_id=256)),  # Conv1D
    "opt": lambda: OPTForCausalLM(OPTConfig(**COMMON, ffn_dim=24, word_embed_proj_dim=16, init_std=0.2, dropout=0.5)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**COMMON)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),  # biases
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**GROUPED)),  # fused projections
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**MIXTURE)),  # experts in one (experts, out, in) parameter
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**MIXTURE, head_dim=4)),  # experts in (experts, in, out)
}


def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of ARCHITECTURES, the same at every call: frozen, in evaluation mode."""
    torch.manual_seed(0)
    return ARCHITECTURES[name]().to(dtype).eval().requires_grad_(False)
