"""Everything that is installed with the package, directly or not, may be used and passed on freely."""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

tomllib = pytest.importorskip("tomllib")

PROJECT = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
EXTRAS = ("serve", "retrieval", "baselines")
ALLOWED = {
    "0BSD", "Apache-2.0", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC",
    "LLVM-exception", "MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Unlicense", "Zlib",
}  # fmt: skip
"""Permissive licences, and the MPL, which asks to publish changes to its own files only."""

WORDS = (
    (r"MPL|Mozilla Public", "MPL-2.0"), (r"apache", "Apache-2.0"), (r"MIT(?!-)\b", "MIT"), (r"BSD|3-Clause", "BSD"),
    (r"ISC", "ISC"), (r"PSF|Python Software Foundation", "PSF-2.0"),
)  # fmt: skip
"""What older packages write instead of an SPDX expression."""


def required() -> dict[str, Distribution]:
    """The distributions that the package and its extras bring along, by name."""
    todo = [Requirement(line) for line in PROJECT["dependencies"]]
    todo += [Requirement(line) for extra in EXTRAS for line in PROJECT["optional-dependencies"][extra]]
    found: dict[str, Distribution] = {}
    while todo:
        wanted = todo.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name.lower())
        if name in found:
            continue
        try:
            found[name] = distribution(wanted.name)
        except PackageNotFoundError:
            continue  # an extra that is not installed here
        for line in found[name].requires or []:
            one = Requirement(line)
            if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in ("", *wanted.extras)):
                todo.append(one)
    return found


def licences(found: Distribution) -> set[str]:
    """The licences of a distribution as it names them: by an expression, by classifiers, or in words."""
    told = found.metadata
    expression = told.get("License-Expression") or ""
    if expression:
        return set(re.split(r"\s+(?:AND|OR|WITH)\s+|[()]", expression)) - {""}
    names = [c.rsplit("::", 1)[1] for c in told.get_all("Classifier") or [] if c.startswith("License ::")]
    text = " ".join(names) or (told.get("License") or "").strip().split("\n")[0]
    if re.search(r"\b[AL]?GPL|GNU", text):
        return {text}
    return {licence for word, licence in WORDS if re.search(word, text, re.IGNORECASE)} or {text or "none"}


def test_every_dependency_has_a_licence_that_is_allowed() -> None:
    found = required()
    assert {"torch", "transformers", "tokenizers", "safetensors", "filelock", "pyyaml"} <= set(found)
    refused = {name: sorted(licences(one) - ALLOWED) for name, one in found.items() if licences(one) - ALLOWED}
    assert not refused
