"""Assembles the page of results: for each experiment and setting its tables and figures, each with its sources."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from icl_markup.figures import Drawing, drawings, drawings_over_settings
from icl_markup.markdown import code, escape, folded
from icl_markup.plot_style import to_png
from icl_markup.report_grid import base_method, by_setting, method_order
from icl_markup.report_rows import TRAINING_LOSS, Row, natural
from icl_markup.tables import Block, tables, training_loss

EXPERIMENTS = {
    "news": "News headlines of classes that no warm-up task holds, a few of them on offer at a time.",
    "intent": "Intents of users of domains that no warm-up task holds, a few of them on offer at a time.",
    "intent_full": "Intents with every label of the task on offer, too many for one prompt unless they are retrieved.",
    "open_world": "Queries that may fit none of the offered options: to answer the others, and to tell these apart.",
    "legal": "Clauses of legal documents, text of another kind than the warm-up's.",
    "sensitivity": "How far accuracy moves with choices that should not matter: wordings, orders, demonstrations.",
    "ablation": "Warmed-up tags with one thing changed at a time.",
    "training": "What is trained and how much of it: tags beside tuning of prompts, adapters and the whole model.",
    "unseen": "Real tasks that neither the backbone nor the tags were trained on.",
    "mechanics": "That warm-up runs end to end on other kinds of backbone: mechanics, not accuracy.",
}
METHODS = {
    "chance": "a uniform guess over the options",
    "majority": "the most frequent label of the demonstrations",
    "label_names": "a prompt in plain words, with options and without demonstrations",
    "plain": "prompts in plain words, in several wordings that the embedded backbone was not trained on",
    "plain_seen": "prompts in plain words, in the wordings that the embedded backbone was trained on",
    "tags_untrained": "prompts with tags as they are initialised",
    "tags": "prompts with warmed-up tags; the language model is frozen",
    "prompt_tuning": "one block of trained soft tokens before a prompt in plain words",
    "lora": "low-rank adapters trained on the warm-up's episodes",
    "full_finetuning": "the whole language model trained on the warm-up's episodes",
    "embedding_knn": "sentence embeddings, nearest demonstrations",
    "embedding_centroid": "sentence embeddings, nearest class mean",
    "embedding_logreg": "sentence embeddings, logistic regression",
    "tfidf_logreg": "TF-IDF, logistic regression",
    "retrieval": "the label that retrieval puts first: the mean of its two texts or names nearest to the query",
    "setfit": "a sentence encoder fine-tuned on the demonstrations, logistic regression",
}


def build_page(rows: Sequence[Row], command: str, link: Callable[[str], str]) -> tuple[str, dict[str, bytes]]:
    """Return the page and the figures that it shows.

    Args:
        rows: the rows; their order does not matter.
        command: the command that makes the page, which it names.
        link: from the name of a figure's file to the address that the page shows it by.

    Returns:
        The page as Markdown, and for the name of each figure's file its content.

    Raises:
        ConfigError: two rows measure the same thing, and differ.
    """
    images: dict[str, bytes] = {}
    parts = ["# Results", _introduction(command), _glossary(rows)]

    def show(found: Iterable[Drawing]) -> Iterator[str]:
        for drawing in found:
            name = _unused(drawing.name, images)
            images[name] = to_png(drawing.draw())
            text = f"![{escape(drawing.title)}]({link(name)})\n\n{escape(drawing.caption)}\n\n{sources(drawing.rows)}"
            yield folded(drawing.title, text) if drawing.folded else text

    known = list(EXPERIMENTS)
    names = {row.experiment for row in rows}
    for name in sorted(names, key=lambda n: (known.index(n) if n in known else len(known), natural(n))):
        mine = [row for row in rows if row.experiment == name]
        settings = by_setting([row for row in mine if row.kind != TRAINING_LOSS])
        parts.append(f"## {escape(name)}")
        if name in EXPERIMENTS:
            parts.append(EXPERIMENTS[name])
        losses = training_loss(mine)
        if losses is not None:
            parts += _block(losses)
        for setting, of_setting in settings.items():
            parts.append(f"### {escape(name)}: {escape(setting.label)}")
            for block in tables(of_setting):
                parts += _block(block)
            parts += show(drawings(name, setting, of_setting))
        over = list(show(drawings_over_settings(name, settings)))
        if over:
            parts += [f"### {escape(name)}: over settings", *over]
    return "\n\n".join(parts) + "\n", images


def _introduction(command: str) -> str:
    return (
        f"Generated by {code(command)} from the rows beside it, and never written by hand: to change it, measure, and "
        "run the command again.\n\n"
        "Accuracies are in percent with their 95 % interval in parentheses. Where a method has several variants "
        "(wordings, warm-up seeds), the number is their mean, with the lowest and highest in square brackets. An empty "
        "cell was not measured. Under each table and figure stand the commands that make its rows again."
    )


def _glossary(rows: Sequence[Row]) -> str:
    bases = sorted({base_method(row.method) for row in rows}, key=method_order)
    lines = [f"- {escape(base)}: {METHODS[base]}" for base in bases if base in METHODS]
    return "\n".join(["Methods:", "", *lines]) if lines else ""


def _block(block: Block) -> Iterator[str]:
    text = f"{block.body}\n\n{block.note}\n\n{sources(block.rows)}".replace("\n\n\n\n", "\n\n")
    if block.folded:
        yield folded(block.title, text)
    else:
        yield f"#### {block.title}"
        yield text


def sources(rows: Sequence[Row]) -> str:
    """Return what rows were measured with, as Markdown: commands, seeds, episodes, commits, hardware, versions."""
    commands = _distinct(row.data["command"] for row in rows)
    seeds = _distinct(seed for row in rows for seed in (row.data.get("seeds") or [row.data.get("seed")]))
    versions: dict[str, list[object]] = {}
    for row in rows:
        for library, version in (row.data.get("versions") or {}).items():
            versions.setdefault(str(library), []).append(version)
    used = [f"{escape(name)} {escape(' / '.join(_distinct(versions[name])))}" for name in sorted(versions)]
    facts = [
        ("Command" if len(commands) == 1 else "Commands", [code(one) for one in commands]),
        ("seeds", seeds),
        ("episodes", _distinct(row.data.get("episodes") for row in rows)),
        ("queries", _distinct(row.data.get("queries") for row in rows)),
        ("backbone", [escape(one) for one in _distinct(row.data.get("backbone") for row in rows)]),
        ("commit", [code(one) for one in _distinct(row.data.get("commit") for row in rows)]),
        ("hardware", [escape(one) for one in _distinct(row.data.get("hardware") for row in rows)]),
        ("versions", used),
    ]
    return "<sub>" + "; ".join(f"{name}: {', '.join(values)}" for name, values in facts if values) + ".</sub>"


def _distinct(values: Iterable[object]) -> list[str]:
    return sorted({str(value) for value in values if value is not None}, key=natural)


def _unused(name: str, taken: dict[str, bytes]) -> str:
    count = 1
    while (file := f"{name}.png" if count == 1 else f"{name}-{count}.png") in taken:
        count += 1
    return file
