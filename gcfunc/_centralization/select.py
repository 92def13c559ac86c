"""A mask of what the paper means by weights, from a model's modules, and what it leaves out."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

from gcfunc._centralization.formula import ROWS, Units
from gcfunc._centralization.where import RULES, LayerKind, require_rule
from gcfunc._tensors.modules import require_module, require_shape

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LINEAR = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
# By name, so that nothing is imported: a Linear layer that stores (inputs, outputs).
LINEAR_BY_COLUMNS = "transformers.pytorch_utils.Conv1D"

Layers = Mapping[type[nn.Module], Units]


def select(
    model: nn.Module, where: str = "gc", *, layers: Layers | None = None
) -> dict[str, bool | Units]:
    """A mask that centralizes the weights of layers that have output units, per output unit.

    The reference's rule, ``where="gc"``, goes by the number of dimensions alone, and so reaches
    embeddings, position tables and class tokens too. This one asks the modules:

    - Linear, Bilinear, the projections of MultiheadAttention, and Conv1d, 2d and 3d, grouped ones
      included: per row.
    - RNN, LSTM, GRU and their cells: per row of ``weight_ih``, ``weight_hh`` and ``weight_hr``,
      which is a unit of a gate, of the state or of its projection.
    - Transposed convolutions: per output channel, which is dimension 1, within each group.
    - The ``Conv1D`` of Hugging Face transformers, a Linear that stores its transpose: per column.
    - Not a weight that is also an embedding's (tied heads), and not one with a single input per
      unit, whose centralized gradient would always be zero.

    Their subclasses count as they do. Embeddings, norms and modules that are not torch's own are
    left out; :func:`gcfunc.left_out` names what was, and why.

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
    found = _answers(model, where, layers)
    return {name: _plainly(answer) for name, (_, answer) in found.items()}


def left_out(
    model: nn.Module, where: str = "gc", *, layers: Layers | None = None
) -> dict[str, str]:
    """What :func:`gcfunc.select` leaves out of all that has at least 2 dimensions, and why.

    A module of your own whose rows are output units is added by ``layers={Own: gcfunc.Units()}``.
    For parameters that are not called "weight", give ``GC(where=...)`` a mask of your own:
    ``gcfunc.select(model) | {"lora_A": True}``.

    Args:
        model: As in :func:`gcfunc.select`, and so are all other arguments and the errors.
        where: As there.
        layers: As there.

    Returns:
        ``{name: reason}``; empty if nothing was left out.

    Example:
        >>> import gcfunc
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 1), nn.Linear(1, 9))
        >>> for name, why in gcfunc.left_out(model).items():
        ...     print(f"{name}: {why}")
        0.weight: Embedding is no layer whose output units are known
        2.weight: with one input per output unit its gradient would always be zero
    """
    found = _answers(model, where, layers)
    return {n: a for n, (p, a) in found.items() if isinstance(a, str) and p.ndim >= 2}


def _answers(
    model: nn.Module, where: str, layers: Layers | None
) -> dict[str, tuple[Tensor, Units | str]]:
    """Each parameter, with how it is centralized or why it is not."""
    require_module(model)
    require_rule(where)
    layers = {} if layers is None else layers
    if not isinstance(layers, Mapping) or not all(
        isinstance(kind, type) and isinstance(units, Units) for kind, units in layers.items()
    ):
        raise TypeError(f"layers must map module classes to gcfunc.Units, got {layers!r}")
    given: dict[Tensor, list[Units | str]] = {}
    for module in model.modules():
        units = _units(module, where, layers)
        for name, param in _own_parameters(module):
            require_shape(param, f"{name!r} of a {type(module).__name__}")
            given.setdefault(param, []).append(_answer(module, units, name, param))
    return {name: (param, _agreed(given[param])) for name, param in model.named_parameters()}


def _answer(module: nn.Module, units: Units | str, name: str, param: Tensor) -> Units | str:
    if isinstance(units, str):
        return units
    if "weight" not in name:
        return f'{name!r} of {type(module).__name__} is not called "weight"'
    if _inputs(param, units) <= 1:
        return "with one input per output unit its gradient would always be zero"
    return units


def _agreed(answers: list[Units | str]) -> Units | str:
    """What all modules that own a parameter say, if they say the same."""
    first = answers[0]
    if all(answer == first for answer in answers):
        return first
    reasons = [answer for answer in answers if isinstance(answer, str)]
    return f"tied, and {reasons[0] if reasons else 'its layers lay it out in two ways'}"


def _plainly(answer: Units | str) -> bool | Units:
    if isinstance(answer, str):
        return False
    return True if answer == ROWS else answer


def _units(module: nn.Module, where: str, layers: Layers) -> Units | str:
    for further, units in layers.items():
        if isinstance(module, further):
            return units
    kind, own = _kind(module)
    if kind is None:
        return f"{type(module).__name__} is no layer whose output units are known"
    if kind not in RULES[where].layers:
        return f"{type(module).__name__} is left out by where={where!r}"
    return own


def _kind(module: nn.Module) -> tuple[LayerKind | None, Units]:
    if isinstance(module, TRANSPOSED):
        return "convolution", Units(dim=1, groups=module.groups)
    if isinstance(module, CONVOLUTIONS):
        return "convolution", ROWS
    if isinstance(module, LINEAR):
        return "linear", ROWS
    names = {f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__}
    return ("linear" if LINEAR_BY_COLUMNS in names else None), Units(dim=1)


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
