"""Where the time of a warm-up's step goes, by PyTorch's profiler: shares of CPU time by kind of work.

    python scripts/profile_warmup.py results/bench/profile.jsonl

One step on 8 equal prompts of 256 tokens, after one that is not watched. `outside` is what the step takes beyond its
operations: Python, batches made into tensors, the optimiser's own bookkeeping. Composing prompts is timed by itself, as
milliseconds a prompt.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench_shapes import SHAPES, backbone_of
from bench_warmup import equal_items, warmup_of
from torch.profiler import ProfilerActivity, profile

from icl_markup import MarkupModel
from icl_markup.preparation import prepared
from icl_markup.results import provenance, write_rows
from icl_markup.stream import Position, Step

KINDS = {
    "attention": ("scaled_dot_product", "softmax", "bmm"),
    "linear layers": ("addmm", "aten::mm", "linear", "mkldnn"),
    "casts and copies": ("copy_", "_to_copy", "clone", "contiguous", "aten::cat"),
    "table of tags": ("embedding", "aten::where", "masked_fill"),
}


def kind_of(name: str) -> str:
    """Return the kind of work that an operation is; all else is elementwise work."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "elementwise")


def row_of(shape: str, precision: str) -> dict[str, Any]:
    """Profile one shape."""
    model = MarkupModel(backbone_of(shape, precision))
    with tempfile.TemporaryDirectory() as out, prepared(model.backbone):
        warmup = warmup_of(model, out)
        step = Step((tuple(equal_items(warmup)),), Position(), 0)
        warmup._step(step).read()
        began = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            warmup._step(step).read()
        whole = time.perf_counter() - began
        began = time.perf_counter()
        batches, _ = warmup.stream.window_at(7)
        composing = (time.perf_counter() - began) / sum(map(len, batches))
    spent: dict[str, float] = defaultdict(float)
    for event in seen.key_averages():
        spent[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    spent["outside"] = max(0.0, whole - sum(spent.values()))
    return {
        "bench": "profile", "shape": shape, "precision": precision, "seconds": round(whole, 3),
        "shares": {kind: round(seconds / whole, 3) for kind, seconds in sorted(spent.items(), key=lambda one: -one[1])},
        "composing_ms_a_prompt": round(1000 * composing, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    rows = []
    for shape, precision in itertools.product(args.shapes, ("fp32", "bf16")):
        row = row_of(shape, precision)
        print(json.dumps(row), flush=True)
        rows.append({**row, "command": f"python scripts/profile_warmup.py {args.out}", **provenance()})
    write_rows(args.out, rows, replace=True)


if __name__ == "__main__":
    main()
