"""Cells: what one variant of a method answered in one task and setting, kept on disk so that it is measured once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from icl_markup.episodes import Episode
from icl_markup.errors import EvaluationError
from icl_markup.files import write_whole
from icl_markup.method import EpisodeScores

_COLUMNS = ("answers", "predicted", "inside", "confidence", "loss", "out_of_scope")


@dataclass(frozen=True)
class Cell:
    """Answers of one variant.

    Attributes:
        answers: the index of each query's right option, (variations, queries); there is one variation, except in
            settings that vary something.
        predicted: the index of the option with the largest score, (variations, queries).
        inside: the index of the label with the largest score, "none of the above" left out, of the same shape.
        confidence: the probability of `predicted`, (variations, queries).
        loss: minus the log-probability of the right option, (variations, queries); infinite where it was ruled out.
        out_of_scope: how little any option fits, (variations, queries).
        episodes: the episode of each query, (queries,).
        none: the index of "none of the above" for each query, or -1, (queries,).
        facts: what was measured, and with what: parts of a row.
    """

    answers: NDArray[np.int64]
    predicted: NDArray[np.int64]
    inside: NDArray[np.int64]
    confidence: NDArray[np.float64]
    loss: NDArray[np.float64]
    out_of_scope: NDArray[np.float64]
    episodes: NDArray[np.int64]
    none: NDArray[np.int64]
    facts: dict[str, Any]

    @classmethod
    def of(
        cls,
        variations: Sequence[tuple[Sequence[Episode], Sequence[EpisodeScores]]],
        facts: dict[str, Any],
    ) -> Cell:
        """Read the answers off the scores of every variation of the episodes."""
        columns: dict[str, list[NDArray[Any]]] = {name: [] for name in _COLUMNS}
        for episodes, found in variations:
            parts = [_answered(e, s, facts["open_world"]) for e, s in zip(episodes, found, strict=True)]
            for name, values in zip(_COLUMNS, zip(*parts, strict=True), strict=True):
                columns[name].append(np.concatenate(values))
        first, scored = variations[0]
        sizes = [len(e.queries) for e in first]
        facts = {
            **facts,
            "shortened": sum(s.shortened for s in scored),
            "dropped": sum(s.dropped for s in scored),
            "mean_options": round(float(np.mean([len(e.options) for e in first])), 2),
        }
        if len({e.options for e in first}) == 1:
            facts["labels"] = [option.name for option in first[0].options]
        none = [len(e.options) - 1 if facts["open_world"] else -1 for e in first]
        return cls(
            **{name: np.array(values) for name, values in columns.items()},
            episodes=np.repeat(np.arange(len(first)), sizes),
            none=np.repeat(np.array(none), sizes),
            facts=facts,
        )

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each query was answered rightly, (variations, queries)."""
        return np.asarray(self.answers == self.predicted)

    @property
    def right_inside(self) -> NDArray[np.bool_]:
        """Whether each query, were it accepted as in scope, would be answered rightly; first variation, (queries,)."""
        return np.asarray(self.answers[0] == self.inside[0])

    def save(self, path: Path) -> None:
        """Write the cell, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        arrays = {name: getattr(self, name) for name in (*_COLUMNS, "episodes", "none")}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save(arrays, metadata={"facts": json.dumps(self.facts, ensure_ascii=False)}))

    @classmethod
    def load(cls, path: Path) -> Cell:
        """Read a cell.

        Raises:
            EvaluationError: the file is damaged.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads(file.metadata()["facts"])
                cell = cls(**{name: file.get_tensor(name) for name in file.keys()}, facts=facts)  # noqa: SIM118
            cell._check()
            return cell
        except OSError as error:
            raise EvaluationError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise EvaluationError(
                f"{path}: a damaged cell ({error}); remove the file, and it is measured anew"
            ) from error

    def _check(self) -> None:
        """Raise a ValueError where the shapes do not belong together."""
        shape = self.answers.shape
        if len(shape) != 2 or any(getattr(self, name).shape != shape for name in _COLUMNS):
            raise ValueError("its columns have different shapes")
        if self.episodes.shape != shape[1:] or self.none.shape != shape[1:] or not isinstance(self.facts, dict):
            raise ValueError("its parts do not belong together")


def cell_name(**parts: Any) -> str:
    """Return the name of a cell's file: a digest of everything that its answers depend on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20] + ".safetensors"


def _answered(episode: Episode, scores: EpisodeScores, open_world: bool) -> tuple[NDArray[Any], ...]:
    answers = [query.answer for query in episode.queries]
    if any(answer is None for answer in answers):
        raise EvaluationError(f"task {episode.task!r}: a query without a right answer cannot be measured")
    known = np.array(answers, dtype=np.int64)
    log_probs = scores.log_probs
    predicted = log_probs.argmax(axis=1)
    inside = log_probs[:, : log_probs.shape[1] - open_world].argmax(axis=1)
    rows = np.arange(len(known))
    return known, predicted, inside, np.exp(log_probs[rows, predicted]), -log_probs[rows, known], scores.out_of_scope
