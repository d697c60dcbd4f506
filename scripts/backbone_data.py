"""What the embedded backbone is trained on: real episodes, neighbour episodes, and copying.

- *Real* episodes come from the tasks of the warm-up side. In some of them the names of the options are replaced by
  random words, so that only the demonstrations tell what an option means.
- *Neighbour* episodes need no labels: an option is a text with its nearest neighbours in the sentence embedding that
  the encoder comes from (the teacher), and its name is a random word. They are as many as there are texts, and keep
  the encoder from remembering the few classes of the real tasks.
- *Copying* asks for an option's own name or a demonstration's own text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from icl_markup.batching import cut_by_length
from icl_markup.episodes import Demo, Episode, EpisodeConfig, EpisodeSampler, Option, Query
from icl_markup.errors import PromptError
from icl_markup.layout import Layout
from icl_markup.markup import Markup
from icl_markup.prompt import Prompt
from icl_markup.readers import read_task
from icl_markup.tasks import NONE_OF_THE_ABOVE, Task
from icl_markup.template import Template, shipped_templates
from icl_markup.text import TextEncoder

WINDOW = 160
"""Prompts that are sorted by length together, so that a batch holds prompts of similar length."""

STAGES = ("represent", "copy among few", "copy", "easy", "real")
"""Representing: the local layers learn to gather a text's sentence embedding at the slot beside it.
Copying among few options in one wording, then in all; real episodes, at first without hard options and without
"none of the above". Copying is learnt all at once or not at all, and nothing else before it. A stage ends when it
is mastered, and the next begins with a small learning rate: gradients grow tenfold there, and AdamW, used to small
ones, would take steps that wipe out what was learnt."""

COPYING = ("copy among few", "copy")
"""The stages that hold nothing but copying."""

TEMPERATURE = 0.05
"""Of the softmax over cosines that is the teacher's opinion."""

FIRST_WORDING = "plain_seen_02"
"""The wording in which copying is learnt first."""


class Teacher:
    """The sentence encoder that the backbone comes from: the normalised mean of its last hidden states."""

    def __init__(self, folder: Path, tokenizer: transformers.PreTrainedTokenizerBase):
        config = transformers.BertConfig.from_pretrained(folder, attn_implementation="eager")
        self.model = transformers.BertModel(config, add_pooling_layer=False).eval()
        weights = load_file(folder / "model.safetensors")
        self.model.load_state_dict({name: weights[name] for name in self.model.state_dict()})
        self._around = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        self._known: dict[tuple[int, ...], Tensor] = {}

    @torch.inference_mode()
    def embed(self, texts: Sequence[tuple[int, ...]]) -> Tensor:
        """Return the embeddings of texts given as ids, shape (texts, width); each is computed once."""
        new = list({t for t in texts if t not in self._known})
        for group in cut_by_length([len(t) + 2 for t in new], 8000):
            lines = [(self._around[0], *new[i], self._around[1]) for i in group]
            longest = max(map(len, lines))
            ids = torch.tensor([[*line, *[0] * (longest - len(line))] for line in lines])
            mask = torch.tensor([[1] * len(line) + [0] * (longest - len(line)) for line in lines])
            with torch.autocast("cpu", torch.bfloat16):
                hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            mean = (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            for i, row in zip(group, torch.nn.functional.normalize(mean, dim=-1), strict=True):
                self._known[new[i]] = row
        return torch.stack([self._known[t] for t in texts])

    def probabilities(self, episode: Episode, encode: Callable[[str], Sequence[int]], *, names: bool) -> Tensor:
        """Return what a nearest class mean of the embeddings thinks of each query, shape (queries, options).

        Args:
            episode: without "none of the above", which no embedding stands for.
            encode: turns a text into ids.
            names: whether an option's name counts as one of its examples.
        """
        examples = [(demo.answer, demo.text) for demo in episode.demos]
        examples += [(i, option.name) for i, option in enumerate(episode.options)] if names else []
        vectors = self.embed([tuple(encode(text.strip())) for _, text in examples])
        owners = torch.tensor([answer for answer, _ in examples])
        means = torch.zeros(len(episode.options), vectors.shape[1]).index_add(0, owners, vectors)
        means = torch.nn.functional.normalize(means, dim=-1)
        queries = self.embed([tuple(encode(query.text.strip())) for query in episode.queries])
        return (queries @ means.T / TEMPERATURE).softmax(-1)


class Item(NamedTuple):
    """A prompt, and what the teacher thinks of its queries where it has an opinion, (queries, options)."""

    prompt: Prompt
    opinion: Tensor | None = None


class Neighbours:
    """Episodes whose classes are texts with their nearest neighbours; the teacher says which is the right one."""

    def __init__(self, texts: list[str], ids: list[tuple[int, ...]], teacher: Teacher, kept: int = 64):
        self.texts = texts
        self.vectors = teacher.embed(ids)
        self.nearest = torch.cat([(rows @ self.vectors.T).topk(kept + 1).indices for rows in self.vectors.split(1024)])

    def episode(self, rng: random.Random, names: Sequence[str]) -> Episode:
        """Draw an episode."""
        count, shots = rng.randint(2, 8), rng.choice((1, 1, 1, 2))
        centre = rng.randrange(len(self.texts))
        if rng.random() < 0.5:
            near = self.nearest[centre, 8:].tolist()
            seeds = [centre, *rng.sample(near, count - 1)]
        else:
            seeds = rng.sample(range(len(self.texts)), count)
        rng.shuffle(seeds)
        shown = [[seed, *rng.sample(self.nearest[seed, 1:5].tolist(), shots - 1)] for seed in seeds]
        centroids = torch.stack([self.vectors[of_class].mean(0) for of_class in shown])
        used = {i for of_class in shown for i in of_class}
        options = [Option(name) for name in rng.sample(names, count)]
        open_world = rng.random() < 0.25
        queries: list[Query] = []
        for _ in range(rng.randint(2, 6)):
            if open_world and rng.random() < 0.3:
                asked = rng.randrange(len(self.texts))
                if float((centroids @ self.vectors[asked]).max()) < 0.3:
                    queries.append(Query(self.texts[asked], count))
                continue
            asked = rng.choice(self.nearest[rng.choice(seeds), 1:10].tolist())
            if asked not in used:
                queries.append(Query(self.texts[asked], int((centroids @ self.vectors[asked]).argmax())))
        if open_world:
            options.append(Option(NONE_OF_THE_ABOVE))
        demos = [Demo(self.texts[i], answer) for answer, of_class in enumerate(shown) for i in of_class]
        rng.shuffle(demos)
        return Episode(tuple(options), tuple(demos), tuple(queries))


class PromptStream:
    """Batches of prompts as a function of the stage and the window alone."""

    def __init__(self, config: Any, tokenizer: transformers.PreTrainedTokenizerBase, teacher: Teacher):
        self.config = config
        tasks = [short(read_task(source), config.longest_text) for source in config.tasks]
        common = EpisodeConfig(
            n_way=(2, 9), k_shot=(0, 2), max_demos=14, queries=(2, 6), none_option=0.25, out_of_scope=0.3,
            hard_options=0.3, task_weights=config.weights,
        )  # fmt: skip
        names = replace(common, k_shot=(0, 1), queries=(4, 4), none_option=0.0, hard_options=0.0)
        easy = replace(common, n_way=(2, 8), none_option=0.0, hard_options=0.0)
        self.samplers = {
            "represent": EpisodeSampler(tasks, common, config.seed + 6),
            "copy among few": EpisodeSampler(tasks, replace(names, n_way=(2, 4)), config.seed + 1),
            "copy": EpisodeSampler(tasks, replace(names, n_way=(2, 8)), config.seed + 2),
            "easy": EpisodeSampler(tasks, easy, config.seed + 5),
            "real": EpisodeSampler(tasks, common, config.seed + 3),
            # Now and then more options than that, or the later letters would never be learnt.
            "real among many": EpisodeSampler(tasks, replace(common, n_way=(10, 25), k_shot=(0, 1)), config.seed + 4),
        }
        self.stage, self.stage_step, self.window = 0, 0, 0
        self.teacher, self.encoder = teacher, TextEncoder(tokenizer)
        encoder, layout = self.encoder, Layout.of(tokenizer, "masked")
        self.wordings = [
            Markup(Template.load(name), encoder, layout, max_length=config.max_length)
            for name in sorted(shipped_templates("plain_seen"), key=lambda n: n != FIRST_WORDING)
        ]
        vocabulary = tokenizer.get_vocab()
        self.words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 3)
        self.unnamed = set(self.words) - {option for task in tasks for option in task.labels}
        self.words = sorted(self.unnamed)
        rng = random.Random(f"{config.seed}/neighbours")
        every = sorted({e.text for task in tasks for examples in task.splits.values() for e in examples})
        texts = rng.sample(every, min(config.neighbour_texts, len(every)))
        self.neighbours = Neighbours(texts, [tuple(encoder.encode(text.strip())) for text in texts], teacher)

    def batches(self, step: int) -> Iterator[tuple[int, list[Item]]]:
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

    def _window(self, step: int) -> list[list[Item]]:
        rng = random.Random(f"{self.config.seed}/window/{self.window}")
        items: list[Item] = []
        # Copying fades as real episodes come in, and is gone at the end.
        fresh = max(0.0, 1 - self.stage_step / 300) if STAGES[self.stage] == "easy" else 0.0
        copy_share = (self.config.copy_share + (0.6 - self.config.copy_share) * fresh) * (1 - step / self.config.steps)
        stage = STAGES[self.stage]
        for position in range(WINDOW * (4 if stage in COPYING else 1)):
            episode = self._episode(rng, position, copy_share)
            wording = self.wordings[0] if stage == "copy among few" else rng.choice(self.wordings)
            items += self._fitting(episode, wording)
        lengths = [len(item.prompt.ids) for item in items]
        groups = [[items[i] for i in group] for group in cut_by_length(lengths, self.config.batch_tokens)]
        rng.shuffle(groups)
        return groups

    def sample(self) -> list[Prompt]:
        """Return some prompts of the present stage."""
        rng = random.Random(f"{self.config.seed}/sample")
        drawn = [self._fitting(self._episode(rng, i, 0.0), rng.choice(self.wordings)) for i in range(48)]
        return [item.prompt for items in drawn for item in items]

    def _episode(self, rng: random.Random, position: int, copy_share: float) -> Episode:
        if STAGES[self.stage] in COPYING:
            return copying(self.samplers[STAGES[self.stage]].episode(self.window, position), rng)
        if rng.random() < self.config.neighbour_share:
            return self.neighbours.episode(rng, self.words)
        many = rng.random() < self.config.many_options and STAGES[self.stage] == "real"
        episode = self.samplers["real among many" if many else STAGES[self.stage]].episode(self.window, position)
        if episode.demos and rng.random() < self.config.unnamed_share:
            episode = self._unnamed(episode, rng)
        return copying(episode, rng) if rng.random() < copy_share else episode

    def _unnamed(self, episode: Episode, rng: random.Random) -> Episode:
        words = rng.sample(self.words, len(episode.options))
        options = [o if o.name == NONE_OF_THE_ABOVE else Option(w) for o, w in zip(episode.options, words, strict=True)]
        return replace(episode, options=tuple(options))

    def _fitting(self, episode: Episode, wording: Markup) -> list[Item]:
        """Compose with as many of the queries as fit; nothing where not even one does."""
        while episode.queries:
            try:
                return [Item(wording.compose(episode), self._opinion(episode))]
            except PromptError:
                episode = replace(episode, queries=episode.queries[:-1])
        return []

    def _opinion(self, episode: Episode) -> Tensor | None:
        if STAGES[self.stage] not in ("easy", "real") or episode.options[-1].name == NONE_OF_THE_ABOVE:
            return None
        named = episode.options[0].name not in self.unnamed
        if not named and {demo.answer for demo in episode.demos} != set(range(len(episode.options))):
            return None
        return self.teacher.probabilities(episode, self.encoder.encode, names=named)


def short(task: Task, words: int) -> Task:
    """Leave out texts of more words."""
    splits = {s: tuple(e for e in examples if len(e.text.split()) <= words) for s, examples in task.splits.items()}
    return replace(task, splits=splits)


def copying(episode: Episode, rng: random.Random) -> Episode:
    """Ask for names of options and texts of demonstrations."""
    queries = []
    for _ in episode.queries:
        if episode.demos and rng.random() < 0.6:
            demo = rng.choice(episode.demos)
            queries.append(Query(demo.text, demo.answer))
        else:
            answer = rng.randrange(len(episode.options))
            queries.append(Query(episode.options[answer].name, answer))
    return replace(episode, queries=tuple(queries))
