"""The ``gcfunc`` command, through its command line."""

import gzip
import json
import math
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from scipy import stats
from torch import Tensor
from torch._dynamo.utils import counters

from gcfunc.recipes import data, report, summary
from gcfunc.recipes import model as network
from gcfunc.recipes.cli import main
from gcfunc.recipes.config import ALGORITHMS, MODES
from gcfunc.recipes.train import Epoch, Finished, Run, Trainer

QUICK = ("--dataset", "digits", "--limit", "48", "--epochs", "2", "--batch-size", "16", "--eager")
STEPS = 6  # of one QUICK run


def train(out: Path, *options: str) -> dict[str, Any]:
    """Run the command and give what it wrote."""
    assert main(["train", *options, "--out", str(out)]) == 0
    return results(out)


def results(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "run.json").read_text())
    return content


def weights(out: Path, run: str) -> dict[str, Tensor]:
    params: dict[str, Tensor] = torch.load(out / "weights" / f"{run}.pt", weights_only=True)
    return params


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def untimed(result: dict[str, Any]) -> Any:
    """The result without what no two runs share, times."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k != "step_ms"}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(result)


def command(*options: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gcfunc", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


AfterStep = Callable[[int, Callable[[], None]], None]


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """As in a terminal: a shell that starts the tests in the background has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> AfterStep:
    """Have something happen after the nth training step from now."""

    def arrange(n: int, happen: Callable[[], None]) -> None:
        advance, count = Trainer.advance, iter(range(1, n + 1))

        def counted(self: Trainer, run: Run) -> None:
            advance(self, run)
            if next(count, None) == n:
                happen()

        monkeypatch.setattr(Trainer, "advance", counted)

    return arrange


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def group_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As torchrun starts a process that is on its own."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    address = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in address.items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():  # a test that failed
        dist.destroy_process_group()


# What training does


@pytest.mark.parametrize("optimizer", ALGORITHMS)
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
    for gc in ("none", "gc", "gcc"):
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


@pytest.mark.parametrize("mode", MODES)
def test_training_is_what_plain_pytorch_does(tmp_path: Path, mode: str) -> None:
    """Without centralization: torch.optim.SGD on a module, the same images in the same order."""
    options = (*QUICK, "--mode", mode, "--gc", "none", "--batch-size", "20", "--seed", "3")
    result = train(tmp_path, *options)
    dataset = data.load("digits", limit=48)
    model = network.build(8, 8, 10)
    model.load_state_dict(network.initial_params(model, seed=3))
    defaults = ALGORITHMS["sgd"]
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=defaults.lr,
        momentum=defaults.momentum or 0.0,
        weight_decay=defaults.weight_decay,
    )
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


HOOKED = [name for name, algorithm in ALGORITHMS.items() if algorithm.torch]


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


# What it reports


def test_report_is_consistent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(tmp_path, *QUICK, "--compare", "--seeds", "3")
    assert [(r["gc"], r["seed"]) for r in result["runs"]] == [
        (gc, seed) for seed in range(3) for gc in ("none", "gc")
    ]
    assert result["config"]["lr"] == ALGORITHMS["sgd"].lr
    assert result["data"]["train"] == result["data"]["test"] == 48
    assert result["environment"]["torch"] == torch.__version__
    for quantity in ("train_loss", "test_loss", "test_accuracy"):
        values = {}
        for gc in ("none", "gc"):
            runs = [r for r in result["runs"] if r["gc"] == gc]
            assert all(len(r["history"]) == 2 for r in runs)
            values[gc] = [r["history"][-1][quantity] for r in runs]
            assert [r["final"][quantity] for r in runs] == values[gc]
            assert result["summary"][gc][quantity]["mean"] == pytest.approx(np.mean(values[gc]))
            assert result["summary"][gc][quantity]["std"] == pytest.approx(
                np.std(values[gc], ddof=1)
            )
        expected = np.subtract(values["gc"], values["none"]).mean()
        assert result["difference"][quantity]["mean"] == pytest.approx(expected)

    shown = capsys.readouterr().out
    for gc in ("none", "gc"):
        assert f"{result['summary'][gc]['train_loss']['mean']:.4f} ±" in shown
    assert "".join(result["verdict"].split()) in "".join(shown.split())
    assert not (tmp_path / "checkpoint.pt").exists()


def test_report_says_how_it_was_trained(tmp_path: Path) -> None:
    result = train(tmp_path, *QUICK, "--mode", "hooks")
    assert result["config"]["mode"] == "hooks"
    assert (result["config"]["ddp"], result["config"]["fsdp"]) == (False, False)
    assert result["processes"] == 1
    assert (result["compiled"], result["why_eager"]) == (False, "mode hooks compiles nothing")


def test_curves_show_lines_and_bands_of_both_variants(tmp_path: Path) -> None:
    train(tmp_path, *QUICK, "--compare", "--seeds", "2")
    image = matplotlib.image.imread(tmp_path / "curves.png")[..., :3]
    for gc in ("none", "gc"):
        line = np.array(to_rgb(report.COLORS[gc]))
        assert (np.abs(image - line).max(-1) < 0.02).sum() > 200
        band = report.BAND * line + 1 - report.BAND
        assert (np.abs(image - band).max(-1) < 0.02).sum() > 200


def test_divergence_is_said_and_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(tmp_path, *QUICK, "--compare", "--seeds", "2", "--lr", "1e30")
    assert result["summary"]["gc"]["train_loss"]["mean"] is None
    assert "2 of 2 runs without centralization and 2 of 2 with gc diverged" in result["verdict"]
    assert "nan" in capsys.readouterr().out


def runs_with(gc: str, accuracies: list[float]) -> list[Finished]:
    return [
        Finished(gc, seed, [Epoch(1, 0.1, 0.5, 0.5, accuracy, 1.0)])
        for seed, accuracy in enumerate(accuracies)
    ]


@pytest.mark.parametrize(
    ("without", "with_gc", "said"),
    [
        ([0.90, 0.91, 0.92], [0.95, 0.96, 0.97], r"\+5\.00 ± 0\.00 .* it helps\.$"),
        ([0.95, 0.96, 0.98], [0.90, 0.91, 0.92], r"-5\.33 ± 0\.33 .* it hurts\.$"),
        ([0.90, 0.95, 0.97], [0.96, 0.92, 0.97], r"within noise, so .* no measurable difference"),
        ([0.90, 0.90], [0.90, 0.90], r"\+0\.00 ± 0\.00 .* within noise"),
        # More than two standard errors, which with two seeds is still nothing.
        ([0.90, 0.90], [0.91, 0.92], r"\+1\.50 ± 0\.50 .* within noise"),
        ([0.90], [0.99], r"\+9\.00 points; one seed cannot tell"),
    ],
)
def test_verdict(without: list[float], with_gc: list[float], said: str) -> None:
    verdict = summary.verdict([*runs_with("none", without), *runs_with("gc", with_gc)], "gc")
    assert re.search(said, verdict)


def test_noise_is_what_a_paired_t_test_says() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        without = rng.normal(0.9, 0.02, size=4)
        with_gc = without + rng.normal(0.01, 0.01, size=4)
        p = stats.ttest_rel(with_gc, without).pvalue
        is_noise = summary.difference(list(with_gc), list(without)).is_noise
        assert is_noise == (p >= 0.05)
        seen.add(is_noise)
    assert seen == {True, False}


# Stopping and going on


@pytest.mark.parametrize("step", [1, 3, 4, STEPS, STEPS + 2, 3 * STEPS - 1])
@pytest.mark.parametrize("optimizer", ["sgd", "ranger"])
def test_resume_is_exact(
    tmp_path: Path,
    after_step: AfterStep,
    capsys: pytest.CaptureFixture[str],
    optimizer: str,
    step: int,
) -> None:
    """Stopped mid-epoch, between epochs, between runs: the end is the same to the last bit."""
    options = (*QUICK, "--compare", "--seeds", "2", "--optimizer", optimizer)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, *options)
    after_step(step, interrupt)
    capsys.readouterr()
    assert main(["train", *options, "--out", str(parts)]) == 128 + signal.SIGINT
    assert f"train --resume {parts}" in capsys.readouterr().out
    assert not (parts / "run.json").exists()
    assert main(["train", "--resume", str(parts)]) == 0
    assert untimed(results(parts)) == untimed(results(whole))
    for run in ("none-seed0", "gc-seed0", "none-seed1", "gc-seed1"):
        assert same(weights(parts, run), weights(whole, run))
    assert not same(weights(parts, "gc-seed0"), weights(whole, "gc-seed1"))


def test_resume_is_exact_when_compiled(tmp_path: Path, after_step: AfterStep) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = QUICK[:-1]
    assert train(whole, *options)["why_eager"] is None
    after_step(STEPS - 2, interrupt)
    assert main(["train", *options, "--out", str(parts)]) == 130
    assert main(["train", "--resume", str(parts)]) == 0
    assert untimed(results(parts)) == untimed(results(whole))
    assert same(weights(parts, "gc-seed0"), weights(whole, "gc-seed0"))


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("step", [2, STEPS], ids=["mid-epoch", "before the first step"])
@pytest.mark.parametrize("how", [("--mode", "hooks"), ("--ddp",), ("--fsdp",)], ids=" ".join)
@pytest.mark.parametrize("optimizer", HOOKED)
def test_resume_is_exact_with_hooks(
    tmp_path: Path, after_step: AfterStep, optimizer: str, how: tuple[str, ...], step: int
) -> None:
    """Also before a run's first step, when an optimizer has no state yet."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = (*QUICK, "--seeds", "2", "--optimizer", optimizer, *how)
    train(whole, *options)
    after_step(step, interrupt)
    assert main(["train", *options, "--out", str(parts)]) == 130
    assert main(["train", "--resume", str(parts)]) == 0
    assert untimed(results(parts)) == untimed(results(whole))
    for run in ("gc-seed0", "gc-seed1"):
        assert same(weights(parts, run), weights(whole, run))


def test_checkpoint_from_before_there_were_modes(
    tmp_path: Path, after_step: AfterStep, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, *QUICK)
    after_step(2, interrupt)
    assert main(["train", *QUICK, "--out", str(parts)]) == 130
    path = parts / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    for new in ("mode", "ddp", "fsdp"):
        del content["config"][new]
    del content["environment"]["processes"]
    torch.save(content, path)
    capsys.readouterr()
    assert main(["train", "--resume", str(parts)]) == 0
    assert "Note" not in capsys.readouterr().out
    assert untimed(results(parts)) == untimed(results(whole))


def test_stopped_again_and_again(tmp_path: Path, after_step: AfterStep) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, *QUICK)
    after_step(2, interrupt)
    assert main(["train", *QUICK, "--out", str(parts)]) == 130
    # A file of its own name will do as well as its folder.
    after_step(2, interrupt)
    assert main(["train", "--resume", str(parts / "checkpoint.pt")]) == 130
    assert main(["train", "--resume", str(parts)]) == 0
    assert same(weights(parts, "gc-seed0"), weights(whole, "gc-seed0"))


def test_a_crash_loses_one_epoch_at_most(tmp_path: Path, after_step: AfterStep) -> None:
    def crash() -> None:
        raise MemoryError

    train(tmp_path / "whole", *QUICK)
    after_step(STEPS - 1, crash)
    with pytest.raises(MemoryError):
        main(["train", *QUICK, "--out", str(tmp_path / "parts")])
    saved = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    assert saved["current"]["epoch"] == 1
    assert main(["train", "--resume", str(tmp_path / "parts")]) == 0
    assert same(weights(tmp_path / "parts", "gc-seed0"), weights(tmp_path / "whole", "gc-seed0"))


def test_second_interrupt_ends_at_once(
    tmp_path: Path,
    after_step: AfterStep,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def twice() -> None:
        interrupt()
        interrupt()

    after_step(2, twice)
    assert main(["train", *QUICK, "--out", str(tmp_path)]) == 130
    assert "stopped without saving" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_while_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Trainer) -> None:
        interrupt()
        raise RuntimeError("the C++ compiler was killed")

    train(tmp_path / "whole", *QUICK)
    monkeypatch.setattr(Trainer, "compile", killed)
    monkeypatch.setattr("gcfunc.recipes.compiler.why_not", lambda: None)
    parts = tmp_path / "parts"
    assert main(["train", *QUICK[:-1], "--out", str(parts)]) == 130
    monkeypatch.setattr(Trainer, "compile", lambda self: None)
    assert main(["train", "--resume", str(parts)]) == 0
    assert same(weights(parts, "gc-seed0"), weights(tmp_path / "whole", "gc-seed0"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_signals_from_outside(tmp_path: Path, number: signal.Signals) -> None:
    process = command("train", *QUICK, "--epochs", "1000000", "--out", str(tmp_path))
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "checkpoint.pt").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert f"train --resume {tmp_path}" in out
    assert "Traceback" not in err
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["current"]["params"]


def test_unfinished_experiment_is_not_overwritten(
    tmp_path: Path,
    after_step: AfterStep,
    capsys: pytest.CaptureFixture[str],
) -> None:
    after_step(2, interrupt)
    main(["train", *QUICK, "--out", str(tmp_path)])
    before = (tmp_path / "checkpoint.pt").read_bytes()
    refused(["train", *QUICK, "--out", str(tmp_path)], "holds an unfinished experiment", capsys)
    refused(
        ["train", "--resume", str(tmp_path), "--lr", "1", "--batch-size", "2"],
        "leave out --lr, --batch-size",
        capsys,
    )
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_resume_needs_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["train", "--resume", str(tmp_path)], "there is no .*checkpoint.pt", capsys)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"not a checkpoint")
    refused(["train", "--resume", str(tmp_path)], "is not a checkpoint", capsys)
    torch.save({"something": "else"}, path)
    refused(["train", "--resume", str(path)], "is not a checkpoint", capsys)
    torch.save({"format": 99}, path)
    refused(["train", "--resume", str(path)], "written by another version", capsys)


# IDX files

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx(array: "np.ndarray[Any, np.dtype[np.uint8]]") -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """Random images of 5x6 pixels and three classes."""
    folder = tmp_path / "idx"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in zip(FILES, (40, 40, 20, 20), strict=True):
        shape, top = ((count, 5, 6), 256) if "images" in name else ((count,), 3)
        (folder / name).write_bytes(idx(rng.integers(0, top, shape).astype(np.uint8)))
    return folder


def test_idx_round_trip(idx_folder: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 5, 6)).astype(np.float64)
    labels = rng.integers(0, 3, (40,))
    read = data.load("mnist", idx_folder)
    expected = (pixels - pixels.mean()) / pixels.std()
    np.testing.assert_allclose(read.train.images.squeeze(1), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(read.train.labels, labels)
    assert (read.name, len(read.test), read.classes) == ("idx", 20, 3)


def test_idx_files_train_raw_and_gzipped(tmp_path: Path, idx_folder: Path) -> None:
    options = ("--data", str(idx_folder), "--epochs", "1", "--eager")
    raw = train(tmp_path / "raw", *options)
    for name in FILES:
        path = idx_folder / name
        path.with_name(f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    zipped = train(tmp_path / "zipped", *options)
    assert raw["data"]["train"] == 40
    assert untimed(raw) == untimed(zipped)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def cut_gzip(path: Path) -> None:
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes())[:-10])
    path.unlink()


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        (0, Path.unlink, "neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz"),
        (3, Path.unlink, "neither t10k-labels-idx1-ubyte nor"),
        (0, cut, r"images-idx3-ubyte is cut off: 1,215 bytes, 1,216 expected"),
        (1, lengthen, r"labels-idx1-ubyte is too long: 49 bytes, 48 expected"),
        (2, cut_gzip, r"t10k-images-idx3-ubyte\.gz is not a whole gzip file"),
        (2, lambda p: p.rename(f"{p}.gz"), r"t10k-images-idx3-ubyte\.gz is not a whole gzip file"),
        (0, lambda p: p.write_bytes(b""), "starts with nothing, not 00 00 08 03"),
        (0, lambda p: p.write_bytes(b"\0\0\x08\3\0\0"), "cut off in its header"),
        (1, lambda p: p.write_bytes(b"GIF89a"), "starts with 47 49 46 38, not 00 00 08 01"),
        (0, lambda p: p.write_bytes(idx(np.zeros((40,), np.uint8))), "not an IDX file of 3-dim"),
        (1, lambda p: p.write_bytes(idx(np.zeros((39,), np.uint8))), "40 train images, but 39"),
        (
            2,
            lambda p: p.write_bytes(idx(np.zeros((20, 6, 6), np.uint8))),
            "are 5x6, test images 6x6",
        ),
    ],
)
def test_damaged_idx_files(
    idx_folder: Path,
    capsys: pytest.CaptureFixture[str],
    file: int,
    damage: Callable[[Path], object],
    said: str,
) -> None:
    damage(idx_folder / FILES[file])
    refused(["train", "--data", str(idx_folder)], said, capsys)


def test_no_images_and_tiny_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shape, said in (((0, 5, 5), "there are no train images"), ((4, 3, 9), "3x9 are too small")):
        for name in FILES:
            array = np.zeros(shape if "images" in name else shape[:1], np.uint8)
            (tmp_path / name).write_bytes(idx(array))
        refused(["train", "--data", str(tmp_path), "--out", str(tmp_path)], said, capsys)


def test_resume_on_other_data(
    tmp_path: Path,
    idx_folder: Path,
    after_step: AfterStep,
    capsys: pytest.CaptureFixture[str],
) -> None:
    after_step(1, interrupt)
    out = tmp_path / "out"
    assert main(["train", "--data", str(idx_folder), "--eager", "--out", str(out)]) == 130
    path = idx_folder / FILES[0]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    refused(["train", "--resume", str(out)], "is not the data that .* was trained on", capsys)


# Mistakes, and machines that lack something


def refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gcfunc: error: ")
    assert re.search(said, line)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "arguments are required: command"),
        ("fly", "invalid choice: 'fly'"),
        ("train --data /nowhere/at/all", "/nowhere/at/all is not a folder"),
        ("train --data x --dataset mnist", "give one"),
        ("train --dataset cifar", "invalid choice: 'cifar'"),
        ("train --optimizer lion", "invalid choice: 'lion'"),
        ("train --gc yes", "invalid choice: 'yes'"),
        ("train --at noon", "invalid choice: 'noon'"),
        ("train --lr -1", "lr must be a finite number >= 0, got -1"),
        ("train --lr nan", "lr must be a finite number"),
        ("train --lr fast", "invalid float value: 'fast'"),
        ("train --weight-decay -0.1", "weight_decay must be a finite number >= 0"),
        ("train --momentum -0.1", "momentum must be a finite number >= 0"),
        ("train --nesterov --momentum 0", "(?i)nesterov"),
        ("train --optimizer adam --momentum 0.9", "adam takes neither --momentum nor --nesterov"),
        ("train --optimizer adamw --nesterov", "adamw takes neither"),
        ("train --compare --gc none", "--compare needs something to compare with"),
        ("train --gc none --at update", "--gc none does not"),
        ("train --epochs 0", "must be a whole number >= 1, got '0'"),
        ("train --batch-size 1.5", "must be a whole number >= 1, got '1.5'"),
        ("train --seeds -1", "must be a whole number >= 1"),
        ("train --seed -1", "must be a whole number >= 0"),
        ("train --limit many", "must be a whole number >= 1, got 'many'"),
        ("train --mode magic", "invalid choice: 'magic'"),
        ("train --mode hooks --optimizer ranger", "no ranger; it has sgd, adam, adamw, adagrad, "),
        ("train --mode hooks --optimizer sgdw", "torch.optim, which has no sgdw"),
        ("train --mode hooks --at update", "--at update needs --mode functional"),
        ("train --mode hooks --lr -1", "lr must be a finite number >= 0, got -1"),
        ("train --mode hooks --nesterov --momentum 0", "(?i)nesterov"),
        ("train --mode functional --ddp", "--ddp and --fsdp .* need --mode hooks"),
        ("train --fsdp --optimizer ranger", "torch.optim, which has no ranger"),
        ("train --ddp --fsdp", "--fsdp: not allowed with argument --ddp"),
        ("train --ddp", "torchrun --nproc-per-node 2 -m gcfunc train --ddp"),
        ("train --fsdp --seeds 2", "torchrun --nproc-per-node 2 -m gcfunc train --fsdp"),
        ("train --turbo", "unrecognized arguments: --turbo"),
        ("train --out /dev/null/runs --dataset digits", "cannot write to /dev/null/runs"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    options: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(options.split(), said, capsys)


def test_without_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["train"]) == 1
    assert "pip install 'gcfunc[recipes]'" in capsys.readouterr().err


def test_without_a_compiler(tmp_path: Path) -> None:
    process = command(
        "train",
        *QUICK[:-1],
        "--out",
        str(tmp_path / "out"),
        CXX="/nowhere/g++",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Steps run eager" in out
    assert "No working C++ compiler found" in " ".join(out.split())
    result = results(tmp_path / "out")
    assert result["compiled"] is False
    assert "No working C++ compiler" in result["why_eager"]
    train(tmp_path / "eager", *QUICK)
    assert same(weights(tmp_path / "out", "gc-seed0"), weights(tmp_path / "eager", "gc-seed0"))


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert all(optimizer in shown for optimizer in ALGORITHMS)
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("gcfunc 0.")
    (script,) = entry_points(group="console_scripts", name="gcfunc")
    assert script.load() is main
