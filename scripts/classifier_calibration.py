"""Measures `MarkupClassifier` before and after calibration: accuracy and expected calibration error, on unseen sets.

    python scripts/classifier_calibration.py results/classifier.jsonl

The full label set at 5 demonstrations a label, options and demonstrations chosen by the backbone's own retriever where
they do not fit one prompt; temperature and prior are learnt on texts of the training split that are no demonstrations.
Expected calibration error: 15 bins of equal width over the confidence of the answer (Guo et al. 2017).
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np

from icl_markup import MarkupClassifier, TaskSource, WarmupConfig, load_config, read_task, run_warmup
from icl_markup.evaluation import Estimate
from icl_markup.out_of_scope import confidence_error
from icl_markup.results import provenance, write_rows
from icl_markup.statistics import interval
from icl_markup.tagfile import read_tags
from icl_markup.tasks import Task, TaskChecks

SHOTS, HELD, ASKED, SEED = 5, 150, 150, 0
NEWS = ["arts", "arts & culture", "college", "culture & arts", "education", "environment", "fifty", "good news",
        "latino voices", "money", "religion", "science", "style", "taste", "tech", "world news"]  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "banking77": {},
    "hint3_curekart": {},
    "huffpost41": {"labels": NEWS},
}
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "classifier": ({}, ""),
    "classifier + contextual calibration": ({"calibration": "contextual"}, ""),
    "classifier + batch calibration": ({"calibration": "batch"}, "texts"),
    "classifier + temperature": ({}, "labels"),
    "classifier + batch calibration + temperature": ({"calibration": "batch"}, "labels"),
    "classifier + 4 orders": ({"n_permutations": 4}, ""),
    "classifier + 4 orders + temperature": ({"n_permutations": 4}, "labels"),
}


def split(task: Task) -> tuple[list[Any], list[Any], list[Any]]:
    """Draw demonstrations and held-out texts from the training split, and queries from the test split."""
    rng = random.Random(SEED)
    by_label = task.by_label("train")
    demos = [
        (text, label) for label in task.labels for text in rng.sample(by_label[label], min(SHOTS, len(by_label[label])))
    ]
    shown = {text for text, _ in demos}
    rest = [(e.text, e.label) for e in task.split("train") if e.text not in shown and e.label in task.labels]
    last = "test" if "test" in task.splits else "train"
    asked = [(e.text, e.label) for e in task.split(last) if e.text not in shown and e.label in task.labels]
    held = rng.sample(rest, min(HELD, len(rest)))
    kept = {text for text, _ in held}
    asked = [one for one in asked if one[0] not in kept]
    return demos, held, rng.sample(asked, min(ASKED, len(asked)))


def rows_of(task: Task, tags: Path, command: str) -> list[dict[str, Any]]:
    """Measure every variant on one task."""
    demos, held, asked = split(task)
    texts, right = [text for text, _ in asked], np.array([label for _, label in asked])
    rows = []
    for method, (parameters, learns) in VARIANTS.items():
        classifier = MarkupClassifier(tags, random_state=SEED, **parameters)
        classifier.fit([text for text, _ in demos], [label for _, label in demos])
        if learns:
            labels = [label for _, label in held] if learns == "labels" else None
            classifier.calibrate([text for text, _ in held], labels)
        found = classifier.predict_proba(texts)
        correct = classifier.classes_[found.argmax(axis=1)] == right
        accuracy = interval(correct[None].astype(float), np.zeros(len(correct), dtype=np.int64))
        error = confidence_error(found.max(axis=1), correct)
        common = {
            "kind": "measure",
            "experiment": "classifier",
            "task": task.name,
            "backbone": read_tags(tags).backbone["name"],
            "method": method,
            "n_way": None,
            "k_shot": SHOTS,
            "retrieval": None,
            "open_world": False,
            "seed": SEED,
            "seeds": [SEED],
            "episodes": 1,
            "queries": len(texts),
            "trainable_parameters": sum(v.numel() for v in read_tags(tags).vectors.values()),
            "mean_options": float(len(task.labels)),
            "template": "none",
            "temperature": round(classifier.calibration_.temperature, 4),
            "recall": round(classifier.retriever_recall(texts, right.tolist()), 4),
            "command": command,
            **provenance(),
        }
        rows.append({**common, "metric": "accuracy", **_numbers(accuracy)})
        rows.append({**common, "metric": "expected_calibration_error", "value": round(error, 5)})
        print(f"{task.name:16} {method:46} accuracy {accuracy.mean:.3f}  calibration error {error:.3f}", flush=True)
    return rows


def _numbers(value: Estimate) -> dict[str, float]:
    low, high = round(value.low, 5), round(value.high, 5)
    return {"value": round(value.mean, 5), "low": low, "high": high}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    config = load_config(WarmupConfig, "configs/warmup.yaml", ["--output", "runs/classifier"])
    folder = Path(config.output) / "tags"
    tags = folder if folder.exists() else run_warmup(config).folder
    rows = []
    for name, more in TASKS.items():
        checks = TaskChecks(min_examples=1, rare_labels="drop", duplicates="drop")
        task = read_task(TaskSource(f"../shared/data/{name}", checks=checks, with_oos=False, **more))
        rows += rows_of(task, tags, f"python scripts/classifier_calibration.py {sys.argv[1]}")
    write_rows(Path(sys.argv[1]), rows, replace=True)


if __name__ == "__main__":
    main()
