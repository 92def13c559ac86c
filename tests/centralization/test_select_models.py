"""What the paper means by weights, asked of real models."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import nn
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
from tests.centralization.layers import COLUMNS, differ, require_by_output_unit, tied


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


def test_linear_layer_that_stores_its_transpose() -> None:
    require_by_output_unit(lambda: Conv1D(3, 4), [(2, 4)], COLUMNS)


def test_tied_to_one_that_is_transposed() -> None:
    """They do not agree on what an output unit is."""
    assert not any(gcfunc.select(tied(nn.Linear(4, 4), Conv1D(4, 4))).values())
