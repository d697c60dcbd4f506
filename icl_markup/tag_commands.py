"""The commands ``icl-markup compose``, which makes a tag folder of others, and ``push``, which shares one."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from icl_markup.errors import TagFileError

if TYPE_CHECKING:
    from icl_markup.compose import Operation

COMPOSE = """Make a tag folder of others: merge their tags, or average or interpolate warm-ups of the same tags. TAGS
are folders or names on the hub (user/tags, user/tags@revision), all made for one backbone."""
PUSH = """Upload a tag folder and its card to the Hugging Face Hub, as one commit. The token is that of `hf auth login`
or of HF_TOKEN."""


def add_tag_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare both commands and what they run."""
    compose = commands.add_parser("compose", help="make a tag folder of others", description=COMPOSE)
    _add_compose(compose)
    compose.set_defaults(run=_compose)
    push = commands.add_parser("push", help="upload a tag folder to the hub", description=PUSH)
    _add_push(push)
    push.set_defaults(run=_push)


def _add_compose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tags", nargs="+", metavar="TAGS", help="tag folders or hub names")
    parser.add_argument("--out", required=True, help="the folder to write; existing tags are replaced")
    parser.add_argument("--template", help="a template's name or path (default: the one that has exactly the tags)")
    parser.add_argument("--only", nargs="+", action="append", default=[], metavar=("TAGS", "TAG"),
                        help="take only these tags of that folder, as --only runs/a '<demo>'; repeatable")  # fmt: skip
    parser.add_argument("--rename", nargs=3, action="append", default=[], metavar=("TAGS", "OLD", "NEW"),
                        help="give a tag of that folder another name; repeatable")  # fmt: skip
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--average", action="store_true", help="average warm-ups of the same tags")
    how.add_argument("--interpolate", type=float, metavar="T",
                     help="go from the first to the second: 0 is the first, 1 the second")  # fmt: skip
    parser.add_argument("--weights", type=float, nargs="+", help="of --average, one a folder (default: equal)")
    parser.add_argument("--answers", choices=["symbols", "names"], help="where the folders differ in that")
    parser.add_argument("--license", default="", help="the licence of the result, such as apache-2.0")


def _compose(args: argparse.Namespace, _overrides: list[str]) -> None:
    from icl_markup.composition import composed
    from icl_markup.tagfile import write_tags

    if args.weights is not None and not args.average:
        raise TagFileError("--weights are those of --average; give that too")
    only: dict[str, list[str]] = {}
    for folder, *names in args.only:
        if not names:
            raise TagFileError(f"--only {folder}: name the tags to take, such as '<demo>'")
        only.setdefault(folder, []).extend(names)
    rename: dict[str, dict[str, str]] = {}
    for folder, old, new in args.rename:
        rename.setdefault(folder, {})[old] = new
    how: Operation = "average" if args.average else "merge" if args.interpolate is None else "interpolate"
    made = composed(
        args.tags,
        template=args.template,
        rename=rename or None,
        only=only or None,
        operation=how,
        weights=args.weights,
        t=0.5 if args.interpolate is None else args.interpolate,
        answers=args.answers,
    )
    folder = write_tags(replace(made, license=args.license or made.license), args.out)
    parents = made.ancestry.parents if made.ancestry else ()
    for parent in parents:
        weight = "" if parent.weight is None else f", weight {parent.weight:.4g}"
        print(f"{parent.name}: {', '.join(parent.tags)}{weight}")
    print(f"tags: {folder}")


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="the tag folder")
    parser.add_argument("repo_id", metavar="user/name", help="the repository, which is made if need be")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="a branch, which is made if need be (default: main)")
    parser.add_argument("--message", help="the commit's message")
    parser.add_argument("--license", default="", help="the licence of the tags, such as apache-2.0")
    parser.add_argument("--measured", metavar="ROWS", help="a JSONL file of results measured with these tags")
    parser.add_argument("--backbone", default="", help="the backbone's name on the hub, where the tags name a folder")


def _push(args: argparse.Namespace, _overrides: list[str]) -> None:
    from icl_markup.push import push_folder
    from icl_markup.report_rows import read_rows

    rows = read_rows([Path(args.measured)]) if args.measured else []
    pushed = push_folder(
        args.folder,
        args.repo_id,
        private=args.private,
        revision=args.revision,
        commit_message=args.message,
        license=args.license,
        measured=[row.data for row in rows],
        backbone=args.backbone,
    )
    print(f"pushed: {pushed.url}")
    print(f"load it: --tags {pushed.repo_id}@{pushed.commit}")
