"""The documentation: what its pages show is run, the messages that it quotes are ours, the site builds."""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib.util
import io
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import icl_markup
from icl_markup.backbone import Backbone
from icl_markup.cli import main
from icl_markup.embedded import sample_folders
from icl_markup.model import MarkupModel
from icl_markup.warmup_config import WarmupConfig
from tests.conftest import stand_in, tiny_backbone
from tests.documentation import Block, Reader, matches, write_files
from tests.hub_stand_in import hub_for

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
HUB = {"Qwen/Qwen3-0.6B": "llama", "google/flan-t5-small": "t5", "FacebookAI/roberta-base": "roberta"}
"""Tiny backbones lie in folders of these names, so that what a page does with a hub's models is done with them."""

CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
SHORTEST = 12
"""Literal characters that a message needs at least to be recognised."""


@pytest.fixture(scope="session")
def starting_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has: the files of docs/data.md, the tags of a quickstart, and backbones of every kind."""
    folder = tmp_path_factory.mktemp("reader")
    write_files(DOCS / "data.md", folder)
    MarkupModel(stand_in()).save(folder / "runs/quickstart/tags")
    for name, kind in HUB.items():
        tiny = tiny_backbone(kind)
        tokenizer = copy.copy(tiny.tokenizer)  # other tests have the same one
        if kind == "llama":
            tokenizer.chat_template = CHAT
        tiny.model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def reader(starting_place: Path, tiny_default: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """A reader in a folder of their own; warm-ups take two steps, and a tiny model stands in for the default one."""
    shutil.copytree(starting_place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    run = icl_markup.run_warmup

    def in_small(config: WarmupConfig, **given: Any) -> Any:
        plan = replace(config.optimiser, steps=min(config.optimiser.steps, 2), batch_tokens=500, window=8)
        return run(replace(config, optimiser=plan, validation=replace(config.validation, episodes=2)), **given)

    monkeypatch.setattr(icl_markup, "run_warmup", in_small)
    monkeypatch.setattr("icl_markup.quickstart.run_warmup", in_small)
    folders = {"warmup": sample_folders("warmup"), "unseen": sample_folders("unseen")[:1]}
    monkeypatch.setattr("icl_markup.quickstart.sample_folders", folders.__getitem__)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return Reader({"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_is_so(page: Path, reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "curl " in page.read_text() and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    if "icl-markup serve" in page.read_text():
        pytest.importorskip("uvicorn", reason="pip install 'icl-markup[serve]'")
    with hub_for(monkeypatch, tmp_path / "hub") if page.stem == "sharing" else contextlib.nullcontext():
        reader.read(page)


@pytest.mark.parametrize("language", ["python", "console", "yaml", "bash", "", "text"])
def test_a_block_is_run_or_says_why_not(language: str) -> None:
    reader = Reader({})
    lines = {"console": "$ false", "python": "raise AssertionError('run')"}.get(language, "$ icl-markup --help")
    with pytest.raises(AssertionError):
        reader.do(Block("page:1", language, "", (lines,)))
    reader.do(Block("page:1", language, "", ("# not run: needs several GPUs", lines)))
    with pytest.raises((AssertionError, SyntaxError)):
        reader.do(Block("page:1", language, "", ("# not run:", lines)))


def test_shown_output_must_be_there_in_its_order() -> None:
    reader = Reader(dict(os.environ))
    reader.do(Block("page:1", "console", "", ("$ printf 'one\\ntwo 2\\nthree\\n'", "one", "two …", "…", "three")))
    for wrong in (("two …", "one"), ("four",), ("on",)):
        with pytest.raises(AssertionError, match="is not"):
            reader.do(Block("page:1", "console", "", ("$ printf 'one\\ntwo 2\\n'", *wrong)))
    reader.do(Block("page:1", "python", "", ("print('a 1')", "print('b')")))
    reader.do(Block("page:1", "text", "Output", ("a …", "b")))
    with pytest.raises(AssertionError, match="but this was printed"):
        reader.do(Block("page:1", "text", "Output", ("a …",)))
    assert matches("a … c", "a b c") and not matches("a … c", "a b d")


def quoted_messages() -> list[str]:
    """Return the messages that the page of errors explains: lines of nothing but code, each with a remark below."""
    return re.findall(r"^`([^`]+)`\n: {3}", (DOCS / "errors.md").read_text(), re.MULTILINE)


def messages_in_the_source() -> set[str]:
    """Return every string of the package, with an ellipsis for what is put into it."""
    found = set()
    for path in Path(icl_markup.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values]
                found.add(_simple("".join(parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(_simple(node.value))
    return found


def _simple(message: str) -> str:
    """Where two things are put in side by side, or one behind "FILE:LINE:", the page writes one ellipsis."""
    return re.sub("…+", "…", message).removeprefix("…:…: ").removeprefix("…: ")


@pytest.mark.parametrize("message", quoted_messages())
def test_a_quoted_message_is_in_the_source(message: str, known: set[str]) -> None:
    assert _simple(message) in known
    assert len(message.replace("…", "")) >= SHORTEST or message in ("device …: …", "…: unknown key …")


@pytest.fixture(scope="session")
def known() -> set[str]:
    """The strings of the package."""
    return messages_in_the_source()


def test_the_likeliest_messages_are_explained() -> None:
    messages = quoted_messages()
    assert len(messages) == len(set(messages)) >= 60
    page = (DOCS / "errors.md").read_text()
    assert page.count("\n:   ") == len(messages), "an explanation without a message that is code alone"


@pytest.fixture(scope="session")
def helps() -> str:
    """What --help says of every command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for command in (
            "warmup",
            "plan",
            "evaluate",
            "report",
            "fit",
            "predict",
            "serve",
            "show",
            "tags",
            "quickstart",
            "attention",
            "compose",
            "push",
            "export",
            "import-peft",
            "models",
        ):
            with contextlib.suppress(SystemExit):
                main([command, "--help"])
    return out.getvalue()


OF_ACCELERATE = (
    "--mixed_precision",
    "--config_file",
    "--num_processes",
    "--multi_gpu",
    "--cpu",
)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_a_page_speaks_of_options_that_there_are(page: Path, helps: str) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for option in re.findall(r"`(--[a-z][a-z_.-]*[a-z])", text):
        is_ours = re.search(rf"{re.escape(option)}\b", helps) is not None
        assert is_ours or option in OF_ACCELERATE, f"{page.name}: no command has {option}"


def test_the_site_builds_without_warnings_and_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the site is not built here: pip install 'icl-markup[docs]'"
    build = pytest.importorskip("mkdocs.commands.build", reason=reason)
    pytest.importorskip("mkdocstrings", reason=reason)
    pytest.importorskip("material", reason=reason)
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    build.build(load_config("mkdocs.yml", site_dir=str(tmp_path)))  # strict: a warning ends it with an error
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    for name, text in pages.items():
        fetched = re.findall(r"""<(?:script|img|iframe)[^>]*\bsrc=["']?(https?:[^"' >]*)""", text)
        fetched += re.findall(r"""<link[^>]*\bhref=["']?(https?:[^"' >]*)""", text)
        assert not fetched, f"{name} fetches {fetched[0]}"
    reference = pages["reference/index.html"]
    for name in icl_markup.__all__:
        assert f">{name}</code></a>" in reference, name
    package = Path(icl_markup.__file__).parent
    for module in package.glob("[!_]*.py"):
        assert f'id="icl_markup.{module.stem}"' in pages[f"reference/{module.stem}.html"]


def test_every_module_has_a_heading_in_the_reference() -> None:
    spec = importlib.util.spec_from_file_location("docs_reference", ROOT / "scripts/docs_reference.py")
    assert spec is not None and spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    assert reference.grouped().get("Other", []) == []
