"""Gradients centralized by themselves, out of place."""

from gcfunc._centralization.kinds import centralize_list
from gcfunc._centralization.where import Where, require_some, resolve
from gcfunc._tensors import trees
from gcfunc._tensors.check import require_tensors
from gcfunc._tensors.trees import Tree


def centralize(tree: Tree, where: Where = "gc") -> Tree:
    r"""Centralize gradients: subtract from each its mean over all dimensions but the first.

    For a gradient :math:`G` of shape ``(units, K)`` (a convolution's trailing dimensions count as
    one) this is the projection

    .. math:: \Phi(G) = G - \tfrac1K\, G\, e e^\top = (I - \tfrac1K e e^\top)\ \text{on each row}

    It is linear and idempotent. Sums run in float32 for 16-bit gradients, and the result is
    rounded once.

    A weight with a single input per unit (``K = 1``) has a zero projection: it would never train.
    The reference does the same; :func:`gcfunc.select` leaves such weights out.

    Args:
        tree: A pytree of gradients. Nothing in it is written.
        where: ``"gc"``, every tensor with at least 2 dimensions; ``"gcc"``, convolution weights,
            which the reference takes as at least 4; ``"linear"``, those with exactly 2; a predicate
            ``(name, tensor) -> bool``; or a pytree of bools with the structure of ``tree``, such as
            :func:`gcfunc.select` makes. Tensors with fewer than 2 dimensions are left out whatever
            it says.

    Returns:
        A tree of the same structure. Leaves that ``where`` leaves out are the very same tensors.

    Raises:
        TypeError: a leaf is not a real floating-point strided tensor, or ``where`` is of no
            known kind.
        ValueError: ``where`` selects nothing, or does not match the structure of ``tree``.

    Example:
        >>> import torch, gcfunc
        >>> grads = {"weight": torch.tensor([[1.0, 2.0, 6.0]]), "bias": torch.tensor([1.0])}
        >>> gcfunc.centralize(grads)
        {'weight': tensor([[-2., -1.,  3.]]), 'bias': tensor([1.])}
    """
    flat = trees.flatten(tree, "tree")
    require_tensors(flat.names, flat.leaves, "tree")
    projections = resolve(where, flat)
    require_some(where, projections, flat)
    return flat.rebuild(centralize_list(flat.leaves, projections))
