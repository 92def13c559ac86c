"""Parameter groups that people ask for, and the same as functional optimizers.

No weight decay on biases and norms, and learning rates that fall from a model's output to its
input. Each comes as torch's list of groups, for :mod:`gcfunc.optim` and ``torch.optim`` alike, and
as one :func:`gcfunc.partition`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gcfunc._algorithms.partition import partition
from gcfunc._centralization.where import GC, answers_for_some, as_gc
from gcfunc._step.hyperparams import check
from gcfunc._step.optimizer import Optimizer
from gcfunc._tensors.modules import require_module

Group = dict[str, Any]
Skip = Callable[[str, Tensor], bool]
Params = Mapping[str, Tensor]


def _is_vector(name: str, param: Tensor) -> bool:
    return param.ndim < 2


def no_decay_groups(
    model: nn.Module, weight_decay: float, *, skip: Skip = _is_vector
) -> list[Group]:
    """Two parameter groups: weights, which decay, and biases, norms and scales, which do not.

    Args:
        model: The model. Frozen parameters are left out.
        weight_decay: The decay of those that decay.
        skip: Which do not, as ``(name, parameter) -> bool``; by default those of fewer than 2
            dimensions.

    Returns:
        Groups of named parameters, none of them empty.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no parameters to train, or ``weight_decay`` is negative or NaN.

    Example:
        >>> import torch, gcfunc
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
        >>> groups = gcfunc.no_decay_groups(model, weight_decay=0.1)
        >>> [(g["weight_decay"], [name for name, _ in g["params"]]) for g in groups]
        [(0.1, ['0.weight']), (0.0, ['0.bias', '1.weight', '1.bias'])]
        >>> opt = gcfunc.optim.AdamW(groups, lr=1e-3, gc="gc")
    """
    check(weight_decay=weight_decay)
    params = _trained(model)
    decays = {True: 0.0, False: weight_decay}
    return _groups(params, {n: {"weight_decay": decays[skip(n, p)]} for n, p in params.items()})


def no_decay(
    make: Callable[..., Optimizer],
    params: Params,
    weight_decay: float,
    *,
    skip: Skip = _is_vector,
    gc: GC | str | None = None,
    **options: Any,
) -> Optimizer:
    """:func:`no_decay_groups` as a functional optimizer.

    Args:
        make: Its constructor, such as :func:`gcfunc.adamw`.
        params: The parameters it is for, by name.
        weight_decay: As in :func:`no_decay_groups`.
        skip: Likewise.
        gc: As in the constructors. Of two groups one may have nothing to centralize.
        **options: Further arguments of ``make``.

    Returns:
        A :func:`gcfunc.partition` with the groups ``"decay"`` and ``"no_decay"``.

    Raises:
        ValueError: as ``make``; or ``gc`` selects none of the parameters.

    Example:
        >>> import torch, gcfunc
        >>> params = {"weight": torch.ones(1, 2), "bias": torch.ones(1)}
        >>> opt = gcfunc.no_decay(gcfunc.adamw, params, 0.1, lr=1e-3, gc="gc")
        >>> hyperparams = opt.init(params).hyperparams
        >>> float(hyperparams["decay.weight_decay"]), float(hyperparams["no_decay.weight_decay"])
        (0.1, 0.0)
    """
    labels = {n: "no_decay" if skip(n, p) else "decay" for n, p in params.items()}
    decays = {"decay": {"weight_decay": weight_decay}, "no_decay": {"weight_decay": 0.0}}
    return _partition(make, params, labels, decays, gc, options)


def layerwise_lr_groups(
    model: nn.Module, lr: float, decay: float, *, layers: Sequence[str] | None = None
) -> list[Group]:
    r"""Parameter groups whose learning rate falls from the output to the input, layer by layer.

    With :math:`n` layers, parameters of layer :math:`i` (from 1) learn at :math:`\gamma d^{n+1-i}`,
    those that come after all layers (a head, a last norm) at :math:`\gamma`, and those before (an
    embedding) at :math:`\gamma d^{n+1}`. Common in fine-tuning (ULMFiT, https://arxiv.org/abs/1801.06146;
    BEiT, https://arxiv.org/abs/2106.08254).

    Args:
        model: The model. Frozen parameters are left out.
        lr: The learning rate at the output, :math:`\gamma`.
        decay: The factor from layer to layer, :math:`d`, in (0, 1].
        layers: Names of the layers' modules, from input to output; by default the items of the
            longest ``nn.ModuleList`` or ``nn.Sequential``.

    Returns:
        Groups of named parameters with their ``lr``, from input to output.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no parameters to train or no layers, one of ``layers`` has no parameters,
            or a number is out of its bounds.

    Example:
        >>> import torch, gcfunc
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(3)))
        >>> groups = gcfunc.layerwise_lr_groups(model, lr=1.0, decay=0.5)
        >>> [(g["lr"], [name for name, _ in g["params"]]) for g in groups]
        [(0.125, ['0.weight']), (0.25, ['1.weight']), (0.5, ['2.weight'])]
    """
    params = _trained(model)
    lrs = _lrs(model, params, lr, decay, layers)
    groups = _groups(params, {name: {"lr": lrs[name]} for name in params})
    return sorted(groups, key=lambda group: float(group["lr"]))


def layerwise_lr(
    make: Callable[..., Optimizer],
    model: nn.Module,
    lr: float,
    decay: float,
    *,
    layers: Sequence[str] | None = None,
    gc: GC | str | None = None,
    **options: Any,
) -> Optimizer:
    """:func:`layerwise_lr_groups` as a functional optimizer.

    It is for ``dict(model.named_parameters())`` without the frozen ones.

    Args:
        make: Its constructor, such as :func:`gcfunc.adamw`.
        model: As in :func:`layerwise_lr_groups`.
        lr: Likewise.
        decay: Likewise.
        layers: Likewise.
        gc: As in the constructors. Some groups may have nothing to centralize.
        **options: Further arguments of ``make``.

    Returns:
        A :func:`gcfunc.partition` with the groups ``"layer0"``, from the input, and so on.

    Raises:
        ValueError: as :func:`layerwise_lr_groups` and ``make``; or ``gc`` selects none of the
            parameters.

    Example:
        >>> import torch, gcfunc
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(2)))
        >>> opt = gcfunc.layerwise_lr(gcfunc.sgd, model, lr=1.0, decay=0.5, gc="gc")
        >>> state = opt.init(dict(model.named_parameters()))
        >>> float(state.hyperparams["layer0.lr"]), float(state.hyperparams["layer1.lr"])
        (0.25, 0.5)
    """
    params = _trained(model)
    lrs = _lrs(model, params, lr, decay, layers)
    numbers = {rate: f"layer{i}" for i, rate in enumerate(sorted({*lrs.values()}))}
    labels = {name: numbers[lrs[name]] for name in params}
    settings = {label: {"lr": rate} for rate, label in numbers.items()}
    return _partition(make, params, labels, settings, gc, options)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    require_module(model)
    params: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("model has no parameters to train")
    return params


def _groups(params: Params, settings: Mapping[str, Group]) -> list[Group]:
    """Those that share their settings, together."""
    groups: list[Group] = []
    for name, param in params.items():
        for group in groups:
            if group | settings[name] == group:
                group["params"].append((name, param))
                break
        else:
            groups.append({"params": [(name, param)], **settings[name]})
    return groups


def _partition(
    make: Callable[..., Optimizer],
    params: Params,
    labels: Mapping[str, str],
    settings: Mapping[str, Group],
    gc: GC | str | None,
    options: Group,
) -> Optimizer:
    gc = as_gc(gc)
    selects: set[str] = set()
    if gc is not None:
        units = answers_for_some(gc.where, params)
        selects = {labels[name] for name, unit in units.items() if unit}
        if not selects:
            raise ValueError(f"gc={gc} selects none of the parameters")
    return partition(
        {
            label: make(**options, **settings[label], gc=gc if label in selects else None)
            for label in dict.fromkeys(labels.values())
        },
        dict(labels),
    )


def _lrs(
    model: nn.Module, params: Params, lr: float, decay: float, layers: Sequence[str] | None
) -> dict[str, float]:
    """The learning rate of each parameter."""
    check(lr=lr)
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1], got {decay}")
    layers = _longest(model) if layers is None else layers
    depth: dict[str, int] = {}
    for i, layer in enumerate(layers, 1):
        own = [name for name in params if name.startswith(f"{layer}.")]
        if not own and not any(n.startswith(f"{layer}.") for n, _ in model.named_parameters()):
            raise ValueError(f"layers: the model has no parameters under {layer!r}")
        depth |= dict.fromkeys(own, i)
    inside = [i for i, name in enumerate(params) if name in depth]
    if not inside:
        raise ValueError("none of the layers has parameters to train")
    last = len(layers) + 1
    for i, name in enumerate(params):
        if name not in depth:
            depth[name] = 0 if i < inside[0] else last
    return {name: lr * decay ** (last - depth[name]) for name in params}


def _longest(model: nn.Module) -> list[str]:
    stacks = [
        [f"{name}.{i}".lstrip(".") for i, layer in module.named_children() if [*layer.parameters()]]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    longest = max(stacks, key=len, default=[])
    if not longest:
        raise ValueError(
            "model has no nn.ModuleList or nn.Sequential of layers; name them by layers="
        )
    return longest
