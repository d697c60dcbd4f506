"""Makes the tags of the zoo: warm-ups with several seeds, of which the best by validation is shipped.

    python scripts/make_zoo.py smollm2 --seeds 0 1 2

A warm-up takes an hour or so on two cores. It writes checkpoints, and the same command goes on with it; they are
part of the repository, so that another machine can go on, too. Several processes may make different seeds at the same
time; ``--publish-only`` then writes the tag folder from what is done. A warm-up that was interrupted leaves its best
tags so far, which ``--unfinished`` takes in: the card says at which step it stands.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from icl_markup.card import PLACE
from icl_markup.checkpoint import has_checkpoint
from icl_markup.config import load_config
from icl_markup.errors import MarkupError
from icl_markup.hub import CARD
from icl_markup.models import MODELS
from icl_markup.tagfile import TagFile, load_model, read_tags, tags_of, write_tags
from icl_markup.warmup import WarmupConfig, run_warmup

ZOO = Path("icl_markup/zoo")
RECIPE = Path("configs/warmup.yaml")


@dataclass(frozen=True)
class Entry:
    """Tags of the zoo: their backbone, the license that the backbone's terms leave them, and changes to the recipe."""

    backbone: str
    license: str
    overrides: tuple[str, ...] = ()


ENTRIES = {
    "smollm2": Entry("smollm2", "apache-2.0"),
    "smollm2-long": Entry("smollm2", "apache-2.0", ("--template", "markup_long")),
    "gemma-3-270m": Entry("gemma-3-270m", "gemma"),
    "gemma-3-270m-long": Entry("gemma-3-270m", "gemma", ("--template", "markup_long")),
    "qwen2.5-coder-1.5b": Entry("qwen2.5-coder-1.5b", "apache-2.0"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Warm tags up, and write the best of them into the zoo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ENTRIES, help="the tags to make")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("results/zoo/runs"), help="the folder of the warm-ups")
    parser.add_argument("--publish-only", action="store_true", help="warm nothing up")
    parser.add_argument("--unfinished", action="store_true", help="take warm-ups in that were interrupted")
    parser.add_argument("--measured", type=Path, help="rows of results for the card (JSONL)")
    args = parser.parse_args(arguments)
    entry = ENTRIES[args.name]
    folders = {seed: args.runs / f"{args.name}-{seed}" for seed in args.seeds}
    if not args.publish_only:
        for seed, folder in folders.items():
            run_warmup(config_of(entry, seed, folder))
    done = {seed: read_tags(folder / "tags") for seed, folder in folders.items() if (folder / "tags").is_dir()}
    if not args.unfinished:
        done = {seed: tags for seed, tags in done.items() if "stopped" not in tags.training}
    if not done:
        sys.exit(f"no warm-up of {args.name} has ended in {args.runs}")
    folder = write_tags(best_of(entry, done, measured(args.measured)), ZOO / args.name)
    card = folder / CARD
    card.write_text(card.read_text(encoding="utf-8").replace(PLACE, json.dumps(args.name)), encoding="utf-8")
    print(folder)


def config_of(entry: Entry, seed: int, folder: Path) -> WarmupConfig:
    """Return the configuration of a warm-up, which goes on if its folder holds a checkpoint."""
    resume = json.dumps(has_checkpoint(folder))
    given = ["--backbone.name", entry.backbone, "--seed", str(seed), "--output", str(folder), "--resume", resume]
    return load_config(WarmupConfig, RECIPE, [*given, *entry.overrides])


def best_of(entry: Entry, done: dict[int, TagFile], rows: tuple[dict[str, Any], ...]) -> TagFile:
    """Return the tags with the best validation accuracy, with what is known of all seeds on their card."""
    accuracy = {seed: round(float(tags.training["validation accuracy"]), 4) for seed, tags in done.items()}
    best = max(accuracy, key=accuracy.__getitem__)
    model = load_model(done[best])
    model_of = MODELS[entry.backbone]
    training = {
        **done[best].training,
        "seeds tried": sorted(accuracy),
        "validation accuracy by seed": {str(seed): value for seed, value in accuracy.items()},
        "licenses of the data": licenses(load_config(WarmupConfig, RECIPE)),
        "license of the backbone": f"{model_of.license}, {model_of.terms}",
        "made by": "scripts/make_zoo.py with configs/warmup.yaml",
    }
    # The ancestry is that of the warm-up; values and fingerprint are read off the model again.
    return replace(tags_of(model, training), license=entry.license, measured=rows)


def licenses(config: WarmupConfig) -> dict[str, str]:
    """Return the license of each task that tags are warmed up on or validated with, as far as its folder says."""
    found = {}
    for source in [*config.tasks, *config.validation_tasks]:
        meta = Path(source.path) / "meta.json"
        said = json.loads(meta.read_text(encoding="utf-8")).get("licence", "") if meta.is_file() else ""
        name = source.name or Path(source.path).name
        found[name] = said.split(" (")[0].split(". ")[0] or ("CC0-1.0" if "embedded" in source.path else "not said")
    return found


def measured(path: Path | None) -> tuple[dict[str, Any], ...]:
    """Return rows of results for the card."""
    if path is None:
        return ()
    return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


if __name__ == "__main__":
    try:
        main()
    except MarkupError as error:
        sys.exit(f"error: {error}")
