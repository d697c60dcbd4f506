"""Attention by its implementations, trained and asked, by head size and prompt length: what `attention: auto` rests on.

    python scripts/bench_attention.py results/bench/attention.jsonl

Layers of a causal (Llama) and a masked (BERT) model, random weights, batches of about 2,048 tokens in prompts of unlike
length (padding of up to a quarter). Causal models are given no mask for padding, as `Backbone` does. Implementations
take turns within one process on the same batch; a ratio is of neighbours in time. Attention in blocks is timed where it
is used: in bf16, trained.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from icl_markup.blocked_attention import BLOCKED, padded_to_the_right
from icl_markup.results import provenance, write_rows

IMPLEMENTATIONS = ("eager", "sdpa", BLOCKED)
TOKENS, LAYERS, WIDTH = 2048, 2, 512


def model_of(kind: str, head: int) -> Any:
    """Build a body of a kind with heads of a size."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS,
             "num_attention_heads": WIDTH // head, "vocab_size": 64, "max_position_embeddings": 4096}  # fmt: skip
    if kind == "causal":
        model = transformers.LlamaModel(transformers.LlamaConfig(**sizes))
    else:
        model = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)
    return model.eval().requires_grad_(False)


def timed(model: Any, vectors: torch.Tensor, mask: torch.Tensor | None, trains: bool, precision: str) -> float:
    """Return the seconds of one pass, backward through activations included if `trains`."""
    extra = {"use_cache": False} if isinstance(model, transformers.LlamaModel) else {}
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), torch.set_grad_enabled(trains):
        inputs = vectors.clone().requires_grad_(trains)
        found = model(inputs_embeds=inputs, attention_mask=mask, **extra).last_hidden_state
        total = found[:, -1].float().sum()
    if trains:
        total.backward()
    return time.perf_counter() - began


def row_of(kind: str, head: int, length: int, trains: bool, precision: str, repeats: int) -> dict[str, Any]:
    """Measure one case."""
    model = model_of(kind, head)
    prompts = max(1, TOKENS // length)
    vectors = torch.randn(prompts, length, WIDTH, generator=torch.Generator().manual_seed(1))
    lengths = torch.linspace(0.75 * length, length, prompts).round().long() if prompts > 1 else torch.tensor([length])
    mask = None if kind == "causal" else (torch.arange(length)[None] < lengths[:, None]).long()
    names = IMPLEMENTATIONS if trains and precision == "bf16" else IMPLEMENTATIONS[:2]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        for name in names:
            model.set_attn_implementation(name)
            with padded_to_the_right(mask):
                spent = timed(model, vectors, mask, trains, precision)
            if turn:  # the first is for warming up
                seconds[name].append(spent)
    ratios = [a / b for a, b in zip(seconds["eager"], seconds["sdpa"], strict=True)]
    return {
        "bench": "attention", "kind": kind, "head_size": head, "length": length,
        "does": "train" if trains else "ask", "precision": precision,
        "sdpa_is_faster_by": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)], "repeats": repeats,
        **({"blocked_is_faster_than_sdpa_by": _median_ratio(seconds["sdpa"], seconds[BLOCKED])} if names[2:] else {}),
    }  # fmt: skip


def _median_ratio(above: list[float], below: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--heads", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rows = []
    cases = itertools.product(("causal", "masked"), args.heads, args.lengths, (True, False), args.precisions)
    for kind, head, length, trains, precision in cases:
        row = row_of(kind, head, length, trains, precision, args.repeats)
        print(json.dumps({key: row[key] for key in list(row)[1:7]}), flush=True)
        rows.append({**row, "command": f"python scripts/bench_attention.py {args.out}", **provenance()})
    write_rows(args.out, rows, replace=True)


if __name__ == "__main__":
    main()
