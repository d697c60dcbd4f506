"""What a warm-up begins with: tags of earlier ones, and which of them are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from icl_markup.ancestry import Ancestry
from icl_markup.answers import AUTO, AnswersChoice, default_answers, default_template
from icl_markup.backbone import Backbone
from icl_markup.compose import gathered, widened
from icl_markup.errors import ConfigError, TagFileError, WarmupError, nearest
from icl_markup.fingerprint import Fingerprint
from icl_markup.model import MarkupModel
from icl_markup.tagfile import TagFile, read_tags
from icl_markup.template import Template
from icl_markup.warmup_config import WarmupConfig


@dataclass(frozen=True)
class Start:
    """What a warm-up begins with.

    Attributes:
        template: the template, its tags as wide as they are.
        answers: symbols, names, or auto for what the template shows.
        vectors: the rows of tags that other files bring, by name.
        frozen: the tags that are not trained.
        ancestry: the files; None where there are none.
        checksums: the SHA-256 of each file's tensors, by which a resumed run knows them again.
    """

    template: Template
    answers: AnswersChoice
    vectors: dict[str, Tensor]
    frozen: tuple[str, ...]
    ancestry: Ancestry | None
    checksums: tuple[str, ...]

    @classmethod
    def of(cls, config: WarmupConfig, backbone: Backbone, *, compares: bool = True) -> Start:
        """Read what a configuration begins with.

        Args:
            config: the configuration.
            backbone: the backbone, by which ``auto`` is settled.
            compares: whether files are compared with it, for which its weights are needed.

        Raises:
            WarmupError: the template has no tags, or none is left to train.
            ConfigError: `train_tags` names a tag that the template lacks.
            TagFileError: a file cannot be read, is for another backbone, has none of the template's tags, or clashes
                with another.
        """
        files = [read_tags(tags) for tags in config.start_from]
        template, answers = _template(config, files, backbone)
        if template.is_plain:
            raise WarmupError(f"template {template.name!r} has no tags: there is nothing to warm up")
        if config.tag_width is not None:
            template = template.with_width(config.tag_width)
        if not files:
            return cls(template, answers, {}, _frozen(config, template, {}), None, ())
        if compares:
            _check_backbone(files, backbone)
        vectors, parents = gathered(files, [tag.name for tag in template.tags])
        return cls(
            widened(template, vectors),
            answers,
            vectors,
            _frozen(config, template, vectors),
            Ancestry("warm-up", tuple(parents)),
            tuple(file.tensors_sha256 for file in files),
        )

    def model(self, config: WarmupConfig, backbone: Backbone) -> MarkupModel:
        """Return the model that a warm-up begins with: its tags as they begin, those that are not trained frozen.

        Raises:
            MarkupError: the backbone or its chat template cannot be used.
        """
        model = MarkupModel(
            backbone,
            self.template,
            self.vectors,
            answers=self.answers,
            length_normalised=config.length_normalised,
            initialisation=config.initialisation,
            seed=config.seed,
            chat=config.chat,
        )
        assert model.table is not None
        model.table.freeze(self.frozen)
        return model

    def summary(self) -> dict[str, Any]:
        """Return what the summary of the warm-up says about it."""
        names = [tag.name for tag in self.template.tags]
        told = {"trained tags": [name for name in names if name not in self.frozen], "frozen tags": list(self.frozen)}
        return told if self.frozen or self.ancestry else {}


def _template(config: WarmupConfig, files: Sequence[TagFile], backbone: Backbone) -> tuple[Template, AnswersChoice]:
    """Return what a configuration's ``auto`` stands for."""
    answers = config.answers
    if answers == "auto" and files:
        answers = files[0].answers
    if config.template != AUTO:
        return Template.load(config.template), config.answers
    if files:
        return files[0].template, answers
    settled = default_answers(backbone.kind, backbone.parameters) if answers == "auto" else answers
    return Template.load(default_template(settled)), settled


def _frozen(config: WarmupConfig, template: Template, vectors: dict[str, Tensor]) -> tuple[str, ...]:
    names = [tag.name for tag in template.tags]
    if config.train_tags == "all":
        return ()
    if config.train_tags == "new":
        trained = [name for name in names if name not in vectors]
        if not trained:
            raise WarmupError(
                f"train_tags: new: template {template.name!r} has no tag that {', '.join(config.start_from)} lacks; "
                "there is nothing to warm up"
            )
    else:
        trained = list(config.train_tags)
        for name in trained:
            if name not in names:
                raise ConfigError(f"train_tags: template {template.name!r} has no tag {name}{nearest(name, names)}")
    return tuple(name for name in names if name not in trained)


def _check_backbone(files: Sequence[TagFile], backbone: Backbone) -> None:
    mine = Fingerprint.of(backbone)
    for file in files:
        difference = file.fingerprint.difference(mine)
        if difference:
            raise TagFileError(
                f"start_from: {file.label}: made for {file.backbone['name']!r}, not for {backbone.name!r}: {difference}"
            )
