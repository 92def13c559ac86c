"""Each example runs by the command in its docstring, learns, and shows that GC did something."""

import ast
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
INTERPRETERS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
}


def command(example: Path) -> list[str]:
    """What a reader of the docstring would type."""
    docstring = ast.get_docstring(ast.parse(example.read_text("utf-8"))) or ""
    commands = re.findall(r"^    (.+)$", docstring, re.MULTILINE)
    assert len(commands) == 1, "the docstring has no command, or several"
    program, *arguments = shlex.split(commands[0])
    return [*INTERPRETERS[program], *arguments]


def run(arguments: list[str]) -> str:
    interfaces = [name for _, name in socket.if_nameindex()]
    loopback = "lo" if "lo" in interfaces else "lo0"
    done = subprocess.run(
        arguments,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def require_that_it_learned(output: str) -> None:
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", output)]
    assert len(losses) >= 3, output
    assert losses[-1] < 0.5 * losses[0], output


def require_that_gc_did_something(output: str) -> None:
    before, after = map(float, re.findall(r"\d\.\de[+-]\d\d", output.splitlines()[-1]))
    assert before > 1e-3, output
    assert after < 1e-5 * before, output


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_it_learns_and_gc_did_something(example: Path) -> None:
    assert command(example)[-1] == f"examples/{example.name}"
    output = run(command(example))
    require_that_it_learned(output)
    require_that_gc_did_something(output)


@pytest.mark.parametrize("example", ["hooks_ddp", "fsdp2"])
def test_one_process_will_do(example: str) -> None:
    *launcher, two, script = command(ROOT / "examples" / f"{example}.py")
    assert two == "2"
    require_that_gc_did_something(run([*launcher, "1", script]))
