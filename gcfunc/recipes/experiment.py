"""An experiment from its first run to its report."""

import platform
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

import gcfunc
from gcfunc.recipes import checkpoint, compiler, data, report, summary
from gcfunc.recipes.checkpoint import Experiment
from gcfunc.recipes.config import Config
from gcfunc.recipes.data import Dataset
from gcfunc.recipes.display import Display
from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.stop import StopRequest
from gcfunc.recipes.train import Finished, Trainer


def start(config: Config, folder: Path, console: Console) -> signal.Signals | None:
    """Train as ``config`` says and report into ``folder``.

    Returns:
        The signal that stopped it, after a checkpoint was saved; ``None`` if it finished.

    Raises:
        UsageError: the data cannot be read, or ``folder`` holds an unfinished experiment.
    """
    if (folder / checkpoint.NAME).exists():
        raise UsageError(
            f"{folder} holds an unfinished experiment: go on with it ({_resuming(folder)}), "
            "choose another --out, or delete it"
        )
    dataset = _load(config)
    return _conduct(Experiment(config, dataset.digest, _environment()), dataset, folder, console)


def resume(path: Path, console: Console) -> signal.Signals | None:
    """Go on where a stopped experiment's checkpoint is; as :func:`start` otherwise."""
    experiment, folder = checkpoint.load(path)
    dataset = _load(experiment.config)
    if dataset.digest != experiment.digest:
        raise UsageError(f"{dataset.name} is not the data that {path} was trained on")
    environment = _environment()
    for key, now in environment.items():
        if (then := experiment.environment.get(key)) != now:
            console.print(f"Note: {key} was {then}, is {now}; the last digits may differ.")
    experiment.environment = environment
    return _conduct(experiment, dataset, folder, console)


def _load(config: Config) -> Dataset:
    folder = None if config.data is None else Path(config.data)
    return data.load(config.dataset, folder, config.limit)


def _environment() -> dict[str, str]:
    return {
        "gcfunc": gcfunc.__version__,
        # A str of its own kind, which torch.load with weights_only=True would refuse.
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "machine": platform.machine(),
    }


def _conduct(
    experiment: Experiment, dataset: Dataset, folder: Path, console: Console
) -> signal.Signals | None:
    config = experiment.config
    try:
        (folder / "weights").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from error
    console.print(
        f"{dataset.name}: {len(dataset.train):,} images to train on, {len(dataset.test):,} to test"
    )
    with StopRequest() as stop:
        trainers = {gc: Trainer(config, dataset, gc) for gc in config.variants}
        why_eager = _compile(config, trainers, stop, console)
        finished = _train(experiment, trainers, folder, stop, console)
        if not finished:
            where = checkpoint.save(experiment, folder)
    if not finished:
        run = f"run {len(experiment.finished) + 1} of {len(config.runs)}"
        console.print(f"Stopped in {run} and saved {where}. Go on with:", soft_wrap=True)
        console.print(f"  {_resuming(folder)}", soft_wrap=True)
        return stop.received

    _report(experiment, dataset, folder, why_eager, console)
    # A checkpoint is what tells an unfinished experiment.
    (folder / checkpoint.NAME).unlink(missing_ok=True)
    return None


def _compile(
    config: Config, trainers: Mapping[str, Trainer], stop: StopRequest, console: Console
) -> str | None:
    """Compile every trainer's step, or give the reason why all of them run eager."""
    if config.eager:
        return "asked for"
    with console.status("Starting torch.compile"):
        reason = compiler.why_not()
    for gc, trainer in trainers.items():
        if stop.received is not None:
            # A Ctrl-C reaches the C++ compiler too, and its death is not worth a word.
            return reason
        if reason is not None:
            console.print(f"Steps run eager, as torch.compile fails here: {reason}")
            console.print("On a CPU it needs a C++ compiler (g++ or clang++) and Python's headers.")
            return reason
        began = time.perf_counter()
        try:
            with console.status(f"Compiling the step of {config.optimizer}, gc={gc}"):
                trainer.compile()
        except Exception:
            if stop.received is None:
                raise
        console.print(
            f"Compiled the step of {config.optimizer}, gc={gc}, "
            f"in {time.perf_counter() - began:.1f} s"
        )
    return None


def _train(
    experiment: Experiment,
    trainers: Mapping[str, Trainer],
    folder: Path,
    stop: StopRequest,
    console: Console,
) -> bool:
    """Make all runs that are left, and say whether they finished."""
    config = experiment.config
    batches = next(iter(trainers.values())).batches
    display = Display(console, len(config.runs), config.epochs, batches)
    with display.live():
        for gc, seed in config.runs[len(experiment.finished) :]:
            trainer = trainers[gc]
            run = (
                trainer.restore(experiment.current) if experiment.current else trainer.new_run(seed)
            )
            display.started(run, done=len(experiment.finished))
            while run.epoch < config.epochs:
                if stop.received is not None:
                    experiment.current = run.to_dict()
                    return False
                trainer.advance(run)
                display.stepped(run, done=len(experiment.finished))
                if run.batch == 0:
                    experiment.current = run.to_dict()
                    checkpoint.save(experiment, folder)
            checkpoint.save_atomically(run.params, folder / "weights" / f"{gc}-seed{seed}.pt")
            experiment.finished.append(Finished(gc, seed, run.history))
            experiment.current = None
            display.finished(experiment.finished[-1])
    return True


def _report(
    experiment: Experiment, dataset: Dataset, folder: Path, why_eager: str | None, console: Console
) -> None:
    config, runs = experiment.config, experiment.finished
    facts = {
        "environment": experiment.environment,
        "data": {
            "name": dataset.name,
            "train": len(dataset.train),
            "test": len(dataset.test),
            "sha256": dataset.digest,
        },
        "compiled": why_eager is None,
        "why_eager": why_eager,
    }
    report.write_json(folder / "run.json", config, runs, facts)
    report.draw_curves(folder / "curves.png", config, runs, dataset.name)
    console.print(report.table(config, runs))
    if config.compare:
        console.print(summary.verdict(runs, config.gc))
    console.print(f"In {folder}: run.json, curves.png, weights.", soft_wrap=True)


def _resuming(folder: Path) -> str:
    """The command that goes on, also where the environment is not activated."""
    command = ["gcfunc"] if shutil.which("gcfunc") else [sys.executable, "-m", "gcfunc"]
    return shlex.join([*command, "train", "--resume", str(folder)])
