"""SetFit (Tunstall et al. 2022, "Efficient few-shot learning without prompts") as a rival method.

The package ``setfit`` is used as released (1.2.0 is the first that works with transformers 5): its `Trainer` tunes a
sentence encoder on pairs of demonstrations, of one label or of two, so that their cosine becomes 1 or 0, and its
`SetFitModel` fits a logistic regression on the tuned vectors. The two phases are called one by one
(`train_embeddings`, `train_classifier`), because `Trainer.train` would also write a model card, which asks the hub.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from sklearn.linear_model import LogisticRegression

from icl_markup.baselines import Floats, OutOfScope, Problem, known_out_of_scope, log_probabilities, oddness, positive
from icl_markup.episodes import Episode
from icl_markup.errors import BackboneError, ConfigError
from icl_markup.method import EpisodeScores
from icl_markup.sentences import INSTALL, SentenceEncoder


class SetFit:
    """SetFit, trained anew for every episode on a copy of the encoder.

    Defaults are the paper's: 2 x 20 pairs a text (R = 20), batches of 16 pairs, one epoch, AdamW at 2e-5 with a
    tenth of the steps as warm-up (the package's), scikit-learn's logistic regression as it comes (C = 1).

    One thing is not the paper's: each option's name is a training text too, as every rival and every prompt here
    knows the names. That gives pairs of one label at one shot, where a text otherwise has none but with itself, and
    on warm-up tasks (snips and huffpost41, 5 options, 1 shot, 6 episodes of 50 queries) 76 % instead of 63 %.
    `names` = False is the paper's way; then a name trains only where an option has no demonstration. Where only one
    option can be chosen, nothing is trained.

    Args:
        encoder: the encoder to start from; it is copied and stays as it is, to the bit.
        iterations: R, the number of pairs of one label, and of pairs of two, that are drawn for each text.
        batch_size: pairs a step.
        learning_rate: of the encoder.
        epochs: passes over the pairs.
        max_steps: at most this many steps an episode; None: as many as the pairs give.
        names: each option's name is a further training text.
        c: the inverse strength of the logistic regression's L2 penalty.
        out_of_scope: how ``out_of_scope`` is computed; the distance is that to the nearest training text under
            the tuned encoder.
        seed: seeds dropout and the order of batches; every episode starts from it. Random generators and
            accelerate's state outside are left as they were.

    Raises:
        BackboneError: the package ``setfit`` is missing.
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        encoder: SentenceEncoder,
        *,
        iterations: int = 20,
        batch_size: int = 16,
        learning_rate: float = 2e-5,
        epochs: int = 1,
        max_steps: int | None = None,
        names: bool = True,
        c: float = 1.0,
        out_of_scope: OutOfScope = "distance",
        seed: int = 0,
    ):
        for name, number in {"iterations": iterations, "batch_size": batch_size, "epochs": epochs}.items():
            if number < 1:
                raise ConfigError(f"{name}: {number} is not positive")
        if max_steps is not None and max_steps < 1:
            raise ConfigError(f"max_steps: {max_steps} is not positive; null sets no limit")
        self.encoder = encoder
        self.names = names
        self.c = positive("c", c)
        self.out_of_scope = known_out_of_scope(out_of_scope)
        self._setfit = _package()
        self._arguments: dict[str, Any] = {
            "num_iterations": iterations,
            "batch_size": batch_size,
            "body_learning_rate": positive("learning_rate", learning_rate),
            "num_epochs": epochs,
            "max_steps": -1 if max_steps is None else max_steps,
            "seed": seed,
            "report_to": "none",
            "logging_strategy": "no",
            "logging_first_step": False,
            "save_strategy": "no",
            "show_progress_bar": False,
        }

    def scores(self, episodes: Sequence[Episode]) -> list[EpisodeScores]:
        """Score every query of every episode; one result an episode, in order."""
        return [self._episode(Problem.of(episode)) for episode in episodes]

    def _episode(self, problem: Problem) -> EpisodeScores:
        named = problem.named(self.names)
        texts = [*problem.texts, *(problem.names[i] for i in named)]
        labels = [*problem.classes.tolist(), *named.tolist()]
        count = len(problem.queries)
        cut = self.encoder.too_long(problem.texts) * count
        if len(problem.names) == 1 or not count:
            return problem.answers(np.zeros((count, len(problem.names))), np.zeros(count), cut)
        with _undisturbed():
            head, examples, queries = self._tuned(texts, labels, problem.queries)
        log_probs = log_probabilities(head, queries)
        return problem.answers(log_probs, oddness(self.out_of_scope, queries @ examples.T, log_probs), cut)

    def _tuned(
        self, texts: list[str], labels: list[int], queries: list[str]
    ) -> tuple[LogisticRegression, Floats, Floats]:
        """Return the head, and unit vectors of the training texts and of the queries under the tuned encoder."""
        body = copy.deepcopy(self.encoder.model).requires_grad_(True)
        head = LogisticRegression(C=self.c, max_iter=1000)
        model = self._setfit.SetFitModel(model_body=body, model_head=head, normalize_embeddings=True)
        with tempfile.TemporaryDirectory() as folder:
            arguments = self._setfit.TrainingArguments(output_dir=folder, **self._arguments)
            trainer = self._setfit.Trainer(model=model, args=arguments)
            trainer.st_trainer.args.dataloader_pin_memory = torch.cuda.is_available()  # else torch warns
            # transformers prints its summary of a training where no progress bar shows it.
            trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
            trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
            trainer.train_embeddings(texts, labels, args=arguments)
            trainer.train_classifier(texts, labels, args=arguments)
        examples, asked = (
            np.asarray(model.encode(part, show_progress_bar=False), dtype=np.float64) for part in (texts, queries)
        )
        return head, examples, asked


def _package() -> Any:
    """Import ``setfit``, which sets its loggers to chatter, and quieten it."""
    try:
        import setfit  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise BackboneError(f"the method setfit needs the package setfit: {INSTALL} ({error})") from error
    setfit.logging.set_verbosity_error()
    return setfit


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put back what the trainer sets for the whole process: the random generators and accelerate's state."""
    python, numpy = random.getstate(), np.random.get_state()
    states = [(state, dict(state._shared_state)) for state in (PartialState, AcceleratorState, GradientState)]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for state, before in states:
                state._shared_state.clear()
                state._shared_state.update(before)
