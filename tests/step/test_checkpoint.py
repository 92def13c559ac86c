"""Save, load, go on: as if nothing had happened."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import gcfunc
from gcfunc import GC, Optimizer, State
from tests.cases import ALGORITHMS, Params, make_params, random_like

Through = Callable[[Params, Params, Path], Params]


def torch_save(saved: Params, fresh: Params, folder: Path) -> Params:
    torch.save(saved, folder / "checkpoint.pt")
    loaded: Params = torch.load(folder / "checkpoint.pt", weights_only=True)
    return loaded


def safetensors(saved: Params, fresh: Params, folder: Path) -> Params:
    # It refuses strides; whoever saves a channels_last weight gives them up, as here.
    save_file(
        {name: t.contiguous() for name, t in saved.items()}, folder / "checkpoint.safetensors"
    )
    return load_file(folder / "checkpoint.safetensors")


def distributed(saved: Params, fresh: Params, folder: Path) -> Params:
    dcp_save(saved, checkpoint_id=folder / "checkpoint", no_dist=True)
    loaded = {name: torch.full_like(t, -1) for name, t in fresh.items()}
    dcp_load(loaded, checkpoint_id=folder / "checkpoint", no_dist=True)
    return loaded


FORMATS: dict[str, Through] = {
    "torch": torch_save,
    "safetensors": safetensors,
    "distributed": distributed,
}
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


def params() -> Params:
    """All dtypes, and a convolution in channels_last."""
    tree = make_params(torch.float32)
    tree["conv2d.weight"] = tree["conv2d.weight"].to(memory_format=torch.channels_last)
    tree["linear.weight"] = tree["linear.weight"].bfloat16()
    tree["linear.bias"] = tree["linear.bias"].double()
    return tree


def go_on(opt: Optimizer, tree: Params, state: State, steps: range) -> tuple[Params, State]:
    for t in steps:
        tree, state = opt.step(tree, random_like(tree, t), state)
    return tree, state


def flat(tree: Params, state: State) -> Params:
    return tree | {f"state.{n}": t for n, t in gcfunc.state_dict(state).items()}


def identical(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


@each_algorithm
@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.filterwarnings("ignore:torch.distributed is .*uninitialized, assuming:UserWarning")
def test_resuming_is_bit_exact(algorithm: str, format_: str, tmp_path: Path) -> None:
    opt = ALGORITHMS[algorithm](GC())
    start = params()
    tree, state = go_on(opt, start, opt.init(start), range(4))
    # A hyperparameter that was changed underway goes into the checkpoint too.
    state = gcfunc.update_hyperparams(state, lr=0.02)
    uninterrupted = go_on(opt, tree, state, range(4, 8))

    # Another process: the same code, other values.
    blank = {name: torch.zeros_like(p) for name, p in start.items()}
    fresh = opt.init(blank)
    (tmp_path / "params").mkdir()
    (tmp_path / "state").mkdir()
    through = FORMATS[format_]
    loaded_tree = through(tree, blank, tmp_path / "params")
    loaded = through(gcfunc.state_dict(state), gcfunc.state_dict(fresh), tmp_path / "state")
    new_tree = {name: torch.empty_like(p).copy_(loaded_tree[name]) for name, p in blank.items()}
    new_state = gcfunc.load_state_dict(fresh, loaded)

    assert identical(flat(new_tree, new_state), flat(tree, state))
    resumed = go_on(opt, new_tree, new_state, range(4, 8))
    assert identical(flat(*resumed), flat(*uninterrupted))
    for slot, column in new_state.slots.items():
        for name, tensor in column.items():
            assert tensor.stride() == state.slots[slot][name].stride(), (slot, name)

    # What would happen without the state, and without GC.
    forgotten = go_on(opt, new_tree, opt.init(new_tree), range(4, 8))
    assert not identical(forgotten[0], uninterrupted[0])
    plain = go_on(ALGORITHMS[algorithm](None), new_tree, new_state, range(4, 8))
    assert not identical(plain[0], uninterrupted[0])


@each_algorithm
def test_nothing_is_written_or_shared(algorithm: str) -> None:
    opt = ALGORITHMS[algorithm](GC())
    start = params()
    _, state = go_on(opt, start, opt.init(start), range(2))
    template = opt.init(start)
    saved = {name: t.clone() for name, t in gcfunc.state_dict(template).items()}
    d = gcfunc.state_dict(state)
    loaded = gcfunc.load_state_dict(template, d)
    assert identical(gcfunc.state_dict(loaded), d)
    assert identical(gcfunc.state_dict(template), saved)
    assert not identical(gcfunc.state_dict(loaded), saved)

    def storages(of: State) -> set[int]:
        tensors = [of.step, *of.hyperparams.values()]
        tensors += [t for column in of.slots.values() for t in column.values()]
        found = {t.untyped_storage().data_ptr() for t in tensors}
        assert len(found) == len(tensors)
        return found

    assert not storages(loaded) & (storages(state) | storages(template))


def test_the_template_gives_strides_and_nothing_else() -> None:
    opt = ALGORITHMS["adamw"](GC())
    start = params()
    channels_last = opt.init(start)
    contiguous = opt.init({name: p.contiguous() for name, p in start.items()})
    _, trained = go_on(opt, start, channels_last, range(2))
    loaded = gcfunc.load_state_dict(contiguous, gcfunc.state_dict(trained))
    moments, original = loaded.slots["exp_avg"], trained.slots["exp_avg"]
    assert not original["conv2d.weight"].is_contiguous()
    assert all(t.is_contiguous() for t in moments.values())
    assert identical(moments, original)


def test_the_names() -> None:
    """They are a file format: whoever renames one breaks checkpoints."""
    weights = {"block.weight": torch.ones(2, 3)}

    def names(opt: Optimizer) -> list[str]:
        return [
            n.removeprefix("hyperparams.")
            for n in gcfunc.state_dict(opt.init(weights))
            if n != "step"
        ]

    assert names(gcfunc.sgd(0.1)) == ["lr", "weight_decay"]
    assert sorted(names(gcfunc.ranger(0.1))) == [
        "alpha",
        "beta1",
        "beta2",
        "eps",
        "exp_avg.block.weight",
        "exp_avg_sq.block.weight",
        "k",
        "lr",
        "slow_params.block.weight",
        "weight_decay",
    ]
    assert {"lr_decay", "sum.block.weight"} <= {*names(gcfunc.adagrad())}
    assert {"max_exp_avg_sq.block.weight"} <= {*names(gcfunc.adam(amsgrad=True))}
    assert {"momentum", "dampening", "momentum_buffer.block.weight"} <= {
        *names(gcfunc.sgd(0.1, 0.9))
    }
    grouped = gcfunc.partition({"all": gcfunc.sgd(0.1, 0.9)}, lambda name, tensor: "all")
    assert {"all.lr", "momentum_buffer.block.weight"} <= {*names(grouped)}
    assert all(
        t.is_contiguous() and not t.requires_grad
        for t in gcfunc.state_dict(ALGORITHMS["ranger"](None).init(params())).values()
    )


def test_parameters_that_require_grad_make_no_difference() -> None:
    opt = ALGORITHMS["ranger"](GC())
    attached = {name: p.requires_grad_() for name, p in params().items()}
    d = gcfunc.state_dict(opt.init(attached))
    assert not any(t.requires_grad for t in d.values())
    assert identical(d, gcfunc.state_dict(opt.init(params())))


W = {"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2)}
ADAM = gcfunc.adam()


def saved(opt: Optimizer, **changes: Any) -> dict[str, Any]:
    tree = {n: changes.pop(n, t) for n, t in W.items()} | changes
    return gcfunc.state_dict(opt.init({n: t for n, t in tree.items() if t is not None}))


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another algorithm": (
        saved(gcfunc.sgd(0.1, 0.9)),
        [
            "; missing 'exp_avg.a.bias', 'exp_avg.a.weight', 'exp_avg_sq.a.bias', ",
            "'hyperparams.beta1', 'hyperparams.beta2', 'hyperparams.eps'; unexpected ",
            "'hyperparams.momentum', 'momentum_buffer.a.bias', 'momentum_buffer.a.weight'",
        ],
    ),
    "another option": (
        saved(gcfunc.adam(amsgrad=True)),
        ["; unexpected 'max_exp_avg_sq.a.bias', 'max_exp_avg_sq.a.weight'"],
    ),
    "another wrapper": (
        saved(gcfunc.lookahead(ADAM)),
        ["unexpected 'hyperparams.alpha', 'hyperparams.k', 'slow_params.a.bias'"],
    ),
    "a parameter less": (
        saved(ADAM, **{"a.bias": None}),
        ["; missing 'exp_avg.a.bias', 'exp_avg_sq.a.bias'"],
    ),
    "a parameter more": (
        saved(ADAM, b=torch.ones(1)),
        ["; unexpected 'exp_avg.b', 'exp_avg_sq.b'"],
    ),
    "another name": (
        saved(ADAM, **{"a.bias": None, "a.offset": torch.ones(2)}),
        ["missing 'exp_avg.a.bias'", "unexpected 'exp_avg.a.offset'"],
    ),
    "other shapes": (
        saved(ADAM, **{"a.weight": torch.ones(3, 2), "a.bias": torch.ones(2, 1)}),
        [
            "'exp_avg.a.weight' is torch.float32 (3, 2), expected torch.float32 (2, 3)",
            "'exp_avg.a.bias' is torch.float32 (2, 1), expected torch.float32 (2,)",
            "'exp_avg_sq.a.weight' is torch.float32 (3, 2), expected torch.float32 (2, 3)",
        ],
    ),
    "another dtype": (
        saved(ADAM, **{"a.bias": torch.ones(2, dtype=torch.float64)}),
        ["'exp_avg.a.bias' is torch.float64 (2,), expected torch.float32 (2,)"],
    ),
    "no step": (
        {n: t for n, t in saved(ADAM).items() if n != "step"},
        ["; missing 'step'"],
    ),
    "no tensor": (
        saved(ADAM) | {"step": 3, "hyperparams.lr": None},
        ["'step' is int, expected torch.int64 ()", "'hyperparams.lr' is NoneType, expected"],
    ),
    "a sparse tensor": (
        saved(ADAM) | {"exp_avg.a.bias": torch.ones(2).to_sparse()},
        ["'exp_avg.a.bias' is torch.float32 (2,) torch.sparse_coo, expected torch.float32 (2,)"],
    ),
    "no values": (
        saved(ADAM) | {"exp_avg.a.bias": torch.ones(2, device="meta")},
        ["'exp_avg.a.bias' is torch.float32 (2,) on meta, expected torch.float32 (2,)"],
    ),
    "params in the place of a state": (
        W,
        ["missing 'exp_avg.a.bias'", "unexpected 'a.bias', 'a.weight'"],
    ),
    "nothing": ({}, ["missing 'exp_avg.a.bias'"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_names_that_differ(name: str) -> None:
    d, parts = REFUSED[name]
    state = ADAM.init(W)
    before = {n: t.clone() for n, t in gcfunc.state_dict(state).items()}
    with pytest.raises(ValueError, match=r"^the checkpoint does not match the state[;:] ") as error:
        gcfunc.load_state_dict(state, d)
    for part in parts:
        assert part in str(error.value)
    assert identical(gcfunc.state_dict(state), before)
    gcfunc.load_state_dict(state, saved(ADAM))


def test_a_refusal_of_many_names_stays_readable() -> None:
    many = {f"layers.{i}.weight": torch.ones(1, 2) for i in range(100)}
    with pytest.raises(ValueError, match=r"'exp_avg\.layers\.0\.weight'.* and 192 more; ") as error:
        gcfunc.load_state_dict(
            ADAM.init(many), gcfunc.state_dict(ADAM.init({"w": torch.ones(1, 2)}))
        )
    assert len(str(error.value)) < 1000
