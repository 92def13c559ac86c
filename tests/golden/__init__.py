"""Trajectories of the reference optimizers, in float64.

``reference_trajectories.npz`` holds params of the classes in the code of arXiv 2004.01461, both
generations (``GC_code`` and ``algorithm-GC``), after 1, 2, 6 and 12 steps on random gradients.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.cases import Params, largest_difference

with np.load(Path(__file__).with_name("reference_trajectories.npz")) as archive:
    ARCHIVE = dict(archive)
MANIFEST = json.loads(str(ARCHIVE["manifest"]))
CASES: list[dict[str, Any]] = MANIFEST["cases"]
# The reference's RAdam and Ranger compute in float32 whatever the parameters are.
SINGLE = 1e-6


def tensors(prefix: str) -> Params:
    return {name: torch.from_numpy(ARCHIVE[f"{prefix}/{name}"]) for name in MANIFEST["shapes"]}


def error(case: Mapping[str, Any], ours: Iterator[tuple[int, Params]]) -> float:
    """The largest difference over all saved steps."""
    errors = [largest_difference(p, tensors(f"{case['key']}/{t}")) for t, p in ours]
    assert len(errors) == len(MANIFEST["saved"])
    return max(errors)


def is_quirk(case: Mapping[str, Any]) -> bool:
    """The reference's RAdam and Ranger, except at the gradient without decay, and its Lookahead."""
    h = case["hyperparameters"]
    if case["optimizer"] in ("RAdam", "Ranger"):
        return bool(h["weight_decay"] or not h["gc_loc"])
    return bool(case["optimizer"] == "Lookahead(SGD)")


def ids(case: Mapping[str, Any]) -> str:
    return f"{case['key']}-{case['source']}-{case['optimizer']}"
