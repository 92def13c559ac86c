"""The training loop."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gcfunc
from gcfunc.recipes import model as network
from gcfunc.recipes.config import Config
from gcfunc.recipes.data import Dataset, Split
from gcfunc.recipes.distributed import Group
from gcfunc.recipes.functional import Functional, Step
from gcfunc.recipes.hooked import Hooked
from gcfunc.recipes.model import Params


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to.

    Attributes:
        epoch: Its number, from 1.
        lr: The learning rate of its last step.
        train_loss: Mean over its images, each at the time it was learned from.
        test_loss: Mean over the held-out images, after it.
        test_accuracy: Share of the held-out images it gets right, 0 to 1.
        step_ms: Median time of an optimizer step, forward and backward passes not included.
    """

    epoch: int
    lr: float
    train_loss: float
    test_loss: float
    test_accuracy: float
    step_ms: float


@dataclass(frozen=True)
class Finished:
    """A run that reached its last epoch."""

    gc: str
    seed: int
    history: list[Epoch]


class Learner(Protocol):
    """A network and its optimizer, at rest between two steps."""

    def learn(self, images: Tensor, labels: Tensor, *, of: int, lr: float) -> tuple[float, float]:
        """Take a step down the mean loss of a batch.

        Args:
            images: The share that this process has of the batch.
            labels: Theirs.
            of: How many images the batch has.
            lr: The learning rate.

        Returns:
            The sum of the losses of these images; and the milliseconds that the optimizer took.
        """

    def predict(self, images: Tensor) -> Tensor:
        """Logits."""

    def params(self) -> Params:
        """Every weight, whole."""

    def state(self) -> dict[str, Any]:
        """The optimizer's state, whole: plain values and tensors."""


@dataclass
class Run:
    """One training run, at rest between two steps: all that going on from here needs."""

    gc: str
    seed: int
    learner: Learner
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    step_ms: list[float] = field(default_factory=list)
    history: list[Epoch] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint; :meth:`Trainer.restore` is its inverse."""
        content = {
            **vars(self),
            "params": self.learner.params(),
            "state": self.learner.state(),
            "history": [asdict(epoch) for epoch in self.history],
        }
        del content["learner"]
        return content


class Trainer:
    """Trains one network on one dataset with one optimizer, from any number of seeds."""

    def __init__(self, config: Config, dataset: Dataset, gc: str, group: Group) -> None:
        self._config = config
        self._dataset = dataset
        self._gc = gc
        self._group = group
        self._model = self._build()
        self._opt = config.build(gc)
        self._step: Step = self._opt.step
        self.batches = -(-len(dataset.train) // config.batch_size)

    def new_run(self, seed: int) -> Run:
        """A run before its first step."""
        return Run(self._gc, seed, self._learner(network.initial_params(self._model, seed)))

    def restore(self, saved: Mapping[str, Any]) -> Run:
        """The run that :meth:`Run.to_dict` saved."""
        rest = dict(saved)
        params = {name: p.clone() for name, p in rest.pop("params").items()}
        learner = self._learner(params, rest.pop("state"))
        history = [Epoch(**epoch) for epoch in rest.pop("history")]
        return Run(learner=learner, history=history, **rest)

    def compile(self) -> None:
        """Compile the functional step, and take it once so that no run waits for it."""
        self._step = gcfunc.compile(self._opt).step
        images, labels = self._dataset.train[:1]
        self.new_run(seed=0).learner.learn(images, labels, of=1, lr=self._config.lr)

    def advance(self, run: Run) -> None:
        """One step; at the end of an epoch also its entry in the history."""
        config, train, group = self._config, self._dataset.train, self._group
        start = run.batch * config.batch_size
        batch = _order(run.seed, run.epoch, len(train))[start : start + config.batch_size]

        lr = self._lr(run)
        images, labels = train[group.share(batch)]
        share_of_loss, step_ms = run.learner.learn(images, labels, of=len(batch), lr=lr)
        (loss,) = group.sum(share_of_loss)
        run.loss_sum += loss
        run.step_ms.append(step_ms)
        run.batch += 1

        if run.batch == self.batches:
            test_loss, test_accuracy = self._evaluate(run.learner, self._dataset.test)
            run.history.append(
                Epoch(
                    epoch=run.epoch + 1,
                    lr=lr,
                    train_loss=run.loss_sum / len(train),
                    test_loss=test_loss,
                    test_accuracy=test_accuracy,
                    step_ms=statistics.median(run.step_ms),
                )
            )
            run.epoch, run.batch, run.loss_sum, run.step_ms = run.epoch + 1, 0, 0.0, []

    def _lr(self, run: Run) -> float:
        if self._config.schedule == "constant":
            return self._config.lr
        done = (run.epoch * self.batches + run.batch) / (self._config.epochs * self.batches)
        return self._config.lr * (1 + math.cos(math.pi * done)) / 2

    def _evaluate(self, learner: Learner, split: Split) -> tuple[float, float]:
        loss, right = 0.0, 0.0
        with torch.no_grad():
            for start in range(0, len(split), 1000):
                images, labels = map(self._group.share, split[start : start + 1000])
                logits = learner.predict(images)
                loss += float(F.cross_entropy(logits, labels, reduction="sum"))
                right += int((logits.argmax(1) == labels).sum())
        loss, right = self._group.sum(loss, right)
        return loss / len(split), right / len(split)

    def _learner(self, params: Params, saved: Mapping[str, Any] | None = None) -> Learner:
        if self._config.mode == "hooks":
            none = self._dataset.train.images[:0]
            return Hooked(self._build(), self._config, self._gc, self._group, none, params, saved)
        state = self._opt.init(params)
        if saved is not None:
            state = gcfunc.load_state_dict(state, saved)
        return Functional(self._model, self._step, params, state)

    def _build(self) -> nn.Module:
        height, width = self._dataset.train.images.shape[-2:]
        return network.build(height, width, self._dataset.classes)


@lru_cache(maxsize=1)
def _order(seed: int, epoch: int, images: int) -> Tensor:
    # Of seed and epoch alone, so that a run can stop and go on anywhere.
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(images))
