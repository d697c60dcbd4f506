"""What the embedded backbone is trained on: real episodes and neighbour episodes, as prompts in ten plain wordings.

- *Real* episodes come from the tasks of the warm-up side. In some of them the names of the options are replaced by
  random words, so that only the demonstrations tell what an option means.
- *Neighbour* episodes need no labels: an option is a text with its nearest neighbours in the sentence embedding that
  the encoder comes from (the teacher), and its name is a random word. They are as many as there are texts, and keep
  the encoder from remembering the few classes of the real tasks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
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
from icl_markup.tasks import NONE_OF_THE_ABOVE, HeldExamples, Task
from icl_markup.template import Template, shipped_templates
from icl_markup.text import TextEncoder

WINDOW = 160
"""Prompts that are sorted by length together, so that a batch holds prompts of similar length."""


class Teacher:
    """The sentence encoder that the backbone comes from: the normalised mean of its last hidden states."""

    def __init__(self, folder: Path, tokenizer: transformers.PreTrainedTokenizerBase):
        config = transformers.BertConfig.from_pretrained(folder, attn_implementation="sdpa")
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
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            mean = (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            for i, row in zip(group, torch.nn.functional.normalize(mean, dim=-1), strict=True):
                self._known[new[i]] = row
        return torch.stack([self._known[t] for t in texts])


class Neighbours:
    """Episodes whose classes are texts with their nearest neighbours; the teacher says which is the right one."""

    def __init__(self, texts: list[str], ids: list[tuple[int, ...]], teacher: Teacher, kept: int = 64):
        self.texts = texts
        self.vectors = teacher.embed(ids)
        self.nearest = torch.cat([(rows @ self.vectors.T).topk(kept + 1).indices for rows in self.vectors.split(1024)])

    def episode(self, rng: random.Random, names: Sequence[str]) -> Episode:
        """Draw an episode."""
        count, shots = rng.randint(2, 8), rng.choice((1, 1, 2, 3))
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


class Drawn(NamedTuple):
    """An episode, its prompt, and whether its options have their own names."""

    episode: Episode
    prompt: Prompt
    named: bool


class PromptStream:
    """Episodes and their prompts, as a function of the window alone."""

    def __init__(self, config: Any, tokenizer: transformers.PreTrainedTokenizerBase, teacher: Teacher):
        self.config = config
        tasks = [short(read_task(source), config.longest_text) for source in config.tasks]
        common = EpisodeConfig(
            n_way=(2, 9), k_shot=(0, 2), max_demos=14, queries=(2, 6), none_option=0.25, out_of_scope=0.3,
            hard_options=0.4, task_weights=config.weights,
        )  # fmt: skip
        rich = replace(common, n_way=(4, 9), k_shot=(1, 5), max_demos=28, queries=(8, 8), out_of_scope=0.2)
        self.samplers = {
            "rich": EpisodeSampler(tasks, rich, config.seed + 5),
            # Now and then more options than that, or the later letters would never be learnt.
            "many": EpisodeSampler(tasks, replace(common, n_way=(10, 25), k_shot=(0, 1)), config.seed + 4),
        }
        self.encoder = TextEncoder(tokenizer)
        layout = Layout.of(tokenizer, "masked")
        self.wordings = [
            Markup(Template.load(name), self.encoder, layout, max_length=config.max_length)
            for name in sorted(shipped_templates("plain_seen"))
        ]
        named = {option for task in tasks for option in task.labels}
        words = {word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 3}
        self.words = sorted(words - named)
        rng = random.Random(f"{config.seed}/neighbours")
        every = sorted({e.text for task in tasks for examples in task.splits.values() for e in examples})
        texts = rng.sample(every, min(config.neighbour_texts, len(every)))
        self.neighbours = Neighbours(texts, [self.ids(text) for text in texts], teacher)

    def ids(self, text: str) -> tuple[int, ...]:
        """Return a text's ids."""
        return tuple(self.encoder.encode(text.strip()))

    def batches(self, window: int = 0) -> Iterator[tuple[int, list[Drawn]]]:
        """Yield (window, batch) without end, from `window` on."""
        while True:
            rng = random.Random(f"{self.config.seed}/rich/{window}")
            drawn = [one for position in range(WINDOW) for one in self._drawn(window, position, rng)]
            lengths = [len(one.prompt.ids) for one in drawn]
            groups = [[drawn[i] for i in group] for group in cut_by_length(lengths, self.config.batch_tokens)]
            rng.shuffle(groups)
            yield from ((window, group) for group in groups)
            window += 1

    def _drawn(self, window: int, position: int, rng: random.Random) -> list[Drawn]:
        """Draw an episode and compose it with as many queries as fit; nothing where a demonstration does not fit."""
        episode, named = self._episode(window, position, rng)
        wording = rng.choice(self.wordings)
        while episode.queries:
            try:
                prompt = wording.compose(episode)
                return [] if prompt.dropped else [Drawn(episode, prompt, named)]
            except PromptError:
                episode = replace(episode, queries=episode.queries[:-1])
        return []

    def _episode(self, window: int, position: int, rng: random.Random) -> tuple[Episode, bool]:
        if rng.random() < self.config.neighbour_share:
            return self.neighbours.episode(rng, self.words), False
        sampler = self.samplers["many" if rng.random() < self.config.many_options else "rich"]
        episode = sampler.episode(window, position)
        if not episode.demos or rng.random() >= self.config.unnamed_share:
            return episode, True
        words = rng.sample(self.words, len(episode.options))
        options = [o if o.name == NONE_OF_THE_ABOVE else Option(w) for o, w in zip(episode.options, words, strict=True)]
        return replace(episode, options=tuple(options)), False


def short(task: Task, words: int) -> Task:
    """Leave out texts of more words."""
    splits = {
        split: HeldExamples(e for e in examples if len(e.text.split()) <= words)
        for split, examples in task.splits.items()
    }
    return replace(task, splits=splits)
