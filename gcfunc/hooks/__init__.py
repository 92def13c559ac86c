"""Gradients centralized during backward, for whatever optimizer comes after.

Autograd runs these hooks while the rest of the backward pass, and the communication of DDP and
FSDP2, goes on. The functional steps and ``torch.optim`` see gradients that are centralized already.
"""

from gcfunc.hooks.backward import CentralizeHandle, centralize_backward
from gcfunc.hooks.ddp import CommHook, ddp_comm_hook, register_ddp
from gcfunc.hooks.mechanisms import Sparse

__all__ = [
    "CentralizeHandle",
    "CommHook",
    "Sparse",
    "centralize_backward",
    "ddp_comm_hook",
    "register_ddp",
]
