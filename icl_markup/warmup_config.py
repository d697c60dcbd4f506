"""The configuration of a warm-up; every field's docstring is its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from icl_markup.answers import AnswersChoice
from icl_markup.chat import ChatConfig
from icl_markup.config import require_positive
from icl_markup.episodes import EpisodeConfig
from icl_markup.errors import ConfigError
from icl_markup.loading import BackboneConfig
from icl_markup.readers import TaskSource
from icl_markup.tags import Initialisation


@dataclass(frozen=True)
class OptimiserConfig:
    """How the tags are trained: AdamW without weight decay."""

    steps: int = 200
    """Optimiser steps."""

    learning_rate: float = 0.05
    """Peak learning rate in units of the standard deviation of the vocabulary's embeddings, coordinate by
    coordinate: the scale of embeddings differs a thousandfold between models, that of good steps does not."""

    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """How the learning rate falls."""

    warmup_steps: int = 10
    """Steps over which it rises first (not with the schedule constant)."""

    name_share: float = 0.2
    """With names: the weight of the right name's own loss (the mean over its tokens) beside the contrast of all
    options' names."""

    gradient_clip: float = 1.0
    """The largest norm of the gradient."""

    batch_tokens: int = 4096
    """The most tokens of one forward pass, padding included."""

    window: int = 256
    """Episodes that are sorted by length together: more of them mean less padding."""

    batches_per_step: int = 1
    """Batches whose gradients one step adds up, over all processes together."""

    def __post_init__(self) -> None:
        require_positive(self, "steps", "learning_rate", "gradient_clip", "batch_tokens", "window", "batches_per_step")
        if self.name_share < 0:
            raise ConfigError(f"name_share: {self.name_share} is negative")


@dataclass(frozen=True)
class ValidationConfig:
    """How tags are validated while they warm up."""

    every: int = 50
    """Steps between validations; one happens before the first step and one after the last."""

    episodes: int = 50
    """Episodes a validation task, the same each time."""

    n_way: int = 5
    """Options an episode."""

    k_shot: int = 1
    """Demonstrations a label."""

    queries: int = 1
    """Queries an episode; those of one episode share the work for its context."""

    patience: int | None = None
    """Stop after so many validations without a better one; null: never."""

    def __post_init__(self) -> None:
        require_positive(self, "every", "episodes", "n_way", "queries")

    @property
    def episode_config(self) -> EpisodeConfig:
        """How the episodes of a validation are drawn."""
        ways, shots, queries = self.n_way, self.k_shot, self.queries
        return EpisodeConfig(n_way=(ways, ways), k_shot=(shots, shots), queries=(queries, queries))


@dataclass(frozen=True)
class WarmupConfig:
    """A warm-up."""

    tasks: list[TaskSource]
    """The tasks that tags are warmed up on."""

    validation_tasks: list[TaskSource] = field(default_factory=list)
    """Tasks that choose the best tags; where there are none, the last tags are kept."""

    most_tasks: int | None = None
    """Warm up on only so many of the tasks, which the seed chooses; null: all."""

    output: str = "runs/warmup"
    """The folder for tags, checkpoints and metrics."""

    resume: bool = False
    """Continue the run in `output`."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The frozen language model."""

    template: str = "auto"
    """A template's name or path; auto: that of the first of start_from, or the default markup that goes with the
    answers."""

    tag_width: int | None = None
    """Soft tokens a tag, instead of the widths that the template gives; tags of start_from keep theirs."""

    initialisation: Initialisation = "description"
    """How tags begin."""

    start_from: list[str] = field(default_factory=list)
    """Tag folders, or names on the hub (user/tags@revision), whose tags the warm-up begins with: those that the
    template names, at the widths that they have there. The template's other tags are new."""

    train_tags: Literal["all", "new"] | list[str] = "all"
    """The tags that are trained; the others stay as they began, to the bit. new: those that start_from does not
    bring. Or their names, such as ["<demo>"]."""

    answers: AnswersChoice = "auto"
    """Read option symbols at the slot, or score whole label names; auto: as in start_from, or what the template
    shows, or what suits the backbone (names in causal models of fewer than 3 billion weights and in
    sequence-to-sequence models, else symbols)."""

    length_normalised: bool = False
    """With names: score by the mean log-probability of a name's tokens instead of the sum."""

    chat: ChatConfig = field(default_factory=ChatConfig)
    """Whether prompts stand in the model's chat template; the tags remember it."""

    supervise: Literal["all", "query"] = "all"
    """With symbols in a causal model, every demonstration's label is a slot too: train on all of them, or on the
    queries' alone. Names are always trained on at queries alone."""

    episodes: EpisodeConfig = field(default_factory=EpisodeConfig)
    """How episodes are drawn."""

    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    """How tags are trained."""

    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """How tags are validated."""

    save_every: int = 50
    """Steps between checkpoints."""

    workers: int | None = None
    """Processes that draw and compose episodes ahead of the steps, to the same batches; null: none on a CPU, whose
    cores the steps need, and 2 beside an accelerator."""

    tracker: Literal["none", "wandb"] = "none"
    """Where metrics go besides metrics.jsonl; WANDB_MODE=offline keeps wandb off the network."""

    seed: int = 0
    """Seeds everything random."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"workers: {self.workers} is negative")
        require_positive(self, "save_every", *(["most_tasks"] if self.most_tasks is not None else []))
        if self.train_tags == "new" and not self.start_from:
            raise ConfigError("train_tags: new: every tag is new; name in start_from the tags to begin with")
        if not self.train_tags:
            raise ConfigError("train_tags: [] trains nothing; name the tags to train")
