"""Every kind of tensor that real models hand over: layouts, layers, ties, gaps, dtypes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import gcfunc
from gcfunc import GC, Optimizer, State
from tests.cases import ALGORITHMS, GCS, Params, largest_difference, make_params, random_like

WHERES = {name: GCS[name] for name in ("plain", "gc", "gc2")}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
each_where = pytest.mark.parametrize("where", WHERES)


def run(opt: Optimizer, params: Params, grads: Sequence[Any]) -> tuple[Params, State]:
    state = opt.init(params)
    for g in grads:
        params, state = opt.step(params, g, state)
    return params, state


def tensors(params: Params, state: State) -> Params:
    """Params and slots under one roof."""
    slots = {f"{s}.{n}": t for s, column in state.slots.items() for n, t in column.items()}
    return params | slots


def of(name: str, everything: Params) -> Params:
    """What belongs to one parameter."""
    return {k: t for k, t in everything.items() if k == name or k.endswith(f".{name}")}


def identical(a: Params, b: Params) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def each(operation: Callable[[Tensor], Tensor], params: Mapping[str, Tensor]) -> Params:
    return {name: operation(p) for name, p in params.items()}


def centralized_by_loop(g: Tensor) -> Tensor:
    """The formula read aloud: each row less the mean of its entries."""
    if g.ndim < 2 or not g.numel():
        return g
    return torch.stack([row - row.sum() / row.numel() for row in g])


@each_algorithm
@pytest.mark.parametrize("where", [where for where in GCS if where != "plain"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_gc_makes_a_difference_on_the_inputs_below(
    algorithm: str, where: str, dtype: torch.dtype
) -> None:
    for params in (make_params(dtype), {name: p.to(dtype) for name, p in CONTIGUOUS.items()}):
        grads = [random_like(params, t) for t in range(2)]
        with_gc, _ = run(ALGORITHMS[algorithm](GCS[where]), params, grads)
        without, _ = run(ALGORITHMS[algorithm](None), params, grads)
        for name, p in params.items():
            selected = p.ndim >= (4 if where.startswith("gcc") else 2)
            assert torch.equal(with_gc[name], without[name]) == (not selected), name


# Layouts


def permuted(t: Tensor, order: Sequence[int]) -> Tensor:
    """The same values, in memory as if the dimensions came in this order."""
    return t.permute([*order]).contiguous().permute([order.index(i) for i in range(t.ndim)])


def channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    # Not contiguous(), which leaves a depthwise weight with the strides it has.
    like = torch.empty_like(t, memory_format=formats.get(t.ndim, torch.contiguous_format))
    return like.copy_(t)


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape) if t.ndim else t


def gapped(t: Tensor) -> Tensor:
    every_other = (slice(None, None, 2),) * t.ndim
    holder = torch.full([2 * size for size in t.shape], torch.nan, dtype=t.dtype)
    holder[every_other] = t
    return holder[every_other]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": channels_last,
    "transposed": lambda t: permuted(t, range(t.ndim)[::-1]),
    "rotated": lambda t: permuted(t, [*range(1, t.ndim), 0][: t.ndim]),
}
VIEWS = {"expanded": expanded, "gapped": gapped}
SHAPES = {
    "conv3d": (2, 3, 2, 3, 2),
    "conv2d": (4, 3, 3, 3),
    "depthwise": (4, 1, 3, 3),
    "pointwise": (5, 4, 1, 1),
    "linear": (5, 6),
    "row": (1, 6),
    "bias": (5,),
    "gain": (),
}
CONTIGUOUS, *GRADS = (
    random_like({n: torch.empty(s, dtype=torch.float64) for n, s in SHAPES.items()}, t)
    for t in range(5)
)


def dense(t: Tensor) -> bool:
    return t.numel() == 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))


@each_algorithm
@each_where
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_kept_whatever_the_gradients_are(
    algorithm: str, where: str, layout: str
) -> None:
    opt = ALGORITHMS[algorithm](WHERES[where])
    params = each(LAYOUTS[layout], CONTIGUOUS)
    for grad_layout, lay_out in {**LAYOUTS, **VIEWS}.items():
        grads = [each(lay_out, g) for g in GRADS]
        result = tensors(*run(opt, params, grads))
        for name, p in params.items():
            for key, tensor in of(name, result).items():
                assert tensor.stride() == p.stride(), (key, grad_layout)
        expected = tensors(*run(opt, CONTIGUOUS, [each(Tensor.contiguous, g) for g in grads]))
        if where == "plain":
            assert identical(result, expected), grad_layout
        else:  # a mean sums in the order of memory
            assert largest_difference(result, expected) < 1e-12, grad_layout


def test_transforms_work_on_gradients_of_another_layout() -> None:
    opt = ALGORITHMS["adamw"](GC())
    params = {"depthwise": channels_last(CONTIGUOUS["depthwise"])}
    grads = {"depthwise": CONTIGUOUS["depthwise"]}
    assert params["depthwise"].stride() != grads["depthwise"].stride()

    def through(g: Tensor) -> Tensor:
        return (opt.step(params, {"depthwise": g}, opt.init(params))[0]["depthwise"] ** 2).sum()

    g = grads["depthwise"]
    expected = torch.func.grad(through)(channels_last(g))
    assert expected.abs().max() > 0
    torch.testing.assert_close(torch.func.grad(through)(g), expected)
    batched = torch.vmap(through)(torch.stack([g, -g]))
    torch.testing.assert_close(batched, torch.stack([through(g), through(-g)]))


@each_algorithm
@each_where
@pytest.mark.parametrize("view", VIEWS)
def test_views_work_and_become_dense(algorithm: str, where: str, view: str) -> None:
    opt = ALGORITHMS[algorithm](WHERES[where])
    params = each(VIEWS[view], CONTIGUOUS)
    grads = [each(VIEWS[view], g) for g in GRADS]
    before = each(Tensor.clone, params)
    result = tensors(*run(opt, params, grads))
    assert identical(params, before)
    assert not dense(params["conv2d"])
    assert all(map(dense, result.values()))
    dense_grads = [each(Tensor.contiguous, g) for g in grads]
    contiguous = each(Tensor.contiguous, params)
    assert largest_difference(result, tensors(*run(opt, contiguous, dense_grads))) < 1e-12
    plain = tensors(*run(ALGORITHMS[algorithm](None), contiguous, dense_grads))
    assert (largest_difference(result, plain) < 1e-12) == (where == "plain")


@pytest.mark.parametrize("layout", [*LAYOUTS, *VIEWS])
def test_centralize_is_bit_equal_in_every_layout_where_sums_are_exact(layout: str) -> None:
    integers = each(lambda g: (100 * g).round(), GRADS[0])
    arranged = each({**LAYOUTS, **VIEWS}[layout], integers)
    centralized = gcfunc.centralize(arranged)
    assert identical(centralized, each(centralized_by_loop, arranged))
    assert not torch.equal(centralized["conv2d"], arranged["conv2d"])


# Layers


class Layers(nn.Module):
    """One of each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(1, 2, 3, padding=1)
        self.conv2d = nn.Conv2d(3, 4, 3, padding=1)
        self.conv1d = nn.Conv1d(4, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.pointwise = nn.Conv2d(4, 6, 1)
        self.embedding = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 3)
        self.nothing = nn.Parameter(torch.empty(0))
        self.no_rows = nn.Parameter(torch.empty(0, 6))
        self.no_columns = nn.Parameter(torch.empty(3, 0))
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        x = self.conv2d(self.conv3d(images[:, None]).mean(1))
        x = x + self.conv1d(x.flatten(2)).view_as(x)
        x = self.pointwise(self.depthwise(x).tanh()).mean((2, 3))
        x = self.norm(x + self.embedding(tokens))
        weight = torch.cat([self.linear.weight + self.no_columns.sum(1, True), self.no_rows])
        return self.gain * nn.functional.linear(x, weight, self.linear.bias) + self.nothing.sum()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(5, 3, 6, 6, generator=generator, dtype=torch.float64)
    return images, torch.randint(7, (5,), generator=generator)


def layers(memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
    torch.manual_seed(0)
    model = Layers().double()
    for p in model.parameters():
        if p.ndim == 4:
            p.data = torch.empty_like(p, memory_format=memory_format).copy_(p.data)
    return model


def gradients(model: nn.Module, params: Params, seed: int) -> Params:
    """Real ones, by autograd, at these parameters."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    loss = functional_call(model, leaves, batch(seed)).square().mean()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def detached(model: nn.Module, **kwargs: Any) -> Params:
    return {n: p.detach().clone() for n, p in model.named_parameters(**kwargs)}


# Their decay is decoupled: GC at the gradient is a plain step on centralized gradients.
@pytest.mark.parametrize("algorithm", ["sgdw", "adamw", "radam-decoupled", "ranger"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_layer_is_centralized_by_row(
    algorithm: str, memory_format: torch.memory_format
) -> None:
    model = layers(memory_format)
    start = detached(model)
    opt, plain = ALGORITHMS[algorithm](GC()), ALGORITHMS[algorithm](None)
    params, state = start, opt.init(start)
    expected, expected_state = start, plain.init(start)
    uncentralized, uncentralized_state = start, plain.init(start)
    for t in range(6):
        params, state = opt.step(params, gradients(model, params, t), state)
        by_loop = each(centralized_by_loop, gradients(model, expected, t))
        expected, expected_state = plain.step(expected, by_loop, expected_state)
        uncentralized, uncentralized_state = plain.step(
            uncentralized, gradients(model, uncentralized, t), uncentralized_state
        )
    assert largest_difference(params, expected) < 1e-10
    assert largest_difference(params, uncentralized) > 1e-3
    for name, p in start.items():
        assert params[name].stride() == p.stride(), name
        assert torch.equal(params[name], p) == (not p.numel()), name


@each_algorithm
@pytest.mark.parametrize("where", GCS)
def test_empty_tensors_change_nothing_for_the_others(algorithm: str, where: str) -> None:
    opt = ALGORITHMS[algorithm](GCS[where])
    empties = {"empty": torch.empty(0), "rows": torch.empty(0, 3), "columns": torch.empty(3, 0)}
    empties |= {"conv": torch.empty(2, 0, 3, 3)}
    params = make_params(torch.float32)
    grads = [random_like(params, t) for t in range(4)]
    result = tensors(*run(opt, empties | params, [empties | g for g in grads]))
    expected = tensors(*run(opt, params, grads))
    assert identical({key: result[key] for key in expected}, expected)
    for name, empty in empties.items():
        assert {t.shape for t in of(name, result).values()} == {empty.shape}


# Ties


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)).tanh())


TOKENS = torch.tensor([0, 1, 2, 3, 3, 5])


def tied() -> tuple[Tied, Params]:
    """The model and its gradients, which come from both uses of the weight."""
    torch.manual_seed(1)
    model = Tied().double()
    model(TOKENS).square().mean().backward()
    return model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@each_where
def test_tied_weights_are_one_parameter(where: str) -> None:
    model, grads = tied()
    params = detached(model)
    assert [*params] == ["embedding.weight", "body.weight", "body.bias"]
    opt = ALGORITHMS["adamw"](WHERES[where])
    new, _ = opt.step(params, grads, opt.init(params))
    called = functional_call(model, new, (TOKENS,))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(new[name])
    assert model.head.weight is model.embedding.weight
    assert torch.equal(called, model(TOKENS))
    untied = nn.functional.linear(
        model.body(model.embedding(TOKENS)).tanh(), params["embedding.weight"]
    )
    assert not torch.allclose(called, untied)


@each_algorithm
@each_where
def test_a_weight_under_two_names_stays_equal_and_apart(algorithm: str, where: str) -> None:
    model, grads = tied()
    params: Params = {**dict(model.named_parameters(remove_duplicate=False))}
    assert params["head.weight"] is params["embedding.weight"]
    both = grads | {"head.weight": grads["embedding.weight"]}
    opt = ALGORITHMS[algorithm](WHERES[where])
    with torch.no_grad():
        new, state = run(opt, params, [both] * 4)
        once = tensors(*run(opt, detached(model), [grads] * 4))
    result = tensors(new, state)
    embedding, head = of("embedding.weight", result), of("head.weight", result)
    assert all(torch.equal(*pair) for pair in zip(embedding.values(), head.values(), strict=True))
    assert identical({key: result[key] for key in once}, once)
    storages = [t.untyped_storage().data_ptr() for t in result.values()]
    assert len(set(storages)) == len(storages)


# Missing gradients


@each_algorithm
@pytest.mark.parametrize("where", GCS)
def test_without_a_gradient_nothing_changes(algorithm: str, where: str) -> None:
    opt = ALGORITHMS[algorithm](GCS[where])
    params = make_params()
    missing = ["conv2d.weight", "linear.bias"]
    # Two steps with gradients, so that slots hold something; then k = 3 synchronizes twice.
    params, state = run(opt, params, [random_like(params, t) for t in range(2)])
    before = tensors(params, state)
    for t in range(4):
        grads: dict[str, Tensor | None] = {**random_like(params, 2 + t)}
        params, state = opt.step(params, grads | dict.fromkeys(missing), state)
    after = tensors(params, state)
    for name in params:
        for key, tensor in of(name, after).items():
            assert torch.equal(tensor, before[key]) == (name in missing), key
            assert tensor.data_ptr() != before[key].data_ptr(), key


@each_algorithm
@each_where
def test_a_parameter_may_join_late(algorithm: str, where: str) -> None:
    opt = ALGORITHMS[algorithm](WHERES[where])
    start = make_params()
    late = ["conv2d.weight", "linear.bias"]
    grads = [random_like(start, t) for t in range(6)]
    absent: list[Any] = [g | dict.fromkeys(late) for g in grads[:2]]
    joined = tensors(*run(opt, start, absent + grads[2:]))
    # Its slots are as good as new, the count of steps goes on.
    params, state = start, opt.init(start)._replace(step=torch.tensor(2))
    for g in grads[2:]:
        params, state = opt.step(params, g, state)
    expected = tensors(params, state)
    early = tensors(*run(opt, start, grads))
    for name in start:
        equal = {key: torch.equal(t, expected[key]) for key, t in of(name, joined).items()}
        if name in late:
            assert all(equal.values()), equal
            assert not torch.equal(joined[name], start[name])
        else:
            assert identical(of(name, joined), of(name, early))
            assert not equal[name]


@each_algorithm
def test_no_gradient_at_all(algorithm: str) -> None:
    opt = ALGORITHMS[algorithm](GC())
    params = make_params()
    state = opt.init(params)
    new, after = opt.step(params, dict.fromkeys(params), state)
    assert identical(tensors(new, after), tensors(params, state))
    assert after.step == 1


@each_where
def test_frozen_parameters(where: str) -> None:
    model = layers()
    frozen = ["conv2d.weight", "embedding.weight", "gain"]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    model(*batch(0)).square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert [n for n, g in grads.items() if g is None] == sorted(frozen, key=[*grads].index)
    opt = ALGORITHMS["ranger"](WHERES[where])
    everything = detached(model)
    result = tensors(*run(opt, everything, [grads] * 4))
    trained = {n: p for n, p in everything.items() if n not in frozen}
    expected = tensors(*run(opt, trained, [{n: grads[n] for n in trained}] * 4))
    assert identical({key: result[key] for key in expected}, expected)
    assert all(torch.equal(result[name], everything[name]) for name in frozen)


# Dtypes; of devices tells tests/gpu


@each_algorithm
@each_where
def test_a_tree_may_mix_dtypes(algorithm: str, where: str) -> None:
    opt = ALGORITHMS[algorithm](WHERES[where])
    alone = {str(d).removeprefix("torch."): make_params(d) for d in FLOATS}
    mixed = {f"{d}.{n}": p for d, params in alone.items() for n, p in params.items()}
    # Interleaved, so that a dtype's tensors are not neighbours.
    mixed = {key: mixed[key] for key in sorted(mixed, key=lambda key: key.split(".")[1:])}
    steps = range(4)
    grads = {d: [random_like(params, t) for t in steps] for d, params in alone.items()}
    mixed_grads = [
        {key: grads[key.split(".")[0]][t][key.split(".", 1)[1]] for key in mixed} for t in steps
    ]
    params, state = run(opt, mixed, mixed_grads)
    for d, own in alone.items():
        expected = tensors(*run(opt, own, grads[d]))
        for name in own:
            result = of(f"{d}.{name}", tensors(params, state)).values()
            for tensor, want in zip(result, of(name, expected).values(), strict=True):
                assert tensor.dtype == want.dtype == own[name].dtype
                assert torch.equal(tensor, want)


@each_algorithm
@pytest.mark.parametrize("where", GCS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(algorithm: str, where: str, dtype: torch.dtype) -> None:
    opt = ALGORITHMS[algorithm](GCS[where])
    params = make_params(dtype)
    state = opt.init(params)
    for t in range(4):
        grads = random_like(params, t)
        widened = state._replace(slots={s: each(Tensor.float, c) for s, c in state.slots.items()})
        wide = tensors(*opt.step(each(Tensor.float, params), each(Tensor.float, grads), widened))
        params, state = opt.step(params, grads, state)
        assert identical(tensors(params, state), each(lambda t: t.to(dtype), wide))


def bfloat16_weights(count: int) -> Tensor:
    """Of the size that weights have in networks, 0.02 and a bit more."""
    generator = torch.Generator().manual_seed(0)
    return (0.02 + 0.004 * torch.rand(count, generator=generator)).bfloat16()


def test_decay_survives_in_bfloat16_where_gradients_are_noisy() -> None:
    """One step's decay is 1e-4 of a weight, far below its rounding, 2e-3 to 4e-3 of it.

    Added to the update before the only rounding, it shifts which way the noise rounds, and so is
    right in the mean. torch rounds after the decay alone, and loses all of it.
    """
    start, steps, lr, decay = bfloat16_weights(1 << 13), 300, 1e-3, 0.1
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(len(start), generator=generator).bfloat16() for _ in range(steps)]

    def ours(dtype: torch.dtype, weight_decay: float) -> Tensor:
        opt = gcfunc.adamw(lr, weight_decay=weight_decay)
        return run(opt, {"w": start.to(dtype)}, [{"w": g.to(dtype)} for g in grads])[0]["w"]

    def torchs(weight_decay: float) -> Tensor:
        w = nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([w], lr, weight_decay=weight_decay, foreach=False)
        for g in grads:
            w.grad = g
            optimizer.step()
        return w.detach()

    def lost(decayed: Tensor, plain: Tensor) -> float:
        """The share of the weights' mean that decay took away."""
        return float((plain.double() - decayed.double()).mean() / start.double().mean())

    due = 1 - (1 - lr * decay) ** steps
    exact = lost(ours(torch.float32, decay), ours(torch.float32, 0.0))
    assert exact == pytest.approx(due, rel=0.01)
    rounded = lost(ours(torch.bfloat16, decay), ours(torch.bfloat16, 0.0))
    assert rounded == pytest.approx(due, rel=0.05)
    assert torch.equal(torchs(decay), torchs(0.0))


def test_decay_vanishes_in_bfloat16_where_steps_are_too_small_to_round_anywhere() -> None:
    """Noise helps only if it reaches the next number: not weights of 1 with steps of 1e-3."""
    opt = gcfunc.adamw(1e-3, weight_decay=0.1)
    params = {"w": 1 + bfloat16_weights(1000)}
    generator = torch.Generator().manual_seed(1)
    grads = [{"w": torch.randn(1000, generator=generator).bfloat16()} for _ in range(50)]
    assert torch.equal(run(opt, params, grads)[0]["w"], params["w"])
    wide, _ = run(opt, each(Tensor.float, params), [each(Tensor.float, g) for g in grads])
    assert (wide["w"] != params["w"]).all()


@pytest.mark.parametrize(("decay", "survives"), [(2**-10, False), (2**-7, True)])
def test_decay_alone_vanishes_in_bfloat16_below_its_rounding(decay: float, survives: bool) -> None:
    opt = gcfunc.adamw(1.0, weight_decay=decay)
    params = {"w": bfloat16_weights(1000)}
    result, _ = run(opt, params, [each(torch.zeros_like, params)] * 20)
    moved = result["w"] != params["w"]
    assert moved.all() if survives else not moved.any()
