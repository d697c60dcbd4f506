"""The configuration of a MetaICL baseline; every field's docstring is its help."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from icl_markup.answers import AnswersChoice
from icl_markup.chat import ChatConfig
from icl_markup.config import require_positive
from icl_markup.episodes import EpisodeConfig
from icl_markup.errors import ConfigError
from icl_markup.loading import BackboneConfig
from icl_markup.readers import TaskSource
from icl_markup.warmup_config import OptimiserConfig, ValidationConfig, WarmupConfig

LEARNING_RATES = {"lora": 1e-3, "full_finetuning": 5e-5}
"""Peak learning rates where a configuration gives none."""

_SHARED = (
    "tasks",
    "validation_tasks",
    "backbone",
    "answers",
    "length_normalised",
    "chat",
    "supervise",
    "episodes",
    "validation",
    "save_every",
    "seed",
)


@dataclass(frozen=True)
class MetaIclConfig:
    """Meta-training of the backbone itself (Min et al. 2022, arXiv 2110.15943), without tags."""

    tasks: list[TaskSource]
    """The tasks to train on."""

    validation_tasks: list[TaskSource] = field(default_factory=list)
    """Tasks that choose the best weights; where there are none, the last are kept."""

    output: str = "runs/metaicl"
    """The folder for the trained model, the checkpoint and metrics; a run that is in it is continued, or loaded."""

    method: Literal["lora", "full_finetuning"] = "lora"
    """Train adapters of low rank (Hu et al. 2021, arXiv 2106.09685), or every weight."""

    learning_rate: float | None = None
    """Peak learning rate; null: 1e-3 for lora, 5e-5 for full_finetuning."""

    weight_decay: float = 0.0
    """AdamW's weight decay, on every trained weight; the tags have none."""

    lora_rank: int = 8
    """The rank of each adapter."""

    lora_alpha: int = 16
    """An adapter's output is multiplied by lora_alpha / lora_rank."""

    lora_targets: list[str] | None = None
    """The layers that get an adapter, by the ends of their names; null: every linear layer below the output head."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The language model that a copy of is trained."""

    template: str = "auto"
    """The name or path of a template in plain words; auto: the one of text and label, in words or with letters, as tags
    of the backbone answer by default."""

    answers: AnswersChoice = "auto"
    """Read option symbols at the slot, or score whole label names; auto: what the template shows."""

    length_normalised: bool = False
    """With names: score by the mean log-probability of a name's tokens instead of the sum."""

    chat: ChatConfig = field(default_factory=ChatConfig)
    """Whether prompts stand in the model's chat template; the trained model remembers it."""

    supervise: Literal["all", "query"] = "all"
    """With symbols in a causal model, every demonstration's label is a slot too: train on all of them, or on the
    queries' alone. Names are always trained on at queries alone."""

    episodes: EpisodeConfig = field(default_factory=EpisodeConfig)
    """How episodes are drawn."""

    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    """Steps, schedule and batches, as in a warm-up; its learning_rate is not used and must be left alone."""

    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """How the weights are validated."""

    save_every: int = 50
    """Steps between checkpoints."""

    seed: int = 0
    """Seeds everything random."""

    def __post_init__(self) -> None:
        require_positive(self, "save_every", "lora_rank", "lora_alpha")
        if self.learning_rate is not None:
            require_positive(self, "learning_rate")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay: {self.weight_decay} is negative")
        if self.lora_targets == []:
            raise ConfigError("lora_targets: no layer is named; leave it out (null) for every linear layer")
        if self.optimiser.learning_rate != OptimiserConfig().learning_rate:
            raise ConfigError(
                f"optimiser.learning_rate: {self.optimiser.learning_rate} is the tags', in units of embeddings; "
                "set learning_rate instead"
            )

    @classmethod
    def like(cls, warmup: WarmupConfig, **changes: Any) -> MetaIclConfig:
        """Return the configuration that trains on the same episodes, for as many steps, as a warm-up of tags.

        Args:
            warmup: the warm-up; its template, tags, output and learning rate are not taken over.
            changes: fields that differ, such as `method` and `output`.

        Raises:
            ConfigError: a value is out of range.
        """
        shared: dict[str, Any] = {name: getattr(warmup, name) for name in _SHARED}
        optimiser = replace(warmup.optimiser, learning_rate=OptimiserConfig().learning_rate)
        return cls(**{**shared, "optimiser": optimiser, **changes})

    @property
    def peak_rate(self) -> float:
        """The peak learning rate: the one that is configured, or the method's default."""
        return LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate
