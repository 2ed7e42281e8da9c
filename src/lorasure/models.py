"""Loading the base model and its tokenizer, and saying which model it was."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from . import processes
from .answer_rows import find_free_layers
from .artifacts import exists, sha256
from .errors import DataError, LorasureError, NumericError, ResourceError, UsageError
from .layers import decoder_layers
from .model_files import CONFIG, commit, locate, weight_files
from .norms import fuse_norms
from .packing import find_packing
from .registry import lookup
from .rotations import fuse_rotations

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZE = ("nf4",)  # of bitsandbytes; QLoRA, arXiv 2305.14314
SAME = 0.02  # of the largest logit: above the rounding of any dtype, below what a visible token changes


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is the accelerator when there is one, else the CPU.

    An accelerator without a number is, in one of several processes on a machine, that process's own.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        device = (found or torch.device("cpu")) if name == "auto" else torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device must be auto, cpu, cuda, cuda:N or mps, got '{name}'.") from error
    if found and device == torch.device(found.type) and (local := os.environ.get("LOCAL_RANK")):
        device = torch.device(found.type, int(local))
    here = found is not None and found.type == device.type and (device.index or 0) < torch.accelerator.device_count()
    if device.type != "cpu" and not here:
        raise UsageError(f"--device {name}: there is no such device here.")
    if device.type != "cpu" and device.index is not None:  # what torch takes where none is named: FSDP2, peak memory
        torch.accelerator.set_device_index(device.index)
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 elsewhere (faster on CPUs without native bfloat16 products)."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return lookup(DTYPES, name, "--dtype")


def dtype_name(dtype: torch.dtype) -> str:
    """Its name in DTYPES."""
    return str(dtype).removeprefix("torch.")


def pick_token_budget(tokens: int | None, device: torch.device) -> int:
    """Padded tokens per pass.

    Measured on a CPU: 1024 are as fast as 448 in twice the memory, 256 a tenth slower. On an H200, for a 7B model, 4096
    take a seventh more time than 8192 and half the memory, 2048 almost twice the time of 8192.
    """
    return tokens or (448 if device.type == "cpu" else 8192)


def load_tokenizer(model: str, revision: str | None = None, *, allow_pickle: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Code that comes with a model is never run."""
    return _load(AutoTokenizer.from_pretrained, model, revision, allow_pickle)


def load_shapes(model: str, revision: str | None = None, allow_pickle: bool = False) -> PreTrainedModel:
    """The model as its configuration describes it, on the meta device: no weight is read or made."""

    def described(folder: str, trust_remote_code: bool) -> PreTrainedModel:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)

    return _load(described, model, revision, allow_pickle)


def check_quantize(quantize: str | None) -> None:
    """A name in QUANTIZE or None, and bitsandbytes is there. Raises UsageError."""
    if quantize is None:
        return
    lookup(dict.fromkeys(QUANTIZE), quantize, "--quantize")
    if find_spec("bitsandbytes") is None:
        raise UsageError(f"--quantize {quantize} needs bitsandbytes: pip install 'lorasure[4bit]'.")


def load_model(
    model: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    allow_pickle: bool = False,
    quantize: str | None = None,
) -> PreTrainedModel:
    """The frozen base model in evaluation mode on `device`. Its files are only ever read.

    `allow_pickle`: from a model without safetensors, read the tensors (and nothing else) of its pickle. `quantize`:
    every linear layer but the projection to the vocabulary in 4 bits, with one float32 scale per 64 weights.
    """
    check_quantize(quantize)
    if quantize and processes.sharded():
        raise UsageError(f"--quantize {quantize}: weights in 4 bits cannot be shared out; leave out one or the other.")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # warnings about weights would print names that the file chose
    options: dict[str, Any] = {"dtype": dtype, "weights_only": True, "output_loading_info": True}
    if quantize:
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantize, bnb_4bit_compute_dtype=dtype)
        options |= {"quantization_config": how, "device_map": {"": device}}
    loaded, info = _load(AutoModelForCausalLM.from_pretrained, model, revision, allow_pickle, **options)
    if missing := sorted(info["missing_keys"]):
        raise DataError(f"--model {model}: {len(missing)} weights are not in its files, the first is {missing[0]}.")
    check_finite(loaded, model)
    loaded.requires_grad_(False)
    try:
        if processes.sharded():
            _share_out(loaded, device)
        loaded = loaded.to(device)
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"--model {model} does not fit in the memory of {device} as {dtype}.") from error
    loaded = loaded.eval()
    for module in loaded.modules():  # of bitsandbytes, on a CPU: a faster product that has no gradient
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    check_causal(loaded, model)
    find_shortcuts(loaded)
    return loaded


def find_shortcuts(model: PreTrainedModel) -> None:
    """Try, on a base model on its device, all that makes its passes faster."""
    if not processes.sharded():  # where weights are shared out their modules are known
        fuse_norms(model)
        fuse_rotations(model)
    find_free_layers(model)
    find_packing(model)


def _share_out(model: PreTrainedModel, device: torch.device) -> None:
    layers = decoder_layers(model)
    if not layers:
        raise UsageError(f"{type(model).__name__} has no single stack of layers, so its weights cannot be shared out.")
    processes.shard(layers, device)


def check_finite(model: torch.nn.Module, source: str) -> None:
    """Raise a NumericError if a weight is not finite. One sum per weight shows it, without a mask of its size."""
    for name, weight in model.named_parameters():
        scales = getattr(weight, "quant_state", None)  # of a weight in 4 bits, whose codes are always finite
        numbers = weight if scales is None else scales.absmax
        if numbers.is_floating_point() and not torch.isfinite(numbers.sum(dtype=torch.float32)):
            raise NumericError(f"--model {source}: the weight {name} holds values that are not finite.")


@torch.no_grad()
def check_causal(model: PreTrainedModel, source: str) -> None:
    """Raise a DataError unless a plain pass gives logits that do not depend on later tokens.

    One pass over two rows that differ in their last token only.
    """
    name = f"--model {source}: {type(model).__name__} is not supported"
    if model.get_output_embeddings() is None:
        raise DataError(f"{name}: it has no projection to a vocabulary.")
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=model.device)
    try:
        one, other = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(f"--model {source} does not fit in the memory of {model.device}.") from error
    except Exception as error:  # whatever the model's own code may meet
        text = f"it cannot be run on tokens alone in {model.dtype} on {model.device}"
        raise DataError(f"{name}: {text}: {_reason(error)}") from error
    if (one - other).abs().max() > SAME * one.abs().max():
        raise DataError(f"{name}: it sees the tokens that it should predict, so it is no causal language model.")


def _load(loader: Callable[..., Any], model: str, revision: str | None, allow_pickle: bool, **options: Any) -> Any:
    try:
        return loader(str(locate(model, revision, allow_pickle)), trust_remote_code=False, **options)
    except LorasureError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(f"--model {model} does not fit in memory.") from error
    except Exception as error:  # many libraries below can fail here, each with its own class
        where = "" if exists(Path(model)) else " (no folder of that name, so taken for one of the hub)"
        raise DataError(f"--model {model}{where} cannot be loaded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of a library's message, save where that advises what would be unsafe."""
    text = str(error).strip() or type(error).__name__
    if "trust_remote_code" in text:
        return "it needs code of its own, and code that comes with a model is never run."
    if type(error).__name__ == "UnpicklingError":
        return "its pickle holds something other than tensors, and nothing else is read."
    if "backend tokenizer" in text:
        return "it comes without a tokenizer (tokenizer.json, tokenizer_config.json)."
    if unknown := re.match(r"Unrecognized configuration class <class '(?:\w+\.)*(\w+)'>", text):
        return f"transformers has no causal language model with a {unknown[1]}."
    return text.splitlines()[0]


def fingerprint(model: PreTrainedModel, source: str) -> dict[str, Any]:
    """What identifies the base: its name, hub commit if known, the sha256 of its weight files, how they are held.

    That of its configuration stands apart: two models with the same weights are the same base, while a run that is
    continued must find the configuration as it was too.
    """
    folder = Path(model.name_or_path or source)
    config = folder / CONFIG
    held = getattr(model.config, "quantization_config", None)
    return {
        "source": source,
        "revision": commit(folder),
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "quantize": held.quantization_method() if isinstance(held, BitsAndBytesConfig) else None,
        "files": {p.name: sha256(p) for p in weight_files(folder, allow_pickle=True)},
        "config": sha256(config) if config.is_file() else None,
    }
