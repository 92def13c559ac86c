"""``torch.optim.Optimizer`` classes over the functional steps, for whatever takes one.

Constructor arguments, errors, parameter groups and state are those of the torch class that each is
derived from; the arithmetic is the functional step's. Further arguments, the same for all:

- ``gc``: as in the functional constructors ``None``, a rule such as ``"gc"``, or a
  :class:`gcfunc.GC`, and an option of each parameter group, so that one may switch it off. Masks
  and predicates see names if the optimizer is given ``model.named_parameters()``. A ``state_dict``
  has None for it: which weights are centralized is for code to say.
- ``compile``: whether the step is compiled by :func:`gcfunc.compile`. By default it is if the
  parameters hold a million values or more. Below that a step is so short that the seconds which
  compiling takes may never be won back. What is compiled is for the parameters that have
  gradients: others compile again, and a step keeps hold of the memory it planned for until the
  next.

``foreach`` and ``fused`` are accepted and change nothing; ``capturable`` and ``differentiable`` are
refused. The classes named ``SGD_GC`` and so on have the reference's names, defaults and results.
"""

from gcfunc.optim.classes import (
    SGD,
    SGDW,
    Adagrad,
    Adam,
    AdamW,
    Lion,
    Lookahead,
    RAdam,
    Ranger,
    RMSprop,
)
from gcfunc.optim.reference import (
    SGD_GC,
    SGD_GCC,
    SGDW_GC,
    SGDW_GCC,
    Adagrad_GC,
    Adagrad_GCC,
    Adam_GC,
    Adam_GC2,
    Adam_GCC,
    Adam_GCC2,
    AdamW_GC,
    AdamW_GC2,
    AdamW_GCC,
    AdamW_GCC2,
)

__all__ = [
    "SGD",
    "SGDW",
    "SGDW_GC",
    "SGDW_GCC",
    "SGD_GC",
    "SGD_GCC",
    "Adagrad",
    "Adagrad_GC",
    "Adagrad_GCC",
    "Adam",
    "AdamW",
    "AdamW_GC",
    "AdamW_GC2",
    "AdamW_GCC",
    "AdamW_GCC2",
    "Adam_GC",
    "Adam_GC2",
    "Adam_GCC",
    "Adam_GCC2",
    "Lion",
    "Lookahead",
    "RAdam",
    "RMSprop",
    "Ranger",
]
