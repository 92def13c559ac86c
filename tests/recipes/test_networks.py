"""The networks of the recipes: what they hold, what they compute, how they begin."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models as torchvision

import gcfunc
from gcfunc._catalog import CATALOG
from gcfunc._centralization.where import RULES
from gcfunc.recipes.applications import RECIPES
from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.networks.models import build
from gcfunc.recipes.networks.standardized import StandardizedConv2d, standardize

COUNTS = {
    "cifar100-resnet18": (11_220_132, 62, 21, 20),
    "cifar100-resnet34": (21_328_292, 110, 37, 36),
    "cifar100-resnet50": (23_705_252, 161, 54, 53),
    "cifar100-resnet101": (42_697_380, 314, 105, 104),
    "cifar100-resnext29": (27_288_996, 95, 32, 31),
    "cifar100-vgg11": (9_277_284, 34, 9, 8),
    "cifar100-densenet121": (7_048_548, 362, 121, 120),
    "mini-imagenet-resnet50": (23_712_932, 161, 54, 53),
    "mini-imagenet-resnet50-ws": (23_712_932, 161, 54, 53),
    "imagenet-resnet50-bn": (25_583_592, 214, 54, 53),
    "imagenet-resnet50-gn": (25_583_592, 214, 54, 53),
    "imagenet-resnet101-bn": (44_601_832, 418, 105, 104),
    "imagenet-resnet101-gn": (44_601_832, 418, 105, 104),
    "aircraft-resnet50": (23_712_932, 161, 54, 53),
    "cars-resnet50": (23_909_636, 161, 54, 53),
    "dogs-resnet50": (23_753_912, 161, 54, 53),
    "cub-resnet50": (23_917_832, 161, 54, 53),
}
"""Parameters, tensors, and those that GC and GCC take: of the reference's own, counted."""

LAST_MAP = {
    "cifar100-resnet18": (32, 4),
    "cifar100-resnet50": (32, 4),
    "cifar100-resnext29": (32, 8),
    "cifar100-vgg11": (32, 1),
    "cifar100-densenet121": (32, 4),
    "mini-imagenet-resnet50-ws": (224, 7),
    "imagenet-resnet50-gn": (224, 7),
    "aircraft-resnet50": (448, 14),
}
"""The sides of the image and of what is averaged at the end."""


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def images(side: int, count: int = 4) -> Tensor:
    return torch.randn(count, 3, side, side)


def on_meta(name: str, width: int = 64) -> nn.Module:
    with torch.device("meta"):
        return build(RECIPES[name], width=width)


@pytest.mark.parametrize("name", RECIPES)
def test_counts_are_the_references(name: str) -> None:
    params = [*on_meta(name).parameters()]
    taken = [sum(RULES[rule].selects(p.ndim) for p in params) for rule in ("gc", "gcc")]
    assert (sum(p.numel() for p in params), len(params), *taken) == COUNTS[name]


@pytest.mark.parametrize("name", RECIPES)
def test_narrow_networks_learn_from_small_images(name: str) -> None:
    side = 32 if RECIPES[name].images.kind == "cifar" else 64
    model = build(RECIPES[name], width=8, classes=3)
    logits = model(images(side))
    assert logits.shape == (4, 3)
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    for p in model.parameters():
        assert p.grad is not None
        assert p.grad.isfinite().all()


@pytest.mark.parametrize("name", LAST_MAP)
def test_strides_and_poolings(name: str) -> None:
    side, last = LAST_MAP[name]
    seen: list[tuple[int, ...]] = []

    def see(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        seen.append(tuple(out.shape[2:]))

    model = build(RECIPES[name], width=2, classes=3).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.MaxPool2d):
            module.register_forward_hook(see)
    with torch.no_grad():
        model(images(side, 1))
    assert seen[-1] == (last, last)


@pytest.mark.parametrize("name", LAST_MAP)
@pytest.mark.parametrize("width", [6, 128])
def test_every_stage_scales(name: str, width: int) -> None:
    narrow, full = on_meta(name, width), on_meta(name)
    for (a, p), (b, q) in zip(narrow.named_parameters(), full.named_parameters(), strict=True):
        assert a == b
        inputs = {3: 3}.get(q.shape[1], q.shape[1] * width // 64) if q.ndim > 1 else None
        outputs = q.shape[0] if q.shape[0] == RECIPES[name].data.classes else None
        assert p.shape[0] == (outputs or q.shape[0] * width // 64)
        assert inputs is None or p.shape[1] == inputs


@pytest.mark.parametrize("width", [0, 1, 7, -8])
def test_odd_widths(width: int) -> None:
    with pytest.raises(UsageError, match=f"an even number >= 2, got {width}"):
        build(RECIPES["cifar100-vgg11"], width=width)


def test_groups() -> None:
    for width, groups in ((64, 32), (8, 4), (72, 4), (128, 32), (2, 1)):
        model = on_meta("imagenet-resnet50-gn", width)
        norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
        assert len(norms) == 53
        assert {norm.num_groups for norm in norms} == {groups}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_resnet50_is_torchvisions() -> None:
    model = build(RECIPES["cub-resnet50"], classes=5).eval()
    twin = torchvision.resnet50(num_classes=5).eval()
    twin.load_state_dict(model.state_dict())
    x = images(64, 1)
    torch.testing.assert_close(model(x), twin(x))


def test_resnet50_with_group_norm_is_torchvisions_but_for_biases() -> None:
    model = build(RECIPES["imagenet-resnet50-gn"], classes=5)
    twin = torchvision.resnet50(num_classes=5, norm_layer=lambda c: nn.GroupNorm(32, c))
    loaded = twin.load_state_dict(model.state_dict(), strict=False)
    assert not loaded.missing_keys
    assert len(loaded.unexpected_keys) == 53
    x = images(64, 1)
    # Groups span channels, so here biases are not lost in the norm.
    assert not torch.allclose(model(x), twin(x), rtol=1e-3)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    torch.testing.assert_close(model(x), twin(x))


def test_resnext29_by_hand() -> None:
    model = build(RECIPES["cifar100-resnext29"], width=4, classes=5).double().eval()
    state = model.state_dict()

    def conv(x: Tensor, name: str, norm: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        y = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)
        return y / math.sqrt(1 + 1e-5)  # a norm that has seen nothing, in evaluation

    x = images(32, 2).double()
    y = conv(x, "conv1", "bn1").relu()
    for stage in (1, 2, 3):
        for block in (0, 1, 2):
            stride, at = (2 if stage > 1 and block == 0 else 1), f"layer{stage}.{block}"
            z = conv(y, f"{at}.conv1", f"{at}.bn1").relu()
            z = conv(z, f"{at}.conv2", f"{at}.bn2", stride, groups=4).relu()
            z = conv(z, f"{at}.conv3", f"{at}.bn3")
            shortcut = conv(y, f"{at}.downsample.0", "", stride) if block == 0 else y
            y = (z + shortcut).relu()
    expected = y.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(model(x), expected)


def test_standardized_weights_by_hand() -> None:
    """mmcv's ConvWS2d is defined by the same formula; it is not needed here."""
    torch.manual_seed(1)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64) * 1e-4 + 1e-4
    got = standardize(weight)
    for row, standardized in zip(weight, got, strict=True):
        n, mean = row.numel(), row.sum() / row.numel()
        variance = ((row - mean) ** 2).sum() / (n - 1)
        expected = (row - mean) / (variance.sqrt() + 1e-5)
        torch.testing.assert_close(standardized, expected, rtol=1e-12, atol=1e-12)
        # Neither the biased variance, nor its eps inside the root.
        for other in (variance * (n - 1) / n + 1e-10, variance + 1e-10):
            assert not torch.allclose(standardized, (row - mean) / other.sqrt(), rtol=1e-3)
    conv = StandardizedConv2d(3, 4, 3, stride=2, padding=1).double()
    conv.weight = nn.Parameter(weight)
    x = images(6).double()
    torch.testing.assert_close(conv(x), F.conv2d(x, got, conv.bias, 2, 1))


def test_every_convolution_is_standardized_where_the_recipe_says_so() -> None:
    for name, many in (("mini-imagenet-resnet50-ws", 53), ("mini-imagenet-resnet50", 0)):
        assert sum(isinstance(m, StandardizedConv2d) for m in on_meta(name).modules()) == many


def test_standardized_convolutions_have_centered_gradients() -> None:
    for name, centered in (("mini-imagenet-resnet50-ws", True), ("mini-imagenet-resnet50", False)):
        model = build(RECIPES[name], width=8, classes=3).double()
        F.cross_entropy(model(images(32).double()), torch.tensor([0, 1, 2, 0])).backward()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                assert module.weight.grad is not None
                means = module.weight.grad.mean((1, 2, 3)).abs().max()
                scale = module.weight.grad.abs().max()
                assert (means < 1e-12 * scale) == centered


@pytest.mark.parametrize("name", RECIPES)
def test_beginnings(name: str) -> None:
    """At width 32, where a convolution has numbers enough to judge by."""
    start = RECIPES[name].network.start
    model = build(RECIPES[name], width=32, classes=100)
    norms: list[Tensor] = []
    for module in model.requires_grad_(False).modules():
        if isinstance(module, nn.Conv2d):
            outputs, inputs, *sides = module.weight.shape
            fan_in, fan_out = inputs * math.prod(sides), outputs * math.prod(sides)
            expected = math.sqrt(1 / (3 * fan_in) if start == "torch" else 2 / fan_out)
            few = 5 / math.sqrt(2 * module.weight.numel())
            assert float(module.weight.std()) == pytest.approx(expected, rel=few)
            # Uniform or normal: a normal one of so many numbers goes beyond 2.5 deviations.
            assert (module.weight.abs().max() > 2.2 * expected) == (start != "torch")
            if module.bias is not None:
                assert module.bias.any()
                assert module.bias.abs().max() <= 1 / math.sqrt(fan_in)
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            norms.append(module.weight)
            assert not module.bias.any()
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            assert not module.running_mean.any()
            assert (module.running_var == 1).all()
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            assert bound * 0.99 < module.weight.abs().max() <= bound
    weights = torch.cat(norms)
    if start == "fan-out, norms uniform":
        assert 0 <= weights.min() < 0.01
        assert 0.99 < weights.max() <= 1
        assert float(weights.mean()) == pytest.approx(0.5, abs=0.02)
        assert float(weights.std()) == pytest.approx(1 / math.sqrt(12), abs=0.01)
    else:
        assert (weights == 1).all()


def test_a_seed_gives_a_network() -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model = build(RECIPES["cifar100-densenet121"], width=8, classes=3)
        return nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize("name", ["cifar100-resnet18", "imagenet-resnet50-gn", "cub-resnet50"])
def test_a_step_with_the_recipes_settings(name: str) -> None:
    recipe = RECIPES[name]
    model = build(recipe, width=4, classes=3).double()
    F.cross_entropy(model(images(64).double()), torch.tensor([0, 1, 2, 0])).backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    params = {key: p.detach() for key, p in model.named_parameters()}
    settings = {
        "lr": recipe.lr,
        "momentum": recipe.momentum,
        "weight_decay": recipe.weight_decay,
    }
    opt = CATALOG[recipe.optimizer].make(**settings, gc=gcfunc.GC(recipe.gc, recipe.at))
    stepped, _ = opt.step(params, grads, opt.init(params))
    centralized = 0
    for key, p in params.items():
        plain = update = grads[key] + recipe.weight_decay * p
        if RULES[recipe.gc].selects(p.ndim):
            update = plain - plain.flatten(1).mean(1).view(-1, *[1] * (p.ndim - 1))
            assert not torch.allclose(stepped[key], p - recipe.lr * plain, rtol=1e-9, atol=0)
            centralized += 1
        torch.testing.assert_close(stepped[key], p - recipe.lr * update)
    assert centralized == COUNTS[name][2 if recipe.gc == "gc" else 3]
