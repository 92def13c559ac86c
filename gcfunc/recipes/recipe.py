"""What a recipe says: everything an experiment of the reference depends on, as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Start = Literal["torch", "fan-out", "fan-out, norms uniform"]
Stem = Literal["own", "small"]
Metric = Literal["top-1 accuracy", "top-1 error"]


@dataclass(frozen=True)
class Network:
    """Which network, and in what it differs from torchvision's.

    Attributes:
        architecture: A name that :func:`gcfunc.recipes.networks.models.build` knows.
        stem: The architecture's own, or a ``"small"`` convolution of stride 1 that no pooling
            follows, for small images.
        norm: ``"group"`` is GroupNorm of 32 groups in the place of every BatchNorm.
        conv_bias: Whether every convolution has a bias.
        standardized: Whether convolutions standardize their weights.
        start: How it is initialized: as each torch module initializes itself; with normal
            convolutions scaled by their fan-out; or with weights of norms in U(0, 1) besides.
        weights: What it starts from instead, apart from its classifier.
    """

    architecture: str
    stem: Stem = "own"
    norm: Literal["batch", "group"] = "batch"
    conv_bias: bool = False
    standardized: bool = False
    start: Start = "fan-out"
    weights: str | None = None


@dataclass(frozen=True)
class Images:
    """How images are made to fit the network.

    Attributes:
        kind: Of training: ``"cifar"`` crops at random after padding, ``"imagenet"`` crops a random
            share of the image and resizes it, ``"fine-grained"`` crops the middle. All flip.
        size: The side of what the network sees.
        mean: Subtracted from each channel.
        std: Each channel is divided by it.
        resize: The shorter side before the middle is cropped.
        padding: Zeros on each side before a random crop.
        scale: The least and the greatest share of the image that a random crop has.
    """

    kind: Literal["cifar", "imagenet", "fine-grained"]
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: int | None = None
    padding: int | None = None
    scale: tuple[float, float] | None = None


class Published(NamedTuple):
    """What the reference's README reports, in percent of the recipe's metric."""

    without: float
    with_gc: float


class Difference(NamedTuple):
    """Where the recipe leaves the reference's code, or could be taken for leaving it."""

    reference: str
    here: str


@dataclass(frozen=True)
class Data:
    """A dataset, and what somebody has to get.

    Attributes:
        kind: By which a reader is found.
        title: Its name.
        classes: How many.
        source: Where it is to be had. Nothing is downloaded.
        layouts: What the folder may hold, a line each.
    """

    kind: str
    title: str
    classes: int
    source: str
    layouts: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """One experiment of the reference.

    Attributes:
        name: On the command line.
        application: To which of the reference's experiments it belongs.
        data: Of what.
        network: What is trained.
        images: What it sees.
        lr: The learning rate of the first epoch.
        weight_decay: Coupled, on every parameter, norms and biases too.
        batch_size: Images in a step. A last batch of fewer is left out of training.
        epochs: How many.
        milestones: After these epochs the learning rate is multiplied by ``factor``.
        gc: The rule of the run with centralization.
        metric: Of the test images.
        published: The reference's figures, or why there are none.
        differences: From the reference's code.
        optimizer: By its name in :mod:`gcfunc`.
        momentum: Without dampening, and not Nesterov's.
        factor: See ``milestones``.
        at: Where in the step it is centralized.
        other_lr: Learning rates of other optimizers in the same experiment.
    """

    name: str
    application: str
    data: Data
    network: Network
    images: Images
    lr: float
    weight_decay: float
    batch_size: int
    epochs: int
    milestones: tuple[int, ...]
    gc: str
    metric: Metric
    published: Published | str
    differences: tuple[Difference, ...]
    optimizer: str = "sgd"
    momentum: float = 0.9
    factor: float = 0.1
    at: Literal["gradient", "update"] = "gradient"
    other_lr: Mapping[str, float] = field(default_factory=dict)
