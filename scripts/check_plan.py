"""What `icl-markup plan` says against what is measured on this machine.

    python scripts/check_plan.py results/bench/plan.jsonl

For shapes of `bench_shapes.py`, and batches of equal prompts of several lengths and numbers: parameters, FLOPs of a
step's forward and backward pass as PyTorch's FlopCounterMode counts them on the real model, memory beyond weights as
the largest resident set during steps less that before them, and seconds of a step (their median) against the sum of
operations at the rates that the plan measures. The plan is made of the configuration and the tokenizer alone. Each
measurement is a process of its own; in it the real model runs first. Memory is measured twice: with freed pages given
back at once, which is what PyTorch holds, and with glibc's default, which keeps gaps. `ratio` is planned over measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from bench_classifier import Memory
from bench_shapes import SHAPES, backbone_of, sample_tasks
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from icl_markup import BackboneConfig, EpisodeConfig, EpisodeSampler, MarkupModel
from icl_markup.costs import measured
from icl_markup.plan import observed
from icl_markup.preparation import prepared
from icl_markup.results import provenance, write_rows
from icl_markup.skeleton import Skeleton
from icl_markup.stream import Item, PromptStream

SIZES = ((4, 256), (8, 128), (2, 512))
"""Prompts of a batch, and tokens of each, about."""


def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)  # type: ignore[no-any-return]


def attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)  # type: ignore[no-any-return]


FORMULAS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}
"""PyTorch's own formulas for an operation that FlopCounterMode does not know."""


def equal_items(model: MarkupModel, prompts: int, length: int, episodes: EpisodeConfig | None = None) -> list[Item]:
    """Return the first prompt of a warm-up's stream that has about so many tokens, several times."""
    episodes = episodes or EpisodeConfig(n_way=(3, 8), k_shot=(0, 4), max_demos=24)
    sampler = EpisodeSampler(sample_tasks(), episodes, 0)
    stream = PromptStream(model.markup, sampler, window=256, batch_tokens=length, batches_per_step=1)
    best: Item | None = None
    for step in itertools.islice(stream.steps(), 400):
        for item in itertools.chain(*step.batches):
            off = abs(len(item.prompt.ids) - length)
            if off <= 4:
                return [item] * prompts
            if best is None or off < abs(len(best.prompt.ids) - length):
                best = item
    assert best is not None
    return [best] * prompts


def step(model: MarkupModel, items: list[Item]) -> None:
    """Run a warm-up's forward and backward pass."""
    assert model.table is not None
    terms = model.loss_terms([item.prompt for item in items], [item.episode for item in items], False)
    F.cross_entropy(terms.scores, terms.targets, reduction="sum", ignore_index=-1).backward()
    model.table.rows.grad = None


def skeleton_of(model: MarkupModel, precision: str) -> MarkupModel:
    """Build a model of the same shape of fake tensors, from its configuration and tokenizer as they are saved."""
    backbone = model.backbone
    autocast: Literal["bf16", "none"] = "bf16" if precision == "bf16" else "none"
    with tempfile.TemporaryDirectory() as folder:
        backbone.model.config.save_pretrained(folder)
        backbone.tokenizer.save_pretrained(folder)
        config = BackboneConfig(folder, kind=backbone.kind, device="cpu", precision=autocast)
        return MarkupModel(Skeleton.build(config))


def memory_case(shape: str, precision: str, prompts: int, length: int) -> dict[str, Any]:
    """Measure and plan memory in this process, MiB."""
    model = MarkupModel(backbone_of(shape, precision))
    items = equal_items(model, prompts, length)
    step(model, equal_items(model, 1, 100))  # what is loaded and set up once
    with Memory() as memory, prepared(model.backbone):
        for _ in range(2):
            step(model, items)
    costs = observed(skeleton_of(model, precision), items, False)
    return {"memory_mib": [round(costs.peak / 2**20, 1), round(memory.grown, 1)]}


def case(shape: str, precision: str, prompts: int, length: int, steps: int) -> dict[str, Any]:
    """Measure and plan all else in this process: parameters, FLOPs and seconds of both."""
    model = MarkupModel(backbone_of(shape, precision))
    items = equal_items(model, prompts, length)
    seconds = []
    with prepared(model.backbone):
        for _ in range(steps + 1):
            began = time.perf_counter()
            step(model, items)
            seconds.append(time.perf_counter() - began)
        del seconds[0]
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            step(model, items)
    planned = skeleton_of(model, precision)
    began = time.perf_counter()
    here = measured(torch.device("cpu"))
    costs = observed(planned, items, False, [here])
    watched = time.perf_counter() - began
    estimate = costs.seconds(here, "forward", "backward")
    return {
        "tokens": len(items[0].prompt.ids),
        "parameters": [sum(p.numel() for p in one.backbone.model.parameters()) for one in (planned, model)],
        "flops": [sum(costs.flops.values()), counter.get_total_flops()],
        "seconds": [round(estimate, 4), round(statistics.median(seconds), 4)],
        "seconds_range": [round(min(seconds), 4), round(max(seconds), 4)],
        "planning_seconds": round(watched, 2),
    }


ALLOCATORS = {"memory_mib": {"MALLOC_MMAP_THRESHOLD_": "65536"}, "memory_mib, glibc's default": {}}
"""Environments in which memory is measured: with freed pages given back at once, and as it comes."""


def rows_of(shape: str, precision: str, size: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each quantity of a case."""
    prompts, length = size.split("x")
    given = [shape, precision, prompts, length]
    found = run_again(["--steps", str(args.steps), "--case", *given], {})
    for name, environment in ALLOCATORS.items():
        found[name] = run_again(["--memory", *given], environment)["memory_mib"]
    for quantity in ("parameters", "flops", "seconds", *ALLOCATORS):
        planned, measured = found[quantity]
        yield {
            "bench": "plan", "shape": shape, "precision": precision, "prompts": int(prompts),
            "tokens": found["tokens"], "quantity": quantity, "planned": planned, "measured": measured,
            "ratio": round(planned / measured, 4),
            **({"range": found["seconds_range"]} if quantity == "seconds" else {}),
            "planning_seconds": found["planning_seconds"],
            "command": f"python scripts/check_plan.py {args.out}", **provenance(),
        }  # fmt: skip


def run_again(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run this script in a process of its own; return what it prints."""
    done = subprocess.run(
        [sys.executable, __file__, "-", *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--sizes", nargs="+", default=[f"{n}x{length}" for n, length in SIZES])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--append", action="store_true", help="keep the rows that are there")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    given = args.case or args.memory
    if given:
        shape, precision, prompts, length = given[0], given[1], int(given[2]), int(given[3])
        found = (
            memory_case(shape, precision, prompts, length)
            if args.memory
            else case(shape, precision, prompts, length, args.steps)
        )
        print(json.dumps(found))
        return
    rows: list[dict[str, Any]] = []
    if args.append and args.out.exists():
        rows = [json.loads(line) for line in args.out.read_text(encoding="utf-8").splitlines()]
    for shape, precision, size in itertools.product(args.shapes, args.precisions, args.sizes):
        for row in rows_of(shape, precision, size, args):
            rows.append(row)
            print(json.dumps({key: row[key] for key in list(row)[1:9]}), flush=True)
        write_rows(args.out, rows, replace=True)


if __name__ == "__main__":
    main()
