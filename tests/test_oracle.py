"""The product agrees with a first proof of the method that was written apart from it, on the same prompts and tags."""

from __future__ import annotations

import gzip
import json
import random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from icl_markup.backbone import Backbone
from icl_markup.episodes import Demo, Episode, Option, Query
from icl_markup.model import MarkupModel
from tests.conftest import shared_path

EPISODES = 2
ARMS = {"plain2": "plain_words_text_label", "plain4": "plain_words_input_output", "smol_b.pt": "markup_words"}
"""The proof's name of a way to ask, and the template that writes the same; the last has the proof's tags."""


def texts_of(task: str, split: str, keep: set[str] | None = None) -> dict[str, list[str]]:
    """Texts by label as the proof read them: no text over 300 characters, no label with fewer than three texts."""
    found: dict[str, list[str]] = {}
    for line in shared_path("data", task, f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        label = row["label"]
        if label != "out of scope" and (keep is None or label in keep) and len(row["text"]) <= 300:
            found.setdefault(label, []).append(row["text"])
    return {label: texts for label, texts in found.items() if len(texts) >= 3}


def drawn(support: dict[str, list[str]], asked: dict[str, list[str]], rng: random.Random) -> Episode:
    """Draw an episode as the proof did: 5-way 1-shot, five queries."""
    labels = rng.sample(sorted(set(support) & set(asked)), 5)
    demos = []
    for label in labels:
        pool = list(support[label])
        rng.shuffle(pool)
        demos.append((pool[0], label))
    queries = []
    for _ in range(5):
        label = rng.choice(labels)
        text = rng.choice(asked[label])
        while any(text == shown for shown, _ in demos):
            text = rng.choice(asked[label])
        queries.append(Query(text, labels.index(label)))
    rng.shuffle(demos)
    shown = tuple(Demo(text, labels.index(label)) for text, label in demos)
    return Episode(tuple(map(Option, labels)), shown, tuple(queries))


def wanted_rows() -> list[dict[str, Any]]:
    """The proof's rows of the first episodes."""
    with gzip.open(shared_path("lab", "smollm2_rows.jsonl.gz"), "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["e"] < EPISODES and row["shots"] == 1]


@pytest.mark.parametrize("arm", ARMS)
def test_scores_are_those_of_the_proof(arm: str, smollm2: Backbone) -> None:
    classes = json.loads(shared_path("data", "huffpost41", "meta.json").read_text(encoding="utf-8"))
    unseen = next(set(labels) for side, labels in classes["class_split_bao2020"].items() if "test" in side)
    sets = {
        "banking77": (texts_of("banking77", "train"), texts_of("banking77", "test")),
        "huffpost": (texts_of("huffpost41", "train", unseen), texts_of("huffpost41", "test", unseen)),
        "curekart": (texts_of("hint3_curekart", "train"), texts_of("hint3_curekart", "test")),
    }
    vectors = None
    if arm == "smol_b.pt":
        vectors = {f"<{name}>": rows for name, rows in load_file(shared_path("lab", "smollm2.safetensors")).items()}
    model = MarkupModel(smollm2, ARMS[arm], vectors, answers="names", length_normalised=False)
    rows = [row for row in wanted_rows() if row["arm"] == arm]
    compared = 0
    for name, (support, asked) in sets.items():
        rng = random.Random(1234)
        episodes = [drawn(support, asked, rng) for _ in range(EPISODES)]
        for row in rows:
            if row["set"] != name:
                continue
            episode = episodes[row["e"]]
            assert [query.answer for query in episode.queries] == row["y"]
            found = torch.stack([one.scores for one in model.scores([episode])[0]])
            assert torch.allclose(found, torch.tensor(row["s"]), atol=2e-2), (name, row["e"])
            compared += 1
    assert compared == 3 * EPISODES
