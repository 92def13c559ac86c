"""The code in the README runs as it stands."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import gcfunc
from tests.cases import Params

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(
    r"^(?:<!-- test: (?P<name>[^\n]+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    name: str | None
    """Of the comment above it: ``<!-- test: name -->``."""
    line: int
    code: str


def blocks(language: str) -> Iterator[Block]:
    """Those that run, in their order; ``<!-- test: skip -->`` is for what cannot."""
    text = README.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        if found["language"] == language and found["name"] != "skip":
            yield Block(found["name"], text.count("\n", 0, found.start("code")), found["code"])


def run(block: Block, scope: dict[str, Any], code: str | None = None) -> None:
    """With the README's own lines in tracebacks."""
    source = "\n" * block.line + (code or block.code)
    exec(compile(source, str(README), "exec"), scope)


class Ran(NamedTuple):
    """What there is to look at once a block ran."""

    scope: dict[str, Any]
    earlier: dict[str, Any]
    """What the names stood for until then."""
    before: Params
    """The model's parameters until then."""

    def moved(self, name: str, params: Any = None) -> torch.Tensor:
        params = dict(self.scope["model"].named_parameters()) if params is None else params
        return (params[name] - self.before[name]).detach()


def loop(ran: Ran) -> None:
    params, state = ran.scope["params"], ran.scope["state"]
    assert state.step == 3
    assert state.hyperparams["lr"] == schedule(2)
    for name, p in ran.scope["model"].named_parameters():
        assert torch.equal(p, ran.before[name])
        assert not torch.equal(params[name], p)
    # Gradient and decay are centralized, so the mean of no row moves.
    assert ran.moved("3.weight", params).mean(1).abs().max() < 1e-7
    assert ran.moved("3.bias", params).abs().max() > 1e-3


def checkpoint(ran: Ran) -> None:
    new, old = ran.scope["params"], ran.earlier["params"]
    assert new is not old
    assert all(map(torch.equal, new.values(), old.values()))
    states = [gcfunc.state_dict(each["state"]) for each in (ran.scope, ran.earlier)]
    assert states[0].keys() == states[1].keys()


def packed(ran: Ran) -> None:
    new, old = ran.scope["params"], ran.earlier["params"]
    assert ran.scope["state"].step == 3
    assert new.keys() == old.keys()
    assert (new["3.bias"] - old["3.bias"]).abs().max() > 1e-5
    assert (new["3.weight"] - old["3.weight"]).mean(1).abs().max() < 1e-7


def whole_step(ran: Ran) -> None:
    trained = ran.scope["train"].params
    assert ran.scope["train"].state.step == 3
    for name, p in ran.scope["model"].named_parameters():
        assert torch.equal(p, trained[name])
    assert ran.moved("3.weight").mean(1).abs().max() < 1e-7
    assert ran.moved("3.bias").abs().max() > 1e-3


def hooked(ran: Ran) -> None:
    grad = ran.scope["model"].get_parameter("3.weight").grad
    assert grad.mean(1).abs().max() < 1e-7
    assert ran.moved("3.bias").abs().max() > 1e-4
    ran.scope["handle"].remove()


def sharded(ran: Ran) -> None:
    assert ran.moved("3.weight").mean(1).abs().max() < 1e-7
    assert ran.moved("3.bias").abs().max() > 1e-3


def drop_in(ran: Ran) -> None:
    optimizer = ran.scope["optimizer"]
    assert optimizer.state_dict()["state"][0]["step"] == 3
    assert optimizer.param_groups[0]["lr"] < 1e-9
    assert ran.moved("3.bias").abs().max() > 1e-4


def mask(ran: Ran) -> None:
    state = ran.scope["opt"].init(dict(ran.scope["model"].named_parameters()))
    assert state.hyperparams["lr"] == 1e-3


# By the names of blocks. One without a name has to run, and no more.
CHECKS: dict[str, Callable[[Ran], None]] = {
    "loop": loop,
    "checkpoint": checkpoint,
    "packed": packed,
    "train_step": whole_step,
    "hooks": hooked,
    "sharded": sharded,
    "optim": drop_in,
    "mask": mask,
}


def test_every_block_after_the_one_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4 * 4, 2))
    scope: dict[str, Any] = {
        "model": model,
        "loss_fn": nn.CrossEntropyLoss(),
        "batches": [(torch.randn(8, 1, 6, 6), torch.randint(2, (8,))) for _ in range(3)],
        "schedule": schedule,
        "path": tmp_path / "checkpoint.pt",
    }
    checks = dict(CHECKS)
    for block in blocks("python"):
        model.zero_grad()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        earlier = dict(scope)
        run(block, scope)
        if block.name:
            checks.pop(block.name)(Ran(scope, earlier, before))
    assert not checks


def test_every_migration() -> None:
    diffs = [*blocks("diff")]
    assert len(diffs) >= 4
    for diff in diffs:
        # What was there is an empty line, so that the others stay where they are.
        lines = ["" if line.startswith("-") else line[1:] for line in diff.code.splitlines()]
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        before = model.weight.detach().clone()
        scope: dict[str, Any] = {"model": model, "gcfunc": gcfunc, "torch": torch}
        run(diff, scope, "\n".join(lines))
        model(torch.randn(5, 4)).square().sum().backward()
        scope["optimizer"].step()
        # Decay of SGD_GC is centralized, that of the others is not.
        moved = model.weight - before
        assert moved.abs().max() > 1e-6
        if "SGD_GC" in diff.code:
            assert moved.mean(1).abs().max() < 1e-7


def schedule(i: int) -> float:
    return 0.1 / (1 + i)
