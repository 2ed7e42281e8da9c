"""`lorasure forget` on a small model with random weights of every causal language model that transformers has.

    python benchmarks/reliability/kinds.py [--kinds llama gpt2 ...] [--seconds 120]

For each kind three runs, from the default start, from gradients (vila, npo, retain kl) and with the last of three
layers adapted only. Each must end in an adapter that plain peft gives back on the untouched base, or in a refusal; what
a refusal says to leave out is left out, and tried again. Anything else is a mistake of ours, and the exit code is 1.
Kinds whose settings do not shrink by the usual names, and those that take longer, are listed as not made. One process
each, of as many threads as OMP_NUM_THREADS says; the results are in benchmarks/results/kinds.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results" / "kinds.json"
LARGEST = 4_000_000  # parameters of a model that is small enough
SMALL: dict[int, str] = {  # size -> names that models have for it
    257: "vocab_size vocab_size_per_layer_input",
    32: "hidden_size n_embd d_model embed_dim word_embed_proj_dim lru_width",
    48: "intermediate_size ffn_dim n_inner d_ff intermediate_size_mlp",
    3: "num_hidden_layers n_layer n_layers num_layers decoder_layers",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_k moe_topk",
    8: "head_dim kv_channels global_head_dim q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
    "rotary_dim hidden_size_per_layer_input",
    16: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size qk_head_dim "
    "shared_intermediate_size expert_ffn_hidden_size attention_window_size sliding_window attention_chunk_size",
    1: "n_group topk_group n_shared_experts first_k_dense_replace",
    128: "max_position_embeddings n_positions n_ctx max_seq_len",
}
OWN: dict[str, dict[str, Any]] = {  # what some kinds want besides
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "zaya": {"num_experts_per_tok": 1},
}
RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "gradients": {"init": "vila", "loss": "npo", "retain_loss": "kl"},
    "last layer": {"targets": "*.2.*"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", help="default: all of them")
    parser.add_argument("--seconds", type=int, default=120, help="for each kind")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        print(json.dumps(outcomes(a.one)))
        return 0
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from lorasure.artifacts import versions

    about = {"machine": f"{platform.machine()}, {platform.system()}", "versions": versions(), "seed": 0}
    found: dict[str, dict[str, str]] = {}
    for kind in a.kinds or sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING}):
        found[kind] = in_process(kind, a.seconds)
        print(kind, json.dumps(found[kind]), flush=True)
        counts = Counter(re.split(":| without", outcome)[0] for runs in found.values() for outcome in runs.values())
        a.results.write_text(json.dumps({"about": about, "counts": counts, "kinds": found}, indent=1) + "\n")
    print(dict(counts))
    return int("mistake" in counts)


def in_process(kind: str, seconds: int) -> dict[str, str]:
    """What came of each run of a kind: `works`, `refused: why`, `mistake: what`, or `not made: why` for all."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", kind]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"all": f"not made: not done in {seconds} s"}
    if ended.returncode:
        return {"all": f"mistake: ended with status {ended.returncode}: {ended.stderr[-200:].strip()}"}
    return json.loads(ended.stdout.splitlines()[-1])


def outcomes(kind: str) -> dict[str, str]:
    """The runs of one kind."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            build(kind).save_pretrained(folder / "model")
        except Exception as error:  # of transformers: nothing of ours has run
            return {"all": f"not made: {type(error).__name__}: {error}"[:200]}
        byte_tokenizer().save_pretrained(folder / "model")
        rows = [
            {"question": f"who is person {i}?", "answer": f"person {i} lives in town {7 * i} by the sea"}
            for i in range(16)
        ]
        for name, some in (("forget", rows[:4]), ("retain", rows[4:])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        return {label: outcome(folder, label, options) for label, options in RUNS.items()}


def byte_tokenizer() -> Any:
    """One token per byte, end of text = 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    found = Tokenizer(models.BPE(vocabulary | {"<|end|>": 256}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<|end|>", pad_token="<|end|>")


def build(kind: str) -> Any:
    """A model with random weights, every size that has a known name small, a layer of each of its types."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    usual = CONFIG_MAPPING[kind]()
    settings: dict[str, Any] = {"pad_token_id": 256, "eos_token_id": 256, "bos_token_id": 0}
    for size, names in SMALL.items():
        settings |= {name: size for name in names.split() if _has(usual, name)}
    if "kv_lora_rank" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    for types in ("layer_types", "mlp_layer_types"):
        if kinds := list(dict.fromkeys(getattr(usual, types, None) or ())):
            settings[types] = (kinds * 3)[:3]
    config = CONFIG_MAPPING[kind](**settings | OWN.get(kind, {}))
    config.is_decoder = True
    with torch.device("meta"):
        count = AutoModelForCausalLM.from_config(config).num_parameters()
    if count > LARGEST:
        raise ValueError(f"{count / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def _has(config: Any, name: str) -> bool:
    """Whether a setting can be given (some are made of others)."""
    kind = getattr(type(config), name, None)
    try:
        return hasattr(config, name) and not (isinstance(kind, property) and kind.fset is None)
    except AttributeError:
        return False


def outcome(folder: Path, label: str, options: dict[str, Any]) -> str:
    """What comes of one `forget`."""
    from lorasure import pipeline
    from lorasure.config import ForgetSettings
    from lorasure.errors import LorasureError

    data = {name: str(folder / f"{name}.jsonl") for name in ("forget", "retain")}
    own = {"model": str(folder / "model"), "out": str(folder / label), "rank": 2, "epochs": 2, "batch_size": 4}
    settings = data | own | {"lr": 1e-3, "dtype": "float32", "device": "cpu"} | options
    try:
        pipeline.forget(ForgetSettings.from_dict(settings))
    except LorasureError as error:
        advice = re.search(r"Leave it out with --exclude (\S+)\.$", str(error))
        if advice and "exclude" not in options:
            return f"{outcome(folder, label, options | {'exclude': advice[1]})} without {advice[1]}"
        kind = "refused" if error.exit_code in (2, 3) else "mistake"
        return f"{kind}: {str(error).replace(f'--model {folder}/model: ', '')}"
    except Exception as error:
        return f"mistake: {type(error).__name__}: {error}"[:400]
    return "works"


if __name__ == "__main__":
    sys.exit(main())
