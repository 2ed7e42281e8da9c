"""Real shapes with random weights, and random rows of TOFU's lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig, PretrainedConfig, PreTrainedModel

from lorasure.data.examples import Example
from lorasure.models import find_shortcuts

# Prompt and answer tokens at 32 evenly spaced quantiles of forget10 and as many retain rows.
LENGTHS = (
    "20+15 22+19 24+22 38+12 27+25 25+29 29+27 29+29 29+31 26+35 29+33 32+31 29+36 27+39 31+37 26+43 "
    "29+41 30+41 23+50 28+46 26+50 28+49 30+49 28+53 29+54 31+55 35+53 29+62 28+67 26+73 42+64 45+77"
)


def llama(**changes: Any) -> LlamaConfig:
    """Llama-2-7B's shape, unless changed."""
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    return LlamaConfig(**{"vocab_size": 32_000, **shape, "bos_token_id": None, "eos_token_id": 0} | changes)


def phi() -> PhiConfig:
    """Phi-1.5's shape; half of each head rotates, the class's default."""
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32}
    return PhiConfig(vocab_size=51_200, bos_token_id=None, eos_token_id=0, **shape)


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-2-7b": llama,
    "phi-1.5": phi,
    "llama-3.1-8b": lambda: llama(vocab_size=128_256, intermediate_size=14_336, num_key_value_heads=8),
    "tiny": lambda: llama(
        vocab_size=1000, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=2
    ),
}


def build(name: str, device: torch.device, *, four_bit: bool) -> PreTrainedModel:
    """Random weights in bfloat16 (float32 on a CPU); `four_bit`: every linear layer but the head in NF4."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(SHAPES[name](), dtype=dtype)
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    model = _quantised(model, device) if four_bit else model
    find_shortcuts(model)
    return model


def _quantised(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    import bitsandbytes as bnb  # pyright: ignore[reportMissingImports]

    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear) and layer is not head:
                small = bnb.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=layer.bias is not None,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                    device="meta",
                )
                small.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                small.bias = layer.bias
                setattr(module, name, small.to(device))
    model.is_loaded_in_4bit = True  # pyright: ignore[reportArgumentType] (peft asks for it)
    torch.cuda.empty_cache()
    return model


def examples(count: int, vocabulary: int, seed: int) -> list[Example]:
    """Random tokens with TOFU's lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [tuple(map(int, pair.split("+"))) for pair in LENGTHS.split()]
    found = []
    for i in range(count):
        prompt, answer = lengths[i % len(lengths)]
        ids = torch.randint(vocabulary, (prompt + answer,), generator=generator).tolist()
        found.append(Example(tuple(ids), prompt, f"row {i}"))
    return found
