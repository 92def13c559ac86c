"""An experiment from its first run to its report."""

import platform
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

import gcfunc
from gcfunc.recipes import checkpoint, compiler, data, report, summary
from gcfunc.recipes import model as network
from gcfunc.recipes.checkpoint import Experiment
from gcfunc.recipes.config import Config
from gcfunc.recipes.data import Dataset
from gcfunc.recipes.display import Display
from gcfunc.recipes.distributed import Group
from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.stop import StopRequest
from gcfunc.recipes.train import Finished, Trainer


def start(config: Config, folder: Path, group: Group, console: Console) -> signal.Signals | None:
    """Train as ``config`` says and report into ``folder``.

    Args:
        config: The request.
        folder: Where results go; that of the first process counts.
        group: The processes to train with.
        console: What to print on.

    Returns:
        The signal that stopped it, after a checkpoint was saved; ``None`` if it finished.

    Raises:
        UsageError: the data cannot be read, ``folder`` holds an unfinished experiment, or the
            processes are not what ``config`` asks for.
    """
    _require_processes(config, group, f"-m gcfunc train --{config.parallel} ...")
    folder = group.first(lambda: _claim(folder, _resuming(folder, config, group)))
    dataset = group.first(lambda: _load(config))
    experiment = Experiment(config, dataset.digest, _environment(group))
    return _conduct(experiment, dataset, folder, group, console)


def resume(path: Path, group: Group, console: Console) -> signal.Signals | None:
    """Go on where a stopped experiment's checkpoint is; as :func:`start` otherwise."""
    experiment, folder = group.first(lambda: checkpoint.load(path))
    config = experiment.config
    _require_processes(config, group, f"-m gcfunc train --resume {shlex.quote(str(path))}")
    dataset = group.first(lambda: _load(config))
    if dataset.digest != experiment.digest:
        raise UsageError(f"{dataset.name} is not the data that {path} was trained on")
    environment = _environment(group)
    for key, now in environment.items():
        if (then := experiment.environment.get(key, now)) != now:
            console.print(f"Note: {key} was {then}, is {now}; the last digits may differ.")
    experiment.environment = environment
    return _conduct(experiment, dataset, folder, group, console)


def _require_processes(config: Config, group: Group, arguments: str) -> None:
    if config.parallel and not group.launched:
        raise UsageError(
            f"--{config.parallel} is for processes that torchrun starts: "
            f"torchrun --nproc-per-node 2 {arguments}"
        )
    if group.size > 1 and not config.parallel:
        raise UsageError(
            f"started as {group.size} processes, which train together only with --ddp or --fsdp"
        )


def _claim(folder: Path, resuming: str) -> Path:
    if (folder / checkpoint.NAME).exists():
        raise UsageError(
            f"{folder} holds an unfinished experiment: go on with it ({resuming}), "
            "choose another --out, or delete it"
        )
    return folder


def _load(config: Config) -> Dataset:
    folder = None if config.data is None else Path(config.data)
    return data.load(config.dataset, folder, config.limit)


def _environment(group: Group) -> dict[str, str]:
    return {
        "processes": str(group.size),
        "gcfunc": gcfunc.__version__,
        # A str of its own kind, which torch.load with weights_only=True would refuse.
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "machine": platform.machine(),
    }


def _conduct(
    experiment: Experiment, dataset: Dataset, folder: Path, group: Group, console: Console
) -> signal.Signals | None:
    config = experiment.config
    resuming = _resuming(folder, config, group)
    group.first(lambda: _require_selection(config, dataset))
    group.first(lambda: _prepare(folder))
    console.print(
        f"{dataset.name}: {len(dataset.train):,} images to train on, {len(dataset.test):,} to test"
    )
    with (
        StopRequest(announced=group.rank == 0) as stop,
        group.watched(lambda: _what_stands(folder, resuming)),
    ):
        trainers = {gc: Trainer(config, dataset, gc, group) for gc in config.variants}
        why_eager = _compile(config, trainers, stop, console)
        stopped_by = _train(experiment, trainers, folder, group, stop, console)
        if stopped_by is not None:
            where = group.first(lambda: checkpoint.save(experiment, folder))
    if stopped_by is not None:
        run = f"run {len(experiment.finished) + 1} of {len(config.runs)}"
        console.print(f"Stopped in {run} and saved {where}. Go on with:", soft_wrap=True)
        console.print(f"  {resuming}", soft_wrap=True)
        return stopped_by

    group.first(lambda: _report(experiment, dataset, folder, why_eager, console))
    return None


def _require_selection(config: Config, dataset: Dataset) -> None:
    if config.gc == "none":
        return
    height, width = dataset.train.images.shape[-2:]
    params = dict(network.build(height, width, dataset.classes).named_parameters())
    try:
        gcfunc.centralize(params, where=config.gc)
    except ValueError as error:
        raise UsageError(f"--gc {config.gc}: {error}") from error


def _prepare(folder: Path) -> None:
    try:
        (folder / "weights").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from error


def _what_stands(folder: Path, resuming: str) -> str:
    if (folder / checkpoint.NAME).exists():
        return f"the checkpoint of the last whole epoch stands, go on with: {resuming}"
    return "no epoch was finished, so that nothing was saved"


def _compile(
    config: Config, trainers: Mapping[str, Trainer], stop: StopRequest, console: Console
) -> str | None:
    """Compile every trainer's step, or give the reason why all of them run eager."""
    if config.mode == "hooks":
        return "mode hooks compiles nothing"
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
    group: Group,
    stop: StopRequest,
    console: Console,
) -> signal.Signals | None:
    """Make all runs that are left, or give the signal that stopped them."""
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
                if (stopped_by := group.agree(stop.received)) is not None:
                    experiment.current = run.to_dict()
                    return stopped_by
                trainer.advance(run)
                display.stepped(run, done=len(experiment.finished))
                if run.batch == 0:
                    experiment.current = run.to_dict()
                    group.first(lambda: checkpoint.save(experiment, folder))
            params, path = run.learner.params(), folder / "weights" / f"{gc}-seed{seed}.pt"
            group.first(partial(checkpoint.save_atomically, params, path))
            experiment.finished.append(Finished(gc, seed, run.history))
            experiment.current = None
            display.finished(experiment.finished[-1])
    return None


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
        "processes": int(experiment.environment["processes"]),
        "compiled": why_eager is None,
        "why_eager": why_eager,
    }
    report.write_json(folder / "run.json", config, runs, facts)
    report.draw_curves(folder / "curves.png", config, runs, dataset.name)
    console.print(report.table(config, runs))
    if config.compare:
        console.print(summary.verdict(runs, config.gc))
    console.print(f"In {folder}: run.json, curves.png, weights.", soft_wrap=True)
    # A checkpoint is what tells an unfinished experiment.
    (folder / checkpoint.NAME).unlink(missing_ok=True)


def _resuming(folder: Path, config: Config, group: Group) -> str:
    """The command that goes on, also where the environment is not activated."""
    if config.parallel:
        torchrun = _command("torchrun", "torch.distributed.run")
        command = [*torchrun, "--nproc-per-node", str(group.size), "-m", "gcfunc"]
    else:
        command = _command("gcfunc", "gcfunc")
    return shlex.join([*command, "train", "--resume", str(folder)])


def _command(script: str, module: str) -> list[str]:
    return [script] if shutil.which(script) else [sys.executable, "-m", module]
