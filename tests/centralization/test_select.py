"""What the paper means by weights, asked of real models and of every kind of layer."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

import gcfunc
from gcfunc import GC, Units
from gcfunc._centralization.where import RULES
from tests.cases import Params

COLUMNS = Units(dim=1)


def resnet() -> nn.Module:
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck"
    )
    return ResNetForImageClassification(config)


def vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=32,
        patch_size=16,
    )
    return ViTForImageClassification(config)


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=11,
        n_positions=7,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


IMAGES = {
    "pixel_values": torch.linspace(0, 99, 2 * 3 * 32 * 32, dtype=torch.float64)
    .sin()
    .view(2, 3, 32, 32),
    "labels": torch.tensor([0, 1]),
}
TOKENS = dict.fromkeys(("input_ids", "labels"), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]))

# The model, its input, and how each weight that is selected is laid out, by its name's end.
MODELS: dict[str, tuple[Callable[[], nn.Module], Params, dict[str, bool | Units]]] = {
    "resnet": (resnet, IMAGES, {".convolution.weight": True, "classifier.1.weight": True}),
    "vit": (
        vit,
        IMAGES,
        {
            "patch_embeddings.projection.weight": True,
            **{f"attention.{x}_proj.weight": True for x in "qkvo"},
            "mlp.fc1.weight": True,
            "mlp.fc2.weight": True,
            "classifier.weight": True,
        },
    ),
    "gpt2": (
        gpt2,
        TOKENS,
        {f"{x}.weight": COLUMNS for x in ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")},
    ),
}
# What the rule by dimensions takes too, and the paper does not mean.
TABLES = {
    "resnet": [],
    "vit": ["vit.embeddings.cls_token", "vit.embeddings.position_embeddings"],
    "gpt2": ["transformer.wte.weight", "transformer.wpe.weight"],
}

each_model = pytest.mark.parametrize("name", MODELS)


def real(name: str) -> tuple[Params, Params, dict[str, bool | Units]]:
    """Params, their gradients by a backward pass, and the mask."""
    torch.manual_seed(0)
    build, inputs, _ = MODELS[name]
    model = build().double()
    for p in model.parameters():
        # A LayerNorm whose gains are all 1 makes the gradients of what it feeds centered.
        p.data += 0.3 * torch.randn_like(p)
    model(**inputs).loss.backward()
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == params.keys()
    return params, grads, gcfunc.select(model)


def differ(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) > 1e-6


@each_model
def test_selected_by_name(name: str) -> None:
    build, _, expected = MODELS[name]
    model = build()
    mask = gcfunc.select(model)
    assert [*mask] == [n for n, _ in model.named_parameters()]
    used = set()
    for parameter, answer in mask.items():
        ends = [end for end in expected if parameter.endswith(end)]
        assert answer == (expected[ends[0]] if ends else False), parameter
        used |= {*ends}
    assert used == {*expected}
    # The other weights with at least two dimensions are tables.
    weights = [n for n, p in model.named_parameters() if p.ndim >= 2]
    assert [n for n in weights if not mask[n]] == TABLES[name]


def test_linear_selects_the_others() -> None:
    for model in (vit(), gpt2(), resnet()):
        chosen = {r: {n for n, a in gcfunc.select(model, r).items() if a} for r in RULES}
        assert chosen["linear"] == chosen["gc"] - chosen["gcc"] != set()


def test_gcc_selects_convolutions_only() -> None:
    def selected(model: nn.Module) -> list[str]:
        return [n for n, answer in gcfunc.select(model, "gcc").items() if answer]

    assert selected(vit()) == ["vit.embeddings.patch_embeddings.projection.weight"]
    assert selected(gpt2()) == []
    assert [n for n in gcfunc.select(resnet()) if n.endswith("convolution.weight")] == (
        selected(resnet())
    )
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ConvTranspose1d(3, 2, 3), nn.Linear(2, 2))
    assert selected(model) == ["0.weight", "1.weight"]


@each_model
@pytest.mark.parametrize("at", ["gradient", "update"])
def test_one_step_end_to_end(name: str, at: Literal["gradient", "update"]) -> None:
    params, grads, mask = real(name)

    def step(gc: GC | str | None) -> Params:
        # Coupled decay, for without it a table that feeds a LayerNorm is centered already.
        opt = gcfunc.sgd(0.5, weight_decay=0.1, gc=gc)
        return opt.step(params, grads, opt.init(params))[0]

    new, plain, by_dimensions = step(GC(where=mask, at=at)), step(None), step("gc")
    for n, answer in mask.items():
        if answer:
            # By row; where columns are the units, transposed, by row, and transposed back.
            g = grads[n] + 0.1 * params[n]
            g = g if answer is True else g.T
            g = torch.stack([row - row.sum() / row.numel() for row in g])
            expected = params[n] - 0.5 * (g if answer is True else g.T)
            torch.testing.assert_close(new[n], expected, rtol=0, atol=1e-12)
            assert differ(new[n], plain[n]), n
            # The rule by dimensions takes HF's Conv1D by its inputs.
            assert differ(new[n], by_dimensions[n]) == (answer is not True), n
        else:
            assert torch.equal(new[n], plain[n]), n
            assert differ(new[n], by_dimensions[n]) == (n in TABLES[name]), n


# Layers

OUTPUT_CHANNELS_LAST = (nn.Linear, nn.Bilinear, Conv1D)
LAYERS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]], bool | Units]] = {
    "linear": (lambda: nn.Linear(4, 3), [(2, 4)], True),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), [(2, 3), (2, 4)], True),
    "hf-conv1d": (lambda: Conv1D(3, 4), [(2, 4)], COLUMNS),
    "conv1d": (lambda: nn.Conv1d(4, 3, 3), [(2, 4, 5)], True),
    "conv2d": (lambda: nn.Conv2d(4, 3, 3), [(2, 4, 5, 5)], True),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), [(2, 2, 3, 3, 3)], True),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), [(2, 4, 5, 5)], True),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), [(2, 4, 5, 5)], True),
    "pointwise": (lambda: nn.Conv2d(4, 3, 1), [(2, 4, 5, 5)], True),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 3, 3), [(2, 4, 5)], COLUMNS),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2), [(2, 4, 5, 5)], COLUMNS),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), [(2, 2, 3, 3, 3)], COLUMNS),
    "transposed-grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
        [(2, 4, 5, 5)],
        Units(dim=1, groups=2),
    ),
    "transposed-depthwise": (
        lambda: nn.ConvTranspose1d(4, 4, 3, groups=4),
        [(2, 4, 5)],
        Units(dim=1, groups=4),
    ),
}


def output_units(layer: nn.Module, inputs: list[Tensor]) -> Iterator[Tensor]:
    """Which weights each output channel depends on, found by differentiating it."""
    outputs = layer(*inputs)
    channels = outputs.unbind(-1 if isinstance(layer, OUTPUT_CHANNELS_LAST) else 1)
    for channel in channels:
        (g,) = torch.autograd.grad(
            channel.sum(), [layer.get_parameter("weight")], retain_graph=True
        )
        yield g != 0


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_by_output_unit(name: str) -> None:
    build, shapes, answer = LAYERS[name]
    torch.manual_seed(0)
    layer = build().double()
    inputs = [1 + torch.rand(shape, dtype=torch.float64) for shape in shapes]
    assert gcfunc.select(layer) == {"weight": answer, "bias": False}
    layer(*inputs).pow(3).sum().backward()
    grads = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    expected = grads["weight"].clone()
    uses = torch.zeros_like(expected)
    for unit in output_units(layer, inputs):
        expected[unit] -= expected[unit].mean()
        uses += unit
    assert (uses == 1).all()
    centralized = gcfunc.centralize(grads, where=gcfunc.select(layer))
    torch.testing.assert_close(centralized["weight"], expected, rtol=0, atol=1e-9)
    assert centralized["bias"] is grads["bias"]
    assert differ(centralized["weight"], grads["weight"])
    by_dimensions = gcfunc.centralize(grads)["weight"]
    # A group of one input has rows for units, transposed or not.
    rows = answer is True or answer == Units(dim=1, groups=len(expected))
    assert differ(centralized["weight"], by_dimensions) == (not rows)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def parametrized(layer: nn.Module, *by: nn.Module) -> nn.Module:
    for module in by:
        parametrize.register_parametrization(layer, "weight", module)
    return layer


def weighing(layer: nn.Module, weight: Tensor) -> nn.Module:
    layer.weight = nn.Parameter(weight)
    return layer


def tied(first: nn.Module, second: nn.Module) -> nn.Module:
    second.weight = first.weight
    return nn.ModuleList([first, second])


class Projection(nn.Module):
    """Someone's own layer, its weight stored by inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))
        self.table = nn.Parameter(torch.ones(4, 3))


ORIGINAL = "parametrizations.weight.original"
NOTHING: dict[str, Any] = {}
# What of a model is selected; all else is not.
MODULES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "attention": (
        lambda: nn.MultiheadAttention(8, 2),
        {"in_proj_weight": True, "out_proj.weight": True},
    ),
    "attention, keys and values of other widths": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True),
        {f"{x}_proj_weight": True for x in "qkv"} | {"out_proj.weight": True},
    ),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        {"self_attn.in_proj_weight": True, "self_attn.out_proj.weight": True}
        | {"linear1.weight": True, "linear2.weight": True},
    ),
    "tables, norms and recurrence": (
        lambda: nn.ModuleList(
            [
                nn.Embedding(5, 4),
                nn.EmbeddingBag(5, 4),
                nn.LayerNorm([3, 4]),
                nn.BatchNorm2d(3),
                nn.GroupNorm(1, 3),
                nn.PReLU(3),
                nn.LSTM(3, 4),
            ]
        ),
        NOTHING,
    ),
    "one input": (lambda: nn.Linear(1, 3), NOTHING),
    "one input, depthwise": (lambda: nn.Conv2d(4, 4, 1, groups=4), NOTHING),
    "one input, transposed": (lambda: nn.ConvTranspose2d(2, 6, 1, groups=2), NOTHING),
    "two inputs, transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 1, groups=2),
        {"weight": Units(dim=1, groups=2)},
    ),
    "no inputs": (lambda: weighing(nn.Linear(4, 3), torch.empty(3, 0)), NOTHING),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), {ORIGINAL: True}),
    "spectral norm, transposed": (
        lambda: parametrizations.spectral_norm(nn.ConvTranspose1d(4, 6, 3, groups=2)),
        {ORIGINAL: Units(dim=1, groups=2)},
    ),
    "spectral norm of a table": (
        lambda: parametrizations.spectral_norm(nn.Embedding(4, 3)),
        NOTHING,
    ),
    # Of its two parameters the direction, which has the weight's shape; lengths have one input.
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        {"parametrizations.weight.original1": True},
    ),
    "two parametrizations": (
        lambda: parametrized(nn.Linear(4, 3), Halved(), Halved()),
        {ORIGINAL: True},
    ),
    "head tied to its embedding": (lambda: tied(nn.Embedding(5, 4), nn.Linear(4, 5)), NOTHING),
    "embedding tied to its head": (lambda: tied(nn.Linear(4, 5), nn.Embedding(5, 4)), NOTHING),
    "tied twins": (lambda: tied(nn.Linear(4, 4), nn.Linear(4, 4)), {"0.weight": True}),
    "tied and transposed": (lambda: tied(nn.Linear(4, 4), Conv1D(4, 4)), NOTHING),
    "someone's own": (Projection, NOTHING),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    build, expected = MODULES[name]
    model = build()
    mask = gcfunc.select(model)
    assert [*mask] == [n for n, _ in model.named_parameters()]
    assert {n: answer for n, answer in mask.items() if answer is not False} == expected
    if expected:
        grads = {n: torch.rand_like(p) for n, p in model.named_parameters()}
        centralized = gcfunc.centralize(grads, where=mask)
        for n in grads:
            assert torch.equal(centralized[n], grads[n]) == (n not in expected), n


@pytest.mark.parametrize("where", RULES)
def test_further_layers(where: str) -> None:
    class Table(nn.Embedding):
        pass

    model = nn.ModuleDict(
        {
            "own": Projection(),
            "table": Table(5, 4),
            "lstm": nn.LSTM(3, 4),
            "narrow": Table(5, 1),
            "linear": nn.Linear(4, 3),
        }
    )
    plain = {n: answer for n, answer in gcfunc.select(model, where).items() if answer}
    assert plain == ({} if where == "gcc" else {"linear.weight": True})
    mask = gcfunc.select(
        model,
        where,
        layers={Projection: COLUMNS, nn.Embedding: Units(), nn.LSTM: Units(), nn.Linear: COLUMNS},
    )
    assert {n: answer for n, answer in mask.items() if answer} == {
        "own.weight": COLUMNS,
        "table.weight": True,
        "lstm.weight_ih_l0": True,
        "lstm.weight_hh_l0": True,
        "linear.weight": COLUMNS,
    }


def test_frozen_and_shared_modules_are_listed_once() -> None:
    layer = nn.Linear(4, 3).requires_grad_(False)
    model = nn.ModuleList([layer, layer])
    assert gcfunc.select(model) == {"0.weight": True, "0.bias": False}
