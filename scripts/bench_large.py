"""Time and memory of large things: tasks of millions of texts, tasks of 10,000 labels, prompts of 32,000 tokens.

    python scripts/bench_large.py results/bench/large.jsonl write --rows 10000000 --folder /tmp/large
    python scripts/bench_large.py results/bench/large.jsonl read --rows 10000000 --folder /tmp/large

Each part is a process of its own and appends its rows. `write` makes a file (not measured); `read` reads it into a
store; `draw` opens the store, draws episodes and composes them; `predict` answers texts of the file; `labels` and
`prompts` need no file. The folder also takes the cache of `datasets`, and may be deleted afterwards.

`seconds` and `a_second` say what the part's name says. Memory, in MiB, is the process's largest resident set while the
part ran: `anonymous` without pages of mapped files, `resident` with them; those are the system's to take back. `before`
is the first when the part began: libraries and the model.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from bench_shapes import tiny_llama
from torch.nn import functional as F

from icl_markup import Demo, Episode, MarkupClassifier, MarkupModel, Option, Query, TaskSource, WarmupConfig, read_task
from icl_markup.episodes import EpisodeConfig, EpisodeSampler
from icl_markup.predict import ask_model, open_texts, predict_lines
from icl_markup.results import provenance, write_rows
from icl_markup.tasks import Example, HeldExamples, Task
from icl_markup.warmup import OptimiserConfig, run_warmup

LABELS = 100
WARMUP_STEPS = 50
WORDS = ["card", "order", "window", "river", "paper", "engine", "garden", "ticket", "salary", "winter", "please",
         "late", "where", "broken", "today", "account", "change", "never", "parcel", "number"]  # fmt: skip
CONFIG = EpisodeConfig(n_way=(2, 8), k_shot=(0, 2), none_option=0.3, out_of_scope=0.5, hard_options=0.5)


def text_of(number: int) -> str:
    """Return the text of a row; no two rows have the same."""
    words, rest = [], number * 2654435761 % 2**32  # Knuth's multiplicative hash
    for _ in range(7):
        words.append(WORDS[rest % len(WORDS)])
        rest //= len(WORDS)
    return f"{' '.join(words)} {number}"


class Memory:
    """The largest memory of this process while it is open, sampled every 10 ms, in MiB."""

    def __enter__(self) -> Memory:
        self.anonymous = self.resident = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    @staticmethod
    def now() -> tuple[float, float]:
        """Return anonymous and whole resident memory."""
        told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(told["RssAnon"].split()[0]) / 1024, int(told["VmRSS"].split()[0]) / 1024

    def _watch(self) -> None:
        while True:
            anonymous, resident = self.now()
            self.anonymous, self.resident = max(self.anonymous, anonymous), max(self.resident, resident)
            if self._stop.wait(0.01):
                return

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def measured(name: str, count: int, work: Callable[[], Any], **more: Any) -> dict[str, Any]:
    """Do some work and return its row."""
    with Memory() as memory:
        before = memory.now()[0]
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    row = {"bench": "large", "part": name, "count": count, "seconds": round(seconds, 2),
           "a_second": round(count / seconds, 1), "anonymous": round(memory.anonymous),
           "resident": round(memory.resident), "before": round(before), **more}  # fmt: skip
    print(row, flush=True)
    return row


def source_of(folder: Path, rows: int) -> TaskSource:
    """Return the source of the task of so many rows."""
    return TaskSource(str(folder / f"rows-{rows}.parquet"), in_memory=False)


def write(folder: Path, rows: int) -> list[dict[str, Any]]:
    """Write a Parquet file of texts with labels."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    schema = pyarrow.schema({"text": pyarrow.string(), "label": pyarrow.string()})
    with parquet.ParquetWriter(source_of(folder, rows).path, schema) as out:
        for start in range(0, rows, 100_000):
            numbers = range(start, min(start + 100_000, rows))
            columns = [[text_of(i) for i in numbers], [f"topic {i * 7919 % LABELS}" for i in numbers]]
            out.write_table(pyarrow.table(columns, schema))
    return []


def read(folder: Path, rows: int) -> list[dict[str, Any]]:
    """Read the file into a store."""
    size = Path(source_of(folder, rows).path).stat().st_size
    return [measured("read", rows, lambda: read_task(source_of(folder, rows)), labels=LABELS, file_mib=size >> 20)]


def draw(folder: Path, rows: int) -> list[dict[str, Any]]:
    """Open the store that was written, draw episodes, and compose them."""
    found = [measured("open", rows, lambda: read_task(source_of(folder, rows)), labels=LABELS)]
    sampler = EpisodeSampler([read_task(source_of(folder, rows))], CONFIG)
    model = MarkupModel(tiny_llama(2048))

    def work() -> None:
        for i in range(10_000):
            model.markup.compose_each(sampler.episode(i, 0))

    return [*found, measured("draw", 10_000, work, rows=rows, labels=LABELS)]


def predict(folder: Path, rows: int) -> list[dict[str, Any]]:
    """Answer one text in 200 of the file, as a stream."""
    model = MarkupModel(tiny_llama(2048))
    episode = Episode(tuple(Option(f"topic {i}") for i in range(8)), (), ())

    def work() -> None:
        with open_texts([], source_of(folder, rows).path) as texts:
            for _ in predict_lines(ask_model(model, episode, 8192), islice(texts, rows // 200)):
                pass

    return [measured("predict", rows // 200, work, rows=rows)]


def labels(_folder: Path, count: int) -> list[dict[str, Any]]:
    """Draw from a task of so many labels and compose, warm tags up on it, fit a classifier, and ask it."""
    names = [f"{WORDS[i % 20]} {WORDS[i // 20 % 20]} {WORDS[i // 400 % 20]} {i}" for i in range(count)]
    examples = HeldExamples(
        Example(f"{text_of(i * 3 + j)} {name}", name) for i, name in enumerate(names) for j in range(3)
    )
    task = Task("many", tuple(names), {"train": examples})
    model = MarkupModel(tiny_llama(2048))
    classifier = MarkupClassifier(model)
    texts, truth = [e.text for e in examples], [e.label for e in examples]

    def episodes() -> None:
        sampler = EpisodeSampler([task], CONFIG)
        for i in range(1000):
            model.markup.compose_each(sampler.episode(i, 0))

    def warm_up() -> None:
        with tempfile.TemporaryDirectory() as out:
            plan = OptimiserConfig(steps=WARMUP_STEPS)
            config = WarmupConfig(tasks=[], output=out, episodes=CONFIG, optimiser=plan, save_every=WARMUP_STEPS)
            run_warmup(config, tasks=[task], backbone=model.backbone, progress=False)

    def ask() -> None:
        classifier.predict(texts[1:1537:3])

    return [
        measured("labels: episodes", 1000, episodes, labels=count),
        measured("labels: warm-up steps", WARMUP_STEPS, warm_up, labels=count, batch_tokens=4096),
        measured("labels: fit", len(texts), lambda: classifier.fit(texts, truth), labels=count),
        measured("labels: first texts", 512, ask, labels=count, embeds="labels and demonstrations"),
        measured("labels: more texts", 512, ask, labels=count),
    ]


def long_prompts() -> Iterator[tuple[int, Episode, MarkupModel]]:
    """Yield episodes of longer and longer prompts."""
    model = MarkupModel(tiny_llama(40_000))
    texts = [text_of(i) for i in range(3000)]
    lengths = [len(model.backbone.encoder.encode(text)) + 4 for text in texts]
    options = tuple(Option(f"topic {i}") for i in range(8))
    for tokens in (4000, 8000, 16_000, 32_000):
        count = next(n for n in range(len(texts)) if sum(lengths[:n]) > tokens)
        demos = tuple(Demo(text, i % 8) for i, text in enumerate(texts[:count]))
        yield tokens, Episode(options, demos, (Query("where is my parcel", 0),)), model


def prompts(_folder: Path, _count: int) -> list[dict[str, Any]]:
    """Compose long prompts, take a gradient through them, and answer queries beside them."""
    found = []
    for _, episode, model in long_prompts():
        prompt = model.markup.compose(episode)
        again = MarkupModel(model.backbone)
        assert again.table is not None
        size = {"tokens": len(prompt.ids), "demonstrations": len(episode.demos), "dropped": prompt.dropped}
        found.append(measured("prompts: compose", 1, lambda m=again, e=episode: m.markup.compose(e), **size))  # type: ignore[misc]

        def step(m: MarkupModel = again, e: Episode = episode, p: Any = prompt) -> None:
            scores = m.loss_terms([p], [e], True)
            F.cross_entropy(scores.scores, scores.targets).backward()

        found.append(measured("prompts: forward and backward", 1, step, **size))
        asked = replace(episode, queries=tuple(Query(f"where is parcel {i}") for i in range(16)))
        found.append(measured("prompts: 16 queries", 16, lambda m=again, e=asked: m.scores([e]), **size))  # type: ignore[misc]
        found.append(measured("prompts: 16 queries again", 16, lambda m=again, e=asked: m.scores([e]), **size))  # type: ignore[misc]
    return found


PARTS = {"write": write, "read": read, "draw": draw, "predict": predict, "labels": labels, "prompts": prompts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rows", type=int, default=10_000, help="rows of the file; in the part `labels`, labels")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/large"))
    args = parser.parse_args()
    datasets.config.HF_DATASETS_CACHE = args.folder / "cache"
    rows = PARTS[args.part](args.folder, args.rows)
    command = f"python scripts/bench_large.py {args.out} {args.part} --rows {args.rows}"
    write_rows(args.out, [{**row, "command": command, **provenance()} for row in rows])


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
