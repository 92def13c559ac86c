"""How many steps in a row autograd has recorded, and a word to a loop that forgot to detach.

A step is differentiable. A loop that hands in params which require grad, and hands back what it
gets, therefore has each step recorded upon the one before: results are right and memory grows until
it ends. Meta-learning does the same on purpose, for as many steps as it differentiates through.
What tells the two apart is how many there are, so each step leaves its number in the graph itself,
on the nodes that made its results. The number is found there by the next step, and goes when the
graph goes. Nothing is kept elsewhere, and no tensor's value is read.
"""

import inspect
import itertools
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from gcfunc._step.state import State, tensors
from gcfunc._tensors import trees
from gcfunc._tensors.lists import unbatched, under_grad
from gcfunc._tensors.trees import Tree

FIRST_ORDER = 20
"""So many steps in a row are taken for meta-learning if nothing but params requires grad.

Then the derivative through a step is little but the identity. First-order MAML, which wants just
that, takes up to 10 steps.
"""
UNROLLED = 100
"""So many if gradients or hyperparameters require grad, too, as where one learns through steps.

MAML unrolls 5, learning of hyperparameters about 100 (https://arxiv.org/abs/1502.03492).
"""
_MARK = "gcfunc: steps in a row, and whether the user was told"
# Someone may have done something to the params between two steps: cloned, masked, normalized them.
_HOPS = 4
_WIDTH = 1000


def follow(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    state: State,
    new_params: Sequence[Tensor],
    new_state: State,
) -> None:
    """Count a step that was recorded, and warn once of a row that is too long to be meant."""
    # Inside of a torch.func.grad steps are meant to be recorded, and only until it returns.
    if not torch.is_grad_enabled() or under_grad():
        return
    results = unbatched([*new_params, *tensors(new_state)])
    made = [t.grad_fn for t in results if t.grad_fn is not None]
    if not made:
        return
    before, told = _before(unbatched([*params, *tensors(state)]))
    steps = before + 1
    others = [*(g for g in grads if g is not None), *state.hyperparams.values()]
    on_purpose = any(t.requires_grad for t in unbatched(others))
    if not told and steps > (UNROLLED if on_purpose else FIRST_ORDER):
        _tell(steps)
        told = True
    for node in made:
        _notes(node)[_MARK] = steps, told


def follow_trees(given: tuple[Tree, Tree, State], made: tuple[Tree, State]) -> None:
    """:func:`follow` of a step that was compiled, from outside of it."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    (params, grads, state), (new, new_state) = given, made
    results = trees.leaves_of(new)
    if any(t.requires_grad for t in results):  # else the other trees are taken apart for nothing
        follow(trees.leaves_of(params), trees.leaves_of(grads), state, results, new_state)


def _before(given: Iterable[Tensor]) -> tuple[int, bool]:
    """What the latest step before left, if these tensors were made of its results."""
    nodes: set[Node] = {t.grad_fn for t in given if t.grad_fn is not None}
    for _ in range(1 + _HOPS):
        if marks := [mark for node in nodes if (mark := _notes(node).get(_MARK))]:
            return max(marks)
        parents = (parent for node in nodes for parent, _ in node.next_functions)
        nodes = {*itertools.islice((p for p in parents if p is not None), _WIDTH)}
    return 0, False


def _notes(node: Node) -> dict[str, tuple[int, bool]]:
    # A property that torch annotates as a method.
    return node.metadata  # type: ignore[return-value]


def _tell(steps: int) -> None:
    warnings.warn(
        f"autograd has recorded {steps} optimizer steps in a row, each upon the one before, and "
        "memory grows with every step. In a training loop call step under torch.no_grad(), and "
        "then requires_grad_() on the new params if gradients are taken by torch.autograd; or "
        "start from detached params, with gradients by torch.func.grad. If you mean to "
        "differentiate through so many steps, ignore this warning.",
        UserWarning,
        stacklevel=_users_level(),
    )


def _users_level() -> int:
    """The stacklevel at which :func:`_tell` warns in the line of whoever calls the library.

    Python 3.12 has ``skip_file_prefixes`` for that.
    """
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in ("gcfunc", "torch"):
            break
        frame, level = frame.f_back, level + 1
    return level
