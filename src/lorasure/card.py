"""The model card beside an exported adapter: what it is for, how it was made, what was shown and what was not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .init.apply import INITS
from .losses.forget import FORGET_LOSSES
from .outcome import adapter_form

PLAIN_WORDS = """\
- This adapter **suppresses**; it does not erase. Anyone who holds the base model can leave the adapter out, or scale it
  down, and has the old model back. Merge it (`lorasure export RUN --merge`) before giving weights away.
- The numbers above say how probable the forget set's *own* answers are. They do not show that the knowledge cannot be
  brought back by further training, quantisation, paraphrased or translated questions, or other prompts. Those attacks
  were **not run** for this card.
- The retain numbers are measured on rows that training may have used. They do not show that everything else is
  unharmed."""

LOADING = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM{imports}

base = AutoModelForCausalLM.from_pretrained("{base}"{options})
model = PeftModel.from_pretrained(base, "this folder")
```"""


def model_card(summary: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """Markdown with the YAML header that the hub reads. Contains hashes and counts, never the data's text."""
    s, base = summary["settings"], summary["base"]
    rows = [_score_row(name, summary["before"][name], summary["after"][name]) for name in ("forget", "retain")]
    settings = "\n".join(f"| {name} | {value} |" for name, value in sorted(s.items()) if value is not None)
    sets = "\n".join(
        f"| {name} | {part['rows']} | {part['answer_tokens']} | {part['truncated']} | `{part['sha256']}` |"
        for name, part in data.items()
    )
    hashes = "\n".join(f"  - `{name}` sha256 `{value}`" for name, value in base["files"].items())
    return f"""---
base_model: {base["source"]}
library_name: peft
tags: [unlearning, lora, lorasure]
---

# Unlearning adapter for {base["source"]}

A plain LoRA adapter ({adapter_form(summary["export"])}) for the **untouched** base model.

- Base: `{base["source"]}`, {base["parameters"]} parameters, revision {base["revision"] or "unknown (local folder)"}
{hashes}
{_method(summary)}
- Verdict: {summary["verdict"]["text"]}

{_loading(base)}

## What was measured

Mean probability of an answer token sequence, exp(-NLL per token), with a 95 % interval over examples.

| set | examples | before | after |
|---|---|---|---|
{chr(10).join(rows)}

The adapter was loaded on the base anew with nothing but `transformers` and `peft`; its logits differ from the trained
model's by {summary["export"]["max_logit_difference"]:.1e} at most (bound {summary["export"]["bound"]:.1e}).

## What this does not show

{PLAIN_WORDS}

## Data

| set | rows | answer tokens | truncated rows | sha256 of the rows |
|---|---|---|---|---|
{sets}

## Settings

| setting | value |
|---|---|
{settings}
"""


def _method(summary: Mapping[str, Any]) -> str:
    """A baseline says in the summary what it is; else it is start and loss."""
    s = summary["settings"]
    if "method" in summary:
        return f"- Method: {summary['method']['title']} ({summary['method']['paper']})"
    init, loss = INITS[s["init"]], FORGET_LOSSES[s["loss"]]
    return f"- Start: {init.title} ({init.paper})\n- Forget loss: {loss.title} ({loss.paper})"


def _loading(base: Mapping[str, Any]) -> str:
    """How to load base and adapter: the base as it was measured, in 4 bits if it was."""
    imports = options = ""
    if base["quantize"]:
        imports = ", BitsAndBytesConfig"
        options = (
            f', quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{base["quantize"]}")'
        )
    return LOADING.format(base=base["source"], imports=imports, options=options)


def _score_row(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    def shown(score: Mapping[str, Any]) -> str:
        interval = "" if score["low"] is None else f" [{score['low']:.4f}, {score['high']:.4f}]"
        return f"{score['value']:.4f}{interval}"

    return f"| {name} | {after['n']} | {shown(before)} | {shown(after)} |"
