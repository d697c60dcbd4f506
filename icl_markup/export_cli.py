"""The commands that take tags to other tools and back: ``export`` and ``import-peft``."""

from __future__ import annotations

import argparse
from typing import Any

from icl_markup.backbone import Backbone
from icl_markup.loading import BackboneConfig, revision_of

_EXPORT = """Write warmed-up tags for other tools. merged: a plain transformers checkpoint in which tags are ordinary
tokens. peft: a TRAINABLE_TOKENS adapter. What is written is loaded again and its logits are compared with ours; where
they differ nothing is left behind."""
_IMPORT = "Make a tag folder of a TRAINABLE_TOKENS adapter of PEFT."


def add_commands(commands: Any) -> None:
    """Declare the commands."""
    export = commands.add_parser("export", help="write tags for other tools", description=_EXPORT)
    export.add_argument("--tags", required=True, help="the tag folder")
    export.add_argument("--to", required=True, choices=["merged", "peft"], help="the format")
    export.add_argument("--out", required=True, help="the folder to write; an earlier export is replaced")
    export.add_argument("--backbone", help="the backbone's folder or hub name (default: the tags')")
    export.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
                        help="the type of the weights that are loaded and written")  # fmt: skip
    export.add_argument("--device", default="auto", help="cpu, cuda, mps …")
    export.set_defaults(run=_export)

    back = commands.add_parser("import-peft", help="make a tag folder of a PEFT adapter", description=_IMPORT)
    back.add_argument("adapter", help="the adapter's folder")
    back.add_argument("--backbone", required=True, help="the model that it was trained for: a folder or hub name")
    back.add_argument("--out", required=True, help="the tag folder to write")
    back.add_argument("--template", help="the template that uses the tags (default: the one beside the adapter)")
    named = "a tag and the ids of its soft tokens (default: as the files beside the adapter name them)"
    back.add_argument("--tag", action="append", default=[], metavar="'<NAME>=ID,ID'", help=named)
    back.add_argument("--device", default="auto", help="cpu, cuda, mps …")
    back.set_defaults(run=_import)


def _model(args: argparse.Namespace) -> Any:
    from icl_markup.tagfile import load_model, read_tags

    saved = read_tags(args.tags).backbone
    revision = None if args.backbone else revision_of(saved)
    name = args.backbone or str(saved["name"])
    return load_model(args.tags, BackboneConfig(name, revision, dtype=args.dtype, device=args.device))


def _export(args: argparse.Namespace, _overrides: list[str]) -> None:
    from icl_markup.export_merged import export_merged
    from icl_markup.export_peft import export_peft

    model = _model(args)
    if args.to == "peft":
        agreement = export_peft(model, args.out)
    else:
        merged = export_merged(model, args.out)
        agreement = merged.agreement
        rows = "in spare rows" if merged.resized is None else f"in an embedding resized to {merged.resized} rows"
        print(f"tags: {len(merged.placement.all_ids)} soft tokens {rows}")
        print(f"prompts: {'text or token ids' if merged.text_prompts else 'token ids'}")
    same = "to the bit" if agreement.equal_to_the_bit else f"within {agreement.largest_difference:.1g} of the largest"
    print(f"logits: those of the live model {same}, on {agreement.prompts} prompts")
    print(f"{args.to}: {args.out}")


def _import(args: argparse.Namespace, _overrides: list[str]) -> None:
    from icl_markup.import_peft import import_peft, parse_names

    names = parse_names(args.tag) or None
    backbone = Backbone.load(BackboneConfig(args.backbone, device=args.device))
    model = import_peft(args.adapter, backbone, args.template, names)
    print(f"tags: {model.save(args.out, {'imported_from': 'PEFT TRAINABLE_TOKENS'})}")
