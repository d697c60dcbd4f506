"""From an experiment's methods to things that answer: warm-ups are run or loaded, wordings and baselines are made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from icl_markup.answers import default_answers, default_template
from icl_markup.backbone import Backbone
from icl_markup.baselines import Chance, EmbeddingCentroid, EmbeddingKNN, EmbeddingLogReg, Majority, TfidfLogReg
from icl_markup.chat import ChatFrame
from icl_markup.checkpoint import has_checkpoint
from icl_markup.config import load_config
from icl_markup.errors import ConfigError
from icl_markup.experiment_config import TRAINED, ExperimentConfig, MethodConfig
from icl_markup.hub import locate
from icl_markup.metaicl import load_metaicl, run_metaicl
from icl_markup.metaicl_config import MetaIclConfig
from icl_markup.metaicl_model import read_details
from icl_markup.method import Method
from icl_markup.model import MarkupModel
from icl_markup.processes import Processes
from icl_markup.prompted import Probed, Prompted
from icl_markup.retrieval import NearestLabel
from icl_markup.sentences import SentenceEncoder
from icl_markup.tagfile import load_model, read_tags
from icl_markup.template import Template
from icl_markup.warmup import run_warmup
from icl_markup.warmup_config import WarmupConfig

CALIBRATIONS = {
    "contextual": " + contextual calibration",
    "domain": " + domain-context calibration",
    "unconditional": " + unconditional calibration",
    "batch": " + batch calibration",
}


@dataclass(frozen=True)
class Variant:
    """One thing to measure.

    Attributes:
        method: the method's name in rows.
        label: what tells the variant from the method's others.
        identity: changes with everything its answers depend on, the episodes aside.
        parameters: trained parameters.
        prompted: whether it composes prompts, from options that retrieval may choose.
        make: makes the method; called when a cell of it is missing.
        config: where it comes from.
    """

    method: str
    label: str
    identity: str
    parameters: int
    prompted: bool
    make: Callable[[], Method]
    config: MethodConfig

    @property
    def base(self) -> str:
        """The method's name in rows without its calibration."""
        return _named(self.config)


def variants(config: ExperimentConfig, backbone: Backbone, encoder: Callable[[], SentenceEncoder]) -> Iterator[Variant]:
    """Yield every variant of every method; warm-ups that a method names are run first, unless they were.

    Raises:
        MarkupError: a template, tag folder, warm-up or argument cannot be used.
    """
    weights = backbone.checksum()
    models: dict[str, Probed] = {}  # one for all calibrations
    for method in config.methods:
        name = _named(method, CALIBRATIONS.get(method.calibration, ""))
        if method.name not in ("plain", "label_names", "tags_untrained", *TRAINED):
            yield _baseline(name, method, config, encoder)
            continue
        for label, made_of, model, parameters in _models(method, config, backbone):
            # Now, and not where it is made: the first that answers asks for the priors of all.
            prompted = _prompted(method, config, models.setdefault(json.dumps(made_of), Probed(model)))
            digest = hashlib.sha256(json.dumps([weights, made_of, method.calibration, method.out_of_scope]).encode())
            yield Variant(
                name,
                label,
                digest.hexdigest()[:16],
                parameters,
                True,
                _constant(prompted),
                method,
            )


def _named(method: MethodConfig, calibration: str = "") -> str:
    decides = " (largest probability)" if method.out_of_scope == "max_probability" else ""
    return (method.name_in_rows or method.name) + calibration + decides


def _constant(method: Method) -> Callable[[], Method]:
    return lambda: method


def _prompted(method: MethodConfig, config: ExperimentConfig, model: Probed) -> Method:
    return Prompted(
        model,
        method.calibration,
        offers_none=method.out_of_scope == "default",
        shows_demos=method.name != "label_names",
        batch_tokens=config.batch_tokens,
    )


def _models(
    method: MethodConfig, config: ExperimentConfig, backbone: Backbone
) -> Iterator[tuple[str, list[Any], MarkupModel, int]]:
    """Yield label, what the answers depend on besides the backbone, the model, parameters."""
    if method.name in ("plain", "label_names", "tags_untrained"):
        for name in method.templates or [_default_template(config, backbone)]:
            template = _without(Template.load(name), method.without_tags)
            if template.is_plain != (method.name != "tags_untrained"):
                has = "has no" if template.is_plain else "has"
                raise ConfigError(f"method {method.name}: template {name!r} {has} tags")
            model = MarkupModel(
                backbone, template, answers=config.answers, initialisation=method.initialisation, chat=config.chat
            )
            rows = model.table.rows.numel() if model.table else 0
            made_of = [template.source, model.answers, method.initialisation, method.name, *_chat(model.chat)]
            yield Path(name).stem, made_of, model, 0 if method.name != "tags_untrained" else rows
        return
    folders = [locate(folder).folder for folder in method.folders]  # the zoo's, on disk, or the hub's
    folders += [_warmed_up(method, seed, config, backbone) for seed in method.seeds] if method.warmup else []
    for folder in folders:
        if method.name in ("lora", "full_finetuning"):
            # A copy of the backbone each; they are few, and their number of trained parameters is only known then.
            trained, parameters = load_metaicl(folder, backbone)
            seed_of_run = read_details(folder)["summary"]["seed"]
            made_of = [_digest(folder), *_chat(trained.chat)]
            yield f"seed {seed_of_run}", made_of, trained, parameters
            continue
        file = read_tags(folder)
        label = f"seed {file.training.get('seed')}"
        elsewhere: list[str | None] = [*method.templates] or [None]
        for other in elsewhere:
            template = _without(Template.load(other) if other else file.template, method.without_tags)
            made_of = [_digest(folder), template.source, file.answers, *_chat(file.chat)]
            model = _with_template(load_model(folder, backbone), template)
            assert model.table is not None
            yield (
                label if other is None else f"{Path(other).stem}, {label}",
                made_of,
                model,
                model.table.rows.numel(),
            )


def _default_template(config: ExperimentConfig, backbone: Backbone) -> str:
    answers = config.answers
    return default_template(default_answers(backbone.kind, backbone.parameters) if answers == "auto" else answers)


def _with_template(model: MarkupModel, template: Template) -> MarkupModel:
    if template.source == model.template.source or model.table is None:
        return model
    known = {tag.name for tag in template.tags}
    vectors = {name: rows for name, rows in model.table.vectors().items() if name in known}
    return MarkupModel(
        model.backbone,
        template,
        vectors,
        answers=model.answers,
        length_normalised=model.length_normalised,
        chat=model.chat,
    )


def _chat(frame: ChatFrame | None) -> list[Any]:
    """Return what a chat adds to an identity: nothing where there is none, so that earlier cells are found again."""
    return [] if frame is None else [frame.to_json()]


def _without(template: Template, tags: list[str]) -> Template:
    for tag in tags:
        template = template.without_tag(tag)
    return template


def _warmed_up(method: MethodConfig, seed: int, config: ExperimentConfig, backbone: Backbone) -> Path:
    """Run a warm-up, continue it, or find it finished; return its folder.

    Several processes warm tags up together; MetaICL trains in the first, for which the others wait.
    """
    assert method.warmup is not None
    metaicl = method.name in ("lora", "full_finetuning")
    changes = {**config.warmup_overrides, **({} if metaicl else method.overrides)}
    warmup = load_config(WarmupConfig, method.warmup, [f"--{key}={json.dumps(v)}" for key, v in changes.items()])
    chat = warmup.chat if warmup.chat.enabled else config.chat
    warmup = replace(warmup, seed=seed, backbone=config.backbone, chat=chat)
    told = [method.name, method.overrides, config.warmup_overrides, backbone.checksum()]
    plain = json.dumps([*told, *([asdict(chat)] if chat.enabled else [])], sort_keys=True)
    digest = hashlib.sha256(plain.encode()).hexdigest()[:8]
    folder = Path(config.runs) / f"{method.name}-{Path(method.warmup).stem}-{digest}-{seed}"
    if metaicl:
        try:
            trained = MetaIclConfig.like(warmup, method=method.name, output=str(folder), **method.overrides)
        except TypeError as error:
            raise ConfigError(f"method {method.name}: overrides: {error}") from error
        return Processes.here().from_main(lambda: run_metaicl(trained, backbone=backbone).folder)
    return run_warmup(replace(warmup, output=str(folder), resume=has_checkpoint(folder)), backbone=backbone).folder


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _setfit(encoder: SentenceEncoder, options: dict[str, Any]) -> Method:
    from icl_markup.setfit_method import SetFit  # imports a trainer, which takes seconds

    return SetFit(encoder, **options)


def _baseline(
    name: str, method: MethodConfig, config: ExperimentConfig, encoder: Callable[[], SentenceEncoder]
) -> Variant:
    makers: dict[str, Callable[..., Method]] = {
        "chance": Chance,
        "majority": Majority,
        "tfidf_logreg": TfidfLogReg,
        "embedding_knn": lambda **options: EmbeddingKNN(encoder(), **options),
        "embedding_centroid": lambda **options: EmbeddingCentroid(encoder(), **options),
        "embedding_logreg": lambda **options: EmbeddingLogReg(encoder(), **options),
        "retrieval": lambda **options: NearestLabel(encoder(), **options),
        "setfit": lambda **options: _setfit(encoder(), options),
    }
    options = dict(method.options)
    if method.out_of_scope == "max_probability":
        options["out_of_scope"] = "max_probability"

    def make() -> Method:
        try:
            return makers[method.name](**options)
        except TypeError as error:
            raise ConfigError(f"method {method.name}: options: {error}") from error

    identity = json.dumps([method.name, options, config.encoder], sort_keys=True)
    return Variant(name, "none", identity, 0, False, make, method)
