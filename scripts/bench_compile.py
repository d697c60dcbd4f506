"""Whether `torch.compile` pays for a warm-up: its layers compiled, against the same as they are.

    python scripts/bench_compile.py results/bench/compile.jsonl

Each layer of the backbone is compiled by itself with dynamic shapes: all layers share one compilation. Both ways make
a forward and a backward pass on the same natural batches in turn; seconds of compiling are those that the first passes
took beyond later ones. `pays_after_steps` is how many steps make up for it (null: none do).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from bench_shapes import SHAPES, backbone_of, sample_tasks
from torch import nn

import icl_markup.backbone
from icl_markup import EpisodeConfig, MarkupModel
from icl_markup.episodes import EpisodeSampler
from icl_markup.preparation import prepared
from icl_markup.results import provenance, write_rows
from icl_markup.stream import Item, PromptStream


@contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """While active, every layer is compiled; activations are then kept as the compiler decides."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    layers = [layer for stack in stacks for layer in stack]
    inside: Any = icl_markup.backbone
    lean = inside.lean_activations
    inside.lean_activations = lambda _model: nullcontext()
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)  # type: ignore[method-assign]
    try:
        yield
    finally:
        inside.lean_activations = lean
        for layer in layers:
            del layer.forward


def step(model: MarkupModel, items: Sequence[Item]) -> float:
    """Return the seconds of a forward and a backward pass."""
    assert model.table is not None
    began = time.perf_counter()
    terms = model.loss_terms([i.prompt for i in items], [i.episode for i in items], False)
    torch.nn.functional.cross_entropy(terms.scores, terms.targets, ignore_index=-1).backward()
    model.table.rows.grad = None
    return time.perf_counter() - began


def row_of(shape: str, precision: str, steps: int) -> dict[str, Any]:
    """Measure one shape."""
    model, other = MarkupModel(backbone_of(shape, precision)), MarkupModel(backbone_of(shape, precision))
    episodes = EpisodeConfig(n_way=(3, 8), k_shot=(0, 4), max_demos=24)
    sampler = EpisodeSampler(sample_tasks(), episodes, 0)
    stream = PromptStream(model.markup, sampler, window=64, batch_tokens=1024, batches_per_step=1)
    batches = [s.batches[0] for s in itertools.islice(stream.steps(), steps + 4)]
    with prepared(model.backbone), prepared(other.backbone):
        with torch.no_grad():  # what is checked at first use is none of the compiler's time
            for each in (model, other):
                each.loss_terms([batches[0][0].prompt], [batches[0][0].episode], False)
        with compiled(other.backbone.model):
            first = [step(other, items) for items in batches[:4]]
        plain = [step(model, items) for items in batches[:4]]
        ratios, saved, seconds = [], [], []
        for items in batches[4:]:
            as_it_is = step(model, items)
            with compiled(other.backbone.model):
                fast = step(other, items)
            ratios.append(as_it_is / fast)
            saved.append(as_it_is - fast)
            seconds.append(as_it_is)
    compiling = sum(first) - sum(plain)
    gain = statistics.mean(saved)
    return {
        "bench": "compile", "shape": shape, "precision": precision, "ratio": round(statistics.median(ratios), 3),
        "low": round(min(ratios), 3), "high": round(max(ratios), 3),
        "seconds_a_step": round(statistics.median(seconds), 3), "compiling_seconds": round(compiling, 1),
        "pays_after_steps": round(compiling / gain) if gain > 0 else None, "steps": steps,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["roberta-base"])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    for shape, precision in itertools.product(args.shapes, args.precisions):
        row = row_of(shape, precision, args.steps)
        print(json.dumps(row), flush=True)
        write_rows(args.out, [{**row, "command": f"python scripts/bench_compile.py {args.out}", **provenance()}])


if __name__ == "__main__":
    main()
