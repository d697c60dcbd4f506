"""From cells to rows: accuracies with intervals, comparisons, spread, out-of-scope detection, curves, confusion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icl_markup.cells import Cell
from icl_markup.evaluation import Estimate
from icl_markup.experiment_config import ExperimentConfig
from icl_markup.measured import Group, Measured, grouped
from icl_markup.open_world import answered, curves, open_world_rows
from icl_markup.out_of_scope import confidence_error, confusion
from icl_markup.statistics import compare, holm, interval, spread

CONFUSED = 12
"""Labels of a confusion matrix: those that are confused most."""

CHOICES = {"plain": "wording", "tags": "warm-up seed"}
"""What the variants of a method are an arbitrary choice of."""

OTHERS = "all other labels"

Row = dict[str, Any]


def summarise(
    measured: Sequence[Measured], selected: dict[str, list[Cell]], config: ExperimentConfig, command: str
) -> list[Row]:
    """Return the rows of one task in one setting.

    Args:
        measured: the cells of every variant and seed there.
        selected: for each wording's identity its cells on the selection tasks.
        config: the experiment.
        command: the command that makes the rows again.
    """
    groups = grouped(measured)
    rows: list[Row] = []
    for group in groups:
        common = common_of(group, config, command)
        rows += _accuracies(group, common, selected)
        if group.method != "chance" and group.setting.vary == "nothing" and not group.setting.open_world:
            rows += _calibration_errors(group, common)
        rows += _spreads(group, common)
        if group.setting.open_world:
            rows += open_world_rows({group.named(v): cells for v, cells in group.variants.items()}, common)
        if group.setting.retrieval is not None and group.method == config.reference:
            rows += _recall(group, common)
        if group.setting.vary == "nothing":
            rows += curves(next(iter(group.variants.values())), common)
        if group.setting.n_way is None and group.method == config.reference:
            rows += _confusion(group, common)
    return rows + list(_comparisons(groups, config, command))


def corrected(rows: Sequence[Row]) -> list[Row]:
    """Return an experiment's rows with every comparison's p-value corrected for all of its setting (Holm 1979)."""
    families: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if row["kind"] == "comparison":
            families.setdefault(_family(row), []).append(row["p_value"])
    adjusted = {family: iter(holm(values)) for family, values in families.items()}
    return [
        {**row, "p_adjusted": round(next(adjusted[_family(row)]), 6)} if row["kind"] == "comparison" else row
        for row in rows
    ]


def _family(row: Row) -> tuple[Any, ...]:
    # Rows over all tasks ask what the rows of each task ask, and are a family of their own.
    return (*(row[key] for key in ("n_way", "k_shot", "retrieval", "open_world")), row.get("pooled", False))


def common_of(group: Group, config: ExperimentConfig, command: str) -> Row:
    """Return what all rows of a group share."""
    first = next(iter(group.variants.values()))
    setting, facts = group.setting, first[0].cell.facts
    retrieval = setting.retrieval if first[0].variant.prompted else None
    shown = None
    if retrieval is not None:
        prior = f", prior {retrieval.prior:g}" if retrieval.prior else ""
        expert = " of logistic regression" if retrieval.expert == "logreg" else ""
        shown = f"{retrieval.options} options, {retrieval.demos} demos{prior}{expert}"
    return {
        "experiment": config.experiment,
        "task": group.task.name,
        "backbone": config.backbone.name if first[0].variant.prompted else None,
        "method": group.method,
        "n_way": setting.n_way,
        "k_shot": setting.k_shot,
        "retrieval": shown,
        "open_world": setting.open_world,
        **({} if setting.vary == "nothing" else {"vary": setting.vary}),
        "seed": config.seeds[0] if len(config.seeds) == 1 else None,
        "seeds": config.seeds,
        "episodes": sum(int(m.cell.episodes.max()) + 1 for m in first),
        "queries": int(sum(len(m.cell.episodes) for m in first)),
        "trainable_parameters": first[0].variant.parameters,
        "mean_options": facts["mean_options"],
        "command": command,
        **{key: facts[key] for key in ("commit", "versions", "hardware")},
    }


def measure_row(common: Row, label: str, metric: str, value: Estimate, **more: Any) -> Row:
    """Return a row of one number; `common` is what the rows of its group share."""
    numbers = {"value": value.mean, "low": value.low, "high": value.high}
    if metric == "accuracy":
        numbers = {"accuracy": value.mean, **numbers}
    rounded = {key: round(float(number), 5) for key, number in numbers.items()}
    return {"kind": "measure", **common, "template": label, "metric": metric, **rounded, **more}


def _accuracies(group: Group, common: Row, selected: dict[str, list[Cell]]) -> Iterator[Row]:
    if group.method == "chance":
        # A uniform guess: its expectation is known, and drawing guesses would only add noise.
        guess = 1 / common["mean_options"]  # fewer than N where a task has fewer labels
        yield measure_row(common, "none", "accuracy", Estimate(guess, guess, guess))
        return
    episodes = group.units
    means = {}
    for label, cells in group.variants.items():
        value = interval(group.correct(label), episodes)
        means[label] = value.mean
        cut = {key: sum(m.cell.facts[key] for m in cells) for key in ("shortened", "dropped")}
        parameters = {"trainable_parameters": cells[0].variant.parameters}
        yield measure_row({**common, **parameters}, group.named(label), "accuracy", value, **cut)
    if len(means) > 1:
        spread = {"minimum": min(means.values()), "maximum": max(means.values())}
        rounded = {key: round(value, 5) for key, value in spread.items()}
        every = [m.cell.facts for cells in group.variants.values() for m in cells]
        cut = {key: sum(facts[key] for facts in every) for key in ("shortened", "dropped")}
        whole = interval(group.correct(), episodes)
        yield measure_row(common, group.named("mean"), "accuracy", whole, **rounded, **cut, variants=len(means))
        best = best_on_validation(group, selected)
        if best is not None:
            yield measure_row(
                common,
                group.named("best on validation"),
                "accuracy",
                interval(group.correct(best), episodes),
                wording=best,
            )


def _calibration_errors(group: Group, common: Row) -> Iterator[Row]:
    """Yield how far the probability of the chosen option is from how often it is right (Guo et al. 2017)."""
    errors = {}
    for label, cells in group.variants.items():
        confidence = np.concatenate([m.cell.confidence[0] for m in cells])
        errors[label] = confidence_error(confidence, answered(cells))
    if len(errors) > 1:
        ends = {"minimum": round(min(errors.values()), 5), "maximum": round(max(errors.values()), 5)}
        mean = float(np.mean([*errors.values()]))
        yield {**_error_row(common, group.named("mean"), mean), **ends, "variants": len(errors)}
    for label, error in errors.items():
        parameters = {"trainable_parameters": group.variants[label][0].variant.parameters}
        yield _error_row({**common, **parameters}, group.named(label), error)


def _error_row(common: Row, label: str, error: float) -> Row:
    metric = "expected_calibration_error"
    return {"kind": "measure", **common, "template": label, "metric": metric, "value": round(error, 5)}


def _recall(group: Group, common: Row) -> Iterator[Row]:
    """Yield how often retrieval offers the right option: the ceiling of a method that it chooses options for."""
    losses = [m.cell.loss[0][m.cell.answers[0] != m.cell.none] for m in next(iter(group.variants.values()))]
    found = np.isfinite(np.concatenate(losses))
    if len(found) > 1:
        value = interval(found.astype(float)[None], np.zeros(len(found), dtype=np.int64))
        yield measure_row(common, group.named("retriever"), "right option offered, %", value)


def best_on_validation(group: Group, selected: dict[str, list[Cell]]) -> str | None:
    """Return the variant with the highest mean accuracy on the selection tasks; None where none was measured there."""
    scores = {
        label: float(np.mean([cell.correct.mean() for cell in selected[cells[0].variant.identity]]))
        for label, cells in group.variants.items()
        if cells[0].variant.identity in selected
    }
    return max(scores, key=scores.__getitem__) if scores else None


def _spreads(group: Group, common: Row) -> Iterator[Row]:
    """Yield how far accuracy spreads over arbitrary choices.

    Wordings and warm-up seeds are choices for all episodes: the standard deviation is that of the accuracy over all
    queries. Orders and drawn demonstrations are choices of an episode: the standard deviation is taken within each,
    over choices that answer the same few queries with everything else equal, and then averaged. The two are not on one
    scale: the second is larger, since answers that flip within an episode do not average out.
    """
    episodes = group.episodes
    if group.setting.vary != "nothing":
        tables = [
            np.concatenate([m.cell.correct.astype(float) for m in cells], axis=1) for cells in group.variants.values()
        ]
        within = np.array([_within(table, episodes) for table in tables])
        # All 0 where the order has no influence, which is no sample of a coin's throws.
        value = interval(within, np.arange(within.shape[1])) if within.any() else Estimate(0.0, 0.0, 0.0)
        yield _spread_row(common, group.setting.vary, value)
    elif group.method in CHOICES and len(group.variants) > 1:
        yield _spread_row(common, CHOICES[group.method], spread(group.correct(), group.units))


def _within(correct: NDArray[np.float64], episodes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return, for each episode, the standard deviation over choices of its accuracy, (episodes,)."""
    sizes = np.bincount(episodes)
    accuracy = np.array([np.bincount(episodes, weights=row) / sizes for row in correct])
    return np.asarray(accuracy.std(axis=0, ddof=1))


def _spread_row(common: Row, over: str, value: Estimate) -> Row:
    numbers = {"value": round(value.mean, 5), "low": round(value.low, 5), "high": round(value.high, 5)}
    return {"kind": "spread", **common, "template": "mean", "over": over, **numbers}


def _confusion(group: Group, common: Row) -> Iterator[Row]:
    """Yield the confusion matrix of the labels that are confused most, where every episode offers the same labels.

    None in an open world, where a threshold decides, and not the largest score.
    """
    if group.setting.open_world:
        return
    label, cells = next(iter(group.variants.items()))
    names = cells[0].cell.facts.get("labels")
    if names is None or any(m.cell.facts.get("labels") != names for m in cells):
        return
    answers = np.concatenate([m.cell.answers[0] for m in cells])
    predicted = np.concatenate([m.cell.predicted[0] for m in cells])
    wrong = Counter(np.concatenate([answers[answers != predicted], predicted[answers != predicted]]).tolist())
    shown = {i: names[i] for i in sorted(index for index, _ in wrong.most_common(CONFUSED))}
    labels = [*shown.values(), OTHERS]
    truth, guesses = ([shown.get(i, OTHERS) for i in column.tolist()] for column in (answers, predicted))
    counts = confusion(truth, guesses, labels)
    yield {"kind": "confusion", **common, "template": label, "labels": labels, "counts": counts}


def _comparisons(groups: Sequence[Group], config: ExperimentConfig, command: str) -> Iterator[Row]:
    """Compare the reference with every other method, on the queries that both answered."""
    reference = next((g for g in groups if g.method == config.reference), None)
    if reference is None or reference.setting.vary != "nothing":
        return
    ours, episodes = reference.correct(), reference.units
    place = common_of(reference, config, command)
    for group in groups:
        if group is reference or group.method == "chance":
            continue
        theirs = group.correct()
        if theirs.shape[1] > ours.shape[1] or (len(config.seeds) > 1 and theirs.shape[1] != ours.shape[1]):
            continue
        against = group.label or ("mean" if len(theirs) > 1 else None)
        count = theirs.shape[1]  # a costly method may have answered the first episodes only
        result = compare(ours[:, :count], theirs, episodes[:count])
        yield {
            "kind": "comparison",
            **common_of(group, config, command),
            **{key: place[key] for key in ("backbone", "retrieval")},
            "template": reference.named("mean" if len(ours) > 1 else next(iter(reference.variants))),
            "method": config.reference,
            "against": " ".join([group.method, *([f"({against})"] if against else [])]),
            "difference": round(result.difference, 5),
            "low": round(result.low, 5),
            "high": round(result.high, 5),
            "p_value": round(result.p_value, 6),
            "test": result.test,
        }
