"""A mask of what the paper means by weights, from a model's modules."""

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

from gcfunc._centralization.formula import ROWS, Units
from gcfunc._centralization.where import RULES, LayerKind, require_rule
from gcfunc._tensors.modules import require_module, require_shape

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LINEAR = (nn.Linear, nn.Bilinear, nn.MultiheadAttention)
# By name, so that nothing is imported: a Linear layer that stores (inputs, outputs).
LINEAR_BY_COLUMNS = "transformers.pytorch_utils.Conv1D"


def select(
    model: nn.Module,
    where: str = "gc",
    *,
    layers: Mapping[type[nn.Module], Units] | None = None,
) -> dict[str, bool | Units]:
    """A mask that centralizes the weights of Linear and Conv layers, per output unit.

    The reference's rule, ``where="gc"``, goes by the number of dimensions alone, and so reaches
    embeddings, position tables and class tokens too. This one asks the modules:

    - Linear, Bilinear, the projections of MultiheadAttention, and Conv1d, 2d and 3d, grouped ones
      included: per row.
    - Transposed convolutions: per output channel, which is dimension 1, within each group.
    - The ``Conv1D`` of Hugging Face transformers, a Linear that stores its transpose: per column.
    - Not a weight that is also an embedding's (tied heads), and not one with a single input per
      unit, whose centralized gradient would always be zero.

    Args:
        model: The model.
        where: The rule: ``"gc"`` for all of these, ``"gcc"`` for convolutions only (Conv1d
            included, which the rule by dimensions leaves out), ``"linear"`` for all but those.
        layers: Further module classes and how their weights are laid out, subclasses included;
            their parameters called "weight" something with at least 2 dimensions are selected.

    Returns:
        ``{name: True, False or Units}`` for all of ``model.named_parameters()``, to be given as
        ``GC(where=...)`` or ``centralize(..., where=...)``. If only some of them are trained, it is
        ``{name: mask[name] for name in params}``.

    Raises:
        TypeError: ``model`` is no module, or ``layers`` does not map classes to :class:`Units`.
        ValueError: ``where`` is an unknown string, a layer's :class:`Units` do not fit it, or a
            lazy module has not run yet.

    Example:
        >>> import gcfunc
        >>> from torch import nn
        >>> gcfunc.select(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2, bias=False)))
        {'0.weight': False, '1.weight': True}
        >>> gcfunc.select(nn.ConvTranspose2d(8, 6, 3, groups=2, bias=False))
        {'weight': Units(dim=1, groups=2)}
    """
    require_module(model)
    require_rule(where)
    layers = {} if layers is None else layers
    if not isinstance(layers, Mapping) or not all(
        isinstance(kind, type) and isinstance(units, Units) for kind, units in layers.items()
    ):
        raise TypeError(f"layers must map module classes to gcfunc.Units, got {layers!r}")
    answers: dict[Tensor, set[Units | None]] = {}
    for module in model.modules():
        units = _units(module, RULES[where].layers, layers)
        for name, param in _own_parameters(module):
            require_shape(param, f"{name!r} of a {type(module).__name__}")
            fits = units is not None and "weight" in name and _inputs(param, units) > 1
            answers.setdefault(param, set()).add(units if fits else None)
    # A tied parameter is selected if all modules that own it agree on how.
    agreed = {p: next(iter(a)) if len(a) == 1 else None for p, a in answers.items()}
    return {name: _plainly(agreed[param]) for name, param in model.named_parameters()}


def _plainly(units: Units | None) -> bool | Units:
    if units is None or units == ROWS:
        return units is not None
    return units


def _units(
    module: nn.Module, kinds: Collection[LayerKind], layers: Mapping[type[nn.Module], Units]
) -> Units | None:
    for further, units in layers.items():
        if isinstance(module, further):
            return units
    kind, own = _kind(module)
    return own if kind in kinds else None


def _kind(module: nn.Module) -> tuple[LayerKind, Units] | tuple[None, None]:
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return "convolution", Units(dim=1, groups=module.groups)
    if isinstance(module, CONVOLUTIONS):
        return "convolution", ROWS
    if isinstance(module, LINEAR):
        return "linear", ROWS
    names = {f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__}
    return ("linear", Units(dim=1)) if LINEAR_BY_COLUMNS in names else (None, None)


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, parametrize.ParametrizationList):
        return  # belongs to the parametrized module, below
    yield from module.named_parameters(recurse=False)
    if parametrize.is_parametrized(module):
        for name, chain in module.get_submodule("parametrizations").named_children():
            weight = getattr(module, name)
            for original, param in chain.named_parameters(recurse=False):
                # Of the originals, the one of the weight's own shape: weight norm has a second.
                yield name if param.shape == weight.shape else original, param


def _inputs(weight: Tensor, units: Units) -> int:
    """Inputs per output unit; 0 for what is no matrix."""
    if weight.ndim < 2:
        return 0
    if not units.fit(weight):
        raise ValueError(f"layers: {units} does not fit a weight of shape {tuple(weight.shape)}")
    return weight.numel() // max(1, units.groups * weight.shape[units.dim])
