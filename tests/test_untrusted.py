"""Models, settings and run folders from elsewhere: nothing in them is run, followed out of its folder, or believed."""

from __future__ import annotations

import builtins
import fnmatch
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import save_file

from conftest import tiny_llama, write_rows
from lorasure import artifacts, cli, model_files, models
from lorasure.config import DemoSettings
from lorasure.errors import DataError, UsageError
from lorasure.importance.measure import Importance
from lorasure.model_files import locate

CPU = {"dtype": torch.float32, "device": torch.device("cpu")}
COMMIT = "c0ffee" * 6 + "c0ff"


class Malicious:
    """A pickle of it touches the file `canary` when it is read without care."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.fixture
def canary(tmp_path):
    """A file that must not appear; a test that leaves it fails."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


@pytest.fixture
def base(model_folder, tmp_path):
    """A copy of the model folder, to be damaged."""
    return Path(shutil.copytree(model_folder, tmp_path / "base"))


@pytest.fixture
def refused(base, data_files, tmp_path, capfd, monkeypatch):
    """Run `forget` on the damaged folder: exit code 3, one printable line that says this; nobody is asked anything."""

    def ask(*_):
        raise AssertionError("prompted")

    def check(said, *flags, model=base, code=3):
        monkeypatch.setattr(builtins, "input", ask)
        capfd.readouterr()
        arguments = ["--model", str(model), "--forget", str(data_files[0]), "--retain", str(data_files[1]), *flags]
        assert cli.main(["forget", *arguments, "--out", str(tmp_path / "run")]) == code
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].isprintable() and said in lines[0], lines
        assert not (tmp_path / "run").exists()

    return check


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickled(base, content):
    """The weights of a folder as pickle, instead of safetensors."""
    (base / "model.safetensors").unlink()
    torch.save(content, base / "pytorch_model.bin")


# --- pickles


@pytest.mark.fault(
    "a model with pickled weights only",
    "P7",
    "exit 3 without --allow-pickle",
    "use *.bin as a fallback in weight_files",
)
def test_pickled_weights_are_read_only_when_asked_for(base, refused):
    expected = tiny_llama().state_dict()
    pickled(base, expected)
    refused("--allow-pickle")
    for call in (lambda: models.load_model(str(base), **CPU), lambda: models.load_tokenizer(str(base))):
        with pytest.raises(DataError, match="a pickle can be made to run code"):
            call()
    found = models.load_model(str(base), **CPU, allow_pickle=True)
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    assert models.fingerprint(found, "x")["files"].keys() == {"pytorch_model.bin"}


@pytest.mark.fault(
    "a malicious pickle as weights", "P7", "exit 3, the canary file does not appear", "weights_only=False in torch.load"
)
@pytest.mark.parametrize("flags", [(), ("--allow-pickle",)], ids=["refused", "allowed"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_malicious_pickle_does_nothing(base, refused, canary, flags, sharded):
    pickled(base, {"a": Malicious(canary)})
    if sharded:
        (base / "pytorch_model.bin").rename(base / "shard.bin")
        (base / "pytorch_model.bin.index.json").write_text('{"metadata": {}, "weight_map": {"a": "shard.bin"}}')
    torch.load(next(base.glob("*.bin")), weights_only=False)
    assert canary.exists()  # it would work
    canary.unlink()
    refused("something other than tensors" if flags else "--allow-pickle", *flags)


@pytest.mark.fault(
    "an index of safetensors that names a pickle", "P7", "exit 3, it is not opened", "no check of the suffix in _shards"
)
def test_an_index_of_safetensors_cannot_name_a_pickle(base, refused, canary):
    pickled(base, {"a": Malicious(canary)})
    (base / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}')
    refused("is not a .safetensors file of the same folder")
    refused("is not a .safetensors file of the same folder", "--allow-pickle")


@pytest.mark.fault(
    "an adapter with a pickle, or with `..` as its base, in the model folder",
    "P7, P8",
    "exit 3, neither is opened",
    "no check for adapter_config.json",
)
@pytest.mark.parametrize("flags", [(), ("--allow-pickle",)], ids=["refused", "allowed"])
@pytest.mark.parametrize("named", ["../elsewhere", "/etc", "owner/name"])
def test_an_adapter_beside_the_model_is_not_loaded(base, refused, canary, named, flags):
    torch.save({"a": Malicious(canary)}, base / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": named}
    (base / "adapter_config.json").write_text(json.dumps(config))
    refused("the folder holds an adapter", *flags)
    (base / "config.json").unlink()  # an adapter alone: transformers would open the base that it names
    refused("holds no config.json", *flags)


# --- code that comes with a model


@pytest.mark.fault(
    "a model with its own code (auto_map)", "P7", "exit 3, no prompt, the code is not run", "trust_remote_code=True"
)
@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json", "both"])
def test_code_that_comes_with_a_model_is_not_run(base, refused, canary, where):
    (base / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass E: pass\n")
    if where != "tokenizer_config.json":
        names = {"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.E"}
        edit(base / "config.json", auto_map=names, model_type="evil")
    if where != "config.json":
        names = {"AutoTokenizer": ["evil.E", "evil.E"]}
        edit(base / "tokenizer_config.json", auto_map=names, tokenizer_class="Evil")
        edit(base / "config.json", model_type="evil")
    refused("cannot be loaded")


def test_a_known_architecture_with_its_own_code_runs_ours(base, canary, monkeypatch):
    (base / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass E: pass\n")
    edit(base / "config.json", auto_map={"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.E"})
    assert type(models.load_model(str(base), **CPU)).__name__ == "LlamaForCausalLM"


@pytest.mark.fault(
    "a chat template that reaches for the system",
    "P7",
    "exit 3, the sandbox of transformers stops it",
    "render with a plain jinja2 environment",
)
def test_a_chat_template_cannot_reach_the_system(base, refused, canary):
    evil = "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}"
    edit(base / "tokenizer_config.json", chat_template=evil)
    refused("chat template refuses these messages")


# --- paths out of the folder, and files that are not what they say


@pytest.mark.fault(
    "`..`, an absolute path or rubbish in a weight index",
    "P8",
    "exit 3, nothing outside is opened",
    "no check in _shards",
)
@pytest.mark.parametrize(
    "named",
    [
        "../elsewhere/model.safetensors",
        "/etc/model.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        3,
        None,
        ["x.safetensors"],
    ],
    ids=str,
)
def test_a_weight_index_cannot_point_outside(base, refused, tmp_path, named):
    (tmp_path / "elsewhere").mkdir()
    (base / "model.safetensors").rename(tmp_path / "elsewhere" / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": named}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("is not a .safetensors file of the same folder")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\0"], ids=range(6)
)
def test_rubbish_as_a_weight_index(base, refused, content):
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(content)
    refused("model.safetensors.index.json")


@pytest.mark.fault(
    "a config.json that names other weights, or a kernel on the hub",
    "P7, P8",
    "exit 3, neither is opened or fetched",
    "no call of _check_config",
)
@pytest.mark.parametrize(
    "changes",
    [
        {"transformers_weights": "../elsewhere/model.safetensors"},
        {"transformers_weights": "adapter_model.bin"},
        {"attn_implementation": "owner/kernel"},
        {"attn_implementation": {"": "owner/kernel@main"}},
        {"text_config": {"attn_implementation": "owner/kernel"}},
    ],
    ids=str,
)
def test_a_model_configuration_cannot_point_elsewhere(base, refused, changes):
    edit(base / "config.json", **changes)
    refused(next(key for key in ("transformers_weights", "attn_implementation") if key in str(changes)))


@pytest.mark.parametrize(
    "content", ["[]", "3", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\0", "\ufeff{}"], ids=range(6)
)
def test_rubbish_as_a_model_configuration(base, refused, content):
    (base / "config.json").write_text(content)
    refused("config.json")


HUGE = (100 * 10**9).to_bytes(8, "little") + b"{}"


@pytest.mark.fault(
    "a safetensors header of 100 GB, in a model and in a run", "P8", "exit 3", "except KeyError only in read_tensors"
)
def test_a_header_of_100_gigabytes(base, refused, tmp_path):
    (base / "model.safetensors").write_bytes(HUGE)
    refused("cannot be loaded")
    (tmp_path / "x.safetensors").write_bytes(HUGE)
    with pytest.raises(DataError, match="not a file that this program wrote"):
        artifacts.read_tensors(tmp_path / "x.safetensors")


@pytest.mark.fault(
    "weights missing from the files of a model",
    "P4",
    "exit 3, where transformers would draw them at random",
    "no look at missing_keys",
)
def test_weights_that_are_missing_are_not_made_up(base, refused):
    kept = {name: value for name, value in tiny_llama().state_dict().items() if "layers.1.mlp" not in name}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    refused("3 weights are not in its files, the first is model.layers.1.mlp.down_proj.weight")


# --- models of the hub


@pytest.fixture
def hub(base, tmp_path, monkeypatch):
    """A stand-in for the hub with one model, owner/name, and the list of what was asked for."""
    cache = tmp_path / "models--owner--name" / "snapshots" / COMMIT
    asked = []

    def download(model, *, revision, allow_patterns, ignore_patterns=None):
        assert model == "owner/name"
        asked.append((revision, allow_patterns))
        cache.mkdir(parents=True, exist_ok=True)
        for path in base.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, cache / path.name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    model_files._fetched.cache_clear()
    yield cache, asked
    model_files._fetched.cache_clear()


def test_of_a_hub_model_only_description_and_safetensors_are_fetched_from_one_commit(base, hub):
    cache, asked = hub
    (base / "evil.py").write_text("raise SystemExit")
    torch.save({}, base / "pytorch_model.bin")
    torch.save({}, base / "training_args.bin")
    found = models.load_model("owner/name", **CPU, revision="main")
    assert {p.suffix for p in cache.iterdir()} == {".json", ".safetensors"}
    assert [revision for revision, _ in asked] == ["main", COMMIT]
    about = models.fingerprint(found, "owner/name")
    assert (about["source"], about["revision"]) == ("owner/name", COMMIT) and "model.safetensors" in about["files"]
    assert models.load_tokenizer("owner/name", revision="main").eos_token == "<|end|>"
    assert len(asked) == 2  # a branch that moves on in the meantime is not asked again


@pytest.mark.fault(
    "a hub model with pickled weights, an adapter, or `..` in its index",
    "P7, P8",
    "exit 3, what is refused is not even fetched",
    "no call of check_model_folder in _fetched",
)
@pytest.mark.parametrize("kind", ["pickle", "adapter", "index"])
def test_a_hub_model_is_refused_as_a_folder_is(base, hub, refused, canary, kind):
    cache, _ = hub
    if kind == "pickle":
        pickled(base, {"a": Malicious(canary)})
    elif kind == "adapter":
        (base / "adapter_config.json").write_text('{"base_model_name_or_path": "../x"}')
    else:
        (base / "model.safetensors").unlink()
        (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}')
    said = {"pickle": "--allow-pickle", "adapter": "holds an adapter", "index": "of the same folder"}[kind]
    refused(said, model="owner/name")
    assert not list(cache.glob("*.bin"))


def test_pickled_weights_of_a_hub_model_when_asked_for(base, hub):
    pickled(base, tiny_llama().state_dict())
    assert models.load_model("owner/name", **CPU, allow_pickle=True).num_parameters() > 0
    assert locate("owner/name", allow_pickle=True) == hub[0]


# --- settings and run folders


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnopq", "bcdefghijklmnopqr", strict=True)
)


@pytest.mark.fault(
    "YAML that grows: aliases, also inside a text; a settings file that names another; deep nesting; not UTF-8",
    "P8",
    "exit 2 at once",
    "no call of _check_configs",
)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB.encode(), "aliases are not read"),
        (yaml.safe_dump({"template": BOMB}).encode(), "aliases are not read"),
        (yaml.safe_dump({"epochs": [{"a": BOMB}]}).encode(), "aliases are not read"),
        (b"config: other.yaml\n", "cannot name another one"),
        (b"epochs: " + b"[" * 100_000, "nested deeper than 50"),
        (b"template: '" + b"[" * 100_000 + b"'\n", "nested deeper than 50"),
        (b"template: \xff\xfe\n", "not valid YAML"),
        (b"seed: !!python/object/apply:os.system ['touch canary']\n", "could not determine a constructor"),
        (b"seed: !!timestamp x\n", "not valid YAML"),
        (b"template: '!!timestamp x'\n", "cannot be read"),
        (b"base: &b {epochs:" + b"[" * 20_000, "not valid YAML"),  # a slow reader would take minutes
        (b"\x00", "not valid YAML"),
    ],
    ids=[
        "aliases",
        "in a text",
        "deeper",
        "another file",
        "deep",
        "deep in a text",
        "not UTF-8",
        "object",
        "no date",
        "no date in a text",
        "slow",
        "NUL",
    ],
)
def test_hostile_settings_files(refused, tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_bytes(text)
    Path("other.yaml").write_text("epochs: 1\n")
    refused(said, "--config", "bad.yaml", code=2)
    refused(said, "--config=bad.yaml", code=2)
    assert not Path("canary").exists()


def run_folder(folder, **content):
    """A folder with a right manifest and these files, as somebody else may have made it."""
    folder.mkdir()
    for name, data in content.items():
        (folder / name.replace("_", ".")).write_bytes(data)
    artifacts.write_manifest(folder)
    return folder


@pytest.mark.fault(
    "a run folder whose settings are not settings",
    "P8",
    "exit 2 or 3 in one line",
    "no check of `stored` in flags.parse",
)
@pytest.mark.parametrize(
    "stored", [b"[1]", b"x", b"7", b"rank: [1]\n", b"rank: {a: b}\n", b"out: 3\n", BOMB.encode(), b"\xff"], ids=str
)
def test_a_run_folder_with_hostile_settings(tmp_path, capfd, stored):
    run = run_folder(tmp_path / "run", config_yaml=stored)
    assert cli.main(["train", str(run)]) in (2, 3)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].isprintable(), lines


@pytest.mark.fault(
    "a manifest, or a link in a run, that leads out of the folder", "P8", "exit 3", "`return True` in _is_inside"
)
@pytest.mark.parametrize(
    "name", ["../secret.txt", "a/../../secret.txt", "ABSOLUTE", "link.txt", "deep/secret.txt", "\0", "\ud800"]
)
def test_a_manifest_cannot_name_files_outside(tmp_path, name):
    secret = tmp_path / "secret.txt"
    secret.write_text("x")
    run = run_folder(tmp_path / "run", config_yaml=b"out: x\n")
    (run / "link.txt").symlink_to(secret)
    (run / "deep").symlink_to(tmp_path)
    manifest = artifacts.read_json(run / artifacts.MANIFEST)
    name = str(secret) if name == "ABSOLUTE" else name
    manifest["files"][name] = {"sha256": artifacts.sha256(secret), "bytes": 1}
    artifacts.write_json(run / artifacts.MANIFEST, manifest)
    for call in (artifacts.check_run, artifacts.differences):
        with pytest.raises(DataError, match="is not one of ours"):
            call(run)


@pytest.mark.fault(
    "importance of somebody else, rubbish inside a right file", "P8", "DataError", "no except in Importance.load"
)
@pytest.mark.parametrize(
    ("names", "about"),
    [
        (["a"], {}),
        (["forget|a|W|mean"], {"counts": {}}),
        (["forget|a|W|mean"], {"counts": {"forget": 1}}),
        (["other|a|W|mean"], {"counts": {"other": 1}}),
        ([], {"probe": []}),
        ([], {"probe": {"space": "lora", "x": 1}}),
    ],
    ids=str,
)
def test_rubbish_as_importance(tmp_path, names, about):
    artifacts.write_tensors(tmp_path / "x", dict.fromkeys(names, torch.zeros(1)), about)
    with pytest.raises(DataError, match="not what this program writes there"):
        Importance.load(tmp_path / "x")


@pytest.mark.parametrize(
    "about", ["[" * 100_000, "9" * 5000, "3", "\0", ""], ids=["deep", "long", "number", "NUL", "empty"]
)
def test_rubbish_in_the_header_of_a_file_of_ours(tmp_path, about):
    save_file({"a": torch.zeros(1)}, tmp_path / "x", metadata={"lorasure": about})
    with pytest.raises(DataError, match="not a file that this program wrote"):
        artifacts.read_tensors(tmp_path / "x")


def test_a_setting_that_no_file_can_record_is_refused():
    for text in ("a\0b", os.fsdecode(b"a\xff")):
        with pytest.raises(UsageError, match="--out holds a NUL or a byte that is not UTF-8"):
            DemoSettings(out=text)


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    """A run, whose files the test below replaces."""
    folder = tmp_path_factory.mktemp("finished")
    rows = [{"question": f"Who is {i}?", "answer": f"It is {i}."} for i in range(9)]
    forget, retain = write_rows(folder / "forget.jsonl", rows[:4]), write_rows(folder / "retain.jsonl", rows[4:])
    flags = [
        "--model",
        str(model_folder),
        "--forget",
        str(forget),
        "--retain",
        str(retain),
        "--rank",
        "2",
        "--epochs",
        "1",
        "--init",
        "vila",
    ]
    assert cli.main(["forget", *flags, "--out", str(folder / "run")]) == 0
    return folder / "run"


def text(content):
    return lambda path: path.write_text(content)


def tensors(change):
    def replace(path):
        found, about = artifacts.read_tensors(path)
        artifacts.write_tensors(path, change(found), about)

    return replace


def without(part):
    return tensors(lambda found: {name: t for name, t in found.items() if part not in name})


SMALLER = tensors(lambda found: {name: t[:1] for name, t in found.items()})
LOWER = tensors(lambda found: {name: t[:1] if name.endswith("|B") else t for name, t in found.items()})
NAN = tensors(lambda found: {name: t * float("nan") for name, t in found.items()})
OTHER = tensors(lambda found: {"x": torch.zeros(1)})
TAMPERED = [
    *(
        ("data.json", text(content), "export", 3)
        for content in ("{}", "[]", '{"forget": 3, "retain": 4}', "3", "[" * 99_999)
    ),
    *(("data.json", text(content), "purge", 3) for content in ("[]", '{"forget": 3}')),
    *(
        ("summary.json", text(content), "train", 3)
        for content in ("{}", "[]", '{"base": []}', '{"base": {"files": 3}}')
    ),
    *(
        ("init.safetensors", change, "train", 3)
        for change in (without("|B"), without("|A"), OTHER, SMALLER, LOWER, text("x"))
    ),
    ("init.safetensors", NAN, "train", 4),
    *(
        ("trained.safetensors", change, "export", 3)
        for change in (without("|B"), without("0.mlp"), OTHER, SMALLER, LOWER)
    ),
    ("trained.safetensors", NAN, "export", 4),
    *(
        ("importance.safetensors", change, "init", 3)
        for change in (without("|mean"), without("retain|"), OTHER, SMALLER)
    ),
    ("importance.safetensors", NAN, "init", 4),
]


@pytest.mark.fault(
    "a run folder tampered with, its manifest made anew: accounts, factors and importance of other kinds and shapes",
    "P4, P8",
    "exit 3 or 4 in one line, the run as before",
    "no as_written in Start.load, Importance.load, _reopen; no _check_moments",
)
@pytest.mark.parametrize(("name", "change", "command", "code"), TAMPERED, ids=range(len(TAMPERED)))
def test_a_run_folder_that_was_tampered_with(finished, tmp_path, capfd, name, change, command, code):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    change(run / name)
    artifacts.write_manifest(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert cli.main([command, str(run), *(["--overwrite"] if command in ("init", "train") else [])]) == code
    err = capfd.readouterr().err.splitlines()
    assert err[-1].startswith("lorasure: ") and err[-1].isprintable()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
