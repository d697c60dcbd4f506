"""How the cost of a warm-up grows: measured seconds of a step beside those that the plan makes of configurations.

    python scripts/bench_scaling.py results/bench/scaling.jsonl --picture docs/scaling.png

One thing grows at a time; batches are equal prompts of the sample tasks, as many as 2,048 tokens hold:

- options: N-way 1-shot; demonstrations: 5-way K-shot; the shape of SmolLM2-135M, bf16 autocast
- tokens: the same shape, bf16 autocast
- size: Llamas of 6 layers and growing width, prompts of about 256 tokens, fp32
- processes: two batches of prompts of about 256 tokens a step, in one process and in two, one thread each, gradients
  summed over gloo; the shape of SmolLM2-135M, bf16 autocast

`planned` is the sum of the operations that a model of fake tensors ran, each timed by itself on this machine;
`flops` are a prompt's. Seconds are of a step's forward and backward pass, divided by its prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_shapes import _llama, backbone_of, sample_tasks
from check_plan import equal_items, skeleton_of, step

from icl_markup import Backbone, EpisodeConfig, EpisodeSampler, MarkupModel
from icl_markup.accelerators import REDUCTION_SECONDS
from icl_markup.preparation import prepared
from icl_markup.replay import Stopwatch
from icl_markup.results import provenance, write_rows
from icl_markup.stream import Item
from icl_markup.study import observed

TOKENS = 2048
"""What a batch holds."""

POINTS: dict[str, list[int]] = {
    "options": [2, 4, 6, 8], "demonstrations": [0, 1, 2, 4], "tokens, 135M": [128, 256, 512],
    "size": [128, 256, 512, 1024], "processes": [1, 2],
}  # fmt: skip
"""What grows, and to what."""


def batch_of(model: MarkupModel, length: int, episodes: EpisodeConfig | None = None) -> list[Item]:
    """Return a prompt of about so many tokens, as often as a batch holds it."""
    (item,) = equal_items(model, 1, length, episodes)
    return [item] * max(1, TOKENS // len(item.prompt.ids))


def llama(width: int) -> MarkupModel:
    """Build a Llama of six layers with random weights."""
    torch.manual_seed(0)
    model, tokenizer = _llama(
        vocab_size=32000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=6,
        num_attention_heads=width // 64, num_key_value_heads=width // 64,
    )  # fmt: skip
    return MarkupModel(Backbone(model, tokenizer, "causal", name=f"llama-6x{width}"))


def point(axis: str, value: int) -> tuple[MarkupModel, MarkupModel, list[Item]]:
    """Return the real model, the one without weights, and a batch."""
    if axis == "size":
        model = llama(value)
        return model, skeleton_of(model, "fp32"), batch_of(model, 256)
    model = MarkupModel(backbone_of("llama-135m", "bf16"))
    fake = skeleton_of(model, "bf16")
    if axis.startswith("tokens"):
        most = EpisodeConfig(n_way=(3, 8), k_shot=(0, 8), max_demos=64)
        return model, fake, batch_of(model, value, most)
    if axis == "processes":
        return model, fake, batch_of(model, 256)
    n_way, k_shot = (value, 1) if axis == "options" else (5, value)
    episodes = EpisodeConfig(n_way=(n_way, n_way), k_shot=(k_shot, k_shot))
    return model, fake, batch_of(model, middle_length(model, episodes), episodes)


def middle_length(model: MarkupModel, episodes: EpisodeConfig) -> int:
    """Return the median length of 100 prompts."""
    sampler = EpisodeSampler(sample_tasks(), episodes, 0)
    prompts = [model.markup.compose(sampler.episode(0, i)) for i in range(100)]
    return int(statistics.median(len(prompt.ids) for prompt in prompts))


def measured(model: MarkupModel, items: list[Item], steps: int) -> list[float]:
    """Return the seconds of some steps."""
    seconds = []
    with prepared(model.backbone):
        for number in range(steps + 2):
            began = time.perf_counter()
            step(model, items)
            if number > 1:
                seconds.append(time.perf_counter() - began)
    return seconds


def in_process(rank: int, processes: int, place: str, steps: int, out: str) -> None:
    """Run steps of two batches as one of some processes, as the warm-up does; the first notes the seconds."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=processes)
    model = MarkupModel(backbone_of("llama-135m", "bf16"))
    assert model.table is not None
    items = batch_of(model, 256)
    seconds = []
    with prepared(model.backbone):
        for _ in range(steps + 2):
            torch.distributed.barrier()
            began = time.perf_counter()
            for _ in range(2 // processes):
                step(model, items)
            total = torch.zeros_like(model.table.rows)
            torch.distributed.all_reduce(total)
            seconds.append(time.perf_counter() - began)
    torch.distributed.destroy_process_group()
    if rank == 0:
        Path(out).write_text(json.dumps(seconds[2:]), encoding="utf-8")


def by_processes(processes: int, steps: int) -> list[float]:
    """Return the seconds of steps of two batches in so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        given = (processes, f"{folder}/meeting", steps, str(out))
        torch.multiprocessing.spawn(in_process, given, nprocs=processes)  # type: ignore[attr-defined, no-untyped-call]
        return list(json.loads(out.read_text(encoding="utf-8")))


def row_of(axis: str, value: int, steps: int) -> dict[str, Any]:
    """Measure and plan one point in this process."""
    if axis == "processes":
        torch.set_num_threads(1)
        seconds = by_processes(value, steps)
    model, fake, items = point(axis, value)
    if axis != "processes":
        seconds = measured(model, items, steps)
    ledger, _ = observed(fake, items, False)
    planned = Stopwatch(torch.device("cpu")).seconds(ledger.operations.items())
    prompts = len(items)
    if axis == "processes":
        planned = planned * 2 / value + (REDUCTION_SECONDS if value > 1 else 0.0)
        prompts *= 2
    parameters = sum(p.numel() for p in model.backbone.model.parameters())
    return {
        "bench": "scaling", "axis": axis, "value": value, "tokens": len(items[0].prompt.ids), "parameters": parameters,
        "gflops": round(ledger.flops() / len(items) / 1e9, 3), "planned": round(planned / prompts, 5),
        "measured": round(statistics.median(seconds) / prompts, 5),
        "range": [round(min(seconds) / prompts, 5), round(max(seconds) / prompts, 5)],
        "ratio": round(planned / statistics.median(seconds), 4),
    }  # fmt: skip


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw measured points beside the plan's lines."""
    from icl_markup.plot_style import INK, MUTED, panels, to_png

    titles = {"options": "options (1-shot)", "demonstrations": "demonstrations a label (5-way)",
              "tokens, 135M": "tokens, 135M Llama", "size": "million parameters", "processes": "processes"}  # fmt: skip
    axes_of = [axis for axis in titles if any(row["axis"] == axis for row in rows)]
    figure, axes = panels("Seconds a prompt, forward and backward", [titles[a] for a in axes_of], (3.0, 2.3), 3,
                          share=(False, False))  # fmt: skip
    for name, axis in zip(axes_of, axes, strict=True):
        own = [row for row in rows if row["axis"] == name]
        places = [row["parameters"] / 1e6 if name == "size" else
                  row["tokens"] if name.startswith("tokens") else row["value"] for row in own]  # fmt: skip
        axis.plot(places, [row["planned"] for row in own], color="#0072B2", linestyle="-", label="planned")
        axis.plot(places, [row["measured"] for row in own], "o", color="#D55E00", markersize=4, label="measured")
        axis.set_ylim(bottom=0)
        if name == "processes":
            axis.set_xticks(places)
    axes[0].legend(frameon=False, fontsize=8, labelcolor=INK)
    axes[0].set_ylabel("seconds", color=MUTED, fontsize=8)
    path.write_bytes(to_png(figure))


def points(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Yield what is measured."""
    for axis in args.axes:
        yield from ((axis, value) for value in POINTS[axis])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--axes", nargs="*", choices=POINTS, default=list(POINTS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--picture", type=Path, help="a PNG of all rows in the file")
    parser.add_argument("--append", action="store_true", help="keep the rows that are there")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(row_of(args.point[0], int(args.point[1]), args.steps)))
        return
    rows: list[dict[str, Any]] = []
    if args.append and args.out.exists():
        rows = [json.loads(line) for line in args.out.read_text(encoding="utf-8").splitlines()]
    for axis, value in points(args):
        command = [sys.executable, __file__, "-", "--steps", str(args.steps), "--point", axis, str(value)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{axis} {value} failed:\n{done.stderr[-3000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(found), flush=True)
        rows.append({**found, "command": f"python scripts/bench_scaling.py {args.out}", **provenance()})
        write_rows(args.out, rows, replace=True)
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
