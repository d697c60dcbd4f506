"""Shows that warm-up runs end to end on a causal and on a sequence-to-sequence backbone: mechanics, not accuracy.

    python scripts/mechanics.py results/mechanics.jsonl

Runs configs/mechanics_causal.yaml (a pretrained Llama of 260,032 parameters) and configs/mechanics_seq2seq.yaml (a
Flan-T5-small with random weights), and writes a row each with the mean training loss of the first and last ten steps.
Needs ../shared/models.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from make_random_t5 import build

from icl_markup.config import load_config
from icl_markup.results import commit, hardware, versions, write_rows
from icl_markup.warmup import run_warmup
from icl_markup.warmup_config import WarmupConfig


def measure(name: str) -> dict[str, object]:
    """Run one configuration and return its row."""
    config = load_config(WarmupConfig, f"configs/mechanics_{name}.yaml")
    result = run_warmup(config)
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    table = result.model.table
    assert table is not None
    return {
        "experiment": "mechanics",
        "task": "sample tasks of the warm-up side",
        "backbone": Path(config.backbone.name).name,
        "method": "tags",
        "template": config.template,
        "metric": "training loss",
        "steps": len(losses),
        "first": round(sum(losses[:10]) / 10, 4),
        "last": round(sum(losses[-10:]) / 10, 4),
        "seed": config.seed,
        "trainable_parameters": table.rows.numel(),
        "command": "python scripts/mechanics.py results/mechanics.jsonl",
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    build(Path("../shared/models/flan-t5-tokenizer"), Path("runs/flan-t5-small-random"))
    for kind in ("causal", "seq2seq"):
        row = measure(kind)
        write_rows(Path(sys.argv[1]), [row])
        print(row)
