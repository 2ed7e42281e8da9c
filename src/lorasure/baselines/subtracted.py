"""A model whose assistant's logits are subtracted from its own: in a forward pass, and at decoding."""

from __future__ import annotations

import copy
import inspect
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from .. import artifacts, lora
from ..forward import base_of
from ..outcome import ABOUT_ASSISTANT


def first_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """The model with its first `count` layers only; weights and vocabulary projection are the same, not copies."""
    head = model.get_output_embeddings()
    shared = {id(thing): thing for thing in (head, *chain(model.parameters(), model.buffers()))}
    small = copy.deepcopy(model, shared)
    settings = small.config.get_text_config()
    lists = (m for m in small.modules() if isinstance(m, nn.ModuleList) and len(m) == settings.num_hidden_layers)
    layers = next(lists)
    del layers[count:]
    settings.num_hidden_layers = count
    if getattr(settings, "layer_types", None):
        settings.layer_types = settings.layer_types[:count]
    return small


class AssistantLogits(LogitsProcessor):
    """For `generate(logits_processor=[...])`: the next token's logits minus `weight` times the assistant's.

    `prompt_mask` (prompts, tokens): the attention mask given to `generate`, None if no prompt is padded. The assistant
    reads the whole text at every token, as it has no cache.
    """

    def __init__(self, assistant: Any, weight: float, prompt_mask: Tensor | None = None) -> None:
        self.assistant, self.weight, self.prompt_mask = assistant, weight, prompt_mask

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mask = torch.ones_like(input_ids)
        if self.prompt_mask is not None:  # several answers or beams per prompt stand one below the other
            repeated = self.prompt_mask.repeat_interleave(len(input_ids) // len(self.prompt_mask), dim=0)
            mask[:, : repeated.shape[1]] = repeated
        inputs = {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}
        if "position_ids" in inspect.signature(base_of(self.assistant).forward).parameters:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
        logits = self.assistant(**inputs, logits_to_keep=1).logits[:, -1]
        return scores - self.weight * logits.to(scores.dtype)


class Subtracted(nn.Module):
    """The base with an assistant: base logits - weight x assistant logits. Weight 0 is the base.

    It is measured like any model (see forward.py): both share the projection to the vocabulary.
    """

    base: Any
    assistant: Any

    def __init__(self, base: PreTrainedModel, assistant: Any, weight: float) -> None:
        super().__init__()
        self.base, self.assistant, self.weight = base, assistant, weight
        self.config, self.generation_config = base.config, base.generation_config

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.base.device

    def get_base_model(self) -> PreTrainedModel:
        """The base."""
        return self.base

    def get_output_embeddings(self) -> Any:
        """The projection to the vocabulary."""
        return self.base.get_output_embeddings()

    def forward(self, **inputs: Any) -> Any:
        """As the base's, with the assistant's logits subtracted; hidden states are the base's."""
        output = self.base(**inputs)
        output.logits = output.logits - self.weight * self.assistant(**inputs).logits
        return output

    def generate(self, **options: Any) -> Any:
        """As the base's, by `AssistantLogits`."""
        own = AssistantLogits(self.assistant, self.weight, options.get("attention_mask"))
        return self.base.generate(**options, logits_processor=LogitsProcessorList([own]))


def save_assistant(model: Subtracted, folder: Path, base: dict[str, Any]) -> None:
    """The assistant's adapter, how many layers it is for, and the weight. Not an adapter for the whole base."""
    lora.save_adapter(model.assistant, folder, base["source"], base["revision"])
    layers = model.assistant.config.get_text_config().num_hidden_layers
    artifacts.write_json(folder / ABOUT_ASSISTANT, {"layers": layers, "weight": model.weight})


def load_assistant(model: PreTrainedModel, folder: Path, scale: float = 1.0) -> Subtracted:
    """The base with the assistant that `save_assistant` wrote, its weight times `scale`."""
    about = artifacts.read_json(folder / ABOUT_ASSISTANT)
    with artifacts.as_written(folder / ABOUT_ASSISTANT):
        layers, weight = int(about["layers"]), float(about["weight"])
    return Subtracted(model, lora.load_adapter(first_layers(model, layers), folder), scale * weight)
