"""What ``gcfunc train`` does."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from gcfunc._catalog import CATALOG
from gcfunc.recipes import data
from gcfunc.recipes import model as network
from gcfunc.recipes.config import MODES
from tests.recipes.command import HOOKED, QUICK, STEPS, same, train, untimed, weights


@pytest.mark.parametrize("optimizer", CATALOG)
def test_every_optimizer_trains(tmp_path: Path, optimizer: str) -> None:
    options = ("--dataset", "digits", "--epochs", "4", "--eager")
    result = train(tmp_path, *options, "--optimizer", optimizer)
    (run,) = result["runs"]
    assert run["final"]["train_loss"] < 0.8 * run["history"][0]["train_loss"]
    assert run["final"]["test_accuracy"] > 0.85


def test_default_data_is_mnist(tmp_path: Path) -> None:
    result = train(tmp_path, "--limit", "8", "--epochs", "1", "--eager")
    assert result["config"]["dataset"] == "mnist"
    mnist = data.load("mnist")
    assert mnist.train.images.shape == (4000, 1, 28, 28)
    assert mnist.test.images.shape == (1000, 1, 28, 28)
    assert mnist.classes == 10
    for split in (mnist.train, mnist.test):
        assert split.labels.bincount(minlength=10).min() > 0.08 * len(split)
    assert abs(float(mnist.train.images.mean())) < 1e-3
    assert abs(float(mnist.train.images.std()) - 1) < 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_centralization_is_what_it_says(tmp_path: Path, mode: str) -> None:
    """Without decay each row of a centralized weight keeps its mean, and only such rows do."""
    options = (*QUICK, "--mode", mode, "--weight-decay", "0", "--lr", "0.1")
    train(tmp_path / "start", *options, "--lr", "0")
    start = weights(tmp_path / "start", "gc-seed0")
    conv, linear = "4.weight", "9.weight"
    moved = {}
    for gc in ("none", "gc", "gcc", "linear"):
        train(tmp_path / gc, *options, "--gc", gc)
        end = weights(tmp_path / gc, f"{gc}-seed0")
        moved[gc] = {
            name: float((end[name] - start[name]).flatten(1).mean(1).abs().max())
            for name in (conv, linear)
        }
        assert float((end[conv] - start[conv]).abs().max()) > 1e-2
    assert moved["none"][conv] > 1e-4
    assert moved["none"][linear] > 1e-4
    assert moved["gc"][conv] < 1e-7
    assert moved["gc"][linear] < 1e-7
    assert moved["gcc"][conv] < 1e-7
    assert moved["gcc"][linear] > 1e-4
    assert moved["linear"][conv] > 1e-4
    assert moved["linear"][linear] < 1e-7


@pytest.mark.parametrize("mode", MODES)
def test_training_is_what_plain_pytorch_does(tmp_path: Path, mode: str) -> None:
    """Without centralization: torch.optim.SGD on a module, the same images in the same order."""
    options = (*QUICK, "--mode", mode, "--gc", "none", "--batch-size", "20", "--seed", "3")
    result = train(tmp_path, *options)
    dataset = data.load("digits", limit=48)
    model = network.build(8, 8, 10)
    model.load_state_dict(network.initial_params(model, seed=3))
    optimizer = torch.optim.SGD(model.parameters(), **CATALOG["sgd"].training)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    for epoch in range(2):
        losses: list[Tensor] = []
        order = np.random.default_rng([3, epoch]).permutation(48)
        for batch in (order[:20], order[20:40], order[40:]):
            images, labels = dataset.train[torch.from_numpy(batch)]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels, reduction="none")
            loss.mean().backward()
            optimizer.step()
            schedule.step()
            losses.extend(loss.detach())
        with torch.no_grad():
            logits = model(dataset.test.images)
            test_loss = float(F.cross_entropy(logits, dataset.test.labels))
            accuracy = float((logits.argmax(1) == dataset.test.labels).double().mean())
        entry = result["runs"][0]["history"][epoch]
        assert entry["train_loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
        assert entry["test_loss"] == pytest.approx(test_loss, rel=1e-5)
        assert entry["test_accuracy"] == pytest.approx(accuracy)
    torch.testing.assert_close(weights(tmp_path, "none-seed3"), model.state_dict())


@pytest.mark.parametrize("gc", ["none", "gc", "gcc"])
@pytest.mark.parametrize(
    "optimizer",
    [
        *((name, "--weight-decay", "0") for name in HOOKED if name != "adamw"),
        ("adamw",),  # decoupled decay is centralized by neither
        ("sgd", "--nesterov", "--momentum", "0.5", "--weight-decay", "0"),
    ],
    ids=" ".join,
)
def test_hooks_learn_what_functional_steps_do(
    tmp_path: Path, optimizer: tuple[str, ...], gc: str
) -> None:
    options = (*QUICK, "--optimizer", *optimizer, "--gc", gc, "--batch-size", "20")
    functional = train(tmp_path / "functional", *options)
    hooks = train(tmp_path / "hooks", *options, "--mode", "hooks")
    for here, there in zip(
        hooks["runs"][0]["history"], functional["runs"][0]["history"], strict=True
    ):
        del here["step_ms"], there["step_ms"]
        assert here == pytest.approx(there, rel=1e-5)
    torch.testing.assert_close(
        *(weights(tmp_path / mode, f"{gc}-seed0") for mode in ("hooks", "functional")),
        rtol=1e-4,
        atol=1e-5,
    )


def test_hooks_leave_coupled_decay_alone(tmp_path: Path) -> None:
    for mode in MODES:
        train(tmp_path / mode, *QUICK, "--weight-decay", "0.1", "--mode", mode)
    hooks, functional = (weights(tmp_path / mode, "gc-seed0") for mode in MODES)
    assert float((hooks["9.weight"] - functional["9.weight"]).abs().max()) > 1e-5


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("parallel", ["--ddp", "--fsdp"])
def test_a_group_of_one_is_one_process(tmp_path: Path, parallel: str) -> None:
    alone = train(tmp_path / "alone", *QUICK, "--mode", "hooks")
    group = train(tmp_path / "group", *QUICK, parallel)
    assert untimed(alone["runs"]) == untimed(group["runs"])
    assert same(*(weights(tmp_path / who, "gc-seed0") for who in ("alone", "group")))


def test_at_update_differs_from_at_gradient(tmp_path: Path) -> None:
    for at in ("gradient", "update"):
        train(tmp_path / at, *QUICK, "--optimizer", "adam", "--at", at)
    gradient, update = (weights(tmp_path / at, "gc-seed0") for at in ("gradient", "update"))
    assert not same(gradient, update)


@pytest.mark.parametrize(
    "option",
    [
        ("--momentum", "0.5"),
        ("--nesterov",),
        ("--weight-decay", "0.1"),
        ("--lr", "0.01"),
        ("--schedule", "constant"),
        ("--batch-size", "8"),
        ("--seed", "1"),
    ],
    ids=lambda option: option[0],
)
def test_every_option_has_an_effect(tmp_path: Path, option: tuple[str, ...]) -> None:
    train(tmp_path / "without", *QUICK)
    result = train(tmp_path / "with", *QUICK, *option)
    seed = result["config"]["seed"]
    assert not same(
        weights(tmp_path / "without", "gc-seed0"), weights(tmp_path / "with", f"gc-seed{seed}")
    )


def test_seed_decides_everything(tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = train(tmp_path / "one", *QUICK)
    torch.manual_seed(2)
    two = train(tmp_path / "two", *QUICK)
    assert untimed(one) == untimed(two)
    assert same(weights(tmp_path / "one", "gc-seed0"), weights(tmp_path / "two", "gc-seed0"))


def test_schedules(tmp_path: Path) -> None:
    cosine = train(tmp_path / "cosine", *QUICK, "--lr", "0.1")
    last_of_each = [0.1 * (1 + math.cos(math.pi * step / STEPS)) / 2 for step in (2, 5)]
    assert [e["lr"] for e in cosine["runs"][0]["history"]] == pytest.approx(last_of_each)
    constant = train(tmp_path / "constant", *QUICK, "--lr", "0.1", "--schedule", "constant")
    assert [e["lr"] for e in constant["runs"][0]["history"]] == [0.1, 0.1]


def test_compiled_equals_eager_without_a_recompile(tmp_path: Path) -> None:
    """Two seeds, a cosine schedule and a short last batch; one graph for each variant."""
    options = (*QUICK[:-1], "--batch-size", "20", "--compare", "--seeds", "2")
    torch.compiler.reset()
    counters.clear()
    compiled = train(tmp_path / "compiled", *options)
    assert compiled["why_eager"] is None
    assert counters["stats"]["unique_graphs"] == 3  # the trial, and one for each variant
    assert compiled["compiled"] is True
    eager = train(tmp_path / "eager", *options, "--eager")
    assert (eager["compiled"], eager["why_eager"]) == (False, "asked for")
    for run in ("none-seed0", "gc-seed0", "none-seed1", "gc-seed1"):
        torch.testing.assert_close(
            weights(tmp_path / "compiled", run),
            weights(tmp_path / "eager", run),
            rtol=1e-4,
            atol=1e-5,
        )
