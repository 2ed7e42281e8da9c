"""Lorasure: make a language model forget, with a LoRA adapter for the untouched base.

The names below are imported when first used, so that `import lorasure` is fast.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "ForgetSettings": "config",
    "FinetuneSettings": "config",
    "forget": "pipeline",
    "Result": "pipeline",
    "finetune": "finetuning",
    "measure": "importance.measure",
    "Importance": "importance.measure",
    "Probe": "importance.collect",
    "SCORES": "importance.scores",
    "SPACES": "importance.scores",
    "INITS": "init.apply",
    "SOLVERS": "init.low_rank",
    "FORGET_LOSSES": "losses.forget",
    "RETAIN_LOSSES": "losses.retain",
    "METRICS": "evaluate.table",
    "LorasureError": "errors",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lorasure' has no attribute '{name}'")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
