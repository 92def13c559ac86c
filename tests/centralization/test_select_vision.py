"""What the paper means by weights, asked of torchvision's models, and one step of each."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

import gcfunc
from gcfunc.hooks import centralize_backward
from tests.centralization.layers import differ

Loss = Callable[[nn.Module], Tensor]


def images(model: nn.Module) -> Tensor:
    """Two small images through a classifier."""
    x = torch.linspace(0, 99, 2 * 3 * 64 * 64).sin().view(2, 3, 64, 64)
    return nn.functional.cross_entropy(model(x), torch.tensor([0, 1]))


def segmented(model: nn.Module) -> Tensor:
    x = torch.linspace(0, 99, 2 * 3 * 64 * 64).sin().view(2, 3, 64, 64)
    out: Tensor = model(x)["out"]
    return out.square().mean()


def detected(model: nn.Module) -> Tensor:
    """The four losses of a Faster R-CNN, with one box in one image."""
    image = torch.linspace(0, 99, 3 * 64 * 64).sin().view(3, 64, 64)
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}
    losses: dict[str, Tensor] = model([image], [target])
    assert len(losses) == 4
    return torch.stack([*losses.values()]).sum()


def faster_rcnn() -> nn.Module:
    return models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3
    )


def deeplab() -> nn.Module:
    return models.segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )


def vit() -> nn.Module:
    return models.VisionTransformer(
        image_size=64,
        patch_size=32,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=12,
        num_classes=3,
    )


# What is left out of those with at least two dimensions.
MODELS: dict[str, tuple[Callable[[], nn.Module], Loss, list[str]]] = {
    "resnet18": (lambda: models.resnet18(num_classes=3), images, []),
    "mobilenet": (lambda: models.mobilenet_v3_small(num_classes=3), images, []),
    "vit": (vit, images, ["class_token", "encoder.pos_embedding"]),
    "faster-rcnn": (faster_rcnn, detected, []),
    "deeplab": (deeplab, segmented, []),
}


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_selected(name: str) -> None:
    build, _, left_out = MODELS[name]
    model = build()
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    mask = gcfunc.select(model)
    assert [n for n in weights if not mask[n]] == left_out
    assert {n for n, answer in mask.items() if answer} == weights.keys() - {*left_out}
    convolutions = {f"{n}.weight" for n, m in model.named_modules() if type(m) is nn.Conv2d and n}
    assert (
        {n for n, answer in gcfunc.select(model, "gcc").items() if answer} == convolutions != set()
    )


@pytest.mark.parametrize("name", MODELS)
def test_hooks_and_steps_agree(name: str) -> None:
    """Gradients that hooks centralized and a step without GC, or plain ones and a step with it."""
    build, loss, _ = MODELS[name]
    torch.manual_seed(0)
    model = build()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)  # a ViT's head starts at 0
    mask = gcfunc.select(model)

    def gradients() -> dict[str, Tensor]:
        torch.manual_seed(1)  # of the boxes that a detector samples, and of dropout
        model.zero_grad()
        loss(model).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    with centralize_backward(model, where=mask):
        hooked = gradients()
    params = {n: p.detach() for n, p in model.named_parameters() if n in plain}
    chosen = {n: mask[n] for n in params}
    with_gc = gcfunc.sgd(0.1, gc=gcfunc.GC(where=chosen))
    without = gcfunc.sgd(0.1)
    new, _ = with_gc.step(params, plain, with_gc.init(params))
    same, _ = without.step(params, hooked, without.init(params))
    other, _ = without.step(params, plain, without.init(params))
    for n, p in new.items():
        torch.testing.assert_close(p, same[n])
    assert any(differ(other[n], p) for n, p in new.items())
