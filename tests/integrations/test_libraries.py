"""What other libraries train with the optimizers equals the same training by hand.

A library is imported in the tests that need it, since importing all of them takes half a minute.
"""

import importlib
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset

import gcfunc
from tests.cases import Params, largest_difference

pytestmark = pytest.mark.filterwarnings(
    # Lightning uses what torch is about to remove.
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
)

EPOCHS, STEPS, PARTS, SIZE = 2, 2, 2, 3
"""An epoch is so many steps of so many parts of a batch, each with so many images."""
CLIP = 0.1
GAMMA = 0.5
"""What the learning rate falls by after an epoch."""

Choice = tuple[str, dict[str, Any]]
"""A name that is both torch.optim's and gcfunc.optim's, and arguments that both take."""

OPTIMIZERS: dict[str, Choice] = {
    "sgd": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "adam": ("Adam", {"lr": 0.01}),
}


Batches = list[dict[str, Tensor]]


class Images(Dataset[dict[str, Tensor]]):
    """For all epochs the same."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(1)
        count = STEPS * PARTS * SIZE
        self.images = torch.randn(count, 2, 5, 5, dtype=torch.float64, generator=random)
        self.labels = torch.randint(3, (count,), generator=random)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"images": self.images[i], "labels": self.labels[i]}


def loader() -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Images(), batch_size=SIZE)


class Net(nn.Module):
    """A convolution and a linear layer, always the same at first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3))
        self.double()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.layers(images), labels)}


def values(model: nn.Module) -> Params:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def subtract_means(params: Any) -> None:
    for p in params:
        if p.grad is not None and p.ndim > 1:
            p.grad -= p.grad.mean(tuple(range(1, p.ndim)), keepdim=True)


def backward(model: nn.Module, parts: Batches) -> None:
    for batch in parts:
        (model(**batch)["loss"] / len(parts)).backward()


Clip = Callable[[Any], object]


def clip_by_norm(params: Any) -> None:
    clip_grad_norm_(params, CLIP)


def loop(schedule: StepLR, step: Callable[[Batches], object]) -> None:
    """``step`` gets the parts of one step."""
    for _ in range(EPOCHS):
        batches = [*loader()]
        for i in range(0, len(batches), PARTS):
            step(batches[i : i + PARTS])
        schedule.step()


def by_hand(choice: Choice, clip: Clip = clip_by_norm, *, gc: bool = True) -> Params:
    """What torch's own optimizer makes of centralized gradients."""
    name, kwargs = choice
    model = Net()
    params = [*model.parameters()]
    opt = getattr(torch.optim, name)(params, **kwargs)

    def step(parts: Batches) -> None:
        opt.zero_grad()
        backward(model, parts)
        clip(params)
        if gc:
            subtract_means(params)
        opt.step()

    loop(StepLR(opt, 1, GAMMA), step)
    return values(model)


def make(choice: Choice, params: Any, **options: Any) -> torch.optim.Optimizer:
    name, kwargs = choice
    opt = getattr(gcfunc.optim, name)(params, **({"gc": "gc"} | kwargs | options))
    assert isinstance(opt, torch.optim.Optimizer)
    return opt


def in_accelerate(choice: Choice, folder: Path, epochs: range) -> Params:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
    model: nn.Module = Net()
    opt = make(choice, model.parameters())
    model, opt, batches, schedule = accelerator.prepare(model, opt, loader(), StepLR(opt, 1, GAMMA))
    if epochs.start:
        accelerator.load_state(str(folder))
    for _ in epochs:
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                opt.step()
                opt.zero_grad()
        schedule.step()
    accelerator.save_state(str(folder))
    return values(model)


def in_lightning(choice: Choice, folder: Path, epochs: range) -> Params:
    from lightning import pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: dict[str, Tensor]) -> Tensor:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            opt = make(choice, self.parameters())
            return [opt], [StepLR(opt, 1, GAMMA)]

    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs.stop,
        accumulate_grad_batches=PARTS,
        gradient_clip_val=CLIP,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    saved = folder / "saved.ckpt"
    trainer.fit(module, loader(), ckpt_path=saved if epochs.start else None)
    trainer.save_checkpoint(saved)
    return values(module.net)


def in_transformers(choice: Choice, folder: Path, epochs: range) -> Params:
    from transformers import Trainer, TrainingArguments

    class Scheduled(Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            assert self.optimizer is not None
            schedule: Any = StepLR(self.optimizer, STEPS, GAMMA)
            self.lr_scheduler = schedule
            return schedule

    name, kwargs = choice
    model = Net()
    trainer = Scheduled(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            num_train_epochs=epochs.stop,
            per_device_train_batch_size=SIZE,
            gradient_accumulation_steps=PARTS,
            max_grad_norm=CLIP,
            train_sampling_strategy="sequential",
            save_strategy="epoch",
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=Images(),
        optimizer_cls_and_kwargs=(getattr(gcfunc.optim, name), {"gc": "gc"} | kwargs),
    )
    trainer.train(resume_from_checkpoint=epochs.start > 0)
    return values(model)


def in_ignite(choice: Choice, folder: Path, epochs: range) -> Params:
    from ignite.engine import Events, create_supervised_trainer
    from ignite.handlers import Checkpoint, DiskSaver

    model = Net()
    opt = make(choice, model.parameters())
    schedule = StepLR(opt, 1, GAMMA)
    trainer = create_supervised_trainer(
        model.layers,
        opt,
        F.cross_entropy,
        prepare_batch=lambda batch, device, non_blocking: (batch["images"], batch["labels"]),
        gradient_accumulation_steps=PARTS,
    )
    # There is no event between the backward pass and the step.
    opt.register_step_pre_hook(lambda *_: clip_by_norm(model.parameters()))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: schedule.step())
    saved: dict[str, Any] = {"model": model, "opt": opt, "schedule": schedule, "trainer": trainer}
    if epochs.start:
        file = folder / "saved.pt"
        Checkpoint.load_objects(saved, torch.load(file, weights_only=True))
    disk = DiskSaver(str(folder), require_empty=False)
    trainer.add_event_handler(
        Events.COMPLETED, Checkpoint(saved, disk, filename_pattern="saved.pt")
    )
    trainer.run(loader(), max_epochs=epochs.stop)
    return values(model)


def in_mmengine(choice: Choice, folder: Path, epochs: range) -> Params:
    pytest.importorskip(
        "cv2",
        reason="OpenCV, which MMEngine's Runner imports, cannot be imported here (no libGL?)",
        exc_type=ImportError,
    )
    from mmengine.config import Config
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Model(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, images: Tensor, labels: Tensor, mode: str) -> dict[str, Tensor]:
            return self.net(images, labels)

    name, kwargs = choice
    file = folder / "config.py"
    file.write_text(
        f"""
custom_imports = dict(imports=["gcfunc.integrations.mmengine"])
optim_wrapper = dict(
    optimizer=dict(type="{name}_GC", **{kwargs}),
    accumulative_counts={PARTS},
    clip_grad=dict(max_norm={CLIP}),
)
param_scheduler = dict(type="StepLR", step_size=1, gamma={GAMMA}, end={EPOCHS})
train_cfg = dict(by_epoch=True, max_epochs={epochs.stop})
"""
    )
    config = Config.fromfile(file)
    model = Model()
    runner = Runner(
        model,
        str(folder),
        loader(),
        train_cfg=config.train_cfg,
        optim_wrapper=config.optim_wrapper,
        param_scheduler=config.param_scheduler,
        resume=epochs.start > 0,
        experiment_name=f"{file} {epochs}",
        log_level="WARNING",
    )
    # For MMEngine's checkpoints, which torch would not load otherwise.
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        warnings.filterwarnings("ignore", "Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
        runner.train()
    return values(model.net)


LIBRARIES: dict[str, Callable[[Choice, Path, range], Params]] = {
    "accelerate": in_accelerate,
    "ignite": in_ignite,
    "lightning": in_lightning,
    "mmengine": in_mmengine,
    "transformers": in_transformers,
}


@pytest.mark.parametrize("choice", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("train", LIBRARIES.values(), ids=LIBRARIES)
def test_training_equals_the_same_by_hand(
    train: Callable[[Choice, Path, range], Params], choice: Choice, tmp_path: Path
) -> None:
    trained = train(choice, tmp_path, range(EPOCHS))
    assert largest_difference(trained, by_hand(choice)) <= 1e-12
    assert largest_difference(trained, by_hand(choice, gc=False)) > 1e-3


@pytest.mark.parametrize("choice", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("train", LIBRARIES.values(), ids=LIBRARIES)
def test_resumed_training_equals_uninterrupted(
    train: Callable[[Choice, Path, range], Params], choice: Choice, tmp_path: Path
) -> None:
    folders = [tmp_path / "whole", tmp_path / "parts"]
    for folder in folders:
        folder.mkdir()
    whole = train(choice, folders[0], range(EPOCHS))
    half = train(choice, folders[1], range(EPOCHS - 1))
    resumed = train(choice, folders[1], range(EPOCHS - 1, EPOCHS))
    assert largest_difference(resumed, whole) == 0
    assert largest_difference(half, whole) > 1e-3


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("train", LIBRARIES.values(), ids=LIBRARIES)
def test_steps_are_compiled_once(
    train: Callable[[Choice, Path, range], Params], tmp_path: Path
) -> None:
    name, kwargs = OPTIMIZERS["sgd"]
    trained = train((name, kwargs | {"compile": True}), tmp_path, range(EPOCHS))
    # The Trainer has a group of parameters of its own for biases.
    assert counters["stats"]["unique_graphs"] == (2 if train is in_transformers else 1)
    assert largest_difference(trained, by_hand((name, kwargs))) <= 1e-12


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("everything", [False, True])
def test_step_in_a_function_that_the_user_compiles(everything: bool, compiled: bool) -> None:
    model = Net()
    opt = make(OPTIMIZERS["sgd"], model.parameters(), compile=compiled)
    only_step = torch.compile(lambda: opt.step(), backend="eager")

    def step(parts: Batches) -> None:
        opt.zero_grad()
        backward(model, parts)
        clip_by_norm(model.parameters())
        if everything:
            opt.step()
        else:
            only_step()

    if everything:
        step = torch.compile(step, backend="eager")
    counts: list[int] = []

    def counted(parts: Batches) -> None:
        step(parts)
        counts.append(counters["stats"]["unique_graphs"])

    loop(StepLR(opt, 1, GAMMA), counted)
    # Once, though the learning rate falls; nothing of the optimizer is part of the user's graphs.
    assert counts == [2 * everything + compiled] * STEPS * EPOCHS
    assert largest_difference(values(model), by_hand(OPTIMIZERS["sgd"])) <= 1e-12


def clip_with_known_norm(params: Any) -> None:
    params = [*params]
    grads = [p.grad for p in params if p.grad is not None]
    clip_grads_with_norm_(params, CLIP, get_total_norm(grads, foreach=True), foreach=True)


CLIPS: dict[str, Clip] = {
    "norm": lambda params: clip_grad_norm_(params, CLIP, foreach=True),
    "largest": lambda params: clip_grad_norm_(params, CLIP, torch.inf, foreach=True),
    "value": lambda params: clip_grad_value_(params, 0.01, foreach=True),
    "known-norm": clip_with_known_norm,
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_gradients_clipped_by_foreach_are_stepped_as_clipped(clip: Clip, compiled: bool) -> None:
    choice = OPTIMIZERS["sgd"]
    model = Net()
    opt = make(choice, model.parameters(), compile=compiled)

    def step(parts: Batches) -> None:
        opt.zero_grad()
        backward(model, parts)
        clip(model.parameters())
        clipped = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        opt.step()
        after = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(map(torch.equal, after, clipped))

    loop(StepLR(opt, 1, GAMMA), step)
    assert largest_difference(values(model), by_hand(choice, clip)) <= 1e-12
    unclipped = by_hand(choice, lambda params: None)
    assert largest_difference(values(model), unclipped) > 1e-3


def test_accelerate_skips_steps_that_overflow() -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    model = Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    inner = make(OPTIMIZERS["sgd"], model.parameters())
    schedule = StepLR(inner, 1, GAMMA)
    # What Accelerator.prepare makes for mixed_precision="fp16", which it has on GPUs only.
    opt = AcceleratedOptimizer(inner, scaler=scaler)
    overflowed: list[bool] = []

    def step(parts: Batches) -> None:
        for factor in (torch.inf, 1.0):
            before = values(model)
            opt.zero_grad()
            for batch in parts:
                scaler.scale(model(**batch)["loss"] / PARTS * factor).backward()
            scaler.unscale_(inner)
            clip_by_norm(model.parameters())
            opt.step()
            overflowed.append(opt.step_was_skipped)
            assert (largest_difference(values(model), before) == 0) == opt.step_was_skipped

    loop(schedule, step)
    assert overflowed == [True, False] * STEPS * EPOCHS
    assert largest_difference(values(model), by_hand(OPTIMIZERS["sgd"])) <= 1e-12


def test_gcfunc_imports_none_of_them() -> None:
    code = f"import sys, gcfunc; assert not {set(LIBRARIES)} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_mmengine_knows_every_class() -> None:
    from mmengine.optim import OPTIMIZERS as REGISTRY

    importlib.import_module("gcfunc.integrations.mmengine")

    for name, kind in vars(gcfunc.optim).items():
        if name.startswith("_") or kind is gcfunc.optim.Lookahead:
            continue
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            assert REGISTRY.get(f"gcfunc.optim.{name}") is kind
            assert REGISTRY.get(name) is getattr(torch.optim, name, kind)


@pytest.mark.parametrize("name", ["Lion", "AdamP"])
def test_hooks_with_the_optimizers_of_pytorch_optimizer(name: str) -> None:
    """They are what its own option for centralization makes of them."""
    import pytorch_optimizer

    results = {}
    for way in ("hooks", "its own", "none"):
        model = Net()
        if way == "hooks":
            gcfunc.hooks.centralize_backward(model)
        own = {"use_gc": True} if way == "its own" else {}
        opt = getattr(pytorch_optimizer, name)(model.parameters(), lr=1e-3, **own)
        for batch in loader():
            opt.zero_grad()
            model(**batch)["loss"].backward()
            opt.step()
        results[way] = values(model)
    assert largest_difference(results["hooks"], results["its own"]) <= 1e-12
    assert largest_difference(results["hooks"], results["none"]) > 1e-4
