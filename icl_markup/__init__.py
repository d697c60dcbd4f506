"""ICL Markup: soft-token tags that compose in-context classification prompts for a frozen language model.

The data's way through the modules: `tasks` (read by `readers`) → `episodes` → `markup` (with `template` and
`tags`) → `prompt` → `backbone` → `model` → label. `warmup` trains tags along that way, `evaluation` measures it,
`tagfile` keeps what was trained. Reference: Brunet, Anderson, Zemel 2023, arXiv 2312.07405.
"""

from icl_markup import quiet  # noqa: F401  (before anything imports transformers)
from icl_markup.backbone import Backbone
from icl_markup.chat import ChatConfig
from icl_markup.classifier import MarkupClassifier
from icl_markup.config import load_config
from icl_markup.episodes import Demo, Episode, EpisodeConfig, EpisodeSampler, Option, Query
from icl_markup.errors import MarkupError
from icl_markup.loading import BackboneConfig
from icl_markup.model import MarkupModel, Prediction
from icl_markup.readers import TaskSource, read_task
from icl_markup.tags import Tag
from icl_markup.tasks import NONE_OF_THE_ABOVE, Example, Task
from icl_markup.template import Template
from icl_markup.warmup import run_warmup
from icl_markup.warmup_config import WarmupConfig

__version__ = "0.1.0"

__all__ = [
    "NONE_OF_THE_ABOVE",
    "Backbone",
    "BackboneConfig",
    "ChatConfig",
    "Demo",
    "Episode",
    "EpisodeConfig",
    "EpisodeSampler",
    "Example",
    "MarkupClassifier",
    "MarkupError",
    "MarkupModel",
    "Option",
    "Prediction",
    "Query",
    "Tag",
    "Task",
    "TaskSource",
    "Template",
    "WarmupConfig",
    "load_config",
    "read_task",
    "run_warmup",
]
