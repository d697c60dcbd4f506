"""A trained copy of a backbone: which of its weights train, and the folder it is kept in.

The backbone that is given is only read: a deep copy is trained. LoRA adapters come from PEFT, which puts them
inside the copy's layers; the copy stays the same transformers model, so that everything that reads a backbone
(hooks on its embedding and layers, its output head) works as before.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from icl_markup.backbone import Backbone
from icl_markup.chat import ChatFrame
from icl_markup.errors import BackboneError, ConfigError, WarmupError
from icl_markup.fingerprint import Fingerprint
from icl_markup.loading import checkpoint_gradients, config_of
from icl_markup.metaicl_config import MetaIclConfig
from icl_markup.model import MarkupModel
from icl_markup.template import Template

FORMAT = 1
DETAILS = "metaicl.json"


@dataclass(frozen=True)
class Trainee:
    """A copy of a backbone, some weights of which require a gradient.

    Attributes:
        backbone: the copy.
        weights: what is trained, fp32, in the order of the model.
        adapters: PEFT's view of the copy, or None where every weight is trained.
    """

    backbone: Backbone
    weights: tuple[nn.Parameter, ...]
    adapters: PeftModel | None

    @classmethod
    def of(cls, backbone: Backbone, config: MetaIclConfig) -> Trainee:
        """Copy a backbone and choose what of the copy is trained.

        Weights are trained in fp32, as steps of full fine-tuning are smaller than what bf16 resolves; the computation
        runs in the backbone's type by autocast. Frozen weights below adapters keep their type on an accelerator.

        Raises:
            BackboneError: the weights are quantised, and full fine-tuning is asked for.
            ConfigError: `lora_targets` names no layer of the model, or its embedding or output head.
        """
        full = config.method == "full_finetuning"
        if full and getattr(backbone.model, "is_quantized", False):
            raise BackboneError(f"{backbone.name!r} is quantised, and cannot be trained in full; choose method lora")
        model, precision = _copy_of(backbone, always_fp32=full)
        adapters = None if full else _with_adapters(model, config, backbone)
        twin = _wrapped(model, backbone, precision)
        named = [(name, p) for name, p in model.named_parameters() if full or "lora_" in name]
        for _, parameter in named:
            parameter.requires_grad_(True)
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            checkpoint_gradients(model)
        return cls(twin, tuple(p for _, p in named), adapters)

    @property
    def count(self) -> int:
        """The number of trained parameters."""
        return sum(p.numel() for p in self.weights)

    def vector(self) -> Tensor:
        """Return a copy of the trained weights, one after the other; fp32, on the CPU, shape (count,)."""
        return torch.cat([p.detach().flatten().cpu() for p in self.weights])

    @torch.no_grad()
    def restore(self, vector: Tensor) -> None:
        """Put weights that `vector` returned back in place."""
        for parameter, values in zip(self.weights, vector.split([p.numel() for p in self.weights]), strict=True):
            parameter.copy_(values.view_as(parameter))


def save_trainee(trainee: Trainee, model: MarkupModel, folder: Path, details: dict[str, Any]) -> None:
    """Write a trained copy as a folder that `load_metaicl` loads; the folder appears whole or not at all.

    It holds the adapters as PEFT saves them, or the whole model with its tokenizer as transformers does, and
    ``metaicl.json``.

    Raises:
        WarmupError: the folder cannot be written.
    """
    part = folder.with_name(folder.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        if trainee.adapters is not None:
            trainee.adapters.save_pretrained(str(part), save_embedding_layers=False)
            (part / "README.md").unlink(missing_ok=True)  # an unfilled form that names the backbone's local folder
        else:
            trainee.backbone.model.save_pretrained(part)
            trainee.backbone.tokenizer.save_pretrained(part)
        described = {
            "format": FORMAT,
            **details,
            "answers": model.answers,
            "length_normalised": model.length_normalised,
            "chat": None if model.chat is None else model.chat.to_json(),
            "parameters": trainee.count,
            "files": {path.name: _sha256(path) for path in sorted(part.glob("*.safetensors"))},
        }
        with (part / DETAILS).open("w", encoding="utf-8") as out:
            out.write(json.dumps(described, indent=1, ensure_ascii=False) + "\n")
            out.flush()
            os.fsync(out.fileno())
        part.rename(folder)
    except OSError as error:
        raise WarmupError(f"{folder}: cannot write the trained model: {error}") from error


def load_metaicl(folder: str | Path, backbone: Backbone | None = None) -> tuple[MarkupModel, int]:
    """Load a model that `run_metaicl` trained.

    Args:
        folder: the folder, ``OUTPUT/model``.
        backbone: the backbone that was trained, which stays as it is; None: the one that the folder names.

    Returns:
        The model, with the template that it was trained in, and its number of trained parameters.

    Raises:
        BackboneError: the folder is missing or damaged, or was trained from another backbone.
    """
    folder = Path(folder)
    details = read_details(folder)
    try:
        source = details["backbone"]
        template = Template.parse(str(details["template"]["source"]), str(details["template"]["name"]))
        method, parameters, answers = details["config"]["method"], int(details["parameters"]), details["answers"]
        fingerprint, files = Fingerprint.from_json(details["fingerprint"]), dict(details["files"])
        length_normalised = bool(details["length_normalised"])
        chat = ChatFrame.from_json(details["chat"]) if details.get("chat") is not None else None
        wanted = config_of(source)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BackboneError(f"{folder / DETAILS}: damaged: {type(error).__name__} {error}") from error
    for name, expected in files.items():
        path = folder / name
        if not path.is_file() or _sha256(path) != expected:
            raise BackboneError(f"{path}: missing or damaged: its content differs from what {DETAILS} says (SHA-256)")
    backbone = backbone or Backbone.load(wanted)
    difference = fingerprint.difference(Fingerprint.of(backbone))
    if difference:
        raise BackboneError(f"{folder}: was trained from {wanted.name!r}, not from {backbone.name!r}: {difference}")
    if method != "lora" and backbone.quantisation != "none":
        raise BackboneError(f"{folder}: was trained in full and cannot be loaded quantised ({backbone.quantisation})")
    twin = _load_adapters(folder, backbone) if method == "lora" else _load_full(folder, backbone)
    model = MarkupModel(twin, template, answers=answers, length_normalised=length_normalised, chat=chat)
    return model, parameters


def read_details(folder: Path) -> dict[str, Any]:
    """Read ``metaicl.json``.

    Raises:
        BackboneError: it is missing, damaged or of another format.
    """
    path = folder / DETAILS
    try:
        details = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BackboneError(f"{path}: cannot be read: {error.strerror}; is this a folder of run_metaicl?") from error
    except (ValueError, RecursionError) as error:
        raise BackboneError(f"{path}: damaged: not valid JSON ({error})") from error
    if not isinstance(details, dict) or details.get("format") != FORMAT:
        raise BackboneError(f"{path}: damaged, or of another format than {FORMAT}, which this version reads")
    return details


def _load_adapters(folder: Path, backbone: Backbone) -> Backbone:
    model, precision = _copy_of(backbone, always_fp32=False)
    PeftModel.from_pretrained(model, str(folder), torch_device=str(backbone.device))
    return _wrapped(model, backbone, precision)


def _load_full(folder: Path, backbone: Backbone) -> Backbone:
    trained = type(backbone.model).from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    # Into a copy, which has what no file holds: the attention implementation, and buffers made in the backbone's type.
    model, precision = _copy_of(backbone, always_fp32=True)
    model.load_state_dict(trained.state_dict())
    return _wrapped(model, backbone, precision)


def check_whole(backbone: Backbone) -> None:
    """Check that a backbone can be copied.

    Raises:
        WarmupError: its layers are split over processes.
    """
    if backbone.is_sharded:
        raise WarmupError("MetaICL copies a backbone, and no process has all of this one; launch without splitting it")


def _copy_of(backbone: Backbone, *, always_fp32: bool) -> tuple[PreTrainedModel, Literal["none", "bf16", "fp16"]]:
    """Return a deep copy of the model and the autocast that it runs under."""
    check_whole(backbone)
    model = copy.deepcopy(backbone.model)
    on_cpu = backbone.device.type == "cpu" and not getattr(model, "is_quantized", False)
    if not (always_fp32 or on_cpu):
        return model, backbone.precision
    return model.float(), _precision(backbone)


def _precision(backbone: Backbone) -> Literal["none", "bf16", "fp16"]:
    """Return the autocast by which an fp32 copy computes as the backbone does."""
    dtype = next(backbone.embedding.parameters()).dtype
    if backbone.precision != "none" or dtype == torch.float32:
        return backbone.precision
    if dtype == torch.bfloat16:
        return "bf16"
    return "none" if backbone.device.type == "cpu" else "fp16"


def _wrapped(model: PreTrainedModel, backbone: Backbone, precision: Literal["none", "bf16", "fp16"]) -> Backbone:
    twin = Backbone(
        model,
        backbone.tokenizer,
        backbone.kind,
        name=backbone.name,
        revision=backbone.revision,
        precision=precision,
        max_length=backbone.max_length,
    )
    twin.layout = backbone.layout
    return twin


def _with_adapters(model: PreTrainedModel, config: MetaIclConfig, backbone: Backbone) -> PeftModel:
    """Put adapters into `model`, in place; their second matrices are zero, so that its outputs stay as they are."""
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear" if config.lora_targets is None else config.lora_targets,
    )
    devices = [backbone.device] if backbone.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(config.seed)
        try:
            adapters = get_peft_model(model, lora)
        except ValueError as error:
            raise ConfigError(f"lora_targets: {str(error).splitlines()[0]}") from error
    for what, module in (("output head", model.get_output_embeddings()), ("embedding", model.get_input_embeddings())):
        if isinstance(module, BaseTunerLayer):
            raise ConfigError(
                f"lora_targets: {config.lora_targets} name the {what}, of which single rows are read; name others"
            )
    # The name that was asked for, and not the folder on this machine that it stands for.
    adapters.peft_config["default"].base_model_name_or_path = backbone.name
    return adapters


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
