"""What the libraries underneath are told before they are imported. Nothing heavy here."""

from __future__ import annotations

import os
import warnings

# A thread that waits for another at full speed, as libgomp's do, keeps its core from whoever else wants it: two threads
# beside a busy process took ten times as long as with this count, which costs nothing alone (docs/log.md).
ENVIRONMENT = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "GOMP_SPINCOUNT": "3000"}


def settle() -> None:
    """No telemetry, no noise of tokenizers' threads, no warnings that a user can do nothing about.

    What the environment says already stands.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\.")
