"""Where an experiment stands, on disk."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gcfunc.recipes.config import Config
from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.train import Epoch, Finished

NAME = "checkpoint.pt"
_FORMAT = 1


@dataclass
class Experiment:
    """A request and how far it got.

    Attributes:
        config: The request.
        digest: Fingerprint of the data it is trained on.
        environment: Versions and settings that can change the last digits of a result.
        finished: The runs that are done, in order.
        current: The run under way, as :meth:`gcfunc.recipes.train.Run.to_dict` gives it.
    """

    config: Config
    digest: str
    environment: Mapping[str, str]
    finished: list[Finished] = field(default_factory=list)
    current: Mapping[str, Any] | None = None


def save(experiment: Experiment, folder: Path) -> Path:
    """Write the experiment into the folder, whole or not at all."""
    path = folder / NAME
    content = {
        "format": _FORMAT,
        "config": experiment.config.to_dict(),
        "digest": experiment.digest,
        "environment": dict(experiment.environment),
        "finished": [
            {"gc": run.gc, "seed": run.seed, "history": [vars(epoch) for epoch in run.history]}
            for run in experiment.finished
        ],
        "current": experiment.current,
    }
    save_atomically(content, path)
    return path


def load(path: Path) -> tuple[Experiment, Path]:
    """The experiment saved at ``path``, a checkpoint or the folder it is in; and that folder.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    folder, path = (path, path / NAME) if path.is_dir() else (path.parent, path)
    if not path.exists():
        raise UsageError(f"there is no {path}; an experiment that finished leaves none")
    try:
        content = torch.load(path, weights_only=True)
        if content["format"] != _FORMAT:
            raise UsageError(f"{path} was written by another version of gcfunc")
        experiment = Experiment(
            config=Config(**content["config"]),
            digest=content["digest"],
            environment=content["environment"],
            finished=[
                Finished(run["gc"], run["seed"], [Epoch(**epoch) for epoch in run["history"]])
                for run in content["finished"]
            ],
            current=content["current"],
        )
    except UsageError:
        raise
    except Exception as error:  # torch.load raises whatever the bytes it trips over make it raise
        raise UsageError(f"{path} is not a checkpoint of gcfunc train") from error
    return experiment, folder


def save_atomically(content: Any, path: Path) -> None:
    """``torch.save``, except that a crash leaves the previous file as it was."""
    temporary = path.with_name(f"{path.name}.tmp")
    torch.save(content, temporary)
    temporary.replace(path)
