"""Trains the embedded backbone: a small encoder that answers in-context prompts in plain words.

    python scripts/train_backbone.py configs/backbone.yaml

It begins with an earlier backbone, whose local layers sum up texts at symbols and slots (they come from
all-MiniLM-L6-v2; Apache-2.0), and gives it global layers that look at symbols and slots alone. Two stages on the
warm-up side, in ten plain wordings:

1. *match*: the global layers and the head, which begin as nearest neighbours (`backbone_start.py`), learn to answer, on
   prompts that the local layers have read once.
2. *tune*: all layers together, on fresh prompts.

Word embeddings stay as they were. The run saves checkpoints and continues from the last one when it is started again
(with the next window of episodes: an interrupted run does not end in the same bits). The result goes to OUT/backbone;
`--export` copies it into the package.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from backbone_bank import Entry, Part, build, draw, entries, load, save, whole
from backbone_data import Drawn, PromptStream, Teacher, short
from backbone_model import ORIGIN, Student
from backbone_start import start_matching
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from icl_markup.backbone import Backbone
from icl_markup.batching import Batch
from icl_markup.config import load_config, to_dict
from icl_markup.embedded import resolve
from icl_markup.episodes import EpisodeConfig, EpisodeSampler
from icl_markup.errors import TaskError
from icl_markup.model import MarkupModel
from icl_markup.readers import TaskSource, read_task
from icl_markup.segments import HEAD
from icl_markup.template import shipped_templates


@dataclass(frozen=True)
class BackboneTraining:
    """Configuration of the embedded backbone's training."""

    tasks: list[TaskSource]
    """The warm-up side."""

    validation_tasks: list[TaskSource]
    """Tasks whose accuracy is reported while training; also of the warm-up side."""

    begins_with: str
    """The folder of an earlier backbone."""

    weights: dict[str, float] = field(default_factory=dict)
    """Relative probability of each task; 1 where it is not given."""

    out: str = "runs/backbone"
    """Where checkpoints and the result go."""

    global_heads: int = 3
    """Attention heads of the global layers; the local ones keep MiniLM's 12."""

    bank_prompts: int = 7000
    """Prompts that the first stage learns from."""

    match_steps: int = 220
    """Steps of the first stage; after some hundred it knows its prompts by heart."""

    match_tokens: int = 2400
    """Heads, symbols and slots in a batch of the first stage."""

    match_rate: float = 1e-3
    """Its peak learning rate."""

    tune_steps: int = 500
    """Steps of the second stage."""

    tune_rate: float = 2e-5
    """Its peak learning rate for the local layers; at five times as much they lost more than they learnt."""

    tune_rate_of_globals: float = 3e-4
    """Its peak learning rate for the global layers and the head."""

    symbols: float = 0.1
    """In it, the weight of the cross-entropy with which a linear probe reads option symbols off their states."""

    distillation: float = 1.0
    """In the second stage: the weight of the distance between a symbol's or slot's state after the local layers,
    through a linear probe, and the teacher's embedding of the text beside it."""

    opinion: float = 0.5
    """The weight of the teacher's opinion beside the right answer: how a nearest class mean of sentence embeddings
    would answer. It keeps the encoder from remembering the classes that it is trained on."""

    neighbour_share: float = 0.25
    """The share of neighbour episodes."""

    neighbour_texts: int = 24000
    """The number of texts that neighbour episodes are drawn from."""

    unnamed_share: float = 0.2
    """The share of real episodes with demonstrations whose options have random words for names."""

    many_options: float = 0.08
    """The share of real episodes with 10 to 25 options instead of 4 to 9."""

    batch_tokens: int = 2400
    """The most tokens of a batch of prompts, padding included."""

    max_length: int = 700
    """Longer prompts have demonstrations shortened or dropped."""

    longest_text: int = 60
    """Texts of more words are left out."""

    warmup_steps: int = 60
    """Steps over which the learning rate rises in each stage."""

    weight_decay: float = 0.01
    """AdamW's weight decay."""

    seed: int = 0
    """Seeds everything random."""

    save_every: int = 250
    """Steps between checkpoints."""


class Trainer:
    """The stages; a finished one is kept in OUT, and a running one every `save_every` steps."""

    def __init__(self, config: BackboneTraining):
        transformers.set_seed(config.seed)
        self.config = config
        self.out = Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(ORIGIN)
        self.student = Student(resolve(config.begins_with), config.global_heads)
        self.teacher = Teacher(ORIGIN, self.tokenizer)
        self.stream = PromptStream(config, self.tokenizer, self.teacher)
        self.symbols = torch.tensor(self.stream.wordings[0].option_symbols(26))

    def run(self) -> Path:
        """Run the stages that are not finished, and return the folder of the finished backbone."""
        config, student = self.config, self.student
        local, top = student.local_parameters(), student.global_parameters()
        bank: list[Entry] = []
        if not (self.out / "match.safetensors").exists():
            bank = self._bank()
            start_matching(student, bank[:2000])
            self.validate("start")
        self._stage("match", config.match_steps, [(config.match_rate, top)], lambda window: self._match(bank, window))
        bank.clear()
        self.validate("match")
        rates = [(config.tune_rate, local), (config.tune_rate_of_globals, top)]
        self._stage("tune", config.tune_steps, rates, self._tune)
        self.validate("tune")
        return self._finish()

    def _bank(self) -> list[Entry]:
        path = self.out / "bank.safetensors"
        if not path.exists():
            bank = build(self.student, self.stream, self.teacher, self.config.bank_prompts)
            print(f"bank of {len(bank)} prompts, {sum(len(e.roles) for e in bank)} states", flush=True)
            part = path.with_suffix(".part")
            save(bank, part)
            part.rename(path)
        return load(path)

    def _match(self, bank: list[Entry], window: int) -> Iterator[tuple[int, Tensor, dict[str, float]]]:
        rng = random.Random(f"{self.config.seed}/match")
        for number in itertools.count():
            part = draw(bank, rng, self.config.match_tokens)
            if number < window:
                continue  # trained on before the run was stopped
            loss, right = self.answer(part)
            yield number, loss, {"accuracy": right.float().mean().item()}

    def _tune(self, window: int) -> Iterator[tuple[int, Tensor, dict[str, float]]]:
        for number, drawn in self.stream.batches(100_000 + window):
            prompts = [one.prompt for one in drawn]
            batch = Batch.of_prompts(prompts)
            hidden = self.student.read(batch)
            loss, right = self.answer(self._part(drawn, hidden, batch))
            distance = self.student.distance(hidden, prompts, self.teacher)
            forgetting = self.student.forgetting(hidden, batch, self.symbols)
            report = {"accuracy": right.float().mean().item(), "distance": distance.item()}
            loss = loss + self.config.distillation * distance + self.config.symbols * forgetting
            yield number - 100_000, loss, report

    def _part(self, drawn: list[Drawn], hidden: Tensor, batch: Batch) -> Part:
        """Return what the global layers are given, through which gradients reach the local ones."""
        assert batch.segments is not None and batch.anchors is not None
        part = whole(entries(drawn, hidden.detach(), batch, self.stream, self.teacher))
        kept = batch.anchors | (batch.segments == HEAD)
        states = torch.zeros_like(part.states)
        for row in range(len(drawn)):
            own = hidden[row][kept[row]]
            states[row, : len(own)] = own
        return replace(part, states=states)

    def answer(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy over the options at every slot, and which slots are right.

        Where the teacher has an opinion, the target is a mixture of the right answer and that.
        """
        states = self.student.compare(part.states, part.segments)[part.rows, part.positions]
        logits = self.student.logits(states, part.candidates).masked_fill(~part.candidate_mask, -1e4)
        targets = F.one_hot(part.targets, logits.shape[1]).float()
        weight = self.config.opinion * (part.opinions.sum(1, keepdim=True) > 0.5)
        targets = (1 - weight) * targets + weight * part.opinions
        return F.cross_entropy(logits, targets), logits.argmax(-1) == part.targets

    def _stage(
        self,
        name: str,
        steps: int,
        rates: list[tuple[float, list[torch.nn.Parameter]]],
        losses: Callable[[int], Iterator[tuple[int, Tensor, dict[str, float]]]],
    ) -> None:
        """Run a stage, or load what it ended with."""
        finished = self.out / f"{name}.safetensors"
        if finished.exists():
            self._load(load_file(finished))
            return
        for parameter in self.student.parameters():
            parameter.requires_grad_(False)
        trained = [parameter for _, part in rates for parameter in part]
        for parameter in trained:
            parameter.requires_grad_(True)
        groups: list[dict[str, Any]] = [{"params": part, "peak": rate} for rate, part in rates]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=self.config.weight_decay, fused=True)
        step, window = self._resume(name, optimizer)
        began, recent = time.monotonic(), []
        source = losses(window)
        while step < steps:
            window, loss, report = next(source)
            share = min(1.0, (step + 1) / self.config.warmup_steps) * (
                0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
            )
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            recent.append(report)
            if step % 50 == 0:
                means = {key: sum(r[key] for r in recent) / len(recent) for key in recent[0]}
                shown = "  ".join(f"{key} {value:.3f}" for key, value in means.items())
                print(f"{name} {step}  loss {loss.item():.3f}  {shown}  {time.monotonic() - began:.0f} s", flush=True)
                recent = []
            if step % self.config.save_every == 0 and step < steps:
                self._save(name, optimizer, step, window)
        part = finished.with_suffix(".part")
        save_file(self._weights(), part)
        part.rename(finished)
        shutil.rmtree(self.out / f"{name}.running", ignore_errors=True)

    def _weights(self) -> dict[str, Tensor]:
        return {k: v.detach().contiguous() for k, v in self.student.named_parameters()}

    @torch.no_grad()
    def _load(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.student.named_parameters():
            parameter.copy_(weights[name])

    def _save(self, name: str, optimizer: torch.optim.Optimizer, step: int, window: int) -> None:
        folder = self.out / f"{name}.running"
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        save_file(self._weights(), part / "model.safetensors")
        moments = {
            f"{index}.{key}": value.contiguous()
            for index, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }
        save_file(moments, part / "optimizer.safetensors")
        (part / "step.json").write_text(json.dumps({"step": step, "window": window}))
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)

    def _resume(self, name: str, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
        folder = self.out / f"{name}.running"
        if not (folder / "step.json").exists():
            return 0, 0
        self._load(load_file(folder / "model.safetensors"))
        state = optimizer.state_dict()
        state["state"] = {}
        for key, value in load_file(folder / "optimizer.safetensors").items():
            index, moment = key.split(".", 1)
            state["state"].setdefault(int(index), {})[moment] = value
        optimizer.load_state_dict(state)
        place = json.loads((folder / "step.json").read_text())
        return int(place["step"]), int(place["window"]) + 1

    def validate(self, stage: str, episodes: int = 60) -> dict[str, float]:
        """Measure 5-way accuracy at 1 shot and, where there are examples enough, 5, over the trained wordings."""
        model = self.student.model.eval()
        backbone = Backbone(model, self.tokenizer, "masked", name="in training")
        scores: dict[str, float] = {}
        for source in self.config.validation_tasks:
            task = short(read_task(source), self.config.longest_text)
            for shots in (1, 5):
                settings = EpisodeConfig(n_way=(5, 5), k_shot=(shots, shots), queries=(6, 6))
                try:
                    sampler = EpisodeSampler([task], settings, seed=1)
                except TaskError:  # too few examples of a label
                    continue
                drawn = [sampler.episode(0, i) for i in range(episodes if shots == 1 else episodes // 2)]
                right = total = 0
                for number, wording in enumerate(sorted(shipped_templates("plain_seen"))[:5]):
                    part = drawn[number::5]
                    found = MarkupModel(backbone, wording).scores(part)
                    for episode, answers in zip(part, found, strict=True):
                        for query, answer in zip(episode.queries, answers, strict=True):
                            right += int(answer.scores.argmax()) == query.answer
                            total += 1
                scores[f"{task.name} {shots}"] = round(right / total, 3)
        with (self.out / "validation.jsonl").open("a") as lines:
            lines.write(json.dumps({"stage": stage, **scores}) + "\n")
        print(f"{stage}  validation {scores}", flush=True)
        return scores

    def _finish(self) -> Path:
        folder = self.out / "backbone"
        self.student.model.eval().to(torch.bfloat16).save_pretrained(folder)
        self.tokenizer.backend_tokenizer.no_padding()
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(to_dict(self.config), indent=1) + "\n")
        Backbone.load(str(folder))
        return folder


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
    Trainer(config).run()


if __name__ == "__main__":
    main()
