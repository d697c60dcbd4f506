"""The model card that is written beside tags."""

from __future__ import annotations

from typing import Any


def model_card(details: dict[str, Any], tensor_bytes: int) -> str:
    """Return the card of a tag folder as Markdown.

    Args:
        details: the content of ``tags.json``.
        tensor_bytes: the size of ``tags.safetensors``.
    """
    backbone, training = details["backbone"], details["training"]
    parameters = sum(tag["width"] for tag in details["tags"]) * backbone["embedding_width"]
    form = backbone.get("quantisation", "none")
    quantised = "" if form == "none" else f", quantised (`{form}`)"
    revision = f" at revision `{backbone['revision']}`" if backbone["revision"] else ""
    rows = "\n".join(f"| `{t['name']}` | {t['width']} | {t['description']} |" for t in details["tags"])
    trained = "\n".join(f"- {key}: {_plain(value)}" for key, value in training.items()) or "- not trained"
    return f"""---
library_name: icl-markup
tags: [icl-markup, soft-prompt, few-shot-classification, {backbone["kind"]}]
---
# ICL Markup tags for `{backbone["name"]}`

Soft-token tags that compose in-context classification prompts for a frozen {backbone["kind"]} language model,
`{backbone["name"]}`{revision}{quantised}. {parameters:,} parameters, {tensor_bytes:,} bytes.

| tag | soft tokens | initialised from |
|---|---|---|
{rows}

## Use

```python
from icl_markup import MarkupModel

model = MarkupModel.from_tags("path/to/this/folder")
[answer] = model.classify(["Where is my parcel?"], labels=["order status", "refund"])
print(answer.label, answer.probabilities)
```

## Template

```
{details["template"]["source"].strip()}
```

## Warm-up

{trained}

## Limits

The tags fit the one backbone they were made for, quantised or not; loading them on another is refused. They were
measured on the tasks named above only, on the backbone as it is described above: measure them on yours before you rely
on them. Probabilities are not calibrated.
"""


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return str(value)
