"""Loading the base model and its tokenizer, and saying which model it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .artifacts import sha256
from .errors import DataError, NumericError, ResourceError, UsageError
from .registry import lookup

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHT_FILES = ("*.safetensors", "*.bin")


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is the accelerator when there is one, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device must be auto, cpu, cuda, cuda:N or mps, got '{name}'.") from error
    here = found is not None and found.type == device.type and (device.index or 0) < torch.accelerator.device_count()
    if device.type != "cpu" and not here:
        raise UsageError(f"--device {name}: there is no such device here.")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 elsewhere (faster on CPUs without native bfloat16 products)."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return lookup(DTYPES, name, "--dtype")


def pick_token_budget(tokens: int | None, device: torch.device) -> int:
    """Padded tokens per pass. Measured on two CPU cores: 1024 is fastest, more no longer fits the caches."""
    return tokens or (1024 if device.type == "cpu" else 8192)


def check_model_folder(model: str) -> None:
    """A local folder must hold a configuration and weights; anything else is taken for a hub id."""
    folder = Path(model)
    if not folder.is_dir():
        if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise DataError(f"--model {model}: there is no such folder (a hub id has the form owner/name).")
        return
    if not (folder / "config.json").is_file():
        raise DataError(f"--model {model}: the folder holds no config.json.")
    if not any(path for pattern in WEIGHT_FILES for path in folder.glob(pattern)):
        raise DataError(f"--model {model}: the folder holds no weights (looked for {', '.join(WEIGHT_FILES)}).")


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Code from the hub is never run."""
    check_model_folder(model)
    return _load(AutoTokenizer.from_pretrained, model, revision=revision)


def load_model(model: str, *, dtype: torch.dtype, device: torch.device, revision: str | None = None) -> PreTrainedModel:
    """The frozen base model in evaluation mode on `device`. Its files are only ever read."""
    check_model_folder(model)
    transformers_logging.disable_progress_bar()
    loaded = _load(AutoModelForCausalLM.from_pretrained, model, revision=revision, dtype=dtype)
    check_finite(loaded, model)
    try:
        loaded = loaded.to(device)
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"--model {model} does not fit in the memory of {device} as {dtype}.") from error
    loaded.config.use_cache = False
    return loaded.eval().requires_grad_(False)


def check_finite(model: torch.nn.Module, source: str) -> None:
    """Raise a NumericError if a weight is not finite. One sum per weight shows it, without a mask of its size."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not torch.isfinite(weight.sum(dtype=torch.float32)):
            raise NumericError(f"--model {source}: the weight {name} holds values that are not finite.")


def _load(loader: Callable[..., Any], model: str, **options: Any) -> Any:
    try:
        return loader(model, trust_remote_code=False, **options)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(f"--model {model} does not fit in memory.") from error
    except Exception as error:  # many libraries below can fail here, each with its own class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"--model {model} cannot be loaded: {reason}") from error


def fingerprint(model: PreTrainedModel, source: str) -> dict[str, Any]:
    """What identifies the base: its name, hub commit if known, and the sha256 of a local folder's weight files."""
    folder = Path(source)
    files = sorted(p for pattern in WEIGHT_FILES for p in folder.glob(pattern)) if folder.is_dir() else []
    return {
        "source": source,
        "revision": getattr(model.config, "_commit_hash", None),
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "files": {p.name: sha256(p) for p in files},
    }
