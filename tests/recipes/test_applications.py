"""The recipes: that their settings are the reference's, and what the command shows of them."""

import sys

import pytest

from gcfunc._catalog import CATALOG
from gcfunc._centralization.where import RULES
from gcfunc.recipes.applications import RECIPES, SOURCE
from gcfunc.recipes.cli import main
from gcfunc.recipes.recipe import Published, Recipe
from tests.recipes.command import refused

CIFAR, MINI, IMAGENET, FINE = "CIFAR-100", "Mini-ImageNet", "ImageNet", "Fine-grained"
NAMES = {
    CIFAR: [
        f"cifar100-{network}"
        for network in (
            "resnet18",
            "resnet34",
            "resnet50",
            "resnet101",
            "resnext29",
            "vgg11",
            "densenet121",
        )
    ],
    MINI: ["mini-imagenet-resnet50", "mini-imagenet-resnet50-ws"],
    IMAGENET: [f"imagenet-resnet{depth}-{norm}" for depth in (50, 101) for norm in ("bn", "gn")],
    FINE: [f"{kind}-resnet50" for kind in ("aircraft", "cars", "dogs", "cub")],
}
SETTINGS = {
    CIFAR: (0.1, 5e-4, 128, 200, (60, 120, 180), "gc", "top-1 accuracy"),
    MINI: (0.1, 1e-4, 128, 100, (30, 60, 90), "gc", "top-1 accuracy"),
    IMAGENET: (0.1, 1e-4, 256, 100, (30, 60, 90), "gcc", "top-1 error"),
    FINE: (0.1, 1e-4, 128, 100, (50, 80), "gc", "top-1 accuracy"),
}
PUBLISHED = {
    "imagenet-resnet50-bn": (23.71, 23.21),
    "imagenet-resnet50-gn": (24.50, 23.53),
    "imagenet-resnet101-bn": (22.37, 21.82),
    "imagenet-resnet101-gn": (23.34, 22.14),
    "aircraft-resnet50": (86.62, 87.77),
    "cars-resnet50": (88.66, 90.03),
    "dogs-resnet50": (76.16, 78.23),
    "cub-resnet50": (82.07, 83.40),
}


def test_names() -> None:
    found: dict[str, list[str]] = {}
    for name, recipe in RECIPES.items():
        assert name == recipe.name
        found.setdefault(recipe.application, []).append(name)
    assert found == NAMES


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_settings_are_the_references(recipe: Recipe) -> None:
    settings = (
        recipe.lr,
        recipe.weight_decay,
        recipe.batch_size,
        recipe.epochs,
        recipe.milestones,
        recipe.gc,
        recipe.metric,
    )
    assert settings == SETTINGS[recipe.application]
    assert (recipe.optimizer, recipe.momentum, recipe.factor) == ("sgd", 0.9, 0.1)
    assert recipe.at == "gradient"
    assert recipe.gc in RULES
    assert {recipe.optimizer, *recipe.other_lr} <= CATALOG.keys()
    published = PUBLISHED.get(recipe.name)
    assert isinstance(recipe.published, str) if published is None else recipe.published == published


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_batches_of_norms_are_told_where_several_gpus_shared_them(recipe: Recipe) -> None:
    told = [d.reference for d in recipe.differences if "BatchNorm sees" in d.reference]
    if recipe.application == CIFAR or recipe.network.norm == "group":
        assert told == []
    else:
        (line,) = told
        assert f"sees {recipe.batch_size // 4} images, as 4 GPUs" in line


def test_classes() -> None:
    found = {recipe.data.kind: recipe.data.classes for recipe in RECIPES.values()}
    assert found == {
        "cifar100": 100,
        "mini-imagenet": 100,
        "imagenet": 1000,
        "aircraft": 100,
        "cars": 196,
        "dogs": 120,
        "cub": 200,
    }


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["recipes", *arguments]) == 0
    return capsys.readouterr().out


def test_all_of_them_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = shown(capsys).splitlines()
    assert "…" not in "".join(lines)
    rows = {words[0]: words[1:] for line in lines if (words := line.split())}
    for name, recipe in RECIPES.items():
        figures = [f"{x:.2f}" for x in PUBLISHED.get(name, ())] or ["-", "-"]
        settings = [recipe.gc, recipe.epochs, recipe.batch_size, recipe.weight_decay]
        assert rows[name] == [*map(str, settings), recipe.metric.split()[1], *figures]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_whole_of_one(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    text = shown(capsys, recipe.name)
    images, network = recipe.images, recipe.network
    facts = [
        recipe.name,
        recipe.data.title,
        f"{recipe.data.classes} classes",
        recipe.data.source,
        *recipe.data.layouts,
        f"{images.size}x{images.size}",
        "{:g}, {:g}, {:g}; divided by".format(*images.mean),
        "divided by {:g}, {:g}, {:g}".format(*images.std),
        f"momentum {recipe.momentum}",
        str(recipe.lr),
        f"{recipe.weight_decay} of every parameter",
        f"{recipe.batch_size} images",
        ", ".join(map(str, recipe.milestones)),
        RULES[recipe.gc].meaning,
        recipe.metric,
        SOURCE,
        *(part for difference in recipe.differences for part in difference),
        *(f"{lr:g} with {optimizer}" for optimizer, lr in recipe.other_lr.items()),
    ]
    if isinstance(recipe.published, Published):
        facts.append("{:.2f} without centralization, {:.2f} with it".format(*recipe.published))
    else:
        facts.append(recipe.published)
    for fact in facts:
        assert fact in text
    for fact, holds in {
        "GroupNorm": network.norm == "group",
        "convolution with a bias": network.conv_bias,
        "standardizes its weights": network.standardized,
        "no pooling follows": network.stem == "small",
        "ResNet50_Weights.IMAGENET1K_V1, but for its classifier": network.weights is not None,
        "4 zeros on each side": images.kind == "cifar",
        "crop 8% to 100%": images.kind == "imagenet",
        f"shorter side to {images.resize},": images.resize is not None,
        "uniform in 0 to 1": network.start == "fan-out, norms uniform",
    }.items():
        assert (fact in text) == holds, fact


def test_figures_are_the_readmes_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for name in RECIPES.keys() - PUBLISHED.keys():
        assert "without centralization" not in shown(capsys, name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cifar100-resnet5", "'cifar100-resnet5'; did you mean cifar100-resnet50 or "),
        ("cub", "'cub'; gcfunc recipes lists them"),
        ("imagenet-resnet50", "did you mean .*imagenet-resnet50-bn"),
        ("[bold]", r"there is no recipe '\[bold\]'"),
        ("--data x", "unrecognized arguments"),
        ("a b", "unrecognized arguments: b"),
    ],
)
def test_names_that_there_are_not(name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["recipes", *name.split()], said, capsys)


def test_without_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("rich", "rich.console", "gcfunc.recipes.listing"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["recipes"]) == 1
    assert "is not installed; this needs: pip install" in capsys.readouterr().err
