"""Small models, tokenizers and data that the tests make themselves; nothing is downloaded."""

from __future__ import annotations

import gc
import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorasure import artifacts
from lorasure.data.examples import Example

pytest_plugins = ("faults",)

SHARED = Path(__file__).resolve().parents[2] / "shared"
VOCAB = 256 + 1


def pytest_configure(config: pytest.Config) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests compare float32 results; `auto` would be bfloat16 on a GPU
    torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_finish() -> None:
    """Two things that every short run would repeat: to go through what libraries made at import, and their versions."""
    gc.freeze()
    artifacts.versions = cache(artifacts.versions)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte level, one token per byte, end of text = pad = id 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)} | {"<|end|>": 256}
    bpe = Tokenizer(models.BPE(vocab, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")


def tiny_llama(seed: int = 0, layers: int = 2, **overrides: object) -> LlamaForCausalLM:
    """Two layers, width 16, grouped-query attention, float32, frozen, in evaluation mode."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 256,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings | overrides))
    return model.eval().requires_grad_(False)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny_llama()


def random_examples(count: int, seed: int = 0, vocab: int = VOCAB) -> list[Example]:
    """Examples of different lengths with answers of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    found = []
    for i in range(count):
        prompt, answer = number(2, 8), number(2, 9)
        ids = torch.randint(0, vocab, (prompt + answer,), generator=generator).tolist()
        found.append(Example(tuple(ids), prompt, f"data.jsonl:{i + 1}"))
    return found


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A saved tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data_files(tmp_path: Path) -> tuple[Path, Path]:
    """(forget, retain) files with 6 and 10 question/answer rows."""
    rows = [{"question": f"Who is number {i}?", "answer": f"It is person {i * 7}."} for i in range(16)]
    return write_rows(tmp_path / "forget.jsonl", rows[:6]), write_rows(tmp_path / "retain.jsonl", rows[6:])


def tofu_folder(folder: Path, rows: int = 3) -> Path:
    """TOFU's layout with few rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("forget01_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"):
        found = [
            {
                "question": f"{name} {i}?",
                "answer": f"Answer {i}." + "!" * i,
                "perturbed_answer": [f"No {i}.", "Never."],
                **({} if "facts" in name else {"paraphrased_answer": f"It is {i}."}),
            }
            for i in range(rows)
        ]
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, found)) + "\n")
    return folder
