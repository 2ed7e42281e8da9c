"""What is timed: a model, rows to forget and as many to keep, and the settings that every way of working shares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lorasure.config import ModelSettings
from lorasure.data.examples import Example, Row
from lorasure.data.load import encode_rows
from lorasure.data.readers import read_rows
from lorasure.importance.collect import Probe
from lorasure.init.low_rank import Factors
from lorasure.models import find_shortcuts, load_model, load_tokenizer
from lorasure.sites import Site

EPOCHS = 5


@dataclass(frozen=True)
class Setting:
    """The paper's settings on TOFU, for everyone; the learning rate changes no time."""

    rank: int = 8
    alpha: int = 16
    sigma: float = 0.05
    batch_size: int = 32
    lr: float = 1e-4
    beta: float = 0.1
    lam: float = 1.0
    seed: int = 0

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def probe(self, space: str = "lora") -> Probe:
        return Probe(space, self.rank, self.sigma, self.scaling, self.seed)


@dataclass(frozen=True)
class Workload:
    """A model folder, and rows with their examples; `title` says which."""

    title: str
    folder: Path
    rows: tuple[tuple[Row, ...], tuple[Row, ...]]
    examples: tuple[tuple[Example, ...], tuple[Example, ...]]

    def model(self) -> PreTrainedModel:
        """As this library loads it."""
        return load_model(str(self.folder), dtype=torch.float32, device=torch.device("cpu"))

    def plain_model(self) -> PreTrainedModel:
        """As transformers does."""
        found = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return found.eval().requires_grad_(False)

    def subset(self, count: int) -> Workload:
        """`count` rows of each set, evenly spaced."""
        pair = lambda parts: (spaced(parts[0], count), spaced(parts[1], count))  # noqa: E731
        return Workload(self.title, self.folder, pair(self.rows), pair(self.examples))

    @property
    def tokens(self) -> int:
        return sum(len(e) for part in self.examples for e in part)

    @property
    def count(self) -> int:
        return sum(map(len, self.examples))

    def stretched(self, count: int) -> Workload:
        """`count` rows of each set: these again and again, from the second time on with a number in the prompt."""
        again = lambda rows: tuple(  # noqa: E731
            row if i < len(rows) else replace(row, prompt=f"{row.prompt} ({i // len(rows)})")
            for i, row in zip(range(count), cycle(rows), strict=False)
        )
        return replace(self, rows=(again(self.rows[0]), again(self.rows[1])))

    def write(self, folder: Path) -> tuple[Path, Path]:
        """The two files that a whole run reads."""
        paths = folder / "forget.jsonl", folder / "retain.jsonl"
        for path, rows in zip(paths, self.rows, strict=True):
            path.write_text("".join(json.dumps({"question": r.prompt, "answer": r.answer}) + "\n" for r in rows))
        return paths


def spaced(items: Sequence, count: int) -> tuple:
    """`count` of the items, evenly spaced over all of them."""
    return tuple(items[i * len(items) // count] for i in range(min(count, len(items))))


def find_workload(shared: Path, scratch: Path) -> Workload:
    """TOFU's forget05 and as many kept rows in the small TOFU target; without these, the demo's people and model."""
    tofu, target = shared / "data" / "tofu", shared / "models" / "tofu-mini-target"
    if target.is_dir() and tofu.is_dir():
        kept = read_rows(tofu / "full.json").rows[:400:2]
        return _workload("small TOFU target, forget05", target, read_rows(tofu / "forget05.json").rows, kept)
    from lorasure.demo import make_data, make_start

    make_data(scratch, 0)
    make_start(scratch, "model", 0)
    forget, retain = (read_rows(scratch / f"{name}.jsonl").rows for name in ("forget", "retain"))
    return _workload("the demo's people, random weights", scratch / "model", forget, retain[: len(forget)])


def _workload(title: str, folder: Path, forget: Sequence[Row], retain: Sequence[Row]) -> Workload:
    tokenizer, settings = load_tokenizer(str(folder)), ModelSettings(model=str(folder))
    examples = [encode_rows(rows, settings, tokenizer).examples for rows in (forget, retain)]
    return Workload(title, folder, (tuple(forget), tuple(retain)), (tuple(examples[0]), tuple(examples[1])))


def random_model(*, width: int = 128, layers: int = 4, vocabulary: int = 2048) -> PreTrainedModel:
    """A Llama with random weights, frozen, as this library uses it, for growth curves."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 64),
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    find_shortcuts(model)
    return model


def random_examples(count: int, length: int, vocabulary: int, seed: int) -> list[Example]:
    """Rows of `length` / 2 to 3 / 2 `length` tokens, a third of them prompt."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(length // 2, 3 * length // 2 + 1, (count,), generator=generator).tolist()
    ids = [torch.randint(vocabulary, (size,), generator=generator).tolist() for size in sizes]
    return [Example(tuple(tokens), len(tokens) // 3, f"row {i}") for i, tokens in enumerate(ids)]


def top_quarter(sites: Sequence[Site]) -> list[Site]:
    """The quarter of the sites that is nearest to the output."""
    return list(sites[-max(1, len(sites) // 4) :])


def top_layer(sites: Sequence[Site]) -> list[Site]:
    """The sites of the last decoder layer."""
    layer = sites[-1].module.rsplit(".", 2)[0]
    return [site for site in sites if site.module.startswith(f"{layer}.")]


def small_start(sites: Sequence[Site], setting: Setting) -> dict[Site, Factors]:
    """Some start that is not zero: which one changes no time."""
    return {
        site: Factors(f["B"], f["A"]) for site in sites if (f := setting.probe().factors(site, torch.device("cpu")))
    }


def with_lora(model: PreTrainedModel, start: dict[Site, Factors], setting: Setting, *, residual: bool) -> PeftModel:
    """peft's own LoRA at these factors. `residual`: what they add is taken off the base, as FILA's and VILA's do."""
    config = LoraConfig(r=setting.rank, lora_alpha=setting.alpha, target_modules=[site.module for site in start])
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for site, factors in start.items():
            layer: Any = wrapped.get_base_model().get_submodule(site.module)
            layer.lora_A["default"].weight.copy_(factors.A)
            layer.lora_B["default"].weight.copy_(factors.B)
            if residual:
                layer.base_layer.weight.sub_(setting.scaling * (factors.B @ factors.A).to(layer.base_layer.weight))
    return wrapped.eval()
