"""The configuration of an experiment; every field's docstring is its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from icl_markup.answers import AnswersChoice
from icl_markup.chat import ChatConfig
from icl_markup.config import require_positive
from icl_markup.errors import ConfigError
from icl_markup.loading import BackboneConfig
from icl_markup.readers import TaskSource
from icl_markup.tags import Initialisation

MethodName = Literal[
    "chance",
    "majority",
    "label_names",
    "plain",
    "tags_untrained",
    "tags",
    "prompt_tuning",
    "lora",
    "full_finetuning",
    "embedding_knn",
    "embedding_centroid",
    "embedding_logreg",
    "tfidf_logreg",
    "setfit",
    "retrieval",
]
TRAINED = ("tags", "prompt_tuning", "lora", "full_finetuning")
"""Methods that come from a warm-up."""


@dataclass(frozen=True)
class MethodConfig:
    """A method to measure."""

    name: MethodName
    """chance; majority: the demonstrations' most frequent label; label_names: a prompt in plain words without
    demonstrations; plain: prompts in plain words; tags_untrained: tags as they are initialised; tags: warmed-up tags;
    prompt_tuning: one block of soft tokens before plain words; lora, full_finetuning: MetaICL on the same episodes; and
    methods without a language model."""

    templates: list[str] = field(default_factory=list)
    """Names or paths of wordings; for tags_untrained and tags, templates with tags (default: that of the tags)."""

    folders: list[str] = field(default_factory=list)
    """For trained methods: folders of finished warm-ups, one a seed."""

    warmup: str | None = None
    """For trained methods: a warm-up's configuration, which is run first, once a seed, unless it was before."""

    seeds: list[int] = field(default_factory=lambda: [0])
    """The seeds of `warmup`."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Changes to `warmup`, such as {tag_width: 4, optimiser.steps: 50}."""

    name_in_rows: str | None = None
    """What the method is called in rows, where that is not its name."""

    label: str | None = None
    """What tells it from others of the same name in the column template; methods of one name without a label are
    variants of one another (wordings, warm-up seeds), of which the mean is taken."""

    without_tags: list[str] = field(default_factory=list)
    """Tags that are left out of the template."""

    initialisation: Initialisation = "description"
    """For tags_untrained: how tags are initialised."""

    calibration: Literal["none", "contextual", "domain", "unconditional", "batch"] = "none"
    """For prompts: contextual (Zhao et al. 2021), domain-context (Fei et al. 2023) or batch calibration
    (Zhou et al. 2024)."""

    out_of_scope: Literal["default", "max_probability"] = "default"
    """In an open world. default: the probability of the option "none of the above" for prompts, the distance to the
    nearest demonstration or class for embeddings; max_probability: that option is not offered, and the largest
    probability decides."""

    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of a method without a language model, such as {k: 3}."""

    settings: list[int] | None = None
    """Indices of the settings to measure this method in; null: all."""

    most_episodes: int | None = None
    """Measure only so many of the episodes: for methods that train a model for each."""

    def __post_init__(self) -> None:
        if self.name in TRAINED and not self.folders and not self.warmup:
            raise ConfigError(f"method {self.name}: give `folders` of finished warm-ups, or the `warmup` to run")
        if self.name in ("plain", "label_names") and not self.templates:
            raise ConfigError(f"method {self.name}: templates is empty; name the wordings to measure")


@dataclass(frozen=True)
class RetrievalConfig:
    """How options and demonstrations are chosen for a query when there are too many for one prompt."""

    options: int = 10
    """Options a prompt."""

    demos: int = 20
    """At most so many demonstrations a prompt."""

    prior: float = 0.0
    """How much the retriever's own opinion of a label counts beside the prompt's: a weight of log-probabilities. Where
    "none of the above" is offered, a label that is far from the query then loses to it."""

    expert: Literal["similarity", "logreg"] = "similarity"
    """Whose opinion it is, which also says what labels are shown: the similarity of a label's nearest texts, or
    logistic regression on the embeddings of all demonstrations."""

    def __post_init__(self) -> None:
        require_positive(self, "options", "demos")


@dataclass(frozen=True)
class Setting:
    """How hard the episodes are."""

    n_way: int | None = 5
    """Options an episode; null: every label."""

    k_shot: int = 1
    """Demonstrations a label; with every label, at most so many."""

    episodes: int | None = None
    """Episodes, instead of the experiment's."""

    queries: int | None = None
    """Queries an episode, instead of the experiment's."""

    open_world: bool = False
    """Offer "none of the above", and draw queries at the natural mix of the split, out-of-scope ones among them."""

    retrieval: RetrievalConfig | None = None
    """Choose each prompt's options and demonstrations by retrieval; only for methods that compose prompts."""

    vary: Literal["nothing", "demo order", "option order", "drawn demos"] = "nothing"
    """Ask every episode in several variations, and measure how far accuracy spreads over them."""

    variations: int = 6
    """How many."""

    tasks: list[str] | None = None
    """Measure these tasks only, by name: some have too few examples for many demonstrations; null: all."""


@dataclass(frozen=True)
class ExperimentConfig:
    """An experiment."""

    experiment: str
    """Its name in the rows of results."""

    tasks: list[TaskSource]
    """The tasks to measure on."""

    methods: list[MethodConfig]
    """The methods to compare."""

    settings: list[Setting] = field(default_factory=lambda: [Setting()])
    """The settings to measure in."""

    selection_tasks: list[TaskSource] = field(default_factory=list)
    """Tasks of the warm-up side on which the best of several wordings, and of a method's calibrations, is chosen (5-way
    1-shot)."""

    selection_episodes: int | None = None
    """Episodes of each of these; null: `episodes`."""

    threshold_task: TaskSource | None = None
    """In an open world: the task whose validation split chooses the threshold for tasks that have none."""

    episodes: int = 200
    """Episodes a task, setting and seed, the same for every method."""

    queries: int = 10
    """Queries an episode."""

    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of the episodes."""

    query_split: str = "test"
    """The split that queries come from."""

    reference: str = "tags"
    """The method that every other one is compared with."""

    output: str = "results/experiment.jsonl"
    """The file of rows, written when every cell is finished; until then they are in a file beside it (``.part``)."""

    cells: str = "runs/cells"
    """The folder of finished cells: answers that are there are not measured again."""

    warmup_overrides: dict[str, Any] = field(default_factory=dict)
    """Changes to every warm-up, before those of a method."""

    runs: str = "runs"
    """The folder of warm-ups."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The frozen language model."""

    answers: AnswersChoice = "auto"
    """For plain and tags_untrained: read option symbols, or score whole label names; tags bring theirs along."""

    chat: ChatConfig = field(default_factory=ChatConfig)
    """For plain, label_names and tags_untrained, and for warm-ups that say nothing of a chat: whether prompts stand in
    the model's chat template; what is loaded from a folder brings its own along."""

    encoder: str = "all-MiniLM-L6-v2"
    """The sentence encoder of retrieval and of the methods on embeddings."""

    batch_tokens: int = 4096
    """The most tokens of one forward pass, padding included."""

    fast: dict[str, Any] = field(default_factory=dict)
    """Changes that `--fast` makes: a smoke test of a few minutes. Keys may lead into the configuration with dots."""

    def __post_init__(self) -> None:
        chosen_on = () if self.selection_episodes is None else ("selection_episodes",)
        require_positive(self, "episodes", "queries", "batch_tokens", *chosen_on)
