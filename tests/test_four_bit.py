"""A base in 4 bits: through every stage, recorded, continued to the same adapter, and refused where it cannot be."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from conftest import tiny_llama
from lorasure import artifacts, evaluating, finetuning, models, pipeline, train
from lorasure.config import FinetuneSettings, ForgetSettings
from lorasure.errors import DataError, NumericError, UsageError
from lorasure.evaluate.settings import EvaluateSettings
from lorasure.init.apply import INITS
from lorasure.models import load_model
from lorasure.sites import find_sites, weight

CPU = torch.device("cpu")


@pytest.fixture
def four_bit():
    return pytest.importorskip("bitsandbytes", reason="4-bit bases need bitsandbytes")


@pytest.fixture
def settings(tmp_path, data_files, tokenizer):
    """Settings of a run on a model whose layers are wide enough for blocks of 64 weights."""
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    forget, retain = map(str, data_files)
    given = {"model": str(tmp_path / "model"), "forget": forget, "retain": retain, "out": str(tmp_path / "run")}
    return ForgetSettings(**given, quantize="nf4", init="vila", rank=4, epochs=2, batch_size=3, lr=1e-2)


def base(settings, **options):
    return load_model(settings.model, dtype=torch.float32, device=CPU, **options)


def test_the_whole_run_in_four_bits_for_every_start(four_bit, settings, tmp_path):
    for init in INITS:
        wanted = replace(settings, init=init, out=str(tmp_path / init), loss="npo", retain_loss="kl")
        summary = pipeline.forget(wanted).summary
        assert summary["export"]["max_logit_difference"] < 1e-4
        assert summary["after"]["forget"]["value"] < summary["before"]["forget"]["value"]
        assert summary["base"]["quantize"] == summary["settings"]["quantize"] == "nf4"


def test_another_program_loads_base_and_adapter_as_the_card_says(four_bit, settings, monkeypatch):
    monkeypatch.setattr(four_bit.nn.modules, "has_avx512bf16", lambda: False)  # theirs would round its products to it
    run = pipeline.forget(settings).folder
    card = (run / "adapter" / "README.md").read_text()
    given = 'quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")'
    assert f'from_pretrained("{settings.model}", {given})' in card and "| quantize | nf4 |" in card
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = AutoModelForCausalLM.from_pretrained(settings.model, quantization_config=how, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(theirs, run / "adapter")
    given = {"model": settings.model, "adapter": str(run), "quantize": "nf4", "data": None, "out": str(run) + "-eval"}
    ours = evaluating.load_subject(EvaluateSettings(**given)).model
    ids = torch.arange(20)[None]
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_weights_are_those_that_the_model_computes_with(four_bit, settings):
    model, whole = base(settings, quantize="nf4"), base(settings)
    for site in find_sites(model):
        layer = model.get_submodule(site.module)
        assert layer.weight.dtype == torch.uint8 and layer.weight.numel() * 2 == site.size
        x = torch.randn(3, site.shape[1])
        torch.testing.assert_close(layer(x), x @ weight(model, site).T, atol=1e-4, rtol=1e-4)
        away = weight(model, site) - weight(whole, site)
        assert 0 < away.norm() < 0.15 * weight(whole, site).norm()
    assert model.get_output_embeddings().weight.dtype == torch.float32


def test_importance_of_whole_weights_is_not_that_of_a_base_in_four_bits(four_bit, settings, tmp_path):
    whole = pipeline.importance_command(replace(settings, quantize=None, out=str(tmp_path / "whole")))
    with pytest.raises(DataError, match="--importance: measured on another model"):
        pipeline.importance_command(replace(settings, importance=str(whole)))


def test_resumed_to_the_same_adapter(four_bit, settings, tmp_path, monkeypatch):
    real, calls = train._step, []

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    whole = pipeline.forget(settings)
    parts = replace(settings, out=str(tmp_path / "parts"), checkpoint_every=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "_step", stopping)
        pipeline.forget(parts)
    with pytest.raises(UsageError, match="quantize"):
        pipeline.forget(replace(parts, resume=True, quantize=None))
    found = pipeline.forget(replace(parts, resume=True))
    assert found.summary["resumed"] == [{"stage": "train", "step": 1}]
    files = [run.folder / "adapter/adapter_model.safetensors" for run in (whole, found)]
    assert artifacts.sha256(files[0]) == artifacts.sha256(files[1])


def test_weights_that_are_not_finite_show(four_bit, settings):
    spoilt = tiny_llama(hidden_size=64, intermediate_size=64)
    spoilt.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    spoilt.save_pretrained(settings.model)
    with pytest.raises(NumericError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        base(settings, quantize="nf4")


def test_without_bitsandbytes_one_line_says_what_to_install(settings, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    with pytest.raises(UsageError, match=r"--quantize nf4 needs bitsandbytes: pip install 'lorasure\[4bit\]'\."):
        pipeline.forget(settings)


def test_what_does_not_go_with_four_bits(settings, monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: object())
    with pytest.raises(UsageError, match="Unknown --quantize 'nf8'"):
        pipeline.forget(replace(settings, quantize="nf8"))
    with pytest.raises(UsageError, match=r"--merge.*--quantize nf4"):
        pipeline.forget(replace(settings, merge=True))
    with pytest.raises(UsageError, match=r"finetune writes whole weights.*--quantize nf4"):
        finetuning.finetune(FinetuneSettings(model=settings.model, data=settings.forget, out="x", quantize="nf4"))
