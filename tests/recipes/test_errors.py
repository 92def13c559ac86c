"""Mistakes on the command line, and machines that lack something."""

import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from gcfunc._catalog import CATALOG
from gcfunc._centralization.where import RULES, Rule
from gcfunc.recipes.cli import main
from gcfunc.recipes.config import MODES
from tests.recipes.command import QUICK, command, refused, results, same, train, weights


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "arguments are required: command"),
        ("fly", "invalid choice: 'fly'"),
        ("train --data /nowhere/at/all", "/nowhere/at/all is not a folder"),
        ("train --data x --dataset mnist", "give one"),
        ("train --dataset cifar", "invalid choice: 'cifar'"),
        ("train --optimizer lamb", "invalid choice: 'lamb'"),
        ("train --gc yes", "invalid choice: 'yes'"),
        ("train --at noon", "invalid choice: 'noon'"),
        ("train --lr -1", "lr must be a finite number >= 0, got -1"),
        ("train --lr nan", "lr must be a finite number"),
        ("train --lr fast", "invalid float value: 'fast'"),
        ("train --weight-decay -0.1", "weight_decay must be a finite number >= 0"),
        ("train --momentum -0.1", "momentum must be a finite number >= 0"),
        ("train --nesterov --momentum 0", "(?i)nesterov"),
        ("train --optimizer adam --momentum 0.9", "adam does not take --momentum"),
        ("train --optimizer adamw --nesterov", "adamw does not take --nesterov"),
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
    assert all(optimizer in shown for optimizer in CATALOG)
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("gcfunc 0.")
    (script,) = entry_points(group="console_scripts", name="gcfunc")
    assert script.load() is main


def test_a_rule_that_selects_nothing_is_a_mistake_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, "6d", Rule("weights of 6 dimensions", lambda n: n == 6, frozenset()))
    folder = tmp_path / "out"
    for mode in MODES:
        options = ("--dataset", "digits", "--eager", "--mode", mode, "--out", str(folder))
        assert main(["train", "--gc", "6d", *options]) == 2
        assert "--gc 6d: where='6d' selects none of 10 tensors" in capsys.readouterr().err
        assert not folder.exists()
