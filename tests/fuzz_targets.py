"""What is fuzzed: each target feeds bytes to one reader, which must return or raise a `MarkupError`, nothing else.

`scripts/fuzz.py` runs them under atheris for hours, `tests/test_fuzz.py` under hypothesis for seconds.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from icl_markup.calibration import Calibration
from icl_markup.cells import Cell
from icl_markup.checkpoint import Progress, load_checkpoint, save_checkpoint
from icl_markup.config import load_config, to_dict
from icl_markup.errors import MarkupError, TemplateError
from icl_markup.experiment_config import ExperimentConfig
from icl_markup.output import resumed
from icl_markup.predict import Text, open_texts
from icl_markup.readers import TaskSource, read_task
from icl_markup.run_folder import truncate_metrics
from icl_markup.tagfile import read_tags
from icl_markup.tasks import TaskChecks
from icl_markup.template import Template
from icl_markup.warmup_config import WarmupConfig

ROOT = Path(__file__).resolve().parents[1]
_CHECKS = TaskChecks(1, "drop", "drop")


@cache
def _place() -> Path:
    """A folder for files, in memory where the system has such a place."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="icl-markup-fuzz-", dir=memory if memory.is_dir() else None))


def _written(name: str, data: bytes) -> Path:
    path = _place() / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def template(data: bytes) -> None:
    """A template parses to one that its source parses to again, and its variants are templates."""
    with suppress(TemplateError):
        found = Template.load(_written("a.tmpl", data))
        assert Template.parse(found.source, found.name) == found
        wider = found.with_width(7)
        assert [tag.width for tag in wider.tags] == [7] * len(found.tags)
        assert (wider.head, wider.option, wider.demo) == (found.head, found.option, found.demo)
        for tag in found.tags:
            with suppress(TemplateError):
                assert tag.name not in {one.name for one in found.without_tag(tag.name).tags}


def config(data: bytes) -> None:
    """A configuration is read to one that is JSON-able, from a file or from overrides (a line each)."""
    kind: type[Any] = ExperimentConfig if data[:1] > b"\x7f" else WarmupConfig
    with suppress(MarkupError):
        if data[:1] and data[0] % 2:
            words = data[1:].decode(errors="replace").split("\n")
            found = load_config(kind, overrides=words)
        else:
            found = load_config(kind, _written("a.yaml", data[1:]))
        json.dumps(to_dict(found))


def task(data: bytes) -> None:
    """Every example that a reader yields has a text and a label."""
    suffix = (".jsonl", ".csv", ".tsv", ".JSONL")[data[0] % 4 if data else 0]
    with suppress(MarkupError):
        found = read_task(TaskSource(str(_written("a" + suffix, data[1:])), checks=_CHECKS))
        assert len(found.labels) >= 2
        for examples in found.splits.values():
            assert all(one.text.strip() and one.label.strip() for one in examples)


def folder(data: bytes) -> None:
    """A task folder: ``meta.json`` and a split, divided by a null byte."""
    meta, _, rows = data.partition(b"\0")
    _written("task/meta.json", meta)
    path = _written("task/train.jsonl", rows or b'{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    with suppress(MarkupError):
        read_task(TaskSource(str(path.parent), checks=_CHECKS))


def texts(data: bytes) -> None:
    """Texts to classify, a line each or in a column."""
    suffix = (".jsonl", ".csv", ".tsv", ".txt")[data[0] % 4 if data else 0]
    path = _written("texts" + suffix, data[1:])
    with suppress(MarkupError), open_texts([], str(path)) as found:
        for one in found:
            assert one.place and isinstance(one.text, str)


def answers(data: bytes) -> None:
    """An output to go on with: it is refused and left as it is, or cut to whole lines."""
    path = _written("answers.jsonl", data)
    given = iter([Text(f"line {i}", text) for i, text in enumerate(("eins", "zwei ü", "drei \ud800"))])
    try:
        with resumed(path, given):
            pass
    except MarkupError:
        assert path.read_bytes() == data
    else:
        assert data.startswith(path.read_bytes())


def metrics(data: bytes) -> None:
    """What is kept of a log is its beginning, in whole lines, or it is refused and left as it is."""
    path = _written("metrics.jsonl", data)
    try:
        truncate_metrics(path, 5)
    except MarkupError:
        assert path.read_bytes() == data
    else:
        assert data.startswith(path.read_bytes())


def tags(data: bytes) -> None:
    """A tag folder whose details or tensors are the data; checksums are made to fit, or they would stop everything."""
    tensors, details = _tag_files()
    if data[:1] and data[0] % 2:
        tensors = data[1:]
        details = {**details, "tensors_sha256": hashlib.sha256(tensors).hexdigest()}
        _written("tags/tags.json", json.dumps(details).encode())
    else:
        _written("tags/tags.json", data[1:])
    path = _written("tags/tags.safetensors", tensors)
    with suppress(MarkupError):
        found = read_tags(path.parent)
        assert {t.name: t.width for t in found.template.tags} == {n: v.shape[0] for n, v in found.vectors.items()}
        assert all(bool(rows.isfinite().all()) for rows in found.vectors.values())


def checkpoint(data: bytes) -> None:
    """A checkpoint of a warm-up."""
    path = _written("run/checkpoint.safetensors", data)
    with suppress(MarkupError):
        rows, best, progress, _ = load_checkpoint(path.parent, _optimizer())
        assert rows.shape == best.shape
        assert isinstance(progress.step, int)


def cell(data: bytes) -> None:
    """A cell of an experiment."""
    with suppress(MarkupError):
        found = Cell.load(_written("cell.safetensors", data))
        assert found.correct.shape == found.predicted.shape == found.loss.shape
        assert found.right_inside.shape == found.episodes.shape == found.none.shape
        assert found.facts is not None


def calibration(data: bytes) -> None:
    """The calibration of a classifier's folder."""
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        return
    with suppress(MarkupError, KeyError, TypeError, ValueError, AttributeError):  # what load_classifier reports
        Calibration.from_json(told)


_ALL = (template, config, task, folder, texts, answers, metrics, tags, checkpoint, cell, calibration)
TARGETS: dict[str, Callable[[bytes], None]] = {function.__name__: function for function in _ALL}


def seeds(name: str) -> Iterable[bytes]:
    """Return valid inputs of a target, to begin with."""
    rows = b'{"text": "a", "label": "x"}\n{"text": "b c", "label": "y_z"}\n'
    table = b'text,label\n"a, ""b""",x\nb,y\n'
    if name == "template":
        yield from (path.read_bytes() for path in sorted((ROOT / "icl_markup/templates").glob("*.tmpl"))[:12])
    elif name == "config":
        for path in sorted((ROOT / "configs").rglob("*.yaml")):
            yield (b"\xfe" if "experiments" in path.parts else b"\0") + path.read_bytes()
        yield b"\1--optimiser.steps\n4\n--tasks.0.path=a.csv\n--output\n[a, {b: 1}]"
    elif name in ("task", "texts"):
        yield from (b"\0" + rows, b"\1" + table, b"\2" + table.replace(b",", b"\t"), b"\3" + rows)
    elif name == "folder":
        yield b'{"name": "n", "oos_label": "x", "label_descriptions": {"x": "d"}, "description": "e"}\0' + rows
    elif name == "answers":
        yield '{"text": "eins", "label": "x"}\n{"text": "zwei ü", "error": "x"}\n{"text": "drei'.encode()
    elif name == "metrics":
        yield b'{"step": 0, "validation_accuracy": 0.5}\n{"step": 1, "loss": 0.1}\n{"step": 9, "loss": 1}\n{"st'
    elif name == "tags":
        tensors, details = _tag_files()
        yield b"\0" + json.dumps(details).encode()
        yield b"\1" + tensors
    elif name == "checkpoint":
        optimizer = _optimizer()
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(2, 3)
        optimizer.step()
        where = _place() / "seed"
        where.mkdir(exist_ok=True)
        save_checkpoint(where, torch.ones(2, 3), torch.ones(2, 3), optimizer, Progress(), {"seed": 1})
        yield (where / "checkpoint.safetensors").read_bytes()
    elif name == "cell":
        numbers, values = np.zeros((2, 3), dtype=np.int64), np.zeros((2, 3))
        path = _place() / "seed.safetensors"
        cell_of = Cell(numbers, numbers, numbers, values, values, values, numbers[0], numbers[0], {"task": "t"})
        cell_of.save(path)
        yield path.read_bytes()
    elif name == "calibration":
        yield json.dumps(Calibration({"x": -0.5}, 1.5, 0.2).to_json()).encode()


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2, 3))])


@cache
def _tag_files() -> tuple[bytes, dict[str, Any]]:
    source = '@tag <a> width=2 "an option"\n@tag <b>\n@option\n<a> {symbol} {name}\n@demo\n{text} <b> {label}\n'
    source += "@query\n{text} <b> {label}\n"
    parsed = Template.parse(source)
    tensors = save({tag.name: torch.ones(tag.width, 4) for tag in parsed.tags})
    return tensors, {
        "format": 1,
        "tags": [{"name": t.name, "width": t.width, "description": t.description} for t in parsed.tags],
        "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
        "backbone": {"name": "x", "revision": None, "kind": "masked", "embedding_width": 4},
        "fingerprint": {
            "kind": "masked", "architecture": "B", "embedding_shape": [9, 4], "embedding_dtype": "float32",
            "embedding_sha256": "0", "embedding_sketch": [1.0], "weights_sha256": "0", "weights_sketch": [1.0],
            "tokenizer_sha256": "0",
        },
        "template": {"name": "t", "source": source},
        "answers": "symbols",
        "length_normalised": True,
        "training": {},
    }  # fmt: skip
