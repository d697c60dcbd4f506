"""GGUF files as backbones: a file's weights are dequantized once, and kept as a transformers folder in the cache.

A file is named by its path, or on the hub by its repository and its path in it, ``user/repo/model.gguf``. The folder is
named by the file's checksum, its weights are fp32, which holds what the file says exactly, and its ``config.json`` says
what it was made of. transformers reads the weights; the tokenizer is built here (`icl_markup.gguf_tokenizers`).
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from transformers import PreTrainedTokenizerBase

from icl_markup.cache import cache_folder, checksum_of, made_once
from icl_markup.errors import BackboneError
from icl_markup.gguf_tokenizers import byte_level_tokenizer, corrected_tokenizer, gemma_tokenizer, short
from icl_markup.hub import HUB_ERRORS, LIBRARY, explain, is_hub_name

SUFFIX = ".gguf"
FORMAT = 1
"""A part of the folders' names in the cache; raised if this package or transformers makes other folders of a file."""

ORIGIN = "gguf"
"""The key of ``config.json`` that says what a folder was made of."""

INSTALL = 'pip install "gguf>=0.17"'

_MAGIC = b"GGUF"
_WHOLE = ("F32", "BF16", "F64")
"""Types that hold what models are trained in exactly."""

_EMBEDDING = "token_embd.weight"
_LAYER = re.compile(r"(enc\.|dec\.)?blk\.(\d+)\.")


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says of itself.

    Attributes:
        path: the file.
        fields: its metadata by key.
        types: the type of each tensor by its name, such as ``Q4_1``.
        bits: bits a weight, by type.
    """

    path: Path
    fields: dict[str, Any]
    types: dict[str, str]
    bits: dict[str, float]

    @property
    def architecture(self) -> str:
        """The architecture, by llama.cpp's name."""
        return str(self.fields.get("general.architecture", ""))

    def coarsest(self, *, embedding: bool) -> str:
        """Return the type of fewest bits of the embedding, or of all other tensors; empty if none is rounded."""
        types = {kind for name, kind in self.types.items() if (name == _EMBEDDING) == embedding and kind not in _WHOLE}
        return min(types, key=lambda kind: (self.bits[kind], kind)).lower() if types else ""


def is_gguf(name: str) -> bool:
    """Return whether a backbone's name is that of a GGUF file."""
    return name.lower().endswith(SUFFIX)


def on_hub(name: str) -> tuple[str, str] | None:
    """Return the repository and the path in it that a GGUF file's name has on the hub; None if it has no such form."""
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    hub_name = f"{owner}/{repository}"
    return (hub_name, file) if is_gguf(name) and file and is_hub_name(hub_name) else None


def transformers_folder(name: str, revision: str | None = None) -> Path:
    """Return the transformers folder that a GGUF file makes; it is made if the cache does not have it.

    Args:
        name: a path, or ``user/repo/path.gguf`` on the hub. A file of that path wins.
        revision: a commit, tag or branch of the hub.

    Raises:
        BackboneError: there is no such file, it is damaged or lacks something, transformers cannot read it, the
            package ``gguf`` is missing, or the cache cannot be written.
    """
    path = _located(name, revision)
    try:
        with path.open("rb") as file:
            begins = file.read(len(_MAGIC))
        if begins != _MAGIC:
            raise BackboneError(f"{name}: is not a GGUF file, though its name says so: it begins with {begins!r}")
        return dequantized(path, checksum_of(path), name)
    except OSError as error:
        raise BackboneError(f"{name}: cannot be read: {error.strerror or error}") from error


def dequantized(path: Path | Callable[[], Path], checksum: str, name: str) -> Path:
    """Return the transformers folder of a GGUF file of a known checksum; it is made if the cache does not have it.

    Args:
        path: the file, or what gives it; it is asked only if the folder is not there.
        checksum: the file's SHA-256 in hexadecimal digits.
        name: how messages call the file.

    Raises:
        BackboneError: as `transformers_folder`.
    """
    return made_once(folder_of(checksum), partial(_convert, path, checksum, name))


def folder_of(checksum: str) -> Path:
    """Return where the cache has, or would have, the transformers folder of a file of that SHA-256."""
    return cache_folder() / "gguf" / f"{checksum}-{FORMAT}"


def dequantized_types(settings: transformers.PretrainedConfig) -> tuple[str, str]:
    """Return the coarsest types that a model's linear layers and its embedding were dequantized from; empty: none."""
    made_of = getattr(settings, ORIGIN, None)
    if not isinstance(made_of, dict):
        return "", ""
    return str(made_of.get("linear", "")), str(made_of.get("embedding", ""))


def read_gguf(path: Path, name: str) -> GgufFile:
    """Read a file's metadata, and the names and types of its tensors.

    Raises:
        BackboneError: it is damaged, or the package ``gguf`` is missing.
    """
    if find_spec("gguf") is None:
        raise BackboneError(f"{name}: GGUF files are read by the package gguf, which is not installed: {INSTALL}")
    from gguf import GGML_QUANT_SIZES, GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    except Exception as error:  # whatever damage makes of the reader's arithmetic
        raise BackboneError(
            f"{name}: damaged, or not whole: it cannot be read as a GGUF file ({type(error).__name__}: "
            f"{_first_line(error)}); download it again"
        ) from error
    bits = {kind.name: 8 * size / block for kind, (block, size) in GGML_QUANT_SIZES.items()}
    return GgufFile(path, fields, types, bits)


def _located(name: str, revision: str | None) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    named = on_hub(name)
    if named is None:
        raise BackboneError(
            f"{name}: no such file; name a GGUF file by its path, or on the hub as user/repo/file{SUFFIX}"
        )
    hub_name, file = named
    try:
        return Path(hf_hub_download(hub_name, file, revision=revision, library_name=LIBRARY))
    except HUB_ERRORS as error:
        told = explain(error, hub_name, revision)
        raise BackboneError(f"{name}: no such file here, and as {file} of the hub's {hub_name}: {told}") from error


def _convert(path: Path | Callable[[], Path], checksum: str, name: str, part: Path) -> None:
    """Write a file as a transformers folder into `part`."""
    with _alone(path if isinstance(path, Path) else path()) as link:
        file = read_gguf(link, name)
        _check(file, name)
        print(f"icl-markup: dequantizing {name}; this is done once, and kept in {cache_folder()}", file=sys.stderr)
        tokenizer = _tokenizer(file, name)
        model = _model(file, name)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise BackboneError(f"{name}: damaged: {len(tokenizer)} tokens, but an embedding of {rows} rows")
    made_of = {
        "sha256": checksum,
        "name": str(file.fields.get("general.name", "")),
        "linear": file.coarsest(embedding=False),
        "embedding": file.coarsest(embedding=True),
        "types": dict(Counter(file.types.values())),
    }
    setattr(model.config, ORIGIN, made_of)
    vars(model.config).pop("_model_name_or_path", None)  # the model's title, which transformers takes for a name
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """Yield a link to a file in a folder of its own: transformers also reads what lies beside a file, code included."""
    with tempfile.TemporaryDirectory(prefix="icl-markup-gguf-") as folder:
        link = Path(folder) / f"model{SUFFIX}"
        link.symlink_to(path.resolve())
        yield link


def _check(file: GgufFile, name: str) -> None:
    """Refuse what transformers would read as something else than it is.

    Raises:
        BackboneError: the file is one part of several, holds no model, or scales its positions.
    """
    parts = _number(file, "split.count", name) if "split.count" in file.fields else 1
    if parts > 1:
        raise BackboneError(f"{name}: is one of {parts} parts; join them with llama.cpp's `llama-gguf-split --merge`")
    if not file.architecture:
        raise BackboneError(f"{name}: does not say which architecture it is of (general.architecture)")
    if not file.types:
        raise BackboneError(f"{name}: holds no weights, only metadata; take a file of the whole model")
    for key in ("block_count", "decoder_block_count"):
        if f"{file.architecture}.{key}" in file.fields:
            _number(file, f"{file.architecture}.{key}", name)
    scaling = file.fields.get(f"{file.architecture}.rope.scaling.type", "none")
    scaled = [tensor for tensor in file.types if tensor.startswith("rope_f") or ".rope_f" in tensor]
    if scaled or scaling != "none":
        told = scaled[0] if scaled else f"rope.scaling.type {scaling!r}"
        raise BackboneError(
            f"{name}: scales its rotary positions ({told}), which transformers does not read from GGUF files and would "
            "leave out without a word; take the transformers folder that it was converted from"
        )


def _check_layers(file: GgufFile, name: str) -> None:
    """Refuse a file that holds layers beyond those that it says: transformers leaves them out without a word.

    Layers that it says and does not hold are found when it is loaded.
    """
    held: dict[str, int] = {}
    for tensor in file.types:
        if found := _LAYER.match(tensor):
            stack = found[1] or ""
            held[stack] = max(held.get(stack, 0), int(found[2]) + 1)
    for stack, layers in held.items():
        key = f"{file.architecture}.block_count"
        of_decoder = f"{file.architecture}.decoder_block_count"
        if stack == "dec." and of_decoder in file.fields:
            key = of_decoder
        if key not in file.fields:
            raise BackboneError(f"{name}: damaged: does not say how many layers it has ({key}); download it again")
        said = _number(file, key, name)
        if said < layers:
            raise BackboneError(
                f"{name}: damaged: says that it has {said} layers ({key}), but holds {layers}; download it again"
            )


def _number(file: GgufFile, key: str, name: str) -> int:
    value = file.fields[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise BackboneError(f"{name}: damaged: its {key} is {short(value)}, not a number; download it again")
    return value


def _tokenizer(file: GgufFile, name: str) -> PreTrainedTokenizerBase:
    kind = file.fields.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        raise BackboneError(
            f"{name}: has no tokenizer (tokenizer.ggml.model): take another file, or the transformers folder that it "
            "was converted from"
        )
    if kind == "gpt2":
        return byte_level_tokenizer(file.fields, name)
    if kind == "llama" and file.architecture in ("gemma", "gemma2", "gemma3"):
        return gemma_tokenizer(file.fields, name)
    if kind not in ("llama", "t5", "gemma4"):
        raise BackboneError(
            f"{name}: its tokenizer, {kind!r} (tokenizer.ggml.model), is not known here; take the transformers folder "
            "that it was converted from"
        )
    with _explained(file, name):
        built = transformers.AutoTokenizer.from_pretrained(
            file.path.parent, gguf_file=file.path.name, trust_remote_code=False
        )
    return corrected_tokenizer(built, file.fields, name)


def _model(file: GgufFile, name: str) -> transformers.PreTrainedModel:
    place = {
        "pretrained_model_name_or_path": file.path.parent,
        "gguf_file": file.path.name,
        "trust_remote_code": False,
    }
    config = getattr(transformers, "GgufConfig", None)  # versions that lack it dequantize anyway
    more = {} if config is None else {"quantization_config": config(dequantize=True)}
    with _explained(file, name):
        settings = transformers.AutoConfig.from_pretrained(**place)
    _check_layers(file, name)  # of an architecture that is read
    with _explained(file, name):
        auto = transformers.AutoModelForSeq2SeqLM if settings.is_encoder_decoder else transformers.AutoModelForCausalLM
        model, report = auto.from_pretrained(
            **place, **more, config=settings, dtype=torch.float32, output_loading_info=True
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise BackboneError(
            f"{name}: transformers finds no weights for {missing[0]} ({len(missing)} in all) of {file.architecture!r}; "
            "the file is not whole, or of a form that this version of transformers does not read"
        )
    loaded: transformers.PreTrainedModel = model
    return loaded


@contextmanager
def _explained(file: GgufFile, name: str) -> Iterator[None]:
    """Turn what transformers raises about a file into an error that names the file."""
    try:
        yield
    except Exception as error:  # it raises anything, from KeyError to NotImplementedError
        raise BackboneError(
            f"{name}: transformers cannot read this GGUF file of architecture {file.architecture!r} "
            f"({_first_line(error)}); take the transformers folder that it was converted from"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
