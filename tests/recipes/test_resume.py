"""``gcfunc train`` stopped, by whatever it is, goes on to the last bit."""

import signal
import time
from pathlib import Path

import pytest
import torch

from gcfunc.recipes.cli import main
from gcfunc.recipes.train import Trainer
from tests.recipes.command import (
    HOOKED,
    QUICK,
    STEPS,
    AfterStep,
    command,
    interrupt,
    refused,
    results,
    same,
    train,
    untimed,
    weights,
)


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
