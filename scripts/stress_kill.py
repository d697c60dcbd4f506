"""Kill a warm-up, an evaluation and a streaming prediction at random moments, resume them, and compare every byte.

    python scripts/stress_kill.py results/bench/robustness.jsonl --kills 50

Each job runs once undisturbed. Then it runs in a new folder, gets SIGKILL after a time drawn at random, up to most of
the time that it takes, is started again with the same command, is killed again, and so on until it comes to its end,
whereupon another round begins, until so many kills have hit. After each round the same files must be there with the
same bytes, and no others.

Every start is a fork of this process, which has imported the package and run nothing, so that kills hit work and not
imports. The backbone is a BERT of random weights; the data are the sample tasks inside the package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import icl_markup.classifier
import icl_markup.experiment
import icl_markup.fit
import icl_markup.metaicl
import icl_markup.serving
import icl_markup.warmup  # noqa: F401 (loaded before the forks)
from icl_markup import cli
from icl_markup.embedded import sample_folders
from icl_markup.readers import read_task
from icl_markup.results import provenance, write_rows

JOBS = {
    "warm-up": ["warmup", "warmup.yaml", "--resume", "true"],
    "evaluation": ["evaluate", "experiment.yaml"],
    "prediction": ["predict", "--classifier", "../classifier", "--file", "../texts.txt", "--out", "answers.jsonl"],
}


def main() -> int:
    """Run the jobs, write a row each, and return 1 if a byte differed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", help="a JSONL file to append a row a job to")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=24, help="of the warm-up")
    parser.add_argument("--texts", type=int, default=560, help="of the prediction")
    parser.add_argument("--jobs", nargs="*", choices=list(JOBS), default=list(JOBS))
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    rows, wrong = Path(args.rows).resolve(), 0
    told = provenance()  # found out once: it is a part of what an evaluation writes
    command = f"python scripts/stress_kill.py {args.rows} --kills {args.kills} --seed {args.seed}"
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        if _forked(lambda: _prepare(args.steps, args.texts)).wait():
            raise SystemExit("the backbone and the classifier could not be made")
        for name in args.jobs:
            found = stress(name, args.kills, random.Random(f"{args.seed}/{name}"))
            what = {"experiment": "robustness", "what": f"SIGKILL at random moments, then resumed: {name}"}
            write_rows(rows, [{**what, "seed": args.seed, **found, "command": command, **told}])
            print(json.dumps({name: found}), flush=True)
            wrong += found["different_files"] + found["missing_or_more_files"] + found["failed_starts"]
    return 1 if wrong else 0


def stress(name: str, kills: int, rng: random.Random) -> dict[str, Any]:
    """Run one job undisturbed, then killed until so many kills have hit; return what came of it."""
    began = time.monotonic()
    whole = _folder(name, "whole")
    if _start(name, whole).wait():
        raise SystemExit(f"{name}: the undisturbed run failed: {(whole / 'log').read_text()[-2000:]}")
    seconds = time.monotonic() - began
    expected = _digests(whole)
    found = {"kills": 0, "rounds": 0, "different_files": 0, "missing_or_more_files": 0, "failed_starts": 0}
    while found["kills"] < kills:
        found["rounds"] += 1
        folder = _folder(name, f"round{found['rounds']}")
        while True:
            child = _start(name, folder)
            hit = found["kills"] < kills and child.killed_after(rng.uniform(0, 0.6 * seconds))
            if hit:
                found["kills"] += 1
                continue
            if child.wait():
                found["failed_starts"] += 1
                print(f"{name}: {(folder / 'log').read_text()[-2000:]}", file=sys.stderr)
            break
        digests = _digests(folder)
        different = [path for path in digests.keys() & expected.keys() if digests[path] != expected[path]]
        for path in [*different, *sorted(digests.keys() ^ expected.keys())]:
            print(f"{name}, round {found['rounds']}: {path} differs", file=sys.stderr)
        found["different_files"] += len(different)
        found["missing_or_more_files"] += len(digests.keys() ^ expected.keys())
    return {**found, "files": len(expected), "undisturbed_seconds": round(seconds, 2)}


class _Child:
    def __init__(self, pid: int):
        self.pid = pid
        self.status: int | None = None

    def killed_after(self, seconds: float) -> bool:
        """Kill it after that time; return False if it had ended before."""
        end = time.monotonic() + seconds
        while self.status is None and time.monotonic() < end:
            time.sleep(0.001)
            self._ask(os.WNOHANG)
        if self.status is not None:
            return False
        os.kill(self.pid, signal.SIGKILL)
        self._ask(0)
        return self.status is not None and os.WIFSIGNALED(self.status)

    def wait(self) -> int:
        """Wait for its end and return its exit code."""
        if self.status is None:
            self._ask(0)
        assert self.status is not None
        return os.waitstatus_to_exitcode(self.status)

    def _ask(self, options: int) -> None:
        pid, status = os.waitpid(self.pid, options)
        if pid:
            self.status = status


def _forked(act: Callable[[], int | None], folder: Path = Path()) -> _Child:
    pid = os.fork()
    if pid:
        return _Child(pid)
    code = 1
    try:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = act() or 0
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(code)


def _start(name: str, folder: Path) -> _Child:
    return _forked(lambda: cli.main(JOBS[name]), folder)


def _digests(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder, the log aside."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / "log"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _folder(job: str, name: str) -> Path:
    """Make a folder with the configurations; paths in them are relative, so that every run has the same."""
    folder = Path(f"{job}-{name}")
    folder.mkdir()
    for file in Path().glob("*.yaml"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _prepare(steps: int, count: int) -> int:
    tasks = [read_task(path) for path in sample_folders("warmup")[:3]]
    texts = [one.text for task in tasks for examples in task.splits.values() for one in examples]
    _save_backbone(texts)
    sources = [{"path": str(path)} for path in sample_folders("warmup")[:3]]
    warmup = {
        "output": "run",
        "backbone": {"name": "../backbone", "device": "cpu", "precision": "none"},
        "tasks": sources,
        "validation_tasks": [{"path": str(sample_folders("unseen")[0])}],
        "episodes": {"n_way": [2, 4], "k_shot": [0, 2]},
        "optimiser": {"steps": steps, "batch_tokens": 900, "window": 8, "learning_rate": 0.5},
        "validation": {"episodes": 3, "n_way": 3, "every": 4},
        "save_every": 2,
    }
    experiment = {
        "experiment": "stress",
        "backbone": warmup["backbone"],
        "tasks": sources[:1],
        "episodes": 4,
        "output": "rows.jsonl",
        "cells": "cells",
        "runs": "runs",
        "settings": [{"n_way": 3, "k_shot": 1}, {"n_way": None, "k_shot": 0}],
        "methods": [
            {"name": "chance"},
            {"name": "plain", "templates": ["plain_letters_multiple_choice"]},
            {"name": "tags_untrained"},
            {"name": "tags", "warmup": "warmup.yaml"},
            {"name": "lora", "warmup": "warmup.yaml", "settings": [0]},
        ],
        "warmup_overrides": {"optimiser.steps": 4},
    }
    Path("warmup.yaml").write_text(json.dumps(warmup))
    Path("experiment.yaml").write_text(json.dumps(experiment))
    many = [texts[i % len(texts)] + (" – ünïcode" if i % 7 == 0 else "") for i in range(count)]
    Path("texts.txt").write_text("\n".join(many) + "\n")
    arguments = ["--backbone", "backbone", "--device", "cpu", "--shots", "1", "--out", "classifier"]
    return cli.main(["fit", str(sample_folders("unseen")[0]), *arguments])


def _save_backbone(texts: Sequence[str]) -> None:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters = [f" {letter}: {letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for _ in range(50)]
    trainer = trainers.WordPieceTrainer(vocab_size=800, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*texts, *letters], trainer)
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained("backbone")
    fast.save_pretrained("backbone")


if __name__ == "__main__":
    sys.exit(main())
