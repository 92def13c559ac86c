"""Learning by ``loss.backward()`` and ``torch.optim``, with hooks that centralize."""

import time
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gcfunc.hooks import centralize_backward
from gcfunc.recipes.config import Config
from gcfunc.recipes.distributed import Group
from gcfunc.recipes.model import Params


class Hooked:
    """A :class:`gcfunc.recipes.train.Learner` that holds a module, shared or not.

    Args:
        model: The network, which becomes the learner's own.
        config: What to train with.
        gc: What the hooks centralize.
        group: The processes to train with.
        no_images: A batch of none.
        params: The weights to begin with, whole.
        state: What :meth:`state` gave, to go on from there.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        gc: str,
        group: Group,
        no_images: Tensor,
        params: Params,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        model.load_state_dict(params)
        self._model = self._shared = model
        self._processes = group.size
        if config.fsdp:
            _shard(model, group.size)
        elif config.ddp:
            self._shared = DistributedDataParallel(model)
            # After the first backward DDP lays out its buckets anew, and with that the order of
            # its sums. Let it do so now: a run that goes on is then the same to the last bit.
            self._shared(no_images).sum().backward()
        # The last to touch the parameters: fully_shard would leave hooks behind.
        if gc != "none":
            centralize_backward(model, where=gc)
        self._params = dict(model.named_parameters())
        self._optimizer = config.build_torch([*self._params.values()])
        for name, slots in (state or {}).items():
            param = self._params[name]
            self._optimizer.state[param] = {k: _split(v, param) for k, v in slots.items()}

    def learn(self, images: Tensor, labels: Tensor, *, of: int, lr: float) -> tuple[float, float]:
        """Update the module in place, with what all processes make of their shares."""
        self._optimizer.zero_grad()
        loss = F.cross_entropy(self._shared(images), labels, reduction="sum")
        # DDP and FSDP average over the processes. What is wanted is the sum, which is right for
        # shares of any size.
        (loss * self._processes / of).backward()  # type: ignore[no-untyped-call]
        self._optimizer.param_groups[0]["lr"] = lr
        began = time.perf_counter()
        self._optimizer.step()
        return float(loss.detach()), 1e3 * (time.perf_counter() - began)

    def predict(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self._model(images)
        return logits

    def params(self) -> Params:
        """Every weight, gathered."""
        return {name: _whole(param) for name, param in self._params.items()}

    def state(self) -> dict[str, Any]:
        """The optimizer's state by parameter, gathered; of those that have any."""
        return {
            name: {k: _whole(v) for k, v in self._optimizer.state[param].items()}
            for name, param in self._params.items()
            if param in self._optimizer.state
        }


def _shard(model: nn.Module, processes: int) -> None:
    mesh = init_device_mesh("cpu", (processes,))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fully_shard(layer, mesh=mesh)
    # The root too, lest it keep whole weights from an evaluation, of which no backward follows.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


# torch.distributed.checkpoint.state_dict has functions for this. Of an optimizer before its first
# step they give what a step with zero gradients would make of it, and training from there differs.
def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _split(whole: Tensor, like: Tensor) -> Tensor:
    """What :func:`_whole` was given, if it was laid out like a parameter."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole.clone()
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
