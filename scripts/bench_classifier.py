"""Queries a second and peak memory of the same prompts through four ways, against the number of demonstrations.

    python scripts/bench_classifier.py results/bench/classifier.jsonl

- ours, first call: `MarkupModel.scores`, the shared head of the prompt computed in the same call
- ours, later call: the same queries' siblings once its keys and values are there
- lm-eval: lm-eval-harness' ``HFLM`` on a merged model (`icl_markup.merging`), each option's letter a continuation; it
  is given token ids, so that prompts are the same and its tokenisation costs it nothing
  (`pip install "icl-markup[bench]"`)
- generate: transformers' ``generate`` for one token, a prompt at a time

The model has the shape of SmolLM2-135M with random weights (time does not depend on them); tags lie in spare rows of a
merged model's embedding. Every run is a process of its own, and ways take turns. Memory is the largest resident set
while asking, sampled every 5 ms, less that before. Answers are compared: all ways must choose the same options.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from icl_markup import Backbone, Demo, Episode, MarkupModel, Option, Query
from icl_markup.merging import with_rows
from icl_markup.placement import place_tags
from icl_markup.results import provenance, write_rows

TOKENIZER = "../shared/models/karpathy-stories260K"
OPTIONS = ["lost card", "opening hours", "complaint", "refund", "change address", "delivery", "password", "invoice",
           "cancel", "weather"]  # fmt: skip
WAYS = ("ours, first call", "ours, later call", "lm-eval", "generate")


def model_of() -> MarkupModel:
    """Build the model; the same in every process."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, rope_theta=100000.0,
        bos_token_id=1, eos_token_id=2, initializer_range=0.04,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.model_max_length = config.max_position_embeddings
    return MarkupModel(Backbone(transformers.LlamaForCausalLM(config), tokenizer, "causal", name="llama-135m-shape"))


def episode_of(model: MarkupModel, tokens: int, queries: int, first: int) -> Episode:
    """Return an episode whose prompts have about so many tokens."""
    texts = [f"message number {i}: please help me with {OPTIONS[i % len(OPTIONS)]} today" for i in range(2000)]
    options = tuple(Option(name) for name in OPTIONS)
    asked = tuple(Query(texts[-1 - i]) for i in range(first, first + queries))
    for count in range(2000):
        episode = Episode(options, tuple(Demo(texts[i], i % len(OPTIONS)) for i in range(count)), asked)
        if len(model.markup.compose(replace(episode, queries=asked[:1])).ids) >= tokens:
            return episode
    raise SystemExit(f"{tokens} tokens are more than the demonstrations give")


def run(way: str, tokens: int, queries: int) -> dict[str, Any]:
    """Ask once, in this process; return seconds, peak memory beyond the model's, and the answers."""
    model = model_of()
    episode = episode_of(model, tokens, queries, 0)
    prompts = model.markup.compose_each(episode)
    ask: Callable[[], list[int]]
    if way.startswith("ours"):
        if way == "ours, later call":
            model.scores([episode_of(model, tokens, 2, queries)])

        def ask() -> list[int]:
            return [int(one.scores.argmax()) for one in model.scores([episode])[0]]

    else:
        assert model.table is not None
        placement, _ = place_tags(model.backbone.tokenizer, model.table)
        plain = with_rows(model.backbone, placement.all_ids, model.table.rows.detach())
        ids = [placement.moved(prompt.ids) for prompt in prompts]
        letters = list(prompts[0].slots[-1].candidates)
        ask = by_lm_eval(plain, model, ids, letters) if way == "lm-eval" else by_generate(plain, ids, letters)
    with Memory() as memory:
        began = time.perf_counter()
        answers = ask()
        seconds = time.perf_counter() - began
    length = statistics.median(len(prompt.ids) for prompt in prompts)
    return {"seconds": seconds, "memory": memory.grown, "answers": answers, "tokens": length,
            "demonstrations": len(episode.demos)}  # fmt: skip


def by_lm_eval(plain: Any, model: MarkupModel, ids: list[list[int]], letters: list[int]) -> Callable[[], list[int]]:
    """Return a function that asks lm-eval-harness; a batch holds what one of 4,096 tokens would."""
    from lm_eval.models.huggingface import HFLM

    batch = max(1, 4096 // max(map(len, ids)))
    engine = HFLM(pretrained=plain, tokenizer=model.backbone.tokenizer, batch_size=batch, max_length=8192)

    def ask() -> list[int]:
        requests: Any = [((str(row), str(c)), line, [c]) for row, line in enumerate(ids) for c in letters]
        found = [value for value, _ in engine._loglikelihood_tokens(requests, disable_tqdm=True)]
        rows = [found[i : i + len(letters)] for i in range(0, len(found), len(letters))]
        return [max(range(len(letters)), key=row.__getitem__) for row in rows]

    return ask


def by_generate(plain: Any, ids: list[list[int]], letters: list[int]) -> Callable[[], list[int]]:
    """Return a function that generates one token a prompt, and reads the letters' scores off it."""

    def ask() -> list[int]:
        answers = []
        for line in ids:
            tokens = torch.tensor([line])
            found = plain.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=1, do_sample=False,
                output_scores=True, return_dict_in_generate=True, pad_token_id=0,
            )  # fmt: skip
            answers.append(int(found.scores[0][0, letters].argmax()))
        return answers

    return ask


class Memory:
    """Samples this process' resident memory; `grown` is by how much it grew at most, in MiB."""

    def __enter__(self) -> Memory:
        self._stop, self._before = threading.Event(), self._now()
        self.grown = 0.0
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.grown = max(self.grown, self._now() - self._before)

    @staticmethod
    def _now() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[250, 500, 1000, 2000])
    parser.add_argument("--queries", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(run(args.way, args.tokens[0], args.queries)))
        return
    rows = []
    for tokens in args.tokens:
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(args.repeats):
            for way in WAYS:
                command = [sys.executable, __file__, str(args.out), "--way", way, "--tokens", str(tokens)]
                done = subprocess.run(
                    [*command, "--queries", str(args.queries)], capture_output=True, text=True, check=False
                )
                if done.returncode:
                    sys.exit(f"{way} at {tokens} tokens failed:\n{done.stderr[-2000:]}")
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
        answers = {tuple(one["answers"]) for runs in found.values() for one in runs}
        if len(answers) > 1:
            print(f"{tokens} tokens: ways disagree on some answers", file=sys.stderr)
        for way, runs in found.items():
            seconds = [one["seconds"] for one in runs]
            ratios = [a["seconds"] / b["seconds"] for a, b in zip(found["lm-eval"], runs, strict=True)]
            row = {
                "experiment": "bench_classifier", "way": way, "tokens": runs[0]["tokens"], "queries": args.queries,
                "demonstrations": runs[0]["demonstrations"],
                "queries_a_second": round(args.queries / statistics.median(seconds), 3),
                "times_lm_eval": round(statistics.median(ratios), 3),
                "times_lm_eval_range": [round(min(ratios), 3), round(max(ratios), 3)],
                "memory_mib": round(statistics.median(one["memory"] for one in runs)),
                "same_answers": len(answers) == 1, "repeats": args.repeats, "backbone": "llama-135m-shape, fp32",
                "command": f"python scripts/bench_classifier.py {args.out}", **provenance(),
            }  # fmt: skip
            rows.append(row)
            print(json.dumps({key: row[key] for key in list(row)[1:9]}), flush=True)
    write_rows(args.out, rows, replace=True)


if __name__ == "__main__":
    main()
