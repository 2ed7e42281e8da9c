"""Which files of a model are read: none outside its folder, no code, no pickle unless asked for."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .artifacts import exists, read_json
from .errors import DataError

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
SAFE, PICKLED, INDEX = "model.safetensors", "pytorch_model.bin", ".index.json"
STATE_SPACE = (  # their kernels read the weights of linear layers past the layers, and so past any adapter on them
    *("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"),
    *("jamba", "bamba", "zamba", "zamba2", "granitemoehybrid"),
)
DESCRIPTION = ("*.json", "*.jinja", "*.model", "*.txt")  # what a tokenizer may need; a *.py never comes along


def check_model_folder(model: str, allow_pickle: bool = False) -> None:
    """A local folder must hold a configuration and weights that may be read; anything else is taken for a hub id.

    Raises DataError. Symbolic links are followed: the hub's own cache is made of them.
    """
    folder = Path(model)
    if not exists(folder):
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise DataError(f"--model {model}: there is no such folder (a hub id has the form owner/name).")
        return
    if not (folder / CONFIG).is_file():
        raise DataError(f"--model {model}: the folder holds no {CONFIG}.")
    if (folder / ADAPTER).exists():  # transformers would put it on the base, or fetch the base that it names
        raise DataError(f"--model {model}: the folder holds an adapter ({ADAPTER}); merge it first, or take it out.")
    _check_config(read_json(folder / CONFIG), model)
    if weight_files(folder, allow_pickle):
        return
    if not allow_pickle and weight_files(folder, allow_pickle=True):
        raise DataError(
            f"--model {model}: its weights are pickled ({PICKLED}), and a pickle can be made to run code. Convert them "
            "to safetensors, or add --allow-pickle, which reads tensors from it and nothing else."
        )
    raise DataError(
        f"--model {model}: the folder holds no weights (looked for {SAFE} and {SAFE}{INDEX}; those of "
        f"{PICKLED} are read with --allow-pickle only)."
    )


def weight_files(folder: Path, allow_pickle: bool = False) -> list[Path]:
    """The weight files that transformers will read; none if there are none.

    Raises DataError if an index names anything but files of its own kind in its own folder.
    """
    for name in (SAFE, PICKLED) if allow_pickle else (SAFE,):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}{INDEX}").is_file():
            return [folder / shard for shard in _shards(folder / f"{name}{INDEX}", Path(name).suffix)]
    return []


def locate(model: str, revision: str | None = None, allow_pickle: bool = False) -> Path:
    """The checked folder of a model; a hub model's is fetched, all of it from the one commit that names the folder."""
    if not exists(Path(model)):
        return _fetched(model, revision, allow_pickle)
    check_model_folder(model, allow_pickle)
    return Path(model)


def commit(folder: Path) -> str | None:
    """The commit of a folder in the hub's cache, None for any other."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name) else None


@functools.cache  # a branch may move on while a command works: tokenizer, model and fresh model are of one commit
def _fetched(model: str, revision: str | None, allow_pickle: bool) -> Path:
    """First what describes the model, then the weights that it names."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(model, revision=revision, allow_patterns=[*DESCRIPTION], ignore_patterns="*/*"))
    for name in (SAFE, PICKLED) if allow_pickle else (SAFE,):
        index = folder / f"{name}{INDEX}"
        shards = _shards(index, Path(name).suffix) if index.is_file() else []
        snapshot_download(model, revision=commit(folder) or revision, allow_patterns=[name, *shards])
        if weight_files(folder, allow_pickle):
            break
    check_model_folder(str(folder), allow_pickle)
    return folder


def _shards(index: Path, kind: str) -> list[str]:
    content = read_json(index)
    named = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(named, dict) or not named:
        raise DataError(f"{index}: there is no weight_map in it.")
    for shard in named.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(kind):
            raise DataError(f"{index}: weight_map names '{shard}', which is not a {kind} file of the same folder.")
    return sorted(set(named.values()))


def _check_config(config: Any, model: str) -> None:
    """Refuse what makes transformers read weights, or fetch code, from elsewhere than this folder."""
    if not isinstance(config, Mapping):
        raise DataError(f"--model {model}: {CONFIG} must hold names and values.")
    _check_kind(config, model)
    if "transformers_weights" in config:
        raise DataError(f"--model {model}: {CONFIG} names other weight files (transformers_weights), not supported.")
    for part in (config, *config.values()):  # the configuration itself, and those of its parts
        named = part.get("attn_implementation") if isinstance(part, Mapping) else None
        values = named.values() if isinstance(named, Mapping) else [named]
        if any(isinstance(value, str) and "/" in value for value in values):  # owner/name: a kernel on the hub
            raise DataError(f"--model {model}: {CONFIG} asks for code from the hub (attn_implementation), never run.")


def _check_kind(config: Mapping[str, Any], model: str) -> None:
    """Refuse, before anything is loaded, the kinds of model that an adapter of ours would not fit."""
    kind = config.get("model_type")
    parts = sorted(name for name, part in config.items() if isinstance(part, Mapping) and part.get("model_type"))
    quantised = config.get("quantization_config")
    method = (isinstance(quantised, Mapping) and quantised.get("quant_method")) or "a method not named"
    reason = None
    if config.get("is_encoder_decoder"):
        reason = "an encoder-decoder, not a causal language model"
    elif parts:
        reason = f"several models in one ({', '.join(parts)}); only a language model on its own can be used"
    elif kind in STATE_SPACE:
        reason = "a state-space model, whose layers do not take an adapter"
    elif quantised and method != "bitsandbytes":
        reason = f"quantised with {method}; use its original weights (of quantised ones, only bitsandbytes)"
    if reason:
        raise DataError(f"--model {model}: {kind} is not supported: it is {reason}.")
