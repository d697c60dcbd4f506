"""From answers to rows: thresholds in an open world, families of tests, what spreads and what is ranked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from icl_markup.cells import Cell
from icl_markup.open_world import decided, open_world_rows
from icl_markup.report_rows import parse_row
from icl_markup.statistics import holm
from icl_markup.summary import corrected
from icl_markup.tables import tables


def cell(answers: list[int], inside: list[int], score: list[float], none: int) -> Cell:
    """Answers of one episode in an open world whose last option, `none`, no method here predicts itself."""
    count = len(answers)
    return Cell(
        answers=np.array([answers]),
        predicted=np.array([inside]),
        inside=np.array([inside]),
        confidence=np.full((1, count), 0.5),
        loss=np.zeros((1, count)),
        out_of_scope=np.array([score]),
        episodes=np.zeros(count, dtype=np.int64),
        none=np.full(count, none),
        facts={},
    )


def measured(asked: Cell, validation: Cell | None) -> Any:
    return SimpleNamespace(cell=asked, validation=validation)


def test_in_an_open_world_validation_chooses_what_is_rejected() -> None:
    validation = cell([0, 1, 2, 2], [0, 1, 0, 1], [0.1, 0.2, 0.8, 0.9], none=2)
    asked = cell([0, 1, 2, 2, 0], [0, 0, 0, 1, 0], [0.1, 0.1, 0.9, 0.1, 0.9], none=2)
    found = decided([measured(asked, validation)])
    # right inside; wrong inside; rejected rightly; out of scope, but accepted; in scope, but rejected
    assert found.tolist() == [True, False, True, False, False]
    assert not asked.correct[0][2], "the method itself never says so"


def test_one_threshold_is_chosen_over_all_seeds() -> None:
    seeds = [
        (cell([0, 2], [0, 0], [0.1, 0.4], none=2), cell([0, 1], [0, 1], [0.1, 0.2], none=2)),
        (cell([0, 2], [0, 0], [0.2, 0.6], none=2), cell([2, 2], [0, 1], [0.5, 0.9], none=2)),
    ]
    # Only together do the validation queries have both kinds; the threshold lies between 0.2 and 0.5.
    assert decided([measured(*seed) for seed in seeds]).tolist() == [True, True, True, True]


def test_the_best_option_answers_without_both_kinds_of_validation_queries() -> None:
    asked = cell([0, 2], [0, 0], [0.1, 0.9], none=2)
    best = [True, False]
    assert decided([measured(asked, None)]).tolist() == best
    alike = cell([0, 2], [0, 0], [0.5, 0.5], none=2)
    assert decided([measured(alike, cell([0, 2], [0, 0], [0.5, 0.5], none=2))]).tolist() == best
    assert decided([measured(asked, cell([0, 1], [0, 1], [0.1, 0.2], none=2))]).tolist() == best


@pytest.mark.parametrize("outside", [0, 1, 2])
def test_one_out_of_scope_query_tells_nothing_and_stops_nothing(outside: int) -> None:
    answers = [0, 1, 0, 1, 0] + [2] * outside
    asked = cell(answers, [0] * len(answers), np.linspace(0, 1, len(answers)).tolist(), none=2)
    rows = list(open_world_rows({"tags": [measured(asked, None)]}, {"task": "t"}))
    assert bool(rows) == (outside == 2)


def comparison(p_value: float, k_shot: int) -> dict[str, Any]:
    place = {"n_way": 5, "k_shot": k_shot, "retrieval": None, "open_world": False}
    return {"kind": "comparison", "p_value": p_value, **place}


def test_tests_are_corrected_within_their_setting() -> None:
    values = [0.01, 0.2, 0.03, 0.04]
    rows = corrected([comparison(p, shots) for p, shots in zip(values, (0, 1, 0, 1), strict=True)])
    found = [row["p_adjusted"] for row in rows]
    assert found[0::2] == pytest.approx(holm(values[0::2]))
    assert found[1::2] == pytest.approx(holm(values[1::2]))


def measure(method: str, value: float, queries: int, task: str = "one", **more: Any) -> dict[str, Any]:
    return {
        "kind": "measure", "experiment": "e", "task": task, "backbone": "b", "method": method, "template": "none",
        "n_way": 5, "k_shot": 1, "metric": "accuracy", "value": value, "accuracy": value, "low": value, "high": value,
        "seed": 0, "episodes": queries // 10, "queries": queries, "command": "c", **more,
    }  # fmt: skip


def accuracy_table(rows: list[dict[str, Any]]) -> Any:
    parsed = [parse_row(row, "rows.jsonl:1") for row in rows]
    return next(block for block in tables(parsed) if block.title == "Accuracy")


def test_what_was_asked_fewer_queries_is_shown_and_not_ranked() -> None:
    rows = [measure("tags", 0.6, 100, task) for task in ("one", "two")]
    rows += [measure("plain", 0.5, 100, task) for task in ("one", "two")]
    rows += [measure("setfit", 0.9, 20, task) for task in ("one", "two")]
    block = accuracy_table(rows)
    assert block.body.count("**60.0**") == 3
    assert "**90.0**" not in block.body and "90.0 (90.0–90.0) on 20 queries" in block.body
    assert "mean over tasks" in block.body


def test_a_task_with_fewer_options_than_asked_for_is_named() -> None:
    rows = [measure("tags", 0.6, 100, "one", mean_options=5.0), measure("tags", 0.6, 100, "small", mean_options=4.0)]
    assert "small 4" in accuracy_table(rows).note and "one" not in accuracy_table(rows).note.split("Fewer options")[1]
