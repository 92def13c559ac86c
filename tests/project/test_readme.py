"""The code in the README runs as it stands."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gcfunc

TEXT = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_every_block_after_the_one_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4 * 4, 2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scope: dict[str, Any] = {
        "model": model,
        "loss_fn": nn.CrossEntropyLoss(),
        "batches": [(torch.randn(8, 1, 6, 6), torch.randint(2, (8,))) for _ in range(3)],
        "schedule": schedule,
        "path": tmp_path / "checkpoint.pt",
    }
    loop, checkpoint, packed, whole, hooked, sharded, drop_in, mask = BLOCKS
    exec(loop, scope)
    params, state = scope["params"], scope["state"]
    assert state.step == 3
    assert state.hyperparams["lr"] == schedule(2)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert not torch.equal(params[name], p)
    # Gradient and decay are centralized, so the mean of no row moves.
    moved = (params["3.weight"] - before["3.weight"]).mean(1)
    assert moved.abs().max() < 1e-7
    assert (params["3.bias"] - before["3.bias"]).abs().max() > 1e-3

    exec(checkpoint, scope)
    assert all(map(torch.equal, scope["params"].values(), params.values()))
    assert gcfunc.state_dict(scope["state"]).keys() == gcfunc.state_dict(state).keys()

    exec(packed, scope)
    assert scope["state"].step == 3
    assert scope["params"].keys() == params.keys()
    assert (scope["params"]["3.bias"] - params["3.bias"]).abs().max() > 1e-5
    assert (scope["params"]["3.weight"] - params["3.weight"]).mean(1).abs().max() < 1e-7

    exec(whole, scope)
    trained = scope["train"].params
    assert scope["train"].state.step == 3
    for name, p in model.named_parameters():
        assert torch.equal(p, trained[name])
    assert (trained["3.weight"] - before["3.weight"]).mean(1).abs().max() < 1e-7
    assert (trained["3.bias"] - before["3.bias"]).abs().max() > 1e-3

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    exec(hooked, scope)
    grad = model.get_parameter("3.weight").grad
    assert grad is not None
    assert grad.mean(1).abs().max() < 1e-7
    assert (model.get_parameter("3.bias") - before["3.bias"]).abs().max() > 1e-4
    scope["handle"].remove()

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    exec(sharded, scope)
    with torch.no_grad():
        moved = (model.get_parameter("3.weight") - before["3.weight"]).mean(1)
    assert moved.abs().max() < 1e-7
    assert (model.get_parameter("3.bias") - before["3.bias"]).abs().max() > 1e-3

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    exec(drop_in, scope)
    assert scope["optimizer"].state_dict()["state"][0]["step"] == 3
    assert scope["optimizer"].param_groups[0]["lr"] < 1e-9
    assert (model.get_parameter("3.bias") - before["3.bias"]).abs().max() > 1e-4

    exec(mask, scope)
    assert scope["opt"].init(params).hyperparams["lr"] == 1e-3


def test_every_migration() -> None:
    diffs = re.findall(r"```diff\n(.*?)```", TEXT, re.DOTALL)
    assert len(diffs) == 4
    for diff in diffs:
        lines = [line[1:] for line in diff.splitlines() if not line.startswith("-")]
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        before = model.weight.detach().clone()
        scope: dict[str, Any] = {"model": model, "gcfunc": gcfunc, "torch": torch}
        exec("\n".join(lines), scope)
        model(torch.randn(5, 4)).square().sum().backward()
        scope["optimizer"].step()
        # Decay of SGD_GC is centralized, that of the others is not.
        moved = model.weight - before
        assert moved.abs().max() > 1e-6
        if "SGD_GC" in diff:
            assert moved.mean(1).abs().max() < 1e-7


def schedule(i: int) -> float:
    return 0.1 / (1 + i)
