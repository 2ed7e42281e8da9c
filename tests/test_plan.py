"""What a run is said to need, against what it takes; what does not fit is refused before anything is loaded."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from architectures import tiny_model
from conftest import tiny_llama, write_rows
from lorasure import (
    artifacts,
    fitting,
    layers,
    lora,
    models,
    original,
    pipeline,
    plan,
    stages,
    train,
    train_stage,
    workbench,
)
from lorasure.cli import main
from lorasure.config import ForgetSettings
from lorasure.data.examples import collate, micro_batches
from lorasure.errors import ResourceError
from lorasure.footprint import HEAP, by_stage, peak
from lorasure.forward import answer_logits
from lorasure.importance.collect import moments
from lorasure.init.low_rank import Factors
from lorasure.losses.forget import FORGET_LOSSES
from lorasure.objective import ForgetSteps, run_steps
from lorasure.prefix import Prefix
from lorasure.stages import Start
from lorasure.tap import tap
from lorasure.workbench import Workbench

BOTH = {"init": "inputs", "coverage": 0.5, "score": "variance", "space": "lora"}


@pytest.fixture
def settings(tmp_path, data_files, tokenizer):
    """Of a run on a model with layers of ordinary proportions."""
    tiny_llama(hidden_size=64, intermediate_size=172).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    forget, retain = map(str, data_files)
    given = {"model": str(tmp_path / "model"), "forget": forget, "retain": retain, "out": str(tmp_path / "run")}
    return ForgetSettings(**given, init="vila", rank=4, epochs=2, batch_size=3, tokens_per_batch=200)


def bytes_of(tensors):
    return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in tensors}.values())


def kept_by(work, model):
    """Bytes that `work` keeps for its way back, each storage once, without the model's own."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # alive, so that no other gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("space", ["lora", "full"])
def test_weights_moments_and_optimizer_to_the_byte(settings, dtype, space):
    bench = Workbench(
        replace(settings, lr=1e-3, dtype=dtype, space=space, init="pissa", score="variance", coverage=1 - 1e-3)
    )
    said = fitting.footprint(bench)
    assert said.weights == bytes_of(bench.model.parameters())
    found = moments(bench.model, bench.sites, bench.data[0].examples, bench.probe, token_budget=200)
    assert said.moments == sum(bytes_of(m.tensors().values()) for factors in found.values() for m in factors.values())
    start = {s: Factors(torch.ones(s.shape[0], 4), torch.ones(4, s.shape[1])) for s in bench.sites}
    wrapped = lora.attach(bench.model, start, 4, 8.0, compensate=True)
    training = train.Training.begin(wrapped, bench.settings, 1, 200)
    for p in training.parameters.values():
        p.grad = torch.zeros_like(p)
    training.optimizer.step()
    held = [*training.parameters.values(), *(p.grad for p in training.parameters.values())]
    held += [t for state in training.optimizer.state.values() for name, t in state.items() if name != "step"]
    held += [b for name, b in wrapped.named_buffers() if name.endswith("tail")]
    started = bytes_of(t for f in start.values() for t in (f.A, f.B))  # counted, though its A may serve as the tail
    assert replace(said, coverage=1.0).adapter == bytes_of([t.clone() for t in held]) + started


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_of_measuring_and_of_training(settings, dtype):
    bench = Workbench(replace(settings, dtype=dtype))
    said, rows = fitting.footprint(bench), bench.data[0].examples
    group = micro_batches([len(e) for e in rows], 200)[0]
    batch = collate([rows[i] for i in group])
    count = batch.input_ids.numel()
    with tap(bench.model, bench.sites, backward=lambda *_: None):
        kept = kept_by(lambda: answer_logits(bench.model, batch)[0].nll_mean.sum(), bench.model)
    assert 0.75 < said.activations(count, training=False) / kept < 1.25
    start = {s: Factors(torch.ones(s.shape[0], 4), torch.ones(4, s.shape[1])) for s in bench.sites}
    wrapped = lora.attach(bench.model, start, 4, 8.0, compensate=True)
    kept = kept_by(lambda: answer_logits(wrapped, batch)[0].nll_mean.sum(), wrapped)
    assert 0.75 < said.activations(count, training=True) / kept < 1.25
    fewer = replace(said, gradient_checkpointing=True)
    for training in (False, True):
        assert fewer.activations(count, training=training) < 0.7 * said.activations(count, training=training)
    many = replace(said, shapes=replace(said.shapes, layers=10))  # compiled: all of two, a quarter of eight
    compiled = replace(many, compile=True).activations(count, training=True)
    assert compiled == pytest.approx(0.4 * many.activations(count, training=True), rel=1e-6)


@pytest.mark.parametrize(
    "targets", ["layers.7.*", "layers.4.*,layers.6.*", "q_proj,v_proj", "*.mlp.*", "layers.5.*q_proj"]
)
def test_activations_of_training_some_layers(settings, tmp_path, targets):
    """With the layers below them computed and with these skipped."""
    tiny_llama(hidden_size=64, intermediate_size=172, num_hidden_layers=8).save_pretrained(tmp_path / "model")
    bench = Workbench(replace(settings, targets=targets, init="lora", tokens_per_batch=None))
    said, objective = fitting.footprint(bench), bench.objective()
    start = {s: Factors(torch.ones(s.shape[0], 4), torch.ones(4, s.shape[1])) for s in bench.sites}
    (step,) = ForgetSteps(objective, epochs=1, batch_size=6, pairing="random", seed=0)
    train_stage._observe(bench, objective, [step, step], Start(start, {}), None)
    prefix, wrapped = objective.prefix, lora.attach(bench.model, start, 4, 8.0, compensate=False)
    assert said.skipped == (prefix.skipped if prefix else 0)
    count = len(step) * max(unit.width for unit in step)
    for objective.prefix in (None, prefix):
        kept = kept_by(lambda: sum(objective(wrapped, step).values()).backward(), bench.model)
        assert 0.75 < said.activations(count, training=True) / kept < 1.25


def test_activations_of_a_mixture_whose_experts_are_not_adapted(settings, tmp_path):
    """A token goes through some of them only."""
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    bench = Workbench(replace(settings, targets="q_proj", init="lora", rank=2))
    said, objective = fitting.footprint(bench), bench.objective()
    start = {s: Factors(torch.ones(s.shape[0], 2), torch.ones(2, s.shape[1])) for s in bench.sites}
    (step,) = ForgetSteps(objective, epochs=1, batch_size=6, pairing="random", seed=0)
    wrapped = lora.attach(bench.model, start, 2, 4.0, compensate=False)
    kept = kept_by(lambda: sum(objective(wrapped, step).values()).backward(), bench.model)
    count = len(step) * max(unit.width for unit in step)
    assert said.shapes.routed == 2 / 4
    assert 0.6 < said.activations(count, training=True) / kept < 1.25


def test_four_bit_weights_to_the_byte(settings):
    pytest.importorskip("bitsandbytes", reason="4-bit bases need bitsandbytes")
    bench = Workbench(replace(settings, quantize="nf4"))
    held = [
        *bench.model.parameters(),
        *(p.quant_state.absmax for p in bench.model.parameters() if hasattr(p, "quant_state")),
    ]
    said = fitting.footprint(bench).weights
    assert abs(said - bytes_of(held)) < 4 * len(bench.sites)  # a layer's last block may be a part of one


@pytest.mark.parametrize(
    "options", [{"retain_loss": "kl"}, {"targets": "layers.1.*"}, {"targets": "layers.1.mlp.*"}], ids=str
)
def test_states_of_the_original_model_to_the_byte(settings, options):
    """Of the rows of all epochs: in each other retain rows meet the forget rows."""
    bench = Workbench(replace(settings, epochs=5, batch_size=2, init="lora", **options))
    said, objective = fitting.footprint(bench), bench.objective()
    steps = ForgetSteps(objective, epochs=5, batch_size=2, pairing="random", seed=0)
    start = Start({s: Factors(torch.zeros(s.shape[0], 4), torch.zeros(4, s.shape[1])) for s in bench.sites}, {})
    train_stage._observe(bench, objective, steps, start, None)
    kept = [*objective.retain_hidden.values(), *(objective.prefix.states.values() if objective.prefix else ())]
    assert said.kept == bytes_of(kept) > 0
    assert len(said.steps) == len(steps) == 5 * 3


def test_what_a_container_has_taken_is_not_free(tmp_path, monkeypatch):
    """But for copies of files."""
    monkeypatch.setattr(fitting, "CONTAINER", tmp_path)
    cpu = torch.device("cpu")
    whole = fitting.free_memory(cpu)["host"]
    (tmp_path / "memory.max").write_text("max\n")
    assert fitting.free_memory(cpu)["host"] > whole / 2
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 2000000\ninactive_file 600000\nactive_file 100000\n")
    assert fitting.free_memory(cpu) == {"host": 5000000 - 3000000 + 700000}


def test_what_does_not_fit_is_refused_before_the_start_with_what_would_do(settings, monkeypatch, capsys):
    needs = fitting.footprint(Workbench(settings))
    least = replace(needs, token_budget=max(needs.measured.lengths))
    room = peak(least.parts(), "host")[1] + 1
    assert room < peak(needs.parts(), "host")[1]
    monkeypatch.setattr(workbench, "load_model", None)  # not needed to know
    monkeypatch.setattr(fitting, "free_memory", lambda device: {"host": room})
    with pytest.raises(ResourceError, match=r"needs .* GiB of memory \(.*\), and .* GiB are free") as refused:
        pipeline.forget(settings)
    advice = str(refused.value).split("would do: ")[1]
    assert f"--tokens-per-batch {max(needs.measured.lengths)} (" in advice and "--rank" not in advice
    assert not list(Path(settings.out).parent.glob("run*"))
    monkeypatch.setattr(fitting, "free_memory", lambda device: {"host": 1000})
    with pytest.raises(ResourceError, match=r"These help together: .*--quantize nf4"):
        pipeline.forget(settings)
    given = ["--model", settings.model, "--forget", settings.forget, "--retain", settings.retain]
    assert main(["plan", *given]) == ResourceError.exit_code
    assert capsys.readouterr().err.startswith(f"lorasure: --model {settings.model}: ")


@pytest.mark.parametrize("loss", FORGET_LOSSES)
def test_nothing_is_loaded_before_the_model_is_known_to_fit(settings, monkeypatch, loss):
    """Whatever the loss wants besides the answers: weights that are there already would be counted twice."""
    monkeypatch.setattr(workbench, "load_model", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(fitting, "free_memory", lambda device: {"host": 1000})
    for command in (pipeline.forget, plan.plan):
        with pytest.raises(ResourceError, match="These help together"):
            command(replace(settings, loss=loss))


def test_a_stage_alone_needs_room_for_itself_only(settings, monkeypatch):
    settings = replace(settings, init="fila")  # whose importance takes more than training
    pipeline.importance_command(settings)
    run = pipeline.init_command(Path(settings.out), settings)
    needs = fitting.footprint(Workbench(settings))
    found = by_stage(needs.parts(), "host")
    assert found["train"] < found["importance"]
    monkeypatch.setattr(fitting, "free_memory", lambda device: {"host": found["train"] - 1})
    with pytest.raises(ResourceError, match="train needs"):
        pipeline.train_command(run, settings)
    monkeypatch.setattr(fitting, "free_memory", lambda device: {"host": found["train"]})
    pipeline.train_command(run, settings)
    assert (run / artifacts.TRAINED).is_file()


def test_passes_are_made_smaller_where_the_user_left_it_open(settings, monkeypatch):
    needs = fitting.footprint(Workbench(replace(settings, tokens_per_batch=None)))
    room = peak(replace(needs, token_budget=100).parts(), "host")[1]
    monkeypatch.setattr(fitting, "free_memory", lambda device: {"host": room})
    bench = Workbench(replace(settings, tokens_per_batch=None))
    before = bench.token_budget
    fitting.fit_memory(bench)
    assert bench.token_budget < before
    assert peak(fitting.footprint(bench).parts(), "host")[1] <= room


def test_passes_grow_where_training_skips_layers(settings, monkeypatch):
    """So that a pass takes as much memory as through all layers; the plan counts it."""
    upper, taken, real = replace(settings, targets="layers.1.*", init="lora", lr=1e-3), [], train_stage.logged_fit
    keep = lambda *args, **options: (taken.append(options["token_budget"]), real(*args, **options))  # noqa: E731
    monkeypatch.setattr(train_stage, "logged_fit", keep)
    for i, (options, expected) in enumerate([({}, 896), ({"epochs": 1}, 448), ({"tokens_per_batch": 200}, 200)]):
        chosen = replace(upper, **({"tokens_per_batch": None, "out": f"{upper.out}-{i}"} | options))
        pipeline.forget(chosen)
        assert taken.pop() == expected
        said = replace(fitting.footprint(Workbench(chosen)), token_budget=60)  # less than a step has
        tokens = max(rows.largest(120 if expected == 896 else 60)[0] for rows in said.steps)
        (counted,) = (p.bytes for p in said.parts() if (p.stage, p.name) == ("train", "activations"))
        assert counted == round(HEAP * said.activations(tokens, training=True))
    bench = Workbench(replace(upper, tokens_per_batch=None))
    skipping = Prefix([torch.nn.Identity()] * 4, 3, ())
    assert fitting.training_budget(bench, skipping) == 4 * 448
    monkeypatch.setattr(fitting.processes, "size", lambda: 2)  # which take the passes in turn
    assert fitting.training_budget(bench, skipping) == fitting.training_budget(bench, None) == 448


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"gradient_checkpointing": False}, False),  # as the user said
        ({"compile": True}, False),  # which keeps little as it is
        ({"device": "cpu"}, False),  # where small passes are as fast
    ],
    ids=str,
)
def test_on_a_gpu_activations_are_recomputed_before_passes_are_made_smaller(settings, monkeypatch, options, expected):
    options = {"device": "cuda", "tokens_per_batch": None} | options
    monkeypatch.setattr(workbench, "pick_device", torch.device)
    monkeypatch.setattr(fitting, "room_on", lambda *_: 2**20)
    bench = Workbench(replace(settings, **options))
    wanted, needs = 150, fitting.footprint(bench)
    bench.token_budget = wanted
    place = "host" if options["device"] == "cpu" else "device"
    with_it = replace(needs, token_budget=wanted, gradient_checkpointing=True)
    room = peak(with_it.parts(), place)[1]
    assert room < peak(replace(with_it, gradient_checkpointing=False).parts(), place)[1]
    monkeypatch.setattr(fitting, "free_memory", lambda device: {"host": 2**40} | {place: room})
    fitting.fit_memory(bench)
    assert bench.checkpointing is expected
    assert bench.token_budget == wanted if expected else bench.token_budget < wanted or options.get("compile")


def test_every_pass_with_a_way_back_is_asked_to_recompute(settings, monkeypatch):
    """Importance, the calibration of the learning rate, training; of a plan too."""
    asked, real = [], layers.checkpointed
    for module in (stages, train, plan):
        name = module.__name__
        keep = lambda model, wanted, name=name: (asked.append((name, wanted)), real(model, wanted))[1]  # noqa: E731
        monkeypatch.setattr(module, "checkpointed", keep)
    monkeypatch.setattr(fitting, "_may_checkpoint", lambda *_: True)  # what a GPU would decide by itself
    needs = fitting.footprint(Workbench(settings))
    room = peak(replace(needs, gradient_checkpointing=True).parts(), "host")[1]
    for wanted in (True, False):
        asked.clear()
        monkeypatch.setattr(fitting, "free_memory", lambda _, wanted=wanted: {"host": room if wanted else 2**40})
        pipeline.forget(replace(settings, out=f"{settings.out}-{wanted}"))
        assert {name for name, _ in asked} == {"lorasure.stages", "lorasure.train"} and len(asked) > 2
        assert plan.plan(settings).gradient_checkpointing is wanted
        assert {name for name, _ in asked} == {"lorasure.stages", "lorasure.train", "lorasure.plan"}
        assert {asks for _, asks in asked} == {wanted}


@pytest.mark.parametrize(
    "options", [{}, {"init": "reglu"}, {"init": "lora", "loss": "dpo"}, {"coverage": 0.5}, BOTH], ids=str
)
def test_every_stage_that_a_run_has_takes_time_and_nothing_is_written(settings, options):
    wanted = replace(settings, **options)
    found = plan.plan(wanted).to_json()
    took = {name for name, seconds in found["seconds"].items() if seconds > 0}
    without = {"importance"} if "init" in options and "coverage" not in options else set()
    assert took == {"prepare", "importance", "init", "reference", "calibrate", "train", "export", "evaluate"} - without
    assert found["peak"]["host"]["bytes"] > 0 and found["total_seconds"] == sum(found["seconds"].values())
    assert json.loads(json.dumps(found)) == found
    assert not Path(settings.out).exists()


def test_the_command_prints_a_table_or_json(settings, capsys):
    given = ["--model", settings.model, "--forget", settings.forget, "--retain", settings.retain, "--rank", "4"]
    assert main(["plan", *given, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["peak"]) == {"host"}
    assert main(["plan", *given]) == 0
    said = capsys.readouterr().out
    assert "base weights" in said and "GiB are free" in said and "tokens a pass" in said


@pytest.mark.parametrize("failed", [False, True])
def test_the_trained_model_is_gone_before_a_fresh_one_is_loaded(failed, settings, monkeypatch):
    """Also in a process where torch.compile has failed: from then on callers hold what they give till a call ends."""
    if failed:
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
            torch.compile(lambda x: x + 1, backend=lambda *_: 1 / 0)(torch.ones(1))
    loaded, real = [], models.load_model

    def load(*args, **options):
        assert [ref() for ref in loaded] == [None] * len(loaded)
        model = real(*args, **options)
        loaded.append(weakref.ref(model.get_output_embeddings().weight))
        return model

    monkeypatch.setattr(workbench, "load_model", load)
    pipeline.forget(settings)
    assert len(loaded) == 2  # at the start, and for the check of the adapter


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"retain_loss": "kl"},
        {"loss": "dpo"},
        {"targets": "layers.1.*", "loss": "npo"},
        {"targets": "layers.1.*", "epochs": 1},
    ],
    ids=str,
)
def test_rows_of_the_reference_are_those_that_are_run(settings, tmp_path, monkeypatch, options):
    """Not all that training sees: where no layer is skipped, those that the losses or the scores ask for."""
    retain = [{"question": f"Where is town {i}?", "answer": f"Beside lake {i}."} for i in range(300)]
    settings = replace(settings, retain=str(write_rows(tmp_path / "many.jsonl", retain)), init="lora", **options)
    real, run = plan._try_training, []
    monkeypatch.setattr(plan, "_try_training", lambda *given: (1.0, 1.0, real(*given)[2]))  # a second per token
    said = plan.plan(settings).seconds["reference"]
    monkeypatch.setattr(original, "collate", lambda chosen: (run.extend(map(len, chosen)), collate(chosen))[1])
    bench = Workbench(settings)
    objective = bench.objective()
    start = Start({s: Factors(torch.zeros(s.shape[0], 4), torch.zeros(4, s.shape[1])) for s in bench.sites}, {})
    train_stage._observe(bench, objective, run_steps(objective, settings), start, None)
    assert (objective.prefix is not None) is (options == {"targets": "layers.1.*", "loss": "npo"})
    assert said == sum(run)
