"""The commands that look inside: ``icl-markup tags``, and ``icl-markup attention``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from icl_markup.attention import SlotAttention, slot_attention
from icl_markup.episodes import Query
from icl_markup.errors import ConfigError
from icl_markup.model import MarkupModel
from icl_markup.serving import load_for, task_episode

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_commands(commands: Any, *shared: Callable[[argparse.ArgumentParser], None]) -> None:
    """Declare the commands.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
        shared: what declare the arguments of a model, options and demonstrations.
    """
    tags = commands.add_parser("tags", help="inspect tag folders, and compare warm-ups")
    tags.add_argument(
        "folders",
        nargs="+",
        metavar="folder",
        help="a tag folder or hub name (user/tags@revision); several: warm-ups to compare",
    )
    tags.add_argument("--nearest", type=int, default=5, help="how many nearest vocabulary tokens to show")
    _add_forms(tags)
    tags.set_defaults(run=run_tags)

    attention = commands.add_parser("attention", help="show where the slot looks, with tags and in plain words")
    for declare in shared:
        declare(attention)
    attention.add_argument("--against", metavar="TEMPLATE", help="a template to compare with, by name or path; none: "
                           "no other (default: plain_words_text_label or plain_letters_text_label, whichever is "
                           "answered alike)")  # fmt: skip
    _add_forms(attention)
    attention.add_argument("texts", nargs=1, metavar="text", help="the text to classify")
    attention.set_defaults(run=run_attention)


def _add_forms(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--picture", metavar="FILE.png", help="draw a picture")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of tables")


def run_tags(args: argparse.Namespace, _overrides: Sequence[str] = ()) -> None:
    """Print, and draw if asked to, what tag folders hold.

    Raises:
        TagFileError: a folder cannot be used, or there is no backbone to draw its vocabulary of.
        ConfigError: `--nearest` is not positive, or the picture cannot be written.
    """
    from icl_markup.tag_report import drawable, load_folders, print_tags, report

    if args.nearest < 1:
        raise ConfigError(f"--nearest {args.nearest}: give a number of at least 1")
    if args.picture:
        _check_place(args.picture)
    if args.json:
        found = load_folders(args.folders)
        print(json.dumps(report(found, args.nearest), ensure_ascii=False))
    else:
        shown = print_tags(args.folders, args.nearest)
        if not args.picture:
            return
        found = drawable(shown)
    if args.picture:
        from icl_markup import tag_plots

        told = "" if args.json else tag_plots.caption(found)
        write_picture(tag_plots.picture(drawable(found)), args.picture, told)


def run_attention(args: argparse.Namespace, _overrides: Sequence[str] = ()) -> None:
    """Print, and draw if asked to, where the slot of a text's prompt looks, with tags and in plain words.

    Raises:
        PromptError: a prompt cannot be composed.
        BackboneError: the model cannot be loaded, or does not tell its attention.
        ConfigError: the picture cannot be written.
    """
    if args.picture:
        _check_place(args.picture)
    model, asked = load_for(args), task_episode(args)
    episode = replace(asked, queries=(Query(args.texts[0]),))
    models = [model]
    if args.against != "none":
        models.append(
            MarkupModel(
                model.backbone,
                args.against or f"plain_{'words' if model.answers == 'names' else 'letters'}_text_label",
                answers=model.answers,
                length_normalised=model.length_normalised,
                chat=model.chat,
            )
        )
    found = [slot_attention(one, episode) for one in models]
    if args.json:
        print(json.dumps([one.to_json() for one in found], ensure_ascii=False))
    else:
        for one in found:
            _print_attention(one)
    if args.picture:
        from icl_markup import attention_plots

        told = "" if args.json else attention_plots.caption(found)
        write_picture(attention_plots.picture(found, model.backbone.name), args.picture, told)


def _print_attention(found: SlotAttention) -> None:
    """Print a table of shares in percent: the mean over layers, the first, the middle and the last."""
    console = Console(width=None if Console().is_terminal else 110)
    layers, tokens = len(found.weights), len(found.kinds)
    best = max(found.answer, key=found.answer.__getitem__)
    console.print(escape(f"{found.template}: {tokens} tokens; the answer is {best}, {found.answer[best]:.3f}"))
    chosen = sorted({0, (layers - 1) // 2, layers - 1})
    table = Table(title="attention from the slot, %")
    for heading in ("part", "tokens", "mean", *(f"layer {layer + 1}" for layer in chosen)):
        table.add_column(heading)
    named = [(part.kind, part.name, part.stop - part.start) for part in found.parts]
    rows = [
        (name if kind in ("head", "query", "end") else f"{kind} {name}", size, found.by_part[:, i])
        for i, (kind, name, size) in enumerate(named)
    ]
    for name, size, share in rows:
        shown = [share.mean(), *share[chosen]]
        table.add_row(escape(name), str(size), *(f"{100 * value:.1f}" for value in shown))
    table.add_section()
    for kind, share in found.by_kind.items():
        shown = [share.mean(), *share[chosen]]
        table.add_row(f"all of kind {kind}", str(found.kinds.count(kind)), *(f"{100 * value:.1f}" for value in shown))
    console.print(table)


def write_picture(figure: Figure, path: str, told: str) -> None:
    """Write a figure as a PNG, whole or not at all, and print what it shows.

    Raises:
        ConfigError: it cannot be written.
    """
    from icl_markup.plot_style import to_png

    place, content = Path(path), to_png(figure, few_colours=False)
    part = place.with_name(place.name + ".part")
    try:
        part.write_bytes(content)
        part.replace(place)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"--picture {path}: cannot be written: {error.strerror}") from error
    if told:
        print(f"picture: {path}: {told}")


def _check_place(path: str) -> None:
    """Raise a ConfigError where a picture cannot be written, before anything is computed for it."""
    if Path(path).suffix.lower() != ".png":
        raise ConfigError(f"--picture {path}: pictures are PNG files; let its name end in .png")
    if not Path(path).parent.is_dir():
        raise ConfigError(f"--picture {path}: there is no folder {Path(path).parent}")
