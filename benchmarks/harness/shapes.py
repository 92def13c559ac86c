"""The parameter shapes of well-known models, without the models."""

from collections.abc import Callable

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def _layer(name: str, *shape: int) -> Shapes:
    """A weight and its bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def resnet50(width: int = 64) -> Shapes:
    """ResNet-50 (https://arxiv.org/abs/1512.03385) with ``width`` channels after its stem."""
    shapes: Shapes = {"conv1.weight": (width, 3, 7, 7)} | _layer("bn1", width)
    channels = width
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        inner = width * 2 ** (stage - 1)
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            for i, (o, k) in enumerate(((inner, 1), (inner, 3), (4 * inner, 1)), 1):
                into = channels if i == 1 else inner
                shapes[f"{name}.conv{i}.weight"] = (o, into, k, k)
                shapes |= _layer(f"{name}.bn{i}", o)
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (4 * inner, channels, 1, 1)
                shapes |= _layer(f"{name}.downsample.1", 4 * inner)
            channels = 4 * inner
    return shapes | _layer("fc", 1000, channels)


def vit_b16() -> Shapes:
    """The base vision transformer on patches of 16 (https://arxiv.org/abs/2010.11929)."""
    d = 768
    shapes: Shapes = {"class_token": (1, 1, d), "positions": (1, 197, d)}
    shapes |= _layer("patches", d, 3, 16, 16)
    for i in range(12):
        for name, *shape in (
            ("norm1", d),
            ("attention.in", 3 * d, d),
            ("attention.out", d, d),
            ("norm2", d),
            ("mlp.in", 4 * d, d),
            ("mlp.out", d, 4 * d),
        ):
            shapes |= _layer(f"blocks.{i}.{name}", *shape)
    return shapes | _layer("norm", d) | _layer("head", 1000, d)


def gpt2(blocks: int = 12) -> Shapes:
    """GPT-2 small, its linear layers stored as (in, out) as in the original."""
    d = 768
    shapes: Shapes = {"wte.weight": (50257, d), "wpe.weight": (1024, d)}
    for i in range(blocks):
        shapes |= _layer(f"h.{i}.ln_1", d) | _layer(f"h.{i}.ln_2", d)
        for name, into, out in (
            ("attn.c_attn", d, 3 * d),
            ("attn.c_proj", d, d),
            ("mlp.c_fc", d, 4 * d),
            ("mlp.c_proj", 4 * d, d),
        ):
            shapes |= {f"h.{i}.{name}.weight": (into, out), f"h.{i}.{name}.bias": (out,)}
    return shapes | _layer("ln_f", d)


def tiny_cnn() -> Shapes:
    """ResNet-50's 161 tensors with a sixteenth of its channels."""
    return resnet50(width=4)


MODELS: dict[str, Callable[[], Shapes]] = {
    "resnet50": resnet50,
    "vit_b16": vit_b16,
    "gpt2": gpt2,
    "tiny_cnn": tiny_cnn,
}


def tensors(shapes: Shapes, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters of the size of trained ones, and gradients."""
    generator = torch.Generator(device).manual_seed(0)
    params, grads = (
        {n: scale * torch.randn(s, generator=generator, device=device) for n, s in shapes.items()}
        for scale in (0.02, 0.01)
    )
    return params, grads
