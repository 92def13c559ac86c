"""The training loop."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import gcfunc
from gcfunc.recipes import model as network
from gcfunc.recipes.config import Config
from gcfunc.recipes.data import Dataset, Split

Params = dict[str, Tensor]
Step = Callable[[Params, Params, gcfunc.State], tuple[Params, gcfunc.State]]


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


@dataclass
class Run:
    """One training run, at rest between two steps: all that going on from here needs."""

    gc: str
    seed: int
    params: Params
    state: gcfunc.State
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    step_ms: list[float] = field(default_factory=list)
    history: list[Epoch] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint; :meth:`Trainer.restore` is its inverse."""
        return {
            **vars(self),
            "state": gcfunc.state_dict(self.state),
            "history": [asdict(epoch) for epoch in self.history],
        }


class Trainer:
    """Trains one network on one dataset with one optimizer, from any number of seeds."""

    def __init__(self, config: Config, dataset: Dataset, gc: str) -> None:
        height, width = dataset.train.images.shape[-2:]
        self._config = config
        self._dataset = dataset
        self._gc = gc
        self._model = network.build(height, width, dataset.classes)
        self._opt = config.build(gc)
        self._step: Step = self._opt.step
        self.batches = -(-len(dataset.train) // config.batch_size)

    def new_run(self, seed: int) -> Run:
        """A run before its first step."""
        params = network.initial_params(self._model, seed)
        return Run(self._gc, seed, params, self._opt.init(params))

    def restore(self, saved: Mapping[str, Any]) -> Run:
        """The run that :meth:`Run.to_dict` saved."""
        params = {name: p.clone() for name, p in saved["params"].items()}
        state = gcfunc.load_state_dict(self._opt.init(params), saved["state"])
        history = [Epoch(**epoch) for epoch in saved["history"]]
        return Run(**{**saved, "params": params, "state": state, "history": history})

    def compile(self) -> None:
        """Compile the optimizer's step, and take it once so that no run waits for it."""
        run = self.new_run(seed=0)
        grads, _ = self._grads(run.params, self._dataset.train, torch.arange(1))
        step: Step = gcfunc.compile(self._opt).step
        with torch.no_grad():
            step(run.params, grads, run.state)
        self._step = step

    def advance(self, run: Run) -> None:
        """One step; at the end of an epoch also its entry in the history."""
        config, train = self._config, self._dataset.train
        start = run.batch * config.batch_size
        batch = _order(run.seed, run.epoch, len(train))[start : start + config.batch_size]

        lr = self._lr(run)
        state = gcfunc.update_hyperparams(run.state, lr=lr)
        grads, loss = self._grads(run.params, train, batch)
        with torch.no_grad():
            began = time.perf_counter()
            run.params, run.state = self._step(run.params, grads, state)
            run.step_ms.append(1e3 * (time.perf_counter() - began))
        run.loss_sum += float(loss) * len(batch)
        run.batch += 1

        if run.batch == self.batches:
            test_loss, test_accuracy = self._evaluate(run.params, self._dataset.test)
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

    def _grads(self, params: Params, split: Split, batch: Tensor) -> tuple[Params, Tensor]:
        images, labels = split[batch]

        def loss(params: Params) -> Tensor:
            return F.cross_entropy(self._predict(params, images), labels)

        grads, value = torch.func.grad_and_value(loss)(params)
        return grads, value

    def _evaluate(self, params: Params, split: Split) -> tuple[float, float]:
        loss, right = 0.0, 0
        with torch.no_grad():
            for start in range(0, len(split), 1000):
                images, labels = split[start : start + 1000]
                logits = self._predict(params, images)
                loss += float(F.cross_entropy(logits, labels, reduction="sum"))
                right += int((logits.argmax(1) == labels).sum())
        return loss / len(split), right / len(split)

    def _predict(self, params: Params, images: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(self._model, params, images)
        return logits


@lru_cache(maxsize=1)
def _order(seed: int, epoch: int, images: int) -> Tensor:
    # Of seed and epoch alone, so that a run can stop and go on anywhere.
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(images))
