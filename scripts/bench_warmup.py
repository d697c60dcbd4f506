"""A step of the warm-up against other ways to train on the same tokens, and against the least a step can cost.

    python scripts/bench_warmup.py results/bench/warmup.jsonl

- ours: the warm-up's own step, optimiser included
- ours, natural: the same on batches as they come from the stream, whose making is counted; tokens are those of prompts,
  padding left out
- trainable tokens: PEFT's TrainableTokens with transformers' full-vocabulary loss in its Trainer, tags in spare rows
- lora: PEFT's LoRA of rank 8 in the Trainer; tags are not trained
- full: full fine-tuning in the Trainer
- limit: forward plus backward through the activations of the same body on the same tokens: no head, no optimiser

All but the natural batches are 4 equal prompts of 256 tokens. Ways take turns in processes of their own; a process
makes two steps, then times some. Ratios are of neighbours in time, so that a slow minute slows both. Memory is the
largest resident set during steps less that before the first one: activations, gradients and optimiser states, which is
all beyond weights. Shapes are in `bench_shapes.py`; weights are random.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from bench_classifier import Memory
from bench_shapes import SHAPES, backbone_of, sample_tasks

from icl_markup import EpisodeConfig, MarkupModel, WarmupConfig
from icl_markup.batching import Batch
from icl_markup.prompt import Prompt
from icl_markup.results import provenance, write_rows
from icl_markup.start import Start
from icl_markup.stream import Item, Position, Step
from icl_markup.warmup import _Warmup as Warmup
from icl_markup.warmup_config import OptimiserConfig

WAYS = ("ours", "limit", "trainable tokens", "ours, natural", "lora", "full")
PROMPTS, LENGTH = 4, 256
FIRST = 2
"""Steps before the clock starts."""


def warmup_of(model: MarkupModel, out: str) -> Warmup:
    """Return a warm-up of a model on the sample tasks."""
    config = WarmupConfig(
        tasks=[], output=out, supervise="query",
        episodes=EpisodeConfig(n_way=(3, 8), k_shot=(0, 4), max_demos=24),
        optimiser=OptimiserConfig(steps=10**6, batch_tokens=PROMPTS * LENGTH, window=256),
    )  # fmt: skip
    start = Start.of(config, model.backbone)
    return Warmup(config, model, start, sample_tasks(), [], Accelerator(cpu=True), False)


def equal_items(warmup: Warmup) -> list[Item]:
    """Return the first prompt of the stream that has about `LENGTH` tokens, several times."""
    for step in itertools.islice(warmup.stream.steps(), 1000):
        for item in itertools.chain(*step.batches):
            if abs(len(item.prompt.ids) - LENGTH) <= 4:
                return [item] * PROMPTS
    raise SystemExit(f"no prompt of about {LENGTH} tokens")


def ours(model: MarkupModel, out: str) -> Callable[[], int]:
    """Return a function that makes a step on equal prompts and returns its tokens."""
    warmup = warmup_of(model, out)
    step = Step((tuple(equal_items(warmup)),), Position(), 0)

    def run() -> int:
        warmup._step(step)
        return sum(len(item.prompt.ids) for item in step.batches[0])

    return run


def ours_natural(model: MarkupModel, out: str) -> Callable[[], int]:
    """Return a function that takes the stream's next batch, makes a step on it, and returns its tokens."""
    warmup = warmup_of(model, out)
    steps = warmup.stream.steps()

    def run() -> int:
        step = next(steps)
        warmup._step(step)
        return sum(len(item.prompt.ids) for batch in step.batches for item in batch)

    return run


def limit(model: MarkupModel, out: str) -> Callable[[], int]:
    """Return a function that runs the body forward and backward from embeddings that require a gradient."""
    items = equal_items(warmup_of(model, out))
    prompts = [item.prompt for item in items]
    batch = Batch.of_prompts(prompts, model.pad_id, all_slots=False)
    backbone, table = model.backbone, model.table
    assert table is not None
    ids = batch.input_ids.masked_fill(table.spans(batch.input_ids), 0)
    inputs: dict[str, Any] = {"attention_mask": batch.attention_mask}
    if backbone.kind == "seq2seq":
        inputs["decoder_input_ids"] = torch.zeros(len(prompts), 1, dtype=torch.long)
    if backbone.kind != "masked":
        inputs["use_cache"] = False
    embedded = backbone.embedding(ids).detach()

    def run() -> int:
        vectors = embedded.clone().requires_grad_()
        with backbone._segments(batch) as reading:
            states = backbone.hidden_states({"inputs_embeds": vectors, **inputs, **reading.inputs})
        states[:, -1].float().sum().backward()
        return int(ids.numel())

    return run


def peer(way: str, model: MarkupModel, out: str, precision: str, steps: int) -> tuple[Callable[[], None], list[float]]:
    """Return a function that trains with transformers' Trainer, and the list in which it notes when a step ended."""
    import peft
    import transformers

    prompts = [item.prompt for item in equal_items(warmup_of(model, out))]
    features, spare = _features(model, prompts)
    plain = model.backbone.model
    plain.requires_grad_(True)
    plain.train()
    trained: Any = plain
    if way == "trainable tokens":
        trained = peft.get_peft_model(plain, peft.TrainableTokensConfig(token_indices=spare))
    elif way == "lora":
        targets = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[plain.config.model_type]
        trained = peft.get_peft_model(plain, peft.LoraConfig(r=8, target_modules=targets))
    ended: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ended.append(time.perf_counter())

    settings = transformers.TrainingArguments(
        output_dir=out, max_steps=FIRST + steps, per_device_train_batch_size=1, learning_rate=1e-4, use_cpu=True,
        bf16=precision == "bf16", save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip
    data = [features] * (FIRST + steps)
    trainer = transformers.Trainer(
        model=trained, args=settings, train_dataset=data, data_collator=lambda rows: rows[0], callbacks=[Clock()]
    )
    return trainer.train, ended


def _features(model: MarkupModel, prompts: list[Prompt]) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Return a batch as transformers' models take it, the answers as labels, and the rows in which tags lie there."""
    backbone, table = model.backbone, model.table
    assert table is not None
    first = len(backbone.tokenizer)
    spare = list(range(first, first + len(table.rows)))
    if spare[-1] >= backbone.first_tag_id:
        backbone.model.resize_token_embeddings(spare[-1] + 1, mean_resizing=False)
    batch = Batch.of_prompts(prompts, model.pad_id, all_slots=False)
    ids = torch.where(table.spans(batch.input_ids), batch.input_ids - table.first_id + first, batch.input_ids)
    answers = batch.candidates[torch.arange(len(batch.targets)), batch.targets]
    features = {"attention_mask": batch.attention_mask}
    if backbone.kind == "seq2seq":
        return {**features, "input_ids": ids, "labels": answers[:, None]}, spare
    labels = torch.full_like(ids, -100)
    if backbone.kind == "masked":
        labels[batch.rows, batch.positions] = answers
        return {**features, "input_ids": ids, "labels": labels}, spare
    # A causal prompt ends at its slot; the answer follows it, so that its loss is there.
    ids, labels = torch.cat([ids, answers[:, None]], 1), torch.cat([labels, answers[:, None]], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}, spare


def run(way: str, shape: str, precision: str, steps: int) -> dict[str, Any]:
    """Time some steps in this process; return seconds and tokens of each, and the memory beyond weights in MiB."""
    model = MarkupModel(backbone_of(shape, precision))
    with tempfile.TemporaryDirectory() as out:
        if way in ("ours", "ours, natural", "limit"):
            make = {"ours": ours, "ours, natural": ours_natural, "limit": limit}[way](model, out)
            with Memory() as memory:
                for _ in range(FIRST):
                    make()
                seconds, tokens = [], []
                for _ in range(steps):
                    began = time.perf_counter()
                    tokens.append(make())
                    seconds.append(time.perf_counter() - began)
        else:
            train, ended = peer(way, model, out, precision, steps)
            with Memory() as memory:
                train()
            seconds = [b - a for a, b in itertools.pairwise(ended[FIRST - 1 :])]
            tokens = [PROMPTS * LENGTH] * steps
    return {"seconds": seconds, "tokens": tokens, "memory": memory.grown}


def measured(args: argparse.Namespace, shape: str, precision: str) -> dict[str, list[dict[str, Any]]]:
    """Run every way in turn, so many times."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
    for _ in range(args.repeats):
        for way in args.ways:
            command = [sys.executable, __file__, "-", "--way", way, "--shapes", shape, "--precisions", precision]
            done = subprocess.run([*command, "--steps", str(args.steps)], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{way}, {shape}, {precision} failed:\n{done.stderr[-3000:]}")
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def rows_of(args: argparse.Namespace, shape: str, precision: str) -> Iterator[dict[str, Any]]:
    """Yield a row a way: its time as a multiple of the limit's, and by how many times ours is faster."""
    found = measured(args, shape, precision)
    per_token = {
        way: [statistics.median(s / t for s, t in zip(one["seconds"], one["tokens"], strict=True)) for one in runs]
        for way, runs in found.items()
    }
    if "ours, natural" in found:  # its batches differ in length: all of them together
        per_token["ours, natural"] = [sum(one["seconds"]) / sum(one["tokens"]) for one in found["ours, natural"]]
    for way in args.ways:
        times = {
            f"times_{other}": [a / b for a, b in zip(per_token[way], per_token[other], strict=True)]
            for other in ("limit", "ours")
            if other in per_token
        }
        yield {
            "bench": "warmup", "shape": shape, "precision": precision, "way": way,
            "tokens_a_second": round(1 / statistics.median(per_token[way]), 1),
            **{name: round(statistics.median(ratios), 3) for name, ratios in times.items()},
            **{f"{name}_range": [round(min(ratios), 3), round(max(ratios), 3)] for name, ratios in times.items()},
            "memory_mib": round(statistics.median(one["memory"] for one in found[way])),
            "repeats": args.repeats, "steps": args.steps,
            "command": f"python scripts/bench_warmup.py {args.out}", **provenance(),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(run(args.way, args.shapes[0], args.precisions[0], args.steps)))
        return
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        for precision in args.precisions:
            for row in rows_of(args, shape, precision):
                rows.append(row)
                print(json.dumps({key: row[key] for key in list(row)[1:11]}), flush=True)
            write_rows(args.out, rows, replace=True)


if __name__ == "__main__":
    main()
