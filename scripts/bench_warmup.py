"""A step of the warm-up against other ways to train on the same tokens, and against the least a step can cost.

    python scripts/bench_warmup.py results/bench/warmup.jsonl

- ours: the warm-up's own step, optimiser included
- ours, natural: the same on batches as they come from the stream, of at most 4,096 tokens (the default), whose making
  is counted; tokens are those of prompts, padding left out. Twelve of them go before, not timed: in bf16 oneDNN makes a
  program for each shape when it first meets it, and memory grows to what the largest needs, both once in a run
- ours, level: the same on equal prompts of the stream's mean length, as many tokens as in natural batches, so that
  attention costs as much a token there (the mean over tokens, not prompts, as its cost is the square of a prompt's)
- trainable tokens: PEFT's TrainableTokens with transformers' full-vocabulary loss in its Trainer, tags in spare rows
- lora: PEFT's LoRA of rank 8 in the Trainer; tags are not trained
- full: full fine-tuning in the Trainer
- limit: forward plus backward through the activations of the same body on the same tokens, as transformers computes
  them: no head, no tags, no optimiser

All others are 8 equal prompts of 256 tokens. Ours and the limit take turns
in one process, round by round; each of the others runs in a process of its own, in which ours went before it. A ratio
is of neighbours in time, so that a slow minute slows both. Weights are random, shapes are in `bench_shapes.py`.

Memory is the largest resident set during a step less that before the first one: activations, gradients and optimiser
states, which is all beyond weights. It is taken in a process of its own whose allocator returns what is freed at once
(`MALLOC_MMAP_THRESHOLD_`), for every way alike: gaps that glibc keeps vary by hundreds of MiB from run to run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from bench_classifier import Memory
from bench_shapes import SHAPES, backbone_of, sample_tasks

from icl_markup import EpisodeConfig, MarkupModel, WarmupConfig
from icl_markup.batching import Batch
from icl_markup.preparation import prepared
from icl_markup.prompt import Prompt
from icl_markup.results import provenance, write_rows
from icl_markup.start import Start
from icl_markup.stream import Item, Position, Step
from icl_markup.warmup import _Warmup as Warmup
from icl_markup.warmup_config import OptimiserConfig

OWN = ("ours", "limit", "ours, level", "ours, natural")
PEERS = ("trainable tokens", "lora", "full")
PROMPTS, LENGTH = 8, 256
FIRST = 1
"""Steps before the clock starts."""

NATURAL = 3
"""Natural batches a round."""

NATURAL_FIRST, NATURAL_TOKENS = 12, 4096
"""Natural batches before the clock starts, and the most tokens of one."""


def warmup_of(model: MarkupModel, out: str, tokens: int = PROMPTS * LENGTH) -> Warmup:
    """Return a warm-up of a model on the sample tasks, in batches of so many tokens."""
    config = WarmupConfig(
        tasks=[], output=out, supervise="query",
        episodes=EpisodeConfig(n_way=(3, 8), k_shot=(0, 4), max_demos=24),
        optimiser=OptimiserConfig(steps=10**6, batch_tokens=tokens, window=256),
    )  # fmt: skip
    start = Start.of(config, model.backbone)
    return Warmup(config, model, start, sample_tasks(), [], Accelerator(cpu=True), False)


def equal_items(warmup: Warmup, length: int = LENGTH) -> list[Item]:
    """Return the first prompt of the stream that has about `length` tokens, as often as a batch has room for it."""
    for step in itertools.islice(warmup.stream.steps(), 1000):
        for item in itertools.chain(*step.batches):
            if abs(len(item.prompt.ids) - length) <= 4:
                return [item] * (warmup.stream.batch_tokens // len(item.prompt.ids))
    raise SystemExit(f"no prompt of about {length} tokens")


def mean_length(warmup: Warmup) -> int:
    """Return the mean length of the stream's prompts, over their tokens."""
    lengths = [len(i.prompt.ids) for s in itertools.islice(warmup.stream.steps(), 200) for b in s.batches for i in b]
    return round(sum(n * n for n in lengths) / sum(lengths))


def ours(model: MarkupModel, out: str) -> Callable[[], int]:
    """Return a function that makes a step on equal prompts and returns its tokens."""
    warmup = warmup_of(model, out)
    return _stepping(warmup, equal_items(warmup))


def ours_level(model: MarkupModel, out: str) -> Callable[[], int]:
    """Return a function that makes a step on equal prompts of the mean length and returns its tokens."""
    warmup = warmup_of(model, out, NATURAL_TOKENS)
    return _stepping(warmup, equal_items(warmup, mean_length(warmup)))


def _stepping(warmup: Warmup, items: list[Item]) -> Callable[[], int]:
    step = Step((tuple(items),), Position(), 0)

    def run() -> int:
        warmup._step(step).read()
        return sum(len(item.prompt.ids) for item in step.batches[0])

    return run


def ours_natural(model: MarkupModel, out: str) -> Callable[[], int]:
    """Return a function that takes the stream's next batch, makes a step on it, and returns its tokens."""
    warmup = warmup_of(model, out, NATURAL_TOKENS)
    steps = warmup.stream.steps()

    def run() -> int:
        step = next(steps)
        warmup._step(step).read()
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
        with backbone._head_bypassed() as kept, backbone.autocast():
            backbone.model(inputs_embeds=vectors, **inputs)
        kept[0][:, -1].float().sum().backward()
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


def own(way: str, model: MarkupModel, out: str) -> Callable[[], int]:
    """Return a function that makes a step of one of `OWN`."""
    makers = {"ours": ours, "ours, level": ours_level, "ours, natural": ours_natural, "limit": limit}
    return makers[way](model, out)


def timed(make: Callable[[], int]) -> tuple[float, int]:
    """Return a step's seconds and its tokens."""
    began = time.perf_counter()
    tokens = make()
    return time.perf_counter() - began, tokens


def together(shape: str, precision: str, rounds: int, out: str) -> dict[str, list[tuple[float, int]]]:
    """Time `OWN` in turn; return seconds and tokens of every step."""
    model, plain = MarkupModel(backbone_of(shape, precision)), MarkupModel(backbone_of(shape, precision))
    with prepared(model.backbone):
        steps = {way: own(way, plain if way == "limit" else model, out) for way in OWN}
        for way, make in steps.items():
            for _ in range(NATURAL_FIRST if way == "ours, natural" else FIRST):
                make()
        found: dict[str, list[tuple[float, int]]] = {way: [] for way in OWN}
        for _ in range(rounds):
            for way, make in steps.items():
                found[way] += [timed(make) for _ in range(NATURAL if way == "ours, natural" else 1)]
    return found


def beside(way: str, shape: str, precision: str, steps: int, out: str) -> dict[str, list[tuple[float, int]]]:
    """Time ours, and then a peer, on one model."""
    model = MarkupModel(backbone_of(shape, precision))
    with prepared(model.backbone):
        make = ours(model, out)
        make()
        before = [timed(make) for _ in range(steps)]
    train, ended = peer(way, model, out, precision, steps)
    train()
    return {"ours": before, way: [(b - a, PROMPTS * LENGTH) for a, b in itertools.pairwise(ended[FIRST - 1 :])]}


def memory_of(way: str, shape: str, precision: str, out: str) -> float:
    """Return by how many MiB the process grows in two steps."""
    model = MarkupModel(backbone_of(shape, precision))
    if way in PEERS:
        train, _ = peer(way, model, out, precision, 1)
        with Memory() as memory:
            train()
        return memory.grown
    make = own(way, model, out)
    with Memory() as memory, ExitStack() as held:
        if way != "limit":
            held.enter_context(prepared(model.backbone))
        make()
        make()
    return memory.grown


def child(*args: str, script: str = __file__, returns_pages: bool = False) -> Any:
    """Measure something by a script in a process of its own."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"} if returns_pages else None
    command = [sys.executable, script, "-", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        sys.exit(f"{' '.join(args)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(args: argparse.Namespace, shape: str, precision: str) -> Iterator[dict[str, Any]]:
    """Yield a row a way: tokens a second, its time in multiples of the limit's and of ours, and its memory."""
    what = ["--shapes", shape, "--precisions", precision, "--rounds", str(args.rounds)]
    found = child(*what, "--do", "together")
    times = {way: [sum(s for s, _ in steps) / sum(t for _, t in steps)] for way, steps in found.items()}
    pairs: dict[str, dict[str, list[float]]] = {}
    for way in OWN:
        each = NATURAL if way == "ours, natural" else 1
        rounds = [found[way][i : i + each] for i in range(0, len(found[way]), each)]
        mine = [sum(s for s, _ in one) / sum(t for _, t in one) for one in rounds]
        pairs[way] = {
            f"times_{other.removeprefix('ours, ')}": [a / (s / t) for a, (s, t) in zip(mine, found[other], strict=True)]
            for other in ("limit", "ours", "ours, level")
        }
    for way in args.peers:
        both = child(*what, "--do", "beside", "--way", way)
        before = statistics.median(s / t for s, t in both["ours"])
        times[way] = [statistics.median(s / t for s, t in both[way])]
        pairs[way] = {"times_ours": [s / t / before for s, t in both[way]]}
    for way in (*OWN, *args.peers):
        memory = child(*what, "--do", "memory", "--way", way, returns_pages=True)
        yield {
            "bench": "warmup", "shape": shape, "precision": precision, "way": way,
            "tokens_a_second": round(1 / times[way][0], 1),
            **{name: round(statistics.median(ratios), 3) for name, ratios in pairs[way].items()},
            **{f"{name}_range": [round(min(r), 3), round(max(r), 3)] for name, r in pairs[way].items()},
            "memory_mib": round(memory), "rounds": args.rounds,
            "command": shlex.join(["python", *sys.argv]), **provenance(),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--do", choices=("together", "beside", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=(*OWN, *PEERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.do:
        shape, precision = args.shapes[0], args.precisions[0]
        with tempfile.TemporaryDirectory() as out:
            if args.do == "together":
                print(json.dumps(together(shape, precision, args.rounds, out)))
            elif args.do == "beside":
                print(json.dumps(beside(args.way, shape, precision, args.rounds, out)))
            else:
                print(json.dumps(memory_of(args.way, shape, precision, out)))
        return
    for shape in args.shapes:
        for precision in args.precisions:
            rows = []
            for row in rows_of(args, shape, precision):
                rows.append(row)
                print(json.dumps({key: row[key] for key in list(row)[1:10]}), flush=True)
            write_rows(args.out, rows, replace=False)


if __name__ == "__main__":
    main()
