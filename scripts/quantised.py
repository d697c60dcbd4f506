"""Tags across quantised forms of SmolLM2: accuracy, agreement of answers, and bytes of weights.

    python scripts/quantised.py results/bench/quantised.jsonl

The quickstart's warm-up is run on the fp32 backbone and on quantised ones, with the same seed and so the same episodes.
Tags of fp32 and untrained tags are then used on every form (on torchao-int4 only if `--forms` names it: its kernel is
very slow on CPUs without AVX-512), those of a quantised form on it and on fp32. All answer the same episodes of the
unseen sample tasks, 5-way 1-shot. A row has

- `form`: the backbone that answers; `warmed_up_on`: null for untrained tags
- `agreement`: the share of queries that are answered alike by the same tags on the fp32 backbone
- `points_from_fp32`: the paired difference in accuracy from fp32 tags on the fp32 backbone, with its 95 % interval
- `mib`: everything the backbone stores; `linear_mib`: its linear layers without the head
- `seconds_a_step` of the warm-up, and `cpu_seconds_a_query` of answering

The extra is needed: `pip install "icl-markup[quantisation]"`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from icl_markup import Backbone, BackboneConfig, Episode, MarkupModel, TaskSource, WarmupConfig, load_config, read_task
from icl_markup.embedded import quickstart_config, sample_folders
from icl_markup.evaluation import draw_episodes, estimate
from icl_markup.quantisation import linear_layers, stored_bytes, stored_tensors
from icl_markup.results import provenance, result_row, write_rows
from icl_markup.warmup import run_warmup

FORMS = ("none", "bitsandbytes-int8", "bitsandbytes-nf4", "bitsandbytes-fp4", "torchao-int8", "torchao-int4")
WARMED_UP = ("none", "bitsandbytes-int8", "bitsandbytes-nf4", "torchao-int8")
N_WAY, K_SHOT = 5, 1


def load(form: Any) -> Backbone:
    """Load SmolLM2 in one form, on the CPU in fp32."""
    return Backbone.load(BackboneConfig("smollm2", device="cpu", dtype="fp32", precision="none", quantisation=form))


def warm_up(backbone: Backbone, steps: int, seed: int, folder: Path) -> tuple[MarkupModel, float]:
    """Run the quickstart's warm-up; return the model and the seconds a step."""
    config = load_config(WarmupConfig, quickstart_config(), ["--output", str(folder), "--optimiser.steps", str(steps)])
    config = replace(config, seed=seed, tasks=[TaskSource(str(path)) for path in sample_folders("warmup")])
    before, began = backbone.checksum(), time.perf_counter()
    result = run_warmup(config, backbone=backbone, progress=False)
    seconds = (time.perf_counter() - began) / steps
    if backbone.checksum() != before:
        raise SystemExit(f"the warm-up changed the weights of {backbone.quantisation}")
    return result.model, seconds


def answers(model: MarkupModel, episodes: list[Episode]) -> NDArray[np.intp]:
    """Return the option that each query is answered with, shape (queries,)."""
    return np.array([int(one.scores.argmax()) for found in model.scores(episodes) for one in found])


def mib(backbone: Backbone) -> dict[str, float]:
    """Return the memory of everything stored, and of the linear layers without the head."""
    names = tuple(f"{name}." for name, _, _ in linear_layers(backbone.model))
    stored = stored_tensors(backbone.model)
    linear = sum(value.numel() * value.element_size() for name, value in stored if name.startswith(names))
    return {"mib": round(stored_bytes(backbone.model) / 2**20, 2), "linear_mib": round(linear / 2**20, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--episodes", type=int, default=40, help="episodes an unseen task")
    parser.add_argument("--forms", choices=FORMS, nargs="+", default=FORMS[:-1], help="backbones that answer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    tasks = [read_task(path) for path in sample_folders("unseen")]
    drawn = [
        episode
        for task in tasks
        for episode in draw_episodes(task, n_way=N_WAY, k_shot=K_SHOT, episodes=args.episodes, seed=0)
    ]
    right = np.array([query.answer for episode in drawn for query in episode.queries])
    command = " ".join(
        ["python scripts/quantised.py", str(args.out), f"--steps {args.steps} --episodes {args.episodes}",
         f"--seeds {' '.join(map(str, args.seeds))}"]
    )  # fmt: skip
    backbones = {form: load(form) for form in dict.fromkeys((*args.forms, *WARMED_UP))}
    rows = []
    for seed in args.seeds:
        found: dict[tuple[str | None, str], NDArray[np.intp]] = {}
        spent: dict[tuple[str | None, str], float] = {}
        seconds: dict[str | None, float] = {}
        for source in (None, *WARMED_UP):
            if source is None:
                model = MarkupModel(backbones["none"], "markup_letters", seed=seed)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    model, seconds[source] = warm_up(backbones[source], args.steps, seed, Path(folder) / "run")
            with tempfile.TemporaryDirectory() as folder:  # the way that tags travel
                model.save(Path(folder) / "tags")
                for form in args.forms if source in (None, "none") else ("none", source):
                    moved = MarkupModel.from_tags(Path(folder) / "tags", backbones[form])
                    began = time.process_time()
                    found[source, form] = answers(moved, drawn)
                    spent[source, form] = (time.process_time() - began) / len(drawn)
                    print(source, form, f"{(found[source, form] == right).mean():.3f}", flush=True)
        for (source, form), given in found.items():
            table = MarkupModel(backbones[form], "markup_letters").table
            assert table is not None
            difference = (given == right).astype(float) - (found["none", "none"] == right)
            rows.append(
                result_row(
                    experiment="quantised",
                    task=f"{len(tasks)} unseen sample tasks",
                    backbone="smollm2",
                    method="tags" if source else "tags_untrained",
                    estimate=estimate(given == right),
                    template="markup_letters",
                    n_way=N_WAY,
                    k_shot=K_SHOT,
                    seed=seed,
                    episodes=len(drawn),
                    trainable_parameters=table.rows.numel() if source else 0,
                    command=command,
                    form=form,
                    warmed_up_on=source,
                    steps=args.steps if source else 0,
                    agreement=round(float((given == found[source, "none"]).mean()), 5),
                    points_from_fp32=_points(difference),
                    seconds_a_step=round(seconds[source], 2) if source in seconds else None,
                    cpu_seconds_a_query=round(spent[source, form], 3),
                    **mib(backbones[form]),
                )
            )
    write_rows(args.out, rows, replace=True)
    print(json.dumps(provenance()))


def _points(difference: NDArray[np.float64]) -> list[float]:
    """Return the mean of paired differences and its 95 % interval (bootstrap over episodes), in points."""
    mean = float(difference.mean())
    if np.ptp(difference) == 0:
        return [round(100 * mean, 2)] * 3
    interval = stats.bootstrap(
        (difference,), np.mean, method="percentile", n_resamples=2000, rng=np.random.default_rng(0)
    ).confidence_interval
    return [round(100 * value, 2) for value in (mean, interval.low, interval.high)]


if __name__ == "__main__":
    main()
