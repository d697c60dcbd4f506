"""What answers in words cost: a warm-up step and scoring, against letters on the same episodes.

    python scripts/bench_words.py results/bench/words.jsonl

- step: the warm-up's own step, optimizer included, on 5-way 1-shot episodes of the sample tasks with four queries each
- trainable tokens: a step of PEFT's TrainableTokens on the prompts in words, with the full-vocabulary loss of the right
  name's tokens; tags are in spare rows. It contrasts no names
- scoring: `MarkupModel.scores` of five options whose names have three tokens each (labels of the sample tasks), one
  query a call, and many behind one context. Nothing is kept of earlier calls
- flan-t5-small: the step once more, on random weights, in a sequence-to-sequence model

Ways take turns in one process on the same episodes, and each goes first in its turn. A ratio is of neighbors in time;
it comes as the median over rounds, with a 95 % bootstrap interval. Every shape was computed before the clock starts.

Memory is the most that a process of its own grows in two steps (`bench_warmup.py` says how): what is beyond weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from bench_classifier import Memory
from bench_shapes import sample_tasks
from bench_warmup import child
from scipy import stats

from icl_markup import Backbone, EpisodeConfig, MarkupModel, Task
from icl_markup.episodes import Episode, EpisodeSampler
from icl_markup.loading import BackboneConfig
from icl_markup.optimisation import TagOptimiser
from icl_markup.preparation import prepared
from icl_markup.results import provenance, write_rows
from icl_markup.sharing import prefix_length
from icl_markup.stream import Item, Position, Step
from icl_markup.tasks import Example, HeldExamples
from icl_markup.warmup_config import OptimiserConfig

T5 = "../shared/models/flan-t5-tokenizer"
"""A folder with the configuration and the tokenizer of Flan-T5-small."""

SHAPES = ("smollm2", "flan-t5-small")
TEMPLATES = {"words": "markup_words", "letters": "markup_letters"}
PEER = "trainable tokens"
PARTS = ("step", "one query", "many queries")
EPISODES, QUERIES, MANY = 4, 4, 32
"""Episodes a step, queries an episode of it, and queries behind one context."""

BATCHES, CALLS = 2, 8
"""How many steps, and how many calls, have episodes of their own; further rounds repeat them."""

NAME_TOKENS = 3
Run = Callable[[], object]


def backbone_of(shape: str, precision: str) -> Backbone:
    """Load SmolLM2, or build a Flan-T5-small with random weights, the same in every process."""
    kind: Literal["bf16", "none"] = "bf16" if precision == "bf16" else "none"
    if shape == "smollm2":
        return Backbone.load(BackboneConfig(shape, device="cpu", dtype="fp32", precision=kind))
    transformers.set_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.AutoConfig.from_pretrained(T5))
    return Backbone(model, transformers.AutoTokenizer.from_pretrained(T5), "seq2seq", name=shape, precision=kind)


def batches_of() -> list[list[Episode]]:
    """Return the episodes of each step."""
    config = EpisodeConfig(n_way=(5, 5), k_shot=(1, 1), queries=(QUERIES, QUERIES))
    sampler = EpisodeSampler(sample_tasks(), config)
    return [[sampler.episode(batch, i) for i in range(EPISODES)] for batch in range(BATCHES)]


def calls_of(model: MarkupModel, queries: int) -> list[Episode]:
    """Return episodes whose options are labels of three tokens, from all sample tasks."""
    examples = [
        Example(example.text, example.label)
        for task in sample_tasks()
        for example in task.split("train")
        if example.label != task.oos_label and len(model.markup.name_ids(example.label)) == NAME_TOKENS
    ]
    task = Task(
        "three tokens", tuple(dict.fromkeys(example.label for example in examples)), {"train": HeldExamples(examples)}
    )
    config = EpisodeConfig(n_way=(5, 5), k_shot=(1, 1), queries=(queries, queries))
    sampler = EpisodeSampler([task], config)
    return [sampler.episode(queries, i) for i in range(CALLS)]


def items_of(model: MarkupModel, episodes: Sequence[Episode]) -> list[Item]:
    """Compose a batch as the warm-up's stream does."""
    items = []
    for episode in episodes:
        prompts = tuple(model.markup.compose_each(episode))
        groups = [prompts] if model.answers == "names" else [(prompt,) for prompt in prompts]
        items += [Item(group, episode, model.tokens_of(group, episode)) for group in groups]
    return items


def own_steps(model: MarkupModel) -> tuple[list[Run], float]:
    """Return a function that makes a step for each batch, and the mean of their tokens."""
    optimizer = TagOptimiser(model, OptimiserConfig(steps=10**6), 1e-4, True, Accelerator(cpu=True))
    batches = [items_of(model, episodes) for episodes in batches_of()]
    tokens = statistics.mean(sum(item.tokens for item in items) for items in batches)

    def run_of(items: list[Item]) -> Run:
        return lambda: optimizer.launch(Step((tuple(items),), Position(), 0)).read()

    return [run_of(items) for items in batches], tokens


def peer_steps(model: MarkupModel) -> tuple[list[Run], float]:
    """Return the same for PEFT's TrainableTokens; the model's weights are its own from here on."""
    import peft

    batches = [features_of(model, episodes) for episodes in batches_of()]
    first, table = len(model.backbone.tokenizer), model.table
    assert table is not None
    spare = list(range(first, first + len(table.rows)))
    if spare[-1] >= model.backbone.first_tag_id:
        model.backbone.model.resize_token_embeddings(spare[-1] + 1, mean_resizing=False)
    trained: Any = peft.get_peft_model(model.backbone.model, peft.TrainableTokensConfig(token_indices=spare)).train()
    rows = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(rows, lr=1e-4, weight_decay=0.0)

    def run_of(features: dict[str, torch.Tensor]) -> Run:
        def run() -> float:
            with model.backbone.autocast():
                loss = trained(**features).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(rows, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return float(loss)

        return run

    tokens = statistics.mean(int(features["attention_mask"].sum()) for features in batches)
    return [run_of(features) for features in batches], tokens


def features_of(model: MarkupModel, episodes: Sequence[Episode]) -> dict[str, torch.Tensor]:
    """Return a batch of prompts and their right names as transformers takes it; tags follow the tokenizer's ids."""
    first, table = len(model.backbone.tokenizer), model.table
    assert table is not None
    lines, labels = [], []
    for episode in episodes:
        for prompt in model.markup.compose_each(episode):
            [slot] = prompt.slots
            assert slot.answer is not None
            name = model.markup.name_ids(episode.options[slot.answer].name, slot.spaced)
            line = tuple(i - table.first_id + first if i >= table.first_id else i for i in prompt.ids)
            causal = model.backbone.kind == "causal"
            lines.append(line + name if causal else line)
            labels.append((-100,) * len(line) + name if causal else (*name, model.backbone.tokenizer.eos_token_id))
    return {
        "input_ids": _padded(lines, model.pad_id),
        "attention_mask": _padded([(1,) * len(line) for line in lines], 0),
        "labels": _padded(labels, -100),
    }


def _padded(lines: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    longest = max(map(len, lines))
    return torch.tensor([[*line, *[value] * (longest - len(line))] for line in lines])


def steps_of(way: str, backbone: Backbone) -> tuple[list[Run], float]:
    """Return a way's steps, and the mean of their tokens."""
    model = MarkupModel(backbone, TEMPLATES.get(way, TEMPLATES["words"]), answers="auto")
    return peer_steps(model) if way == PEER else own_steps(model)


def scoring_of(models: dict[str, MarkupModel], queries: int) -> dict[str, tuple[list[Run], float]]:
    """Return for each way a function that scores each call's episode."""
    episodes = calls_of(models["words"], queries)

    def run_of(model: MarkupModel, episode: Episode) -> Run:
        def run() -> object:
            model.prefixes.clear()
            return model.scores([episode])

        return run

    return {
        way: (
            [run_of(model, episode) for episode in episodes],
            statistics.mean(computed(model, episode) for episode in episodes),
        )
        for way, model in models.items()
    }


def computed(model: MarkupModel, episode: Episode) -> int:
    """Return how many tokens scoring computes if it computes the context once."""
    prompts = model.markup.compose_each(episode)
    if model.answers == "names":
        return model.tokens_of(prompts, episode)
    context = prefix_length(prompts[0])
    return context + sum(len(prompt.ids) - context for prompt in prompts)


def in_turn(ways: dict[str, list[Run]], rounds: int) -> dict[str, list[float]]:
    """Time ways in turn; return the seconds of each round."""
    for runs in ways.values():
        for run in runs:
            run()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    order = list(ways)
    for number in range(rounds):
        for way in order:
            run = ways[way][number % len(ways[way])]
            began = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - began)
        order = [*order[1:], order[0]]
    return seconds


def timed(shape: str, precision: str, part: str, rounds: int) -> dict[str, Any]:
    """Measure a part in this process; return seconds and tokens by way."""
    backbone = backbone_of(shape, precision)
    with ExitStack() as held:
        if part == "step":
            ways = {way: steps_of(way, backbone) for way in TEMPLATES}
            ways[PEER] = steps_of(PEER, backbone_of(shape, precision))
            held.enter_context(prepared(backbone))
        else:
            models = {way: MarkupModel(backbone, template) for way, template in TEMPLATES.items()}
            ways = scoring_of(models, 1 if part == "one query" else MANY)
        seconds = in_turn({way: runs for way, (runs, _) in ways.items()}, rounds)
    return {way: {"seconds": seconds[way], "tokens": tokens} for way, (_, tokens) in ways.items()}


def memory_of(shape: str, precision: str, way: str) -> float:
    """Return by how many MiB this process grows in two steps."""
    backbone = backbone_of(shape, precision)
    if backbone.kind == "causal":
        assert backbone.exactness  # is found out once a process, as part of loading
    runs, _ = steps_of(way, backbone)
    with Memory() as memory, ExitStack() as held:
        if way != PEER:
            held.enter_context(prepared(backbone))
        for run in runs[:2]:
            run()
    return memory.grown


def ratio_of(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Return the median of ratios in pairs, and its interval."""
    ratios = np.array(above) / np.array(below)
    ends = stats.bootstrap(
        (ratios,), np.median, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval  # fmt: skip
    return {
        name: round(float(x), 3) for name, x in zip(("ratio", "low", "high"), (np.median(ratios), *ends), strict=True)
    }


def rows_of(args: argparse.Namespace, shape: str, precision: str, part: str) -> list[dict[str, Any]]:
    """Return a row for words against each other way."""
    what = ["--shapes", shape, "--precisions", precision, "--parts", part, "--rounds", str(args.rounds)]
    load = os.getloadavg()[0]
    found = child(*what, "--do", "time", script=__file__)
    memory = {}
    if part == "step":
        memory = {
            way: child(*what, "--do", "memory", "--way", way, script=__file__, returns_pages=True) for way in found
        }
    rows = []
    for way in found:
        if way == "words":
            continue
        row = {
            "bench": "words", "part": part, "shape": shape, "precision": precision, "way": "words", "against": way,
            **ratio_of(found["words"]["seconds"], found[way]["seconds"]),
            "seconds": [round(statistics.median(found[one]["seconds"]), 4) for one in ("words", way)],
            "tokens": [round(found[one]["tokens"], 1) for one in ("words", way)],
        }  # fmt: skip
        if memory:
            row["memory_ratio"] = round(memory["words"] / memory[way], 3)
            row["memory_mib"] = [round(memory[one]) for one in ("words", way)]
        row |= {"rounds": args.rounds, "load_before": round(load, 2), "command": shlex.join(["python", *sys.argv])}
        rows.append({**row, **provenance()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--do", choices=("time", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=(*TEMPLATES, PEER), help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.do:
        shape, precision, part = args.shapes[0], args.precisions[0], args.parts[0]
        measured = (
            memory_of(shape, precision, args.way) if args.do == "memory" else timed(shape, precision, part, args.rounds)
        )
        print(json.dumps(measured))
        return
    for shape in args.shapes:
        if shape == "flan-t5-small" and not Path(T5).is_dir():
            print(f"{shape}: skipped, {T5} is missing", file=sys.stderr)
            continue
        for precision in args.precisions:
            for part in args.parts if shape == "smollm2" else {"step"} & set(args.parts):
                rows = rows_of(args, shape, precision, part)
                for row in rows:
                    print(json.dumps({key: row[key] for key in list(row)[1:13]}), flush=True)
                write_rows(args.out, rows)


if __name__ == "__main__":
    main()
