"""The reference's classification experiments, a row each.

Settings are those of its code. Figures are those of its README and no others.
"""

from dataclasses import replace

from gcfunc.recipes.recipe import Data, Difference, Images, Network, Published, Recipe

SOURCE = "https://github.com/Yonghongwei/Gradient-Centralization"
"""The reference. Every figure is from its README."""

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BY_CLASS = "{train,val}/<class>/<image>"

_BEST = Difference(
    "reports the best of all epochs, so it chooses by the test images", "the last epoch counts"
)
_UNSEEDED = Difference("draws no fixed seed", "every run has a seed")
_FULL_TEST = Difference(
    "drops the last batch of test images if it is not full", "every test image counts"
)


def _norms(batch: int) -> Difference:
    return Difference(
        f"BatchNorm sees {batch // 4} images, as 4 GPUs share each batch of {batch}",
        f"it sees what one process has of the batch; 4 processes have {batch // 4} each",
    )


_R18_CIFAR = Recipe(
    name="cifar100-resnet18",
    application="CIFAR-100",
    data=Data(
        kind="cifar100",
        title="CIFAR-100",
        classes=100,
        source="https://www.cs.toronto.edu/~kriz/cifar.html, the python or the binary version",
        layouts=(
            "cifar-100-python/{train,test,meta}",
            "cifar-100-binary/{train,test}.bin, fine_label_names.txt, coarse_label_names.txt",
            "the .tar.gz that either comes in",
        ),
    ),
    network=Network("resnet18", stem="small", start="torch"),
    images=Images("cifar", 32, (0.507, 0.487, 0.441), (0.267, 0.256, 0.276), padding=4),
    lr=0.1,
    weight_decay=5e-4,
    batch_size=128,
    epochs=200,
    milestones=(60, 120, 180),
    gc="gc",
    metric="top-1 accuracy",
    published="no figures for CIFAR-100",
    differences=(
        _BEST,
        _UNSEEDED,
        Difference(
            "has a second script of 400 epochs, which divides the rate by 10 every 120",
            "the first, of 200 epochs",
        ),
        Difference(
            "its choice adamWGC builds Adam with coupled decay", "adamw is AdamW with or without GC"
        ),
    ),
    other_lr={"adam": 1e-3, "adamw": 1e-3, "adagrad": 1e-2, "sgdw": 0.1},
)

_CIFAR = [
    replace(
        _R18_CIFAR,
        name=f"cifar100-{architecture}",
        network=replace(
            _R18_CIFAR.network,
            architecture=architecture,
            stem="own" if architecture == "vgg11" else "small",
        ),
    )
    for architecture in (
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnext29",
        "vgg11",
        "densenet121",
    )
]

_R50_MINI = Recipe(
    name="mini-imagenet-resnet50",
    application="Mini-ImageNet",
    data=Data(
        kind="mini-imagenet",
        title="Mini-ImageNet",
        classes=100,
        source=f"cut from ImageNet by the lists that few-shot learning uses; {SOURCE} links its "
        "own split",
        layouts=(
            f"{_BY_CLASS}, the same 100 classes in both",
            "images/ with train.csv, val.csv, test.csv: their classes together, each then split",
        ),
    ),
    network=Network("resnet50", start="fan-out, norms uniform"),
    images=Images("imagenet", 224, _IMAGENET_MEAN, _IMAGENET_STD, resize=256, scale=(0.08, 1.0)),
    lr=0.1,
    weight_decay=1e-4,
    batch_size=128,
    epochs=100,
    milestones=(30, 60, 90),
    gc="gc",
    metric="top-1 accuracy",
    published="curves without figures",
    differences=(
        _BEST,
        _UNSEEDED,
        _norms(128),
        Difference(
            "its program has batches of 256, its script of the experiment asks for 128", "128"
        ),
    ),
)

_MINI = [
    _R50_MINI,
    replace(
        _R50_MINI,
        name="mini-imagenet-resnet50-ws",
        network=replace(_R50_MINI.network, standardized=True),
        differences=(
            *_R50_MINI.differences,
            Difference(
                "centralizes standardized convolutions too, whose loss has centered gradients "
                "already",
                "the same: GC then changes their weight decay, and the classifier",
            ),
        ),
    ),
]

_R50_GN = replace(
    _R50_MINI,
    name="imagenet-resnet50-gn",
    application="ImageNet",
    data=Data(
        kind="imagenet",
        title="ImageNet (ILSVRC 2012)",
        classes=1000,
        source="https://image-net.org/challenges/LSVRC/2012/2012-downloads.php, with an account",
        layouts=(
            "{train,val}/<wnid>/<image>",
            "train/<wnid>/<image> with val/ flat, and ILSVRC2012_devkit_t12/data/ for its classes",
            "ILSVRC/Data/CLS-LOC/{train,val} with LOC_val_solution.csv, as on Kaggle",
        ),
    ),
    network=Network("resnet50", conv_bias=True, norm="group"),
    batch_size=256,
    gc="gcc",
    metric="top-1 error",
    published=Published(24.50, 23.53),
    differences=(
        _BEST,
        _UNSEEDED,
        _FULL_TEST,
        Difference(
            "its choice sgdGC centralizes convolutions only, unlike in its other experiments",
            'the same, under its name "gcc"',
        ),
        Difference(
            "its script has ResNet-50 with BatchNorm only, commented out",
            "the four networks that its README reports",
        ),
    ),
)
_R50_BN = replace(
    _R50_GN,
    name="imagenet-resnet50-bn",
    network=replace(_R50_GN.network, norm="batch"),
    published=Published(23.71, 23.21),
    differences=(*_R50_GN.differences, _norms(256)),
)

_IMAGENET = [
    _R50_BN,
    _R50_GN,
    replace(
        _R50_BN,
        name="imagenet-resnet101-bn",
        network=replace(_R50_BN.network, architecture="resnet101"),
        published=Published(22.37, 21.82),
    ),
    replace(
        _R50_GN,
        name="imagenet-resnet101-gn",
        network=replace(_R50_GN.network, architecture="resnet101"),
        published=Published(23.34, 22.14),
    ),
]

_AIRCRAFT = replace(
    _R50_MINI,
    name="aircraft-resnet50",
    application="Fine-grained",
    data=Data(
        kind="aircraft",
        title="FGVC-Aircraft",
        classes=100,
        source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        layouts=("images/, variants.txt, images_variant_{trainval,test}.txt", _BY_CLASS),
    ),
    network=Network("resnet50", weights="torchvision's ResNet50_Weights.IMAGENET1K_V1"),
    images=Images("fine-grained", 448, _IMAGENET_MEAN, _IMAGENET_STD, resize=512),
    milestones=(50, 80),
    published=Published(86.62, 87.77),
    differences=(
        _BEST,
        _UNSEEDED,
        _FULL_TEST,
        _norms(128),
        Difference(
            "gives the pretrained layers lr_mult=0.1, which no optimizer of its reads",
            "one learning rate for all, as in its runs",
        ),
        Difference("crops no training image at random, only flips", "the same"),
        Difference("downloads the pretrained weights", "they are read from a file"),
    ),
)

_FINE_GRAINED = [
    _AIRCRAFT,
    replace(
        _AIRCRAFT,
        name="cars-resnet50",
        data=Data(
            kind="cars",
            title="Stanford Cars",
            classes=196,
            source="copies only: its page, https://ai.stanford.edu/~jkrause/cars/car_dataset.html, "
            "is gone",
            layouts=(
                "cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat",
                "car_ims/ and cars_annos.mat",
                _BY_CLASS,
            ),
        ),
        published=Published(88.66, 90.03),
    ),
    replace(
        _AIRCRAFT,
        name="dogs-resnet50",
        data=Data(
            kind="dogs",
            title="Stanford Dogs",
            classes=120,
            source="http://vision.stanford.edu/aditya86/ImageNetDogs/",
            layouts=("Images/<wnid>-<breed>/ and {train,test}_list.mat", _BY_CLASS),
        ),
        published=Published(76.16, 78.23),
    ),
    replace(
        _AIRCRAFT,
        name="cub-resnet50",
        data=Data(
            kind="cub",
            title="CUB-200-2011",
            classes=200,
            source="https://www.vision.caltech.edu/datasets/cub_200_2011/",
            layouts=(
                "images/, images.txt, image_class_labels.txt, train_test_split.txt, classes.txt",
                _BY_CLASS,
            ),
        ),
        published=Published(82.07, 83.40),
    ),
]

RECIPES = {recipe.name: recipe for recipe in [*_CIFAR, *_MINI, *_IMAGENET, *_FINE_GRAINED]}
"""Every recipe, by its name."""
