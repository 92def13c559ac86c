"""Forward, backward and the optimizer's step as one pure function."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad_and_value

from gcfunc._step.optimizer import Optimizer
from gcfunc._step.state import State
from gcfunc._tensors import trees
from gcfunc._tensors.calls import functional_call
from gcfunc._tensors.lists import Tensors, add, compute_dtype
from gcfunc._tensors.trees import Tree
from gcfunc._training.attributes import Attributes, put_back
from gcfunc._training.batches import clip, gather, micro_batches
from gcfunc._training.limits import (
    enable_saved_tensor_hooks,
    explain,
    explain_compiled,
    require_possible,
    require_uncompiled,
)
from gcfunc._training.objective import (
    Objective,
    require_kept,
    require_loss_fn,
    require_model,
    require_no_hooks,
)
from gcfunc._training.options import require_options


class TrainState(NamedTuple):
    """All that training changes, a pytree of plain tensors.

    Attributes:
        params: The model's trained parameters by name, tied ones once.
        buffers: The model's buffers by name, such as BatchNorm's running statistics.
        state: The optimizer's state; ``train._replace(state=update_hyperparams(train.state, ...))``
            sets a learning rate.
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    state: State


def train_step(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    opt: Optimizer,
    *,
    has_aux: bool = False,
    clip_norm: float | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
) -> TrainStep:
    r"""One function from a batch to the next weights: forward, backward and the optimizer's step.

    .. math:: \theta_t, s_t = \mathrm{step}\Bigl(\theta_{t-1}, \mathrm{clip}\Bigl(\tfrac1n
        \sum_{i=1}^n \nabla L_i(\theta_{t-1})\Bigr), s_{t-1}\Bigr), \qquad
        \mathrm{clip}(g) = g \min\Bigl(1, \frac{c}{\lVert g\rVert + 10^{-6}}\Bigr)

    for the ``n = accumulate`` micro-batches of a batch and ``c = clip_norm``. The norm is that of
    all gradients together, as in :func:`torch.nn.utils.clip_grad_norm_`; gradients are clipped
    before they are centralized.

    ``torch.compile(step, fullgraph=True)`` makes it one pure graph, and :func:`gcfunc.compile` one
    that updates in place.

    Args:
        model: The model, a skeleton from here on: its own parameters and buffers are read by
            ``init`` and never changed. The parameters that require grad now are those trained; all
            others are constants. Train and eval mode, dropout included, are the model's.
        loss_fn: ``loss_fn(output, *targets)`` gives the loss, a floating-point 0-d tensor.
            Parameters of the model that it reads have their values of this step.
        opt: Any optimizer of this library.
        has_aux: Whether ``loss_fn`` returns ``(loss, aux)``, with ``aux`` any pytree of tensors,
            such as logits and metrics.
        clip_norm: The largest norm that the gradient may have; ``None`` for any.
        accumulate: Into how many equal parts every tensor of inputs and targets is cut along its
            dimension 0, the micro-batches. Gradients and losses are averaged, buffers are updated
            by one after the other, and each tensor of ``aux`` gets a new first dimension with an
            entry for each. A compiled graph holds each on its own, and takes as much longer to
            compile.
        autocast: ``torch.bfloat16`` or ``torch.float16`` to run model and loss under
            :class:`torch.autocast`. The loss is not scaled: in float16 small gradients vanish.

    Returns:
        An object with ``init() -> TrainState`` and a pure ``step``, which calling it is short for:
        ``train, loss = step(train, inputs, *targets)``, or ``train, loss, aux`` with ``has_aux``.

    Note:
        A parameter that the loss does not depend on has a gradient of zeros, and so is decayed and
        coasts on its momentum. Autograd gives it ``None`` and torch.optim leaves it alone.
        Freeze it (``requires_grad_(False)``) to have the same here.

    Note:
        Modules may be shared and tensors tied. What the forward writes to attributes that are not
        registered, such as activations, is taken back; return it as ``aux``. torch.func takes no
        ``torch.utils.checkpoint`` and no ``torch.autograd.Function`` without ``setup_context``;
        torch.compile no BatchNorm with ``momentum=None`` in training, no ``nn.LSTM``, ``GRU`` or
        ``RNN`` (their cells it does), and no branch on a tensor's value. A step that fails of these
        raises a ValueError that names the module; under :func:`torch.compile` itself, torch's own.

    Raises:
        TypeError: an argument is of the wrong kind, or the model is wrapped by DDP or FSDP, which
            torch.func would skip.
        ValueError: an argument is out of its bounds, the model has no trainable parameter, or one
            without a shape, with a gradient hook or with sparse gradients, or ``loss_fn`` has
            parameters, which nobody would train.

    Example:
        >>> import torch, gcfunc
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> step = gcfunc.train_step(model, nn.functional.mse_loss, gcfunc.sgd(lr=0.5, gc="gc"))
        >>> train = step.init()
        >>> train, loss = step(train, torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0]]))
        >>> train.params, loss
        ({'weight': tensor([[-1.,  1.]])}, tensor(1.))
    """
    require_model(model)
    require_possible(model)
    require_loss_fn(loss_fn)
    if not isinstance(opt, Optimizer):
        raise TypeError(
            f"opt must be an optimizer such as gcfunc.sgd(0.1), not yet compiled, got {opt!r}"
        )
    require_options(clip_norm, accumulate, autocast)
    return TrainStep(
        Objective(model, loss_fn, bool(has_aux)),
        opt,
        clip_norm=clip_norm,
        accumulate=accumulate,
        autocast=autocast,
    )


class TrainStep:
    """A pure training step; :func:`gcfunc.train_step` makes it."""

    def __init__(
        self,
        objective: Objective,
        opt: Optimizer,
        *,
        clip_norm: float | None,
        accumulate: int,
        autocast: torch.dtype | None,
    ) -> None:
        self.opt = opt
        self._objective = objective
        self._clip_norm = clip_norm
        self._accumulate = accumulate
        self._autocast = autocast
        named = dict(objective.model.named_parameters())
        self._attributes = Attributes(objective)
        self._all_names = [*named]
        self._names = [name for name, p in named.items() if p.requires_grad]
        self.device_type = named[self._names[0]].device.type

    def init(self) -> TrainState:
        """The model's parameters and buffers, copied, and the optimizer's state before step 1.

        Raises:
            TypeError: a parameter is of a kind that cannot be trained, as in
                :meth:`gcfunc.Optimizer.init`.
            ValueError: GC selects none of the parameters.
        """
        model = self._objective.model
        named = dict(model.named_parameters())
        params = {name: named[name].detach().clone() for name in self._names}
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        return TrainState(params, buffers, self.opt.init(params))

    def step(self, train: TrainState, inputs: Any, *targets: Any) -> tuple[Any, ...]:
        """One step. Nothing is written, and nothing returned shares memory with anything given.

        Differentiable, as :meth:`gcfunc.Optimizer.step` is; from detached params and inputs, which
        is what ``init`` and a data loader give, no history is recorded.

        Args:
            train: From :meth:`init` or the step before.
            inputs: What the model is called with: a tuple as ``model(*inputs)``, a dict or other
                mapping as ``model(**inputs)``, anything else as ``model(inputs)``.
            targets: What ``loss_fn`` gets after the model's output.

        Returns:
            ``(train, loss)``, or ``(train, loss, aux)`` with ``has_aux``.

        Raises:
            TypeError: ``train`` is no :class:`TrainState`, ``loss_fn`` returned something of the
                wrong kind, or ``accumulate`` meets something that it cannot cut up.
            ValueError: ``train`` does not match the model, the loss is no 0-d tensor, a tensor's
                dimension 0 cannot be cut into ``accumulate`` equal parts, or the forward does what
                torch.func or torch.compile cannot take, see :func:`gcfunc.train_step`.
        """
        self.require_own(train)
        grads, buffers, results = self.gradients(train.params, train.buffers, inputs, targets)
        params, state = self.opt.step(train.params, grads, train.state)
        return TrainState(params, buffers, state), *results

    def __call__(self, train: TrainState, inputs: Any, *targets: Any) -> tuple[Any, ...]:
        """Short for :meth:`step`."""
        return self.step(train, inputs, *targets)

    def __repr__(self) -> str:
        options = {
            "has_aux": self._objective.has_aux or None,
            "clip_norm": self._clip_norm,
            "accumulate": self._accumulate if self._accumulate > 1 else None,
            "autocast": self._autocast,
        }
        shown = "".join(f", {name}={value}" for name, value in options.items() if value)
        return f"train_step({type(self._objective.model).__name__}, {self.opt!r}{shown})"

    def require_own(self, train: TrainState) -> None:
        """Raise unless the params and buffers are this model's."""
        if not isinstance(train, TrainState):
            raise TypeError(f"train must come from init or step, got {type(train).__name__}")
        now = [name for name, _ in self._objective.model.named_parameters()]
        buffers = [name for name, _ in self._objective.model.named_buffers()]
        require_no_hooks(self._objective.model)
        own = "the model's"
        trees.require_names(now, self._all_names, "the model", "what train_step was given")
        trees.require_names([*train.params], self._names, "train.params", f"{own} trained ones")
        trees.require_names([*train.buffers], buffers, "train.buffers", own)

    def gradients(
        self, params: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Any, targets: Any
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[Any, ...]]:
        """Forward, backward and clipping: gradients, new buffers, and ``(loss,)`` or with aux."""
        sums: Tensors = []
        losses: list[Tensor] = []
        auxes: list[Tree] = []
        gradient = grad_and_value(self._loss, has_aux=True)
        for batch in micro_batches(inputs, targets, self._accumulate):
            try:
                grads, (loss, (aux, buffers)) = gradient(params, buffers, batch)
            except Exception as error:
                if not torch.compiler.is_compiling():
                    explain(self._objective, error)
                raise
            # Summed and clipped wide, and rounded once.
            gs = [grads[name].to(compute_dtype(p.dtype)) for name, p in params.items()]
            sums = add(sums, gs) if sums else gs
            losses.append(loss)
            auxes.append(aux)
        if self._clip_norm is not None:
            sums = clip(sums, self._clip_norm)
        clipped = {name: g.to(p.dtype) for (name, p), g in zip(params.items(), sums, strict=True)}
        loss = torch.stack(losses).sum()
        return clipped, buffers, (loss, gather(auxes)) if self._objective.has_aux else (loss,)

    def require_compilable(self) -> None:
        """Raise ValueError for a model of which it is plain that it cannot be compiled."""
        require_uncompiled(self._objective)

    def explain(
        self, error: Exception, train: TrainState, inputs: Any, targets: tuple[Any, ...]
    ) -> None:
        """Raise an error of ours for what failed compiled, in torch's words, if there is one."""
        enable_saved_tensor_hooks()
        self.require_own(train)
        self.opt.prepare(train.params, train.params, train.state)
        self.gradients(train.params, train.buffers, inputs, targets)
        explain_compiled(self._objective, error)

    def _loss(
        self, params: dict[str, Tensor], buffers: dict[str, Tensor], batch: tuple[Any, Any]
    ) -> tuple[Tensor, tuple[Tree, dict[str, Tensor]]]:
        constants = {
            name: p.detach()
            for name, p in self._objective.model.named_parameters()
            if name not in params
        }
        # The forward may write buffers in place.
        own = params | constants | {name: b.clone() for name, b in buffers.items()}
        given = {f"model.{name}": t for name, t in own.items()}
        held = self._attributes.read()
        try:
            with (
                torch.autocast(self.device_type, self._autocast)
                if self._autocast
                else contextlib.nullcontext()
            ):
                loss, aux, new = functional_call(self._objective, given, batch)
        finally:
            put_back(held)
        require_kept({name: given[f"model.{name}"] for name in own}, own, buffers, new)
        return loss / self._accumulate, (aux, new)
