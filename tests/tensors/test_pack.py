"""Packed trees: the same results from fewer tensors."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call, grad
from torch.utils import _pytree as pytree

import gcfunc
from gcfunc import GC, Units
from gcfunc._centralization.where import RULES
from tests.cases import ALGORITHMS, GCS, Build, Params, largest_difference, make_params, random_like


def awkward_params() -> Params:
    """Every layout there is: shared widths, channels_last, permuted, 0-d, empty, other dtypes."""
    params = make_params()
    more = make_params(seed=1)
    last = torch.channels_last
    return params | {
        "second.weight": more["linear.weight"],
        "last.weight": more["conv2d.weight"].to(memory_format=last),
        "last1x1.weight": torch.randn(4, 3, 1, 1, dtype=torch.float64).to(memory_format=last),
        "last_depthwise.weight": more["depthwise.weight"].to(memory_format=last),
        "permuted.weight": torch.randn(6, 5, dtype=torch.float64).t(),
        "empty.weight": torch.zeros(0, 6, dtype=torch.float64),
        "half.weight": torch.randn(3, 6).to(torch.bfloat16),
        "half.bias": torch.randn(3).to(torch.bfloat16),
    }


def test_round_trip() -> None:
    params = awkward_params()
    packed = gcfunc.pack(params)
    assert len(packed) < len(params) - 4
    back = gcfunc.unpack(packed)
    assert list(back) == list(params)
    for name, p in params.items():
        assert torch.equal(back[name], p), name
        assert back[name].stride() == p.stride(), name
        assert back[name].dtype == p.dtype, name
        assert p.numel() == 0 or back[name].data_ptr() != p.data_ptr(), name


@pytest.mark.parametrize(
    "tree",
    [
        {"a": {"b": torch.ones(2, 3)}, "c": [torch.ones(4, 3), torch.ones(2)]},
        [torch.ones(2, 3), torch.zeros(2, 3)],
        (torch.ones(()), torch.ones(2)),
        torch.ones(2, 3),
    ],
    ids=["nested", "list", "tuple", "tensor"],
)
def test_any_structure(tree: Any) -> None:
    back = gcfunc.unpack(gcfunc.pack(tree))
    assert pytree.tree_structure(back) == pytree.tree_structure(tree)
    pytree.tree_map(torch.testing.assert_close, back, tree)


def test_unpacked_tensors_are_views() -> None:
    packed = gcfunc.pack(awkward_params())
    for view in gcfunc.unpack(packed).values():
        view.fill_(3.0)
    assert all(bool((t == 3.0).all()) for t in packed.values())


def test_the_number_of_tensors_does_not_grow_with_depth() -> None:
    def packed(blocks: int) -> int:
        layers = [nn.TransformerEncoderLayer(8, 2, 16) for _ in range(blocks)]
        return len(gcfunc.pack(dict(nn.ModuleList(layers).named_parameters())))

    assert packed(2) == packed(12) == 3


@pytest.mark.parametrize("gc", GCS)
@pytest.mark.parametrize("build", ALGORITHMS.values(), ids=ALGORITHMS)
def test_steps_as_the_unpacked_tree_does(build: Build, gc: str) -> None:
    params = awkward_params()
    opt = build(GCS[gc])
    packed = gcfunc.pack(params)
    state, packed_state = opt.init(params), opt.init(packed)
    stepped = params
    for seed in range(4):
        grads = random_like(params, seed)
        stepped, state = opt.step(stepped, grads, state)
        packed_grads = gcfunc.pack(grads, like=packed)
        packed, packed_state = opt.step(packed, packed_grads, packed_state)
    assert largest_difference(gcfunc.unpack(packed), stepped) < 1e-12
    flat, packed_flat = gcfunc.state_dict(state), gcfunc.state_dict(packed_state)
    assert flat.keys() == packed_flat.keys()
    assert largest_difference(flat, packed_flat) < 1e-12
    if gc != "plain":
        plain = build(None)
        other, _ = plain.step(params, random_like(params, 0), plain.init(params))
        once, _ = opt.step(params, random_like(params, 0), opt.init(params))
        assert largest_difference(other, once) > 1e-3


WHERES: dict[str, Any] = {
    "predicate": lambda name, tensor: name != "linear.weight" and tensor.shape != (4, 3, 3, 3),
    "columns": lambda name, tensor: Units(dim=1) if name.startswith("linear") else True,
    "groups": lambda name, tensor: Units(dim=1, groups=2) if name == "last.weight" else False,
    "mask": {name: name in ("second.weight", "last.weight") for name in awkward_params()},
}


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("where", WHERES.values(), ids=WHERES)
def test_where_means_the_original_tensors(where: Any, donate: bool, fresh_compiler: None) -> None:
    params = awkward_params()
    opt = gcfunc.sgd(0.1, 0.9, weight_decay=0.01, gc=GC(where))
    steps = gcfunc.compile(opt, backend="aot_eager") if donate else opt
    packed = gcfunc.pack(params)
    places = [t.data_ptr() for t in packed.values()]
    state, packed_state = opt.init(params), opt.init(packed)
    stepped = params
    for seed in range(2):
        grads = random_like(params, seed)
        stepped, state = opt.step(stepped, grads, state)
        packed, packed_state = steps.step(packed, gcfunc.pack(grads, like=packed), packed_state)
    assert largest_difference(gcfunc.unpack(packed), stepped) < 1e-12
    assert (places == [t.data_ptr() for t in packed.values()]) is donate
    plain, _ = gcfunc.sgd(0.1, 0.9, weight_decay=0.01).step(params, grads, opt.init(params))
    assert largest_difference(plain, opt.step(params, grads, opt.init(params))[0]) > 1e-3


@pytest.mark.parametrize("where", ["rule", *WHERES])
def test_donated_by_inductor(where: str, fresh_compiler: None) -> None:
    """In float32, where graphs are compiled ahead."""
    params = {name: p.float() for name, p in awkward_params().items() if p.dtype == torch.float64}
    mask = WHERES.get(where, "gc")
    if where == "mask":
        mask = {name: mask[name] for name in params}
    opt = gcfunc.adamw(0.01, gc=GC(mask))
    compiled = gcfunc.compile(opt)
    packed = gcfunc.pack(params)
    places = [t.data_ptr() for t in packed.values()]
    state, packed_state = opt.init(params), compiled.init(packed)
    for seed in range(3):
        grads = random_like(params, seed)
        params, state = opt.step(params, grads, state)
        compiled.step(packed, gcfunc.pack(grads, like=packed), packed_state)
    assert largest_difference(gcfunc.unpack(packed), params) < 1e-5
    assert places == [t.data_ptr() for t in packed.values()]


def test_the_pure_step_compiles_to_one_graph(fresh_compiler: None) -> None:
    params = awkward_params()
    opt = gcfunc.adam(0.01, gc="gc")
    compiled = torch.compile(opt.step, fullgraph=True, backend="aot_eager")
    packed = gcfunc.pack(params)
    grads = gcfunc.pack(random_like(params, 0), like=packed)
    state = opt.init(packed)
    expected, _ = opt.step(packed, grads, state)
    actual, _ = compiled(packed, grads, state)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert largest_difference(gcfunc.unpack(actual), gcfunc.unpack(expected)) < 1e-12


def test_centralize() -> None:
    grads = random_like(awkward_params(), 0)
    for where in (*RULES, *WHERES.values()):
        packed = gcfunc.centralize(gcfunc.pack(grads), where)
        expected = gcfunc.centralize(grads, where)
        assert largest_difference(gcfunc.unpack(packed), expected) < 1e-12
        assert largest_difference(grads, expected) > 0.1


class Small(nn.Module):
    """Convolutions, a norm and two linear layers of one width, the last two tied."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).mean((2, 3))
        out: Tensor = self.two(self.one(x).tanh())
        return out


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().double()


def batch(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)


def autograd(model: nn.Module, x: Tensor) -> Params:
    loss = model(x).square().sum()
    own = dict(model.named_parameters())
    return dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_arrive_packed(model: nn.Module, memory_format: torch.memory_format) -> None:
    model.to(memory_format=memory_format)
    packed = gcfunc.pack({name: p.detach() for name, p in model.named_parameters()})

    def loss(packed: Any) -> Tensor:
        out: Tensor = functional_call(model, gcfunc.unpack(packed), batch(0))
        return out.square().sum()

    grads = grad(loss)(packed)
    assert repr(grads) == repr(packed)
    assert largest_difference(gcfunc.unpack(grads), autograd(model, batch(0))) < 1e-12


def test_tied_parameters_are_packed_once(model: nn.Module) -> None:
    twice = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    packed = gcfunc.pack(twice)
    once = gcfunc.pack({n: p.detach() for n, p in model.named_parameters()})
    assert sum(t.numel() for t in packed.values()) == sum(t.numel() for t in once.values())
    back = gcfunc.unpack(packed)
    assert list(back) == list(twice)
    assert back["two.weight"].data_ptr() == back["one.weight"].data_ptr()

    def loss(params: Params) -> Tensor:
        out: Tensor = functional_call(model, params, batch(0), tie_weights=False)
        return out.square().sum()

    whole = autograd(model, batch(0))["one.weight"]
    for grads in (
        grad(lambda p: loss(gcfunc.unpack(p)))(packed),
        gcfunc.pack({**twice, "one.weight": whole, "two.weight": whole}, like=packed),
        gcfunc.pack({**twice, "one.weight": whole, "two.weight": None}, like=packed),
    ):
        torch.testing.assert_close(gcfunc.unpack(grads)["two.weight"], whole)


def test_tied_parameters_in_other_trees(model: nn.Module) -> None:
    """Values are not added up as if they were the parts of a gradient."""
    twice = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    packed = gcfunc.pack(twice)
    assert largest_difference(gcfunc.unpack(gcfunc.pack(twice, like=packed)), twice) == 0
    apart = {name: t.clone() for name, t in twice.items()}
    with pytest.raises(ValueError, match=r"'one.weight', 'two.weight' are tied"):
        gcfunc.pack(apart, like=packed)
    opt = gcfunc.adamw(gc="gc")
    grads = gcfunc.pack(twice, like=packed)
    _, state = opt.step(packed, grads, opt.init(packed))
    saved = {name: t.clone() for name, t in gcfunc.state_dict(state).items()}
    loaded = gcfunc.load_state_dict(opt.init(packed), saved)
    assert largest_difference(gcfunc.state_dict(loaded), saved) == 0
    saved["exp_avg.two.weight"] += 1
    with pytest.raises(ValueError, match=r"differs between 'one.weight' and 'two.weight'"):
        gcfunc.load_state_dict(opt.init(packed), saved)


def test_a_module_trains_on_packed_storage(model: nn.Module, fresh_compiler: None) -> None:
    model.norm.requires_grad_(False)
    reference = copy.deepcopy(model)
    identities = [*model.parameters()]
    opt = gcfunc.sgd(0.05, 0.9, weight_decay=1e-3, gc="gc")
    compiled = gcfunc.compile(opt, backend="aot_eager")
    packed = gcfunc.pack(model)
    assert all(a is b for a, b in zip(model.parameters(), identities, strict=True))
    packed_state = compiled.init(packed)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    plain = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    state = opt.init(plain)
    start = copy.deepcopy(reference.state_dict())
    for seed in range(4):
        for m in (model, reference):
            m.zero_grad()
            m(batch(seed)).square().sum().backward()
        own = dict(model.named_parameters())
        compiled.step(
            packed, gcfunc.pack({n: own[n].grad for n in names}, like=packed), packed_state
        )
        with torch.no_grad():
            new, state = opt.step(plain, {n: p.grad for n, p in plain.items()}, state)
            for name, p in plain.items():
                p.copy_(new[name])
    assert largest_difference(model.state_dict(), reference.state_dict()) < 1e-12
    assert largest_difference(start, reference.state_dict()) > 1e-3
    # An ordinary load writes into the packed storage.
    model.load_state_dict({name: torch.ones_like(t) for name, t in model.state_dict().items()})
    assert all(bool((t == 1).all()) for t in packed.values())


@pytest.mark.parametrize("to_packed", [False, True], ids=["to-tree", "to-packed"])
def test_checkpoints_load_either_way(to_packed: bool) -> None:
    params = awkward_params()
    opt = gcfunc.adamw(0.01, gc="gc")
    trees: list[Any] = [params, gcfunc.pack(params)]

    def run(tree: Any, state: Any, seeds: range) -> tuple[Any, Any]:
        for seed in seeds:
            grads: Any = random_like(params, seed)
            if tree is not params and not isinstance(tree, dict):
                grads = gcfunc.pack(grads, like=tree)
            tree, state = opt.step(tree, grads, state)
        return tree, state

    source, target = trees if to_packed else reversed(trees)
    source, state = run(source, opt.init(source), range(3))
    saved = {name: t.clone() for name, t in gcfunc.state_dict(state).items()}
    assert "exp_avg.linear.weight" in saved
    expected, _ = run(source, state, range(3, 5))
    values = source if to_packed else gcfunc.unpack(source)
    moved = gcfunc.pack(values, like=target) if to_packed else values
    actual, _ = run(moved, gcfunc.load_state_dict(opt.init(target), saved), range(3, 5))
    expected, actual = (t if isinstance(t, dict) else gcfunc.unpack(t) for t in (expected, actual))
    assert largest_difference(actual, expected) < 1e-14


def test_groups_need_the_same_labels() -> None:
    params = {"body": torch.randn(4, 3), "head": torch.randn(2, 3), "bias": torch.randn(2)}

    def labels(name: str, tensor: Tensor) -> str:
        return "head" if name == "head" else "body"

    opt = gcfunc.partition({"head": gcfunc.sgd(1.0, gc="gc"), "body": gcfunc.adamw()}, labels)
    with pytest.raises(ValueError, match=r"several groups.*'body' is 'body'.*'head' is 'head'"):
        opt.init(gcfunc.pack(params))
    packed = gcfunc.pack(params, labels=labels)
    assert len(packed) == 3
    grads = random_like(params, 0)
    expected, _ = opt.step(params, grads, opt.init(params))
    actual, _ = opt.step(packed, gcfunc.pack(grads, like=packed), opt.init(packed))
    assert largest_difference(gcfunc.unpack(actual), expected) < 1e-6


def test_a_matrix_without_gradients_is_left_alone() -> None:
    params = {"a": torch.randn(2, 3), "b": torch.randn(2, 3), "c": torch.randn(4)}
    opt = gcfunc.adamw(gc="gc")
    packed = gcfunc.pack(params)
    grads = gcfunc.pack({"a": torch.ones(2, 3), "b": torch.ones(2, 3), "c": None}, like=packed)
    stepped, _ = opt.step(packed, grads, opt.init(packed))
    assert torch.equal(gcfunc.unpack(stepped)["c"], params["c"])
    assert not torch.equal(gcfunc.unpack(stepped)["a"], params["a"])


def test_ensembles_under_vmap() -> None:
    params = make_params()
    opt = gcfunc.adamw(0.01, gc="gc")
    members = [gcfunc.pack(make_params(seed=seed)) for seed in range(3)]
    grads = gcfunc.pack(random_like(params, 0), like=members[0])
    stacked = pytree.tree_map(lambda *ts: torch.stack(ts), *members)
    state = torch.vmap(opt.init)(stacked)
    stepped, _ = torch.vmap(opt.step, in_dims=(0, None, 0))(stacked, grads, state)
    for i, member in enumerate(members):
        alone, _ = opt.step(member, grads, opt.init(member))
        one = pytree.tree_map(lambda t, i=i: t[i], stepped)
        assert largest_difference(gcfunc.unpack(one), gcfunc.unpack(alone)) < 1e-12


def test_copies_and_pickles() -> None:
    packed = gcfunc.pack(awkward_params())
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert largest_difference(gcfunc.unpack(twin), gcfunc.unpack(packed)) == 0
        gcfunc.adamw(gc="gc").init(twin)
        assert twin != packed


TWO: Any = {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}
OTHER = gcfunc.pack({"b": torch.ones(2, 3), "a": torch.ones(2, 3)})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: gcfunc.pack({}), ValueError, "no tensors"),
        (
            lambda p: gcfunc.pack({"a": torch.ones(2, dtype=torch.int64)}),
            TypeError,
            "'a' has dtype",
        ),
        (lambda p: gcfunc.pack(TWO, like=TWO), TypeError, "like must be a tree packed before"),
        (lambda p: gcfunc.pack({"a": TWO["a"]}, like=p), ValueError, "missing 'b'"),
        (lambda p: gcfunc.pack({**TWO, "b": None}, like=p), ValueError, "'b' is None"),
        (
            lambda p: gcfunc.pack({**TWO, "b": torch.ones(3, 2)}, like=p),
            ValueError,
            r"'b' has shape \(3, 2\), expected \(2, 3\)",
        ),
        (
            lambda p: gcfunc.pack({**TWO, "b": torch.ones(2, 3).double()}, like=p),
            ValueError,
            "'b' has dtype torch.float64, expected torch.float32",
        ),
        (lambda p: gcfunc.pack({**TWO, "b": 1.0}, like=p), TypeError, "'b' must be a tensor"),
        (
            lambda p: gcfunc.pack({**TWO, "b": TWO["b"].to_sparse()}, like=p),
            TypeError,
            "'b' has layout",
        ),
        (lambda p: gcfunc.pack(TWO, like=p, labels=TWO), TypeError, "one of the two"),
        (lambda p: gcfunc.unpack(TWO), TypeError, "must come from gcfunc.pack, got dict"),
        (lambda p: gcfunc.sgd(0.1).init({"model": p}), TypeError, "cannot be part of another"),
        (
            lambda p: gcfunc.sgd(0.1).step(p, TWO, gcfunc.sgd(0.1).init(p)),
            ValueError,
            r"gcfunc.pack\(grads, like=params\)",
        ),
        (
            lambda p: gcfunc.sgd(0.1).step(p, OTHER, gcfunc.sgd(0.1).init(p)),
            ValueError,
            "packed alike",
        ),
        (
            lambda p: gcfunc.sgd(0.1, 0.9).step(p, p, gcfunc.sgd(0.1, 0.9).init(TWO)),
            ValueError,
            "make the state from the packed params",
        ),
        (
            lambda p: gcfunc.sgd(0.1, 0.9).step(p, p, gcfunc.sgd(0.1, 0.9).init(OTHER)),
            ValueError,
            "packed alike",
        ),
        (lambda p: gcfunc.sgd(0.1, gc="gcc").init(p), ValueError, "selects none.*'?a'? "),
    ],
)
def test_errors(call: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    packed = gcfunc.pack(TWO)
    before = pytree.tree_map(Tensor.clone, packed)
    with pytest.raises(error, match=message):
        call(packed)
    assert largest_difference(gcfunc.unpack(packed), gcfunc.unpack(before)) == 0
