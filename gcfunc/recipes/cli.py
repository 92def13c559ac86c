"""The ``gcfunc`` command."""

import argparse
import signal
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

import gcfunc
from gcfunc._catalog import CATALOG
from gcfunc._centralization.where import RULES
from gcfunc.recipes.config import DATASETS, MODES, SCHEDULES, Config
from gcfunc.recipes.errors import UsageError, complain

_EXTRA = ("matplotlib", "mlxtend", "numpy", "rich", "scipy", "sklearn")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 0, 1 where the machine fails, 2 for a mistake of the user's, and as usual
        128 plus the signal's number when stopped by one.
    """
    try:
        options = vars(_parser().parse_args(argv))
        run: Callable[[dict[str, Any]], int] = options.pop("run")
        return run(options)
    except UsageError as error:
        return _fail(error, 2)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        return _fail(f"{error.name} is not installed; this needs: pip install 'gcfunc[recipes]'", 1)
    except OSError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail(
            "stopped without saving; a checkpoint of the last whole epoch, if any, stands", 130
        )


def _fail(message: object, status: int) -> int:
    # Processes that have joined say the same, and one of them is enough. Before, torchrun may end
    # the first as soon as another gives up.
    joined = dist.is_available() and dist.is_initialized()
    if not joined or dist.get_rank() == 0:
        complain(message)
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gcfunc", description="Gradient centralization for PyTorch.")
    parser.add_argument("--version", action="version", version=f"gcfunc {gcfunc.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    train = commands.add_parser(
        "train",
        help="train a small convolutional network on real images",
        description="Train a small convolutional network on real images, with a compiled "
        "functional optimizer step or with hooks. Writes run.json, curves.png and the weights into "
        "a folder. Ctrl-C saves a checkpoint that --resume goes on from.",
        # Only what was given is set, so that --resume can refuse what would contradict it.
        argument_default=argparse.SUPPRESS,
    )
    train.set_defaults(run=_train)
    data = train.add_argument_group("data")
    data.add_argument(
        "--dataset",
        choices=DATASETS,
        help=f"images bundled with a package: {_or(DATASETS)} (default {Config.dataset})",
    )
    data.add_argument(
        "--data",
        metavar="DIR",
        help="a folder with the four IDX files of Fashion-MNIST or MNIST, raw or gzipped",
    )
    data.add_argument(
        "--limit", type=_integer(1), metavar="N", help="at most N images to train on and to test on"
    )
    optimizer = train.add_argument_group("optimizer")
    optimizer.add_argument(
        "--optimizer",
        choices=list(CATALOG),
        help=f"{_or(CATALOG)} (default {Config.optimizer})",
    )
    optimizer.add_argument(
        "--gc",
        choices=["none", *RULES],
        help="centralize nothing, or "
        + "; ".join(f"{name}: {rule.meaning}" for name, rule in RULES.items())
        + f" (default {Config.gc})",
    )
    optimizer.add_argument(
        "--at",
        choices=["gradient", "update"],
        help=f"centralize the gradient or what the optimizer makes of it (default {Config.at})",
    )
    optimizer.add_argument("--lr", type=float, help=f"learning rate ({_defaults('lr')})")
    optimizer.add_argument(
        "--weight-decay",
        type=float,
        metavar="WD",
        help=f"weight decay ({_defaults('weight_decay')})",
    )
    optimizer.add_argument("--momentum", type=float, help=f"({_defaults('momentum')})")
    optimizer.add_argument("--nesterov", action="store_true", help="Nesterov's momentum")
    optimizer.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help=f"how the learning rate goes, without a recompile (default {Config.schedule})",
    )
    optimizer.add_argument(
        "--eager",
        action="store_true",
        help="do not compile the functional step (--mode hooks never compiles)",
    )
    how = train.add_argument_group("how")
    how.add_argument(
        "--mode",
        choices=MODES,
        help="functional steps, or hooks that centralize during backward() and an optimizer of "
        f"torch.optim (default {Config.mode}, with --ddp and --fsdp hooks)",
    )
    parallel = how.add_mutually_exclusive_group()
    parallel.add_argument(
        "--ddp",
        action="store_true",
        help="several processes share each batch: torchrun --nproc-per-node 2 -m gcfunc train "
        "--ddp",
    )
    parallel.add_argument(
        "--fsdp",
        action="store_true",
        help="as --ddp, and each holds a part of every weight (FSDP2)",
    )
    runs = train.add_argument_group("runs")
    runs.add_argument("--epochs", type=_integer(1), metavar="N", help=f"(default {Config.epochs})")
    runs.add_argument(
        "--batch-size", type=_integer(1), metavar="N", help=f"(default {Config.batch_size})"
    )
    runs.add_argument(
        "--seed", type=_integer(0), metavar="N", help=f"the first seed (default {Config.seed})"
    )
    runs.add_argument(
        "--seeds",
        type=_integer(1),
        metavar="N",
        help="how many seeds to train from (default 1, with --compare 5)",
    )
    runs.add_argument(
        "--compare",
        action="store_true",
        help="train from each seed without centralization too, and compare",
    )
    runs.add_argument(
        "--out", type=Path, metavar="DIR", help="where results go (default runs/DATE-TIME)"
    )
    runs.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="go on with the experiment that was stopped in this folder; takes no other option",
    )
    recipes = commands.add_parser(
        "recipes",
        help="show the classification experiments of the reference",
        description="Show the classification experiments of the reference, or all of one.",
    )
    recipes.set_defaults(run=_recipes)
    recipes.add_argument("name", nargs="?", metavar="NAME", help="show every setting of this one")
    return parser


def _train(options: dict[str, Any]) -> int:
    checkpoint = options.pop("resume", None)
    if checkpoint is not None and options:
        given = ", ".join("--" + option.replace("_", "-") for option in options)
        raise UsageError(f"--resume takes every option from the checkpoint; leave out {given}")
    # What these import is the recipes extra, which may be missing.
    from rich.console import Console

    from gcfunc.recipes import experiment
    from gcfunc.recipes.distributed import Group, join

    conduct: Callable[[Group, Console], signal.Signals | None]
    if checkpoint is not None:
        conduct = partial(experiment.resume, checkpoint)
    else:
        folder = options.pop("out", None) or Path("runs", f"{datetime.now():%Y%m%d-%H%M%S}")
        conduct = partial(experiment.start, Config.from_options(**options), folder)
    with join() as group:
        # Paths are printed, and brackets and colons in them mean themselves.
        console = Console(markup=False, emoji=False, highlight=False, quiet=group.rank > 0)
        stopped_by = conduct(group, console)
    return 0 if stopped_by is None else 128 + stopped_by


def _recipes(options: dict[str, Any]) -> int:
    from gcfunc.recipes import listing

    listing.show(options["name"])
    return 0


def _integer(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, got {text!r}")
        return value

    return integer


def _or(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}"


def _defaults(option: str) -> str:
    names: dict[object, list[str]] = {}
    for name, algorithm in CATALOG.items():
        if option in algorithm.training:
            names.setdefault(algorithm.training[option], []).append(name)
    return "default " + "; ".join(
        f"{value} for {', '.join(users)}" for value, users in names.items()
    )
