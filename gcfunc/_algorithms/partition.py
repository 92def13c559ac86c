"""One optimizer per group of leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from gcfunc._step.bucket import join
from gcfunc._step.optimizer import Optimizer
from gcfunc._tensors import trees
from gcfunc._tensors.trees import Labels


def partition(optimizers: Mapping[str, Optimizer], labels: Labels) -> Optimizer:
    """One optimizer per group of leaves: no decay on biases, another lr for the head.

    Args:
        optimizers: An optimizer for each label. Each may be a partition itself.
        labels: The label of each leaf: a function ``(name, tensor) -> label`` of the leaf's dotted
            name, or a pytree of labels with the structure of params. A pytree given as a group's
            ``gc=GC(where=...)`` matches all params, not the group's alone.

    Returns:
        An optimizer whose state has each hyperparameter once per group, under ``"label.name"``.

    Raises:
        TypeError: ``optimizers`` is no mapping of labels to optimizers.
        ValueError: it is empty, two groups share a name (label ``"a.b"`` and group ``"b"`` of the
            partition labelled ``"a"``), a leaf's label has no optimizer, or an optimizer has no
            leaf (the last two from ``init`` and ``step``).

    Example:
        >>> import torch, gcfunc
        >>> opt = gcfunc.partition(
        ...     {"decay": gcfunc.sgd(0.1, weight_decay=1.0, gc="gc"), "rest": gcfunc.sgd(0.1)},
        ...     lambda name, tensor: "decay" if tensor.ndim >= 2 else "rest",
        ... )
        >>> params = {"weight": torch.ones(1, 2), "bias": torch.ones(1)}
        >>> state = opt.init(params)
        >>> list(state.hyperparams)
        ['decay.lr', 'decay.weight_decay', 'rest.lr', 'rest.weight_decay']
        >>> grads = {"weight": torch.tensor([[1.0, 3.0]]), "bias": torch.ones(1)}
        >>> opt.step(params, grads, state)[0]
        {'weight': tensor([[1.1000, 0.9000]]), 'bias': tensor([0.9000])}
    """
    if not isinstance(optimizers, Mapping) or not all(
        isinstance(label, str) and isinstance(opt, Optimizer) for label, opt in optimizers.items()
    ):
        raise TypeError(f"optimizers must map string labels to optimizers, got {optimizers!r}")
    if not optimizers:
        raise ValueError("optimizers is empty")
    optimizers = dict(optimizers)

    def assign(names: Sequence[str], leaves: Sequence[Tensor]) -> list[str]:
        given = trees.labels_of(labels, names, leaves)
        unknown = {
            name: label
            for name, label in zip(names, given, strict=True)
            if not isinstance(label, str) or label not in optimizers
        }
        if unknown:
            name, label = next(iter(unknown.items()))
            raise ValueError(
                f"labels: {len(unknown)} leaves have a label without an optimizer, {name!r} has "
                f"{label!r}; there are {', '.join(map(repr, optimizers))}"
            )
        idle = [label for label in optimizers if label not in given]
        if idle:
            raise ValueError(f"labels: no leaf has the label {', '.join(map(repr, idle))}")
        inner = {label: opt.assign(names, leaves) for label, opt in optimizers.items()}
        return [join(label, inner[label][i]) for i, label in enumerate(given)]

    algorithms = {
        join(label, key): algorithm
        for label, opt in optimizers.items()
        for key, algorithm in opt.algorithms.items()
    }
    if len(algorithms) < sum(len(opt.algorithms) for opt in optimizers.values()):
        raise ValueError(
            f"optimizers: two groups have one name, among {', '.join(map(repr, algorithms))}"
        )
    return Optimizer(algorithms, assign)
