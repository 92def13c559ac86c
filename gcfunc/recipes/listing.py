"""The recipes as ``gcfunc recipes`` shows them."""

import difflib
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from gcfunc._centralization.where import RULES
from gcfunc.recipes.applications import RECIPES, SOURCE
from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.recipe import Images, Network, Published, Recipe

_CROPS = {
    "cifar": "crop {size}x{size} at random out of the image with {padding} zeros on each side",
    "imagenet": "crop {scale[0]:.0%} to {scale[1]:.0%} of the image at random, resize to "
    "{size}x{size}",
    "fine-grained": "resize the shorter side to {resize}, crop the middle {size}x{size}",
}
_ARCHITECTURES = {
    "vgg11": "torchvision's vgg11_bn, with one linear layer",
    "resnext29": "ResNeXt-29, 4x64d: three stages of three blocks, each stage twice as wide",
}
_STARTS = {
    "torch": "each layer as torch initializes it",
    "fan-out": "convolutions normal, of variance 2 / (kernel x outputs)",
    "fan-out, norms uniform": "convolutions normal, of variance 2 / (kernel x outputs); weights of "
    "norms uniform in 0 to 1",
}


def show(name: str | None) -> None:
    """Print a recipe with every setting, or without a name a table of all.

    Raises:
        UsageError: There is no recipe of that name.
    """
    # Layouts of folders hold brackets, which mean themselves.
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(_all() if name is None else _whole(_find(name)))


def _find(name: str) -> Recipe:
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES)
    hint = f"did you mean {' or '.join(near)}?" if near else "gcfunc recipes lists them"
    raise UsageError(f"there is no recipe {name!r}; {hint}")


def _all() -> Table:
    table = Table(
        title="The reference's classification experiments",
        caption=f"without and with centralization: what the README of {SOURCE} reports, in %",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading in ("recipe", "gc"):
        table.add_column(heading, no_wrap=True)
    for heading in ("epochs", "batch", "decay"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("top-1", no_wrap=True)
    for heading in ("without", "with"):
        table.add_column(heading, justify="right", no_wrap=True)
    application = None
    for recipe in RECIPES.values():
        if recipe.application != application:
            application = recipe.application
            table.add_section()
        table.add_row(
            recipe.name,
            recipe.gc,
            str(recipe.epochs),
            str(recipe.batch_size),
            f"{recipe.weight_decay:g}",
            recipe.metric.removeprefix("top-1 "),
            *_figures(recipe.published),
        )
    return table


def _whole(recipe: Recipe) -> Table:
    table = Table(title=recipe.name, box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    before = None
    for what, value in _settings(recipe):
        table.add_row("" if what == before else what, value)
        before = what
    return table


def _settings(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "application", recipe.application
    yield "data", f"{recipe.data.title}, {recipe.data.classes} classes"
    yield "get it from", recipe.data.source
    first, *others = recipe.data.layouts
    yield "a folder with", first
    for layout in others:
        yield "or with", layout
    for line in _network(recipe.network):
        yield "network", line
    yield from _images(recipe.images)
    yield "optimizer", f"{recipe.optimizer}, momentum {recipe.momentum:g}"
    yield "learning rate", f"{recipe.lr:g}"
    for optimizer, lr in recipe.other_lr.items():
        yield "learning rate", f"{lr:g} with {optimizer}"
    after = ", ".join(map(str, recipe.milestones))
    yield "schedule", f"times {recipe.factor:g} after epochs {after}"
    yield "weight decay", f"{recipe.weight_decay:g} of every parameter, norms and biases too"
    yield "weight decay", "joins the gradient before that is centralized"
    yield "batch", f"{recipe.batch_size} images; a last one of fewer is left out"
    yield "epochs", str(recipe.epochs)
    yield "gc", f"{recipe.gc}: {RULES[recipe.gc].meaning}; at the {recipe.at}"
    yield "measured", f"{recipe.metric}, %"
    yield "reported", _published(recipe.published)
    yield "reported by", f"the README of {SOURCE}"
    for reference, here in recipe.differences:
        yield "", ""
        yield "the reference", reference
        yield "here", here


def _network(network: Network) -> Iterator[str]:
    name = network.architecture
    yield _ARCHITECTURES.get(name, f"torchvision's {name}")
    if network.stem == "small":
        yield "begins with a small convolution of stride 1 that no pooling follows"
    if network.norm == "group":
        yield "GroupNorm of 32 groups for every BatchNorm"
    if network.conv_bias:
        yield "every convolution with a bias"
    if network.standardized:
        yield "every convolution standardizes its weights"
    if network.weights is None:
        yield _STARTS[network.start]
    else:
        yield f"starts from {network.weights}, but for its classifier"


def _images(images: Images) -> Iterator[tuple[str, str]]:
    yield "training images", f"{_CROPS[images.kind].format(**vars(images))}; flip half of them"
    test = "as they are" if images.resize is None else _CROPS["fine-grained"].format(**vars(images))
    yield "test images", test
    yield "channels", f"less {_triple(images.mean)}; divided by {_triple(images.std)}"


def _triple(numbers: tuple[float, ...]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _figures(published: Published | str) -> tuple[str, ...]:
    if isinstance(published, str):
        return ("-", "-")
    return tuple(f"{figure:.2f}" for figure in published)


def _published(published: Published | str) -> str:
    if isinstance(published, str):
        return published
    before, after = _figures(published)
    return f"{before} without centralization, {after} with it"
