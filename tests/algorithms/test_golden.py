"""Our steps against every trajectory of the reference optimizers."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import pytest
import torch

import gcfunc
from gcfunc import GC, Optimizer
from tests.cases import Params
from tests.golden import CASES, MANIFEST, SINGLE, error, ids, is_quirk, tensors

EXACT = 1e-12


def build(case: Mapping[str, Any], gc: GC | Literal["own"] | None = "own") -> Optimizer:
    """The gcfunc optimizer that equals a reference class, or that one with another gc."""
    h = dict(case["hyperparameters"])
    name: str = case["optimizer"]
    if case["source"] == "GC_code":
        name, _, suffix = name.partition("_")
        where = {"": None, "GC": "gc", "GCC": "gcc"}[suffix.rstrip("2")]
        at: Literal["gradient", "update"] = "update" if suffix.endswith("2") else "gradient"
    else:
        where = "gcc" if h.pop("gc_conv_only", False) else "gc"
        at = "gradient" if h.pop("gc_loc", True) else "update"
        assert h.pop("use_gc")
    if gc == "own":
        gc = GC(where, at) if where else None
    if "betas" in h:
        h["betas"] = tuple(h["betas"])
    if name == "AdamW":
        h.setdefault("weight_decay", 0.01 if case["source"] == "algorithm-GC" else 0.0)
    if name == "RAdam":
        h["decoupled_weight_decay"] = True
    if name == "Lookahead(SGD)":
        outer = {"k": h.pop("k"), "alpha": h.pop("alpha")}
        return gcfunc.lookahead(gcfunc.sgd(**h, gc=gc), **outer)
    return getattr(gcfunc, name.lower())(**h, gc=gc)


def trajectory(
    case: Mapping[str, Any], opt: Optimizer, params: Params
) -> Iterator[tuple[int, Params]]:
    """Our params after every saved step."""
    state = opt.init(params)
    initial = state.hyperparams
    for t in range(1, MANIFEST["steps"] + 1):
        if case["optimizer"].startswith("AdamW"):
            # Its AdamW scales decay, in the first generation eps too, by the bias corrections.
            bias1 = 1 - initial["beta1"] ** t
            root2 = (1 - initial["beta2"] ** t).sqrt()
            decay = initial["weight_decay"] / bias1
            if case["source"] == "GC_code":
                state = gcfunc.update_hyperparams(
                    state, eps=initial["eps"] / root2, weight_decay=decay * root2
                )
            else:
                state = gcfunc.update_hyperparams(state, weight_decay=decay)
        params, state = opt.step(params, tensors(f"grad/{t}"), state)
        if t in MANIFEST["saved"]:
            yield t, params


@pytest.mark.parametrize("case", [c for c in CASES if not is_quirk(c)], ids=ids)
def test_equals_the_reference(case: dict[str, Any]) -> None:
    opt = build(case)
    tolerance = SINGLE if case["optimizer"] in ("RAdam", "Ranger") else EXACT
    assert error(case, trajectory(case, opt, tensors("init"))) < tolerance

    algorithm = opt.algorithms[""]
    if algorithm.gc is not None:
        # Not what the same optimizer does without GC, nor with the other algorithm.
        other = "gc" if algorithm.gc.where == "gcc" else "gcc"
        for gc in (None, GC(other, algorithm.gc.at)):
            assert error(case, trajectory(case, build(case, gc), tensors("init"))) > 1e-4


def test_all_cases_are_there() -> None:
    assert len(CASES) == 100
    assert sum(map(is_quirk, CASES)) == 13


@pytest.mark.parametrize(
    "case", [c for c in CASES if is_quirk(c) and c["optimizer"] != "Lookahead(SGD)"], ids=ids
)
def test_deviates_from_the_reference_radam_by_its_momentum(case: dict[str, Any]) -> None:
    """The reference writes decay and centralization into its momentum in the first steps.

    With that quirk, and only with it, a plain loop gives the reference's numbers.
    """
    assert error(case, trajectory(case, build(case), tensors("init"))) > 1e-4
    assert error(case, reference_radam(case, overwrite_momentum=True)) < SINGLE
    assert error(case, reference_radam(case, overwrite_momentum=False)) > 1e-4


def reference_radam(
    case: Mapping[str, Any], *, overwrite_momentum: bool
) -> Iterator[tuple[int, Params]]:
    h, is_ranger = case["hyperparameters"], case["optimizer"] == "Ranger"
    beta1, beta2, eps = (0.95, 0.999, 1e-5) if is_ranger else (0.9, 0.999, 1e-8)
    where = "gcc" if h.get("gc_conv_only") else "gc"
    params = tensors("init")
    slow = dict(params)
    m = {n: torch.zeros_like(p) for n, p in params.items()}
    v = {n: torch.zeros_like(p) for n, p in params.items()}
    rho_inf = 2 / (1 - beta2) - 1
    for t in range(1, MANIFEST["steps"] + 1):
        g = tensors(f"grad/{t}")
        if h["gc_loc"]:
            g = gcfunc.centralize(g, where)
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        size = 1 / (1 - beta1**t)
        if rho >= 5:
            ratio = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
            size *= math.sqrt((1 - beta2**t) * ratio)
        u = {}
        for n, p in params.items():
            m[n] = beta1 * m[n] + (1 - beta1) * g[n]
            v[n] = beta2 * v[n] + (1 - beta2) * g[n] ** 2
            u[n] = (m[n] / (v[n].sqrt() + eps) if rho >= 5 else m[n]) + h["weight_decay"] * p
        if not h["gc_loc"]:
            u = gcfunc.centralize(u, where)
        if rho < 5 and overwrite_momentum:
            m = dict(u)
        params = {n: p - h["lr"] * size * u[n] for n, p in params.items()}
        if is_ranger and t % 6 == 0:
            slow = {n: slow[n] + 0.5 * (p - slow[n]) for n, p in params.items()}
            params = dict(slow)
        if t in MANIFEST["saved"]:
            yield t, params


def test_deviates_from_the_reference_lookahead_by_its_start() -> None:
    """The reference's slow weights start after step 1, and it counts the k steps from there."""
    (case,) = (c for c in CASES if c["optimizer"] == "Lookahead(SGD)")
    assert error(case, trajectory(case, build(case), tensors("init"))) > 1e-2

    def late() -> Iterator[tuple[int, Params]]:
        opt = gcfunc.sgd(0.1, 0.9, weight_decay=0.0005, gc="gc")
        params, state = opt.step(tensors("init"), tensors("grad/1"), opt.init(tensors("init")))
        yield 1, params
        ahead = gcfunc.lookahead(opt, k=5, alpha=0.5)
        start = ahead.init(params)
        state = start._replace(slots={**start.slots, **state.slots})
        for t in range(2, MANIFEST["steps"] + 1):
            params, state = ahead.step(params, tensors(f"grad/{t}"), state)
            if t in MANIFEST["saved"]:
                yield t, params

    assert error(case, late()) < EXACT
