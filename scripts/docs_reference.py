"""A hook of MkDocs: adds the reference, one page a module, made of the docstrings.

Every module of the package has a page. `_GROUPS` says under which heading; a module that it lacks stands under "Other".
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parents[1] / "icl_markup"
_GROUPS = {
    "Data": "tasks readers rows store mapped episodes",
    "Prompts": "template markup prompt layout chat answers text",
    "Backbone and tags": "models gguf gguf_tokenizers cache tags loading quantisation backbone batching branches"
    " decoding normalizer names priors model scoring sharing packing prefixes exactness backbone_checks"
    " devices",
    "Warm-up": "warmup warmup_config start stream optimisation activations beginnings casts preparation"
    " checkpoint run_folder lock files processes sharded",
    "Planning": "plan plan_cli skeleton costs",
    "Tag folders": "tagfile fingerprint sketches card hub push compose composition ancestry zoo tag_commands",
    "Tags in other tools": "export_merged export_peft import_peft placement merging exported"
    " export_check export_cli exportable",
    "Looking inside": "inspection understand tag_geometry tag_report tag_plots attention attention_plots",
    "Classifier": "classifier classifier_input classifier_file shared asking retrievers selection calibration",
    "Server": "serve server server_bodies server_guard server_metrics server_process microbatch intents",
    "Commands and errors": "cli models_cli quiet config fit predict output serving quickstart embedded errors",
    "Experiments": "experiment experiment_config drawing cells method variants prompted retrieval metaicl"
    " metaicl_config metaicl_model baselines setfit_method sentences measured summary pooled open_world results",
    "Statistics": "evaluation statistics out_of_scope",
    "Report": "report report_rows report_grid results_page tables figures plots plots_against plots_detail plot_style"
    " markdown",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the reference into the navigation."""
    pages: list[Any] = ["reference/index.md"]
    pages += [{group: [{name: f"reference/{name}.md"} for name in names]} for group, names in grouped().items()]
    config.nav = [*(config.nav or []), {"Reference": pages}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make the pages."""
    for name in modules():
        files.append(File.generated(config, f"reference/{name}.md", content=f"::: icl_markup.{name}\n"))
    files.append(File.generated(config, "reference/index.md", content=_index()))
    return files


def modules() -> list[str]:
    """Return the names of the package's modules and of the packages in it, sorted."""
    names = [path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("_")]
    names += [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    return sorted(names)


def grouped() -> dict[str, list[str]]:
    """Return the modules by heading, each once; headings without a module are left out."""
    there = modules()
    groups = {group: [name for name in names.split() if name in there] for group, names in _GROUPS.items()}
    placed = {name for names in groups.values() for name in names}
    groups["Other"] = [name for name in there if name not in placed]
    return {group: names for group, names in groups.items() if names}


def public_names() -> dict[str, str]:
    """Return the names that ``import icl_markup`` offers, with the module that each comes from."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    homes = {
        name.asname or name.name: str(node.module)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    [listed] = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    return {name: homes[name] for name in listed}


def _index() -> str:
    lines = [
        "# Reference",
        "",
        "What the docstrings say, a page a module. A name that begins with an underscore is private and not shown.",
        "",
        "## From `icl_markup`",
        "",
        "These names are imported from the package itself: `from icl_markup import MarkupClassifier`.",
        "",
        "| name | what it is |",
        "|---|---|",
    ]
    for name, module in public_names().items():
        lines.append(f"| [`{name}`][{module}.{name}] | {_cell(_summary(module, name))} |")
    for group, names in grouped().items():
        lines += ["", f"## {group}", "", "| module | what it does |", "|---|---|"]
        lines += [f"| [`{name}`]({name}.md) | {_cell(_summary(f'icl_markup.{name}', None))} |" for name in names]
    return "\n".join(lines) + "\n"


def _summary(module: str, name: str | None) -> str:
    """Return the first line of a docstring; of a constant, the string after it, or its value."""
    path = PACKAGE.parent / (module.replace(".", "/") + ".py")
    tree = ast.parse((path if path.exists() else path.with_suffix("") / "__init__.py").read_text(encoding="utf-8"))
    if name is None:
        return (ast.get_docstring(tree) or "").partition("\n")[0]
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return f"The constant `{ast.unparse(node.value)}`."
    raise LookupError(f"{module} has no {name}")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("``", "`")
