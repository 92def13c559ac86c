"""How long a step would take at the least: an estimate, and no measurement."""

from collections.abc import Sequence

BANDWIDTH = 3.0e12
"""Bytes a second that an H100's memory reaches, of 3.35e12 on paper."""
LAUNCH = 2e-6
"""Seconds that a launch adds on the device: a guess."""

CHUNK = 65536
"""The elements of a block of torch's fused optimizers (``MultiTensorApply.cuh``)."""
TENSORS = {False: (110, 64, 48, 36, 30), True: (770, 448, 336, 252, 210)}
"""The tensors of one launch, by the number of lists, for small and for large arguments."""
BLOCKS = {False: 320, True: 2240}
"""The blocks of one launch."""


def estimate(nbytes: int, launches: int) -> float:
    """The seconds in which these bytes are moved and these kernels start, one after the other."""
    return nbytes / BANDWIDTH + launches * LAUNCH


def fused_launches(numels: Sequence[int], lists: int, *, large: bool = True) -> int:
    """How many launches torch's fused optimizers take, as ``MultiTensorApply.cuh`` counts them.

    Args:
        numels: The elements of each parameter.
        lists: How many lists of tensors go together: parameters, gradients, each slot.
        large: Arguments of 32 KiB, which torch 2.12 and newer take where it was built for CUDA 13.
    """
    launches = tensors = blocks = 0
    for numel in filter(None, numels):
        tensors += 1
        chunks = -(-numel // CHUNK)
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if blocks == BLOCKS[large] or (last and tensors == TENSORS[large][lists - 1]):
                launches += 1
                # A tensor that goes on is the first of the next launch.
                tensors, blocks = (0 if last else 1), 0
    return launches + (blocks > 0)
