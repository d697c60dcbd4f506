"""Measured cells in their place, and the variants of one method together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from icl_markup.cells import Cell
from icl_markup.experiment_config import Setting
from icl_markup.open_world import answered, decided, numbered, resampled
from icl_markup.tasks import Task
from icl_markup.variants import Variant


@dataclass(frozen=True)
class Measured:
    """A cell in its place; `validation`, in an open world, is what the variant answered on a validation split."""

    variant: Variant
    task: Task
    setting: Setting
    seed: int
    cell: Cell
    validation: Cell | None


@dataclass(frozen=True)
class Group:
    """The variants of one method in one task and setting, over all seeds."""

    method: str
    label: str | None
    task: Task
    setting: Setting
    variants: dict[str, list[Measured]]

    def named(self, variant: str) -> str:
        """Return what a variant, or the mean over variants, is called in rows."""
        if self.label is None:
            return variant
        return self.label if len(self.variants) == 1 else f"{self.label}, {variant}"

    def correct(self, label: str | None = None) -> NDArray[np.float64]:
        """Return which queries each variant, or that of `label`, answered rightly, (variants, queries).

        In an open world that is at the threshold which validation chooses, one for all seeds of a variant.
        """
        return np.array([self._correct[name] for name in ([label] if label is not None else self.variants)])

    @cached_property
    def _correct(self) -> dict[str, NDArray[np.float64]]:
        decide = decided if self.setting.open_world else answered
        return {label: decide(cells).astype(np.float64) for label, cells in self.variants.items()}

    @property
    def episodes(self) -> NDArray[np.int64]:
        """Return the episode of each query, numbered over all seeds."""
        return numbered(next(iter(self.variants.values())))

    @property
    def units(self) -> NDArray[np.int64]:
        """Return what a bootstrap resamples for each query: its episode, unless the label set is drawn a few times."""
        return resampled(self.episodes) if self.setting.n_way is None else self.episodes


def grouped(measured: Sequence[Measured]) -> list[Group]:
    """Group the cells of one task and setting by method and label."""
    methods: dict[tuple[str, str | None], dict[str, list[Measured]]] = {}
    for one in measured:
        key = (one.variant.method, one.variant.config.label)
        methods.setdefault(key, {}).setdefault(one.variant.label, []).append(one)
    return [
        Group(method, label, measured[0].task, measured[0].setting, variants)
        for (method, label), variants in methods.items()
    ]
