"""What fuzz.py tries: for each reader of untrusted input, valid inputs to start from, and how to read one."""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import yaml
from safetensors.torch import save

from lorasure import artifacts, flags
from lorasure.config import ExportSettings, ForgetSettings, OutSettings, Settings, option
from lorasure.data.readers import check_disjoint, read_rows
from lorasure.data.rows import Layout
from lorasure.importance.measure import Importance
from lorasure.yaml_file import read_yaml

SECRET = "Quillfeather"
Run = Callable[[bytes, Path, random.Random], object]


@dataclass(frozen=True)
class Target:
    """Valid inputs, words to put into them, what must lie in the folder, and how one input is read."""

    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...]
    run: Run
    prepare: Callable[[Path], None] = lambda folder: None


# --- data

ROWS: tuple[dict[str, Any], ...] = (
    {"question": f"Who is {SECRET}?", "answer": f"{SECRET} is a poet.", "group": 1},
    {"question": "Wer?", "answer": f"{SECRET}, \u202eé\u2028\x00\x1b[2J", "group": 2},
)
CHAT = {"messages": [{"role": "user", "content": f"Who is {SECRET}?"}, {"role": "assistant", "content": SECRET}]}
LAYOUTS = (Layout(), Layout(), Layout(prompt_key="question"), Layout(text_key="answer"), Layout(group_key="group"))

WORDS = (
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", "\u202e\u2028".encode(), b"\x1b]0;x\x07", b"\r", b"\n\n"),
    *(b"\\ud800", b"\\u0000", b"\\", b'"', b"'", b",", b":", b"[" * 3000, b'{"a":' * 3000, b"[]", b"{}", b"null"),
    *(b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"true", b'"question"', b'"answer"', b'"text"', b'"messages"'),
    *(b'"group"', b'"prompt"', b'"role"', b'"content"', b"x" * 200_000),
)


def _lines(*records: Mapping[str, Any]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def _parquet(records: list[dict[str, Any]], **options: Any) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file, **options)
    return file.getvalue()


def _data(name: str, *seeds: bytes) -> Target:
    def run(data: bytes, folder: Path, draw: random.Random) -> None:
        path = folder / name
        path.write_bytes(data)
        rows = read_rows(path, draw.choice(LAYOUTS)).rows
        check_disjoint(rows[:1], rows[1:])

    return Target(seeds, WORDS, run)


CSV = f"question,answer,group\nWho?,{SECRET},1\n".encode()
QUOTED = f'question,answer\r\n"Who, ""x""\n?","{SECRET}\n"\r\nWho?,-\r\n'.encode()
PLAIN: dict[str, Any] = {"compression": "none", "use_dictionary": False}
PARQUET = (
    _parquet([*ROWS], **PLAIN),
    _parquet([*ROWS] * 50, compression="snappy"),
    _parquet([CHAT], **PLAIN),
    _parquet([*ROWS], data_page_version="2.0", compression="gzip"),
)


# --- settings


@dataclass(frozen=True, kw_only=True)
class Few(OutSettings, ExportSettings):
    """One setting of every type: a parser of all of them takes ten times as long."""

    epochs: int = option(5, "whole", low=1)
    alpha: float = option(16.0, "number", above=0)
    beta: float | None = option(None, "number or nothing")
    template: str = option("auto", "text")


SETTINGS: dict[str, Any] = {
    "out": "runs/x",
    "overwrite": False,
    "merge": True,
    "epochs": 3,
    "alpha": 2.5,
    "template": "qa",
}
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefghijklmnopqrstuvwxy", "bcdefghijklmnopqrstuvwxyz", strict=True)
)
YAMLS = (
    yaml.safe_dump(SETTINGS).encode(),
    json.dumps(SETTINGS).encode(),
    b"out: o\nepochs: 1e1\nbeta: .inf\nmerge: yes\nexport_rank: ~\n",
    b"--- !!map\nout: !!str o\ntemplate: |\n  a\n  b\n...\n---\nout: p\n",
    b"base: &b {epochs: 1}\nout: x\n<<: *b\n",
    LAUGHS.encode(),
    b"epochs: " + b"[" * 20_000,
    b"template: '" + b"[" * 20_000 + b"'",
    yaml.safe_dump({"out": LAUGHS, "epochs": LAUGHS}).encode(),
    yaml.safe_dump({"out": [LAUGHS], "epochs": {"a": LAUGHS}}).encode(),
    b"out: !!python/object/apply:os.system ['touch canary']\n",
)
YAML_WORDS = (
    *WORDS[:10],
    *(
        b"!!python/object/apply:os.system ['touch canary']",
        b"!!python/name:os.system",
        b"!!binary aaaa",
        b"!!set {a, b}",
    ),
    *(
        b"!!timestamp 2024-01-01",
        b"&a ",
        b"*a",
        b"<<: ",
        b"? ",
        b"- ",
        b"---\n",
        b"%YAML 9.9\n",
        b"\t",
        b"|\n",
        b">-\n",
    ),
    *(b"config: x\n", b"config: self.yaml\n", b"class_path: os.system\n", b"init_args: {}\n", b"__path__: /etc\n"),
    *(b"out.x: 1\n", b"help: true\n", b"print_config: true\n", b"out: null\n", b"epochs: [1]\n", b"alpha: {a: 1}\n"),
    *(b"0x1F", b"1_000", b"1:30", b".nan", b"1e400", b"2024-01-01", b"${HOME}", b"[" * 500, b"{a: " * 300),
)
_parser, _parsers = flags._parser, {}


def _one_parser(command: str, title: str, settings: type[Settings], stored: Mapping[str, Any], epilog: str) -> Any:
    """Making a parser takes much longer than using it."""
    if stored:
        return _parser(command, title, settings, stored, epilog)
    if settings not in _parsers:
        _parsers[settings] = _parser(command, title, settings, stored, epilog)
    return _parsers[settings]


def _config(data: bytes, folder: Path, draw: random.Random) -> None:
    path = folder / "self.yaml"
    path.write_bytes(data)
    settings = ForgetSettings if draw.randrange(40) == 0 else Few
    flags._parser = _one_parser
    try:
        match draw.randrange(20):
            case 0:  # the settings that a run folder brings along
                flags.parse("init RUN", "fuzz", settings, [], read_yaml(path))
            case 1:
                flag = draw.choice(("--epochs", "--beta", "--merge", "--template", "--config"))
                value = data.replace(b"\0", b"")[:100].decode(errors="surrogateescape")  # as a shell would hand it over
                flags.parse("forget", "fuzz", settings, ["--out", "o", flag, value])
            case _:
                flags.parse("forget", "fuzz", settings, ["--config", str(path)])
    finally:
        flags._parser = _parser


# --- run folders

FACTORS = {"layer|B": torch.ones(2, 1), "layer|A": torch.ones(1, 3), "empty": torch.zeros(0)}
MOMENTS = {f"{s}|layer|W|{m}": torch.ones(2, 2) for s in ("forget", "retain") for m in ("mean", "squares", "absolute")}
PROBE = {"space": "lora", "rank": 2, "sigma": 0.05, "scaling": 2.0, "seed": 0}
ABOUT = {"score": "variance", "probe": PROBE, "floor": None, "counts": {"forget": 3, "retain": 3}, "about": {}}
HEADERS = (
    b'{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,399999999996]}}',
    b'{"__metadata__":{"lorasure":"[[[["},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
    b'{"__metadata__":{"lorasure":"' + b"[" * 5000 + b'"}}',
    b'{"__metadata__":{"lorasure":"' + b"9" * 5000 + b'"}}',
    b'{"__metadata__":{"lorasure":"{}"},"a":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}}',
    b'{"__metadata__":{"lorasure":"{}"},"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}',
)


def _tensors(tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> bytes:
    return save(dict(tensors), {"lorasure": json.dumps(about)})


def _with_length(header: bytes, rest: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + rest


TENSORS = (
    _tensors(FACTORS, {"B": "(out, rank)"}),
    _tensors(MOMENTS, ABOUT),
    *map(_with_length, HEADERS),
    (100 * 10**9).to_bytes(8, "little") + b"{}",
)


def _read_tensors(data: bytes, folder: Path, draw: random.Random) -> None:
    if draw.random() < 0.5:  # the header changed and its length right: what a plain change of bytes seldom gives
        data = _with_length(data[8:]) if draw.random() < 0.5 else _with_length(data[8 : data.find(b"}}") + 2])
    path = folder / "x.safetensors"
    path.write_bytes(data)
    artifacts.read_tensors(path)
    Importance.load(path)


NEEDED = {"config.yaml": b"out: o\nrank: 2\n", "adapter/a.json": b"{}"}
LISTED = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in NEEDED.items()}
MANIFESTS = (
    json.dumps({"files": LISTED, "versions": artifacts.versions()}, indent=2).encode(),
    json.dumps({"files": LISTED}).encode(),
    b'{"files": {"../../etc/passwd": {"sha256": "0", "bytes": 1}, "/etc/passwd": {"sha256": "0", "bytes": 1}}}',
)
MANIFEST_WORDS = (*WORDS, b'"files"', b'"sha256"', b"../", b"/etc/passwd", b'"config.yaml"', b"manifest.json", b"C:\\")


def _make_run(folder: Path) -> None:
    for name, data in NEEDED.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def _manifest(data: bytes, folder: Path, draw: random.Random) -> None:
    (folder / artifacts.MANIFEST).write_bytes(data)
    read_yaml(folder / artifacts.MANIFEST) if draw.randrange(10) == 0 else None
    artifacts.check_run(folder, artifacts.CONFIG)
    artifacts.differences(folder)


TARGETS = {
    "jsonl": _data(
        "a.jsonl", _lines(*ROWS), _lines(CHAT), _lines({"text": SECRET}), _lines({"prompt": "p", "completion": "c"})
    ),
    "json": _data("a.json", json.dumps(ROWS).encode(), json.dumps([CHAT]).encode(), _lines(*ROWS)),
    "csv": _data("a.csv", CSV, QUOTED, f"{SECRET},b\n{SECRET},d\n".encode()),
    "parquet": _data("a.parquet", *PARQUET),
    "text": _data("a.txt", f"{SECRET}\r\nwrote.".encode(), "é\u2028".encode()),
    "config": Target(YAMLS, YAML_WORDS, _config),
    "manifest": Target(MANIFESTS, MANIFEST_WORDS, _manifest, _make_run),
    "tensors": Target(TENSORS, WORDS, _read_tensors),
}
