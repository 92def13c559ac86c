"""Learning by gcfunc's functional step."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gcfunc
from gcfunc.recipes.model import Params

Step = Callable[[Params, Params, gcfunc.State], tuple[Params, gcfunc.State]]


class Functional:
    """A :class:`gcfunc.recipes.train.Learner` whose weights and state each step replaces.

    Args:
        model: The network, for its architecture alone.
        step: The optimizer's step, compiled or not. Compiled, it overwrites what it is given.
        params: The weights to begin with.
        state: The optimizer's state.
    """

    def __init__(self, model: nn.Module, step: Step, params: Params, state: gcfunc.State) -> None:
        self._model = model
        self._step = step
        self._params = params
        self._state = state

    def learn(self, images: Tensor, labels: Tensor, *, of: int, lr: float) -> tuple[float, float]:
        """Replace weights and state by those after a step."""

        def mean_loss(params: Params) -> Tensor:
            logits = gcfunc.functional_call(self._model, params, images)
            return F.cross_entropy(logits, labels, reduction="sum") / of

        grads, loss = torch.func.grad_and_value(mean_loss)(self._params)
        state = gcfunc.update_hyperparams(self._state, lr=lr)
        with torch.no_grad():
            began = time.perf_counter()
            self._params, self._state = self._step(self._params, grads, state)
            took = time.perf_counter() - began
        return float(loss) * of, 1e3 * took

    def predict(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = gcfunc.functional_call(self._model, self._params, images)
        return logits

    def params(self) -> Params:
        """Every weight."""
        return self._params

    def state(self) -> dict[str, Any]:
        """What ``gcfunc.load_state_dict`` takes."""
        return gcfunc.state_dict(self._state)
