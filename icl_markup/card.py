"""The model card that is written beside tags: what they are, how they came about, and how to load them.

What stands in it comes from ``tags.json``. Texts of users, such as names of tasks, are shown as they are: they become
neither Markdown nor YAML.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from icl_markup.ancestry import Ancestry, Parent
from icl_markup.gguf import on_hub
from icl_markup.hub import LIBRARY
from icl_markup.markdown import code, escape, one_line, table
from icl_markup.models import MODELS
from icl_markup.report_rows import Row, parse_row

PLACE = '"path/to/this/folder"'
"""What stands in a card for the place that the tags are loaded from, until they are given one on the hub."""

_ANSWERS = {"symbols": "an option's symbol", "names": "an option's whole name"}

_INTRODUCTIONS = {
    "select": "Selected from other tags:",
    "rename": "Renamed from other tags:",
    "merge": "Merged from other tags, values as they were:",
    "average": "The weighted mean of other tags:",
    "interpolate": "Interpolated between other tags:",
    "warm-up": "The warm-up began with other tags:",
    "change": "The values of other tags, changed after they were loaded:",
}


def model_card(details: Mapping[str, Any], tensor_bytes: int) -> str:
    """Return the card of a tag folder as Markdown with YAML front matter.

    Args:
        details: the content of ``tags.json``.
        tensor_bytes: the size of ``tags.safetensors``.
    """
    backbone, training = details["backbone"], details["training"]
    ancestry = Ancestry.from_json(details["ancestry"]) if details.get("ancestry") else None
    measured = [parse_row(row, "tags.json") for row in details.get("measured", ())]
    parameters = sum(tag["width"] for tag in details["tags"]) * backbone["embedding_width"]
    name = code(backbone_name(backbone["name"]))
    form = str(backbone.get("quantisation", "none"))
    quantised = "" if form == "none" else f", quantised ({code(form)})"
    revision = f" at revision {code(str(backbone['revision']))}" if backbone["revision"] else ""
    rows = [[f"`{t['name']}`", str(t["width"]), escape(t["description"])] for t in details["tags"]]
    return f"""---
{_front_matter(details, measured)}
---
# ICL Markup tags for {name}

Soft-token tags that compose in-context classification prompts for a frozen {backbone["kind"]} language model,
{name}{revision}{quantised}. {parameters:,} parameters, {tensor_bytes:,} bytes; licence: {escape(_license(details))}.

{table(["tag", "soft tokens", "initialised from"], rows)}

## Use

```python
from icl_markup import MarkupModel

model = MarkupModel.from_pretrained({PLACE})
[answer] = model.classify(["Where is my parcel?"], labels=["order status", "refund"])
print(answer.label, answer.probabilities)
```

The backbone is loaded by its name; `backbone=` names another place of the same model. On the hub, `revision=` pins a
commit.

## Template

{_fenced(details["template"]["source"].strip())}

The slot is answered with {_ANSWERS.get(str(details["answers"]), "an option")}.
{_around(details.get("chat"))}
## Training

{_training(training, ancestry)}

## Measurements

{_measurements(training, ancestry, measured)}
{_ancestors(ancestry)}
## Limits

- The tags fit the one backbone they were made for, quantised or not; loading them on another is refused.
- They were measured on the tasks and the backbone named above only, if at all: measure them on yours before you rely on
  them.
- Probabilities are not calibrated, and the backbone's biases and errors are those of the answers.
{_limits(ancestry)}"""


def backbone_name(name: str) -> str:
    """Return a backbone's name without the directories of the machine that it was loaded on."""
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.is_absolute():
            return path.name
    return name


def _on_hub(name: str, revision: str | None) -> str | None:
    """Return a backbone's name on the hub; None if it has none that is known."""
    if name in MODELS:
        return MODELS[name].hub
    if not revision:  # which is known of those that came from the hub
        return None
    file = on_hub(name)
    return name if file is None else file[0]


def _front_matter(details: Mapping[str, Any], measured: Sequence[Row]) -> str:
    backbone = details["backbone"]
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=re.sub(r"[^\w.-]+", "-", row.task),
            dataset_name=one_line(row.task),
            metric_type="accuracy",
            metric_name=one_line(f"accuracy: {row.method}, {row.setting.label}"),
            metric_value=round(row.value, 5),
        )
        for row in measured
        if row.metric == "accuracy"
    ]
    data = ModelCardData(
        library_name=LIBRARY,
        license=_license(details),
        base_model=_on_hub(str(backbone["name"]), backbone["revision"]),
        pipeline_tag="text-classification",
        tags=[LIBRARY, "soft-prompt", "in-context-learning", "few-shot-classification", str(backbone["kind"])],
        eval_results=results or None,
        model_name="ICL Markup tags",
    )
    if not results:
        data.pop("model_name")
    return data.to_yaml(line_break="\n")


def _license(details: Mapping[str, Any]) -> str:
    return one_line(str(details.get("license") or "unknown"))


def _training(training: Mapping[str, Any], ancestry: Ancestry | None) -> str:
    if training:
        return "\n".join(f"- {escape(key)}: {escape(_plain(value)) or 'none'}" for key, value in training.items())
    if ancestry is not None:
        return "Not trained since they were composed. What their ancestors were trained on stands under Ancestry."
    return "- not trained"


def _measurements(training: Mapping[str, Any], ancestry: Ancestry | None, measured: Sequence[Row]) -> str:
    parts = []
    if measured:
        cells = [
            [escape(row.task), escape(row.method), escape(row.setting.label), escape(row.metric), *_value(row)]
            for row in measured
        ]
        headings = ["task", "method", "setting", "metric", "value", "95 % interval", "episodes"]
        parts.append(table(headings, cells, texts=4))
    if "validation accuracy" in training:
        parts.append(
            f"Validation accuracy of the warm-up: {escape(_plain(training['validation accuracy']))}, on "
            f"{escape(_plain(training.get('validation tasks', 'its validation tasks')))}. These tasks chose the tags, "
            "so on others expect less."
        )
    if not parts:
        parts.append("Not measured." if ancestry is None or training else "Not measured since they were composed.")
    return "\n\n".join(parts)


def _value(row: Row) -> list[str]:
    bounds = row.interval
    return [
        f"{row.value:.4g}",
        f"{bounds[0]:.4g} to {bounds[1]:.4g}" if bounds else "",
        escape(str(row.data.get("episodes") or "")),
    ]


def _ancestors(ancestry: Ancestry | None) -> str:
    if ancestry is None:
        return ""
    return "\n## Ancestry\n\n" + "\n".join(_generation(ancestry, "")) + "\n"


def _generation(ancestry: Ancestry, indent: str) -> Iterator[str]:
    introduction = _INTRODUCTIONS.get(ancestry.operation, f"Made of other tags ({escape(ancestry.operation)}):")
    yield f"{indent}{introduction}"
    yield ""
    for parent in ancestry.parents:
        yield f"{indent}- {_parent(parent)}"
        if parent.ancestry is not None:
            yield ""
            yield from _generation(parent.ancestry, indent + "  ")


def _parent(parent: Parent) -> str:
    names = [code(new if new == old else f"{new} (there {old})") for new, old in parent.tags.items()]
    parts = [f"{code(parent.name) if parent.name else 'tags in memory'}: {', '.join(names) or 'no tags'}"]
    if parent.weight is not None:
        parts.append(f"weight {parent.weight:.4g}")
    if parent.training.get("tasks"):
        parts.append(f"trained on {escape(_plain(parent.training['tasks']))}")
    if "validation accuracy" in parent.training:
        parts.append(f"validation accuracy then {escape(_plain(parent.training['validation accuracy']))}")
    if parent.commit:
        parts.append(f"commit {code(parent.commit)}")
    return "; ".join([*parts, f"SHA-256 of the tensors {code(parent.tensors_sha256[:16])}"])


def _limits(ancestry: Ancestry | None) -> str:
    if ancestry is None or ancestry.operation not in ("average", "interpolate"):
        return ""
    return (
        "- A mean of soft tokens that were trained apart need not lie between them in quality: compare it with each.\n"
    )


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _around(chat: Mapping[str, Any] | None) -> str:
    if not chat:
        return ""
    told = "\nA prompt is the message of a user in the model's chat template, which the folder brings along"
    return f"{told}, with this system message:\n\n{_fenced(str(chat['system']))}\n" if chat["system"] else f"{told}.\n"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return str(value)
