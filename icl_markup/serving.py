"""From command-line arguments to a model and to the options and demonstrations that it is asked with."""

from __future__ import annotations

import argparse

from icl_markup.answers import AUTO
from icl_markup.backbone import Backbone
from icl_markup.chat import ChatConfig
from icl_markup.composition import composed
from icl_markup.episodes import Episode
from icl_markup.errors import PromptError
from icl_markup.loading import BackboneConfig, config_of
from icl_markup.model import MarkupModel
from icl_markup.models import DEFAULT
from icl_markup.predict import Ask, ask_classifier, ask_model
from icl_markup.readers import TaskSource, read_task
from icl_markup.tagfile import TagFile, load_model
from icl_markup.tasks import Task, TaskChecks


def load_for(args: argparse.Namespace) -> MarkupModel:
    """Load the model that `--tags`, `--revision`, `--backbone`, `--template`, `--device` and `--quantisation` name.

    Raises:
        PromptError: what the tags bring along is given too.
        MarkupError: something cannot be loaded.
    """
    if not args.tags:
        if args.revision:
            raise PromptError("--revision is that of --tags; give --tags, or leave it away")
        backbone = Backbone.load(_config(args, DEFAULT))
        return MarkupModel(backbone, args.template or AUTO, answers=args.answers, chat=chat_of(args))
    if args.answers != "auto":
        raise PromptError("--tags brings along how it is answered; leave --answers away")
    if args.chat or args.system:
        raise PromptError("--tags brings along the chat that it was warmed up in; leave --chat and --system away")
    tags = tags_for(args)
    if args.backbone:
        return load_model(tags, _config(args))
    return load_model(tags, config_of(tags.backbone, device=args.device, quantisation=args.quantisation))


def _config(args: argparse.Namespace, default: str = "") -> BackboneConfig:
    return BackboneConfig(args.backbone or default, device=args.device, quantisation=args.quantisation)


def tags_for(args: argparse.Namespace) -> TagFile:
    """Read what `--tags`, `--revision` and, for tags in another template, `--template` name.

    Raises:
        TagFileError: they cannot be read, or not be used together.
    """
    return composed(args.tags, revision=args.revision, template=args.template)


def chat_of(args: argparse.Namespace) -> ChatConfig:
    """Return the chat that `--chat` and `--system` name.

    Raises:
        ConfigError: a system message is given, and no chat.
    """
    return ChatConfig(enabled=args.chat, system=args.system or "")


def ask_for(args: argparse.Namespace) -> Ask:
    """Return what answers texts: the classifier of `--classifier`, or a model with the options of `task_episode`.

    Raises:
        PromptError: a classifier is given together with what it brings along, or `--top` is not positive.
        MarkupError: something cannot be loaded.
    """
    for name in ("top", "batch_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise PromptError(f"--{name.replace('_', '-')} {value}: give a number of at least 1")
    if args.classifier and args.answers != "auto":
        raise PromptError("--classifier brings its own answers; omit --answers")
    if args.classifier and args.calibration != "auto":
        raise PromptError("--classifier brings its own calibration; omit --calibration")
    if not args.classifier:
        batch_tokens = args.batch_tokens or 2048
        return ask_model(load_for(args), task_episode(args), batch_tokens, args.top, args.calibration)
    given = ("tags", "revision", "backbone", "template", "chat", "system", "labels", "task", "demo",
             "none_of_the_above")  # fmt: skip
    for name in given:
        if getattr(args, name):
            raise PromptError(f"--classifier brings its own {name}; leave --{name.replace('_', '-')} away")
    from icl_markup.classifier import MarkupClassifier

    classifier = MarkupClassifier.load(
        args.classifier, device=args.device, batch_tokens=args.batch_tokens, quantisation=args.quantisation
    )
    return ask_classifier(classifier, args.top)


def task_episode(args: argparse.Namespace) -> Episode:
    """Build options and demonstrations from `--labels`, `--task`, `--shots` and `--demo`.

    Raises:
        PromptError: no labels are given, or a demonstration has an unknown one.
        TaskError: the task cannot be read.
    """
    labels: dict[str, str] = dict.fromkeys(args.labels or [], "")
    if len(labels) < len(args.labels or []):
        raise PromptError("--labels names a label twice")
    demos: list[tuple[str, str]] = []
    description = ""
    if args.task:
        checks = TaskChecks(duplicates="drop")
        task = read_task(TaskSource(args.task, checks=checks))
        description = task.description
        labels = labels or {label: task.descriptions.get(label, "") for label in task.labels}
        demos = [d for d in _first_demos(task, args.shots) if d[1] in labels]
    if not labels:
        raise PromptError("no label names; give --labels or --task")
    demos += [(text, label) for text, label in args.demo]
    return MarkupModel.episode(labels, demos, none_of_the_above=args.none_of_the_above, task_description=description)


def _first_demos(task: Task, shots: int) -> list[tuple[str, str]]:
    """Take the first `shots` texts of each label of the first split, label after label in turn."""
    texts = task.by_label(next(iter(task.splits)))
    return [(texts[label][i], label) for i in range(shots) for label in task.labels if i < len(texts.get(label, ()))]
