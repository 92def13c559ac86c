"""A training loop of your own, whose optimizer is a pure function.

Params, gradients and state are trees of tensors; nothing is mutated, and nothing reads ``.grad``.

    python examples/custom_loop.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad_and_value

import gcfunc

STEPS = 100

torch.manual_seed(0)
x = torch.randn(512, 20)
y = (x @ torch.randn(20, 4)).argmax(1)
model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))


def loss_of(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(gcfunc.functional_call(model, params, x), y)


# Detached, so that autograd does not record the optimizer's steps. torch.func differentiates
# with respect to its arguments, whether they require grad or not.
params = {name: p.detach().clone() for name, p in model.named_parameters()}
opt = gcfunc.sgd(lr=0.3, momentum=0.9, weight_decay=5e-4, gc="gc")
state = opt.init(params)

for i in range(STEPS):
    grads, loss = grad_and_value(loss_of)(params, x, y)
    # Hyperparameters are tensors in the state: a schedule recompiles nothing.
    state = gcfunc.update_hyperparams(state, lr=0.3 * (1 - i / STEPS))
    # gcfunc.compile(opt).step does the same compiled, and in place.
    params, state = opt.step(params, grads, state)
    if i % 20 == 0 or i == STEPS - 1:
        print(f"step {i:2}: loss {loss.item():.4f}")

# Centralized gradients move the weights, but not the means of their rows.
moved = [params[name] - start.detach() for name, start in model.named_parameters()]
rows = [m.mean(1) for m in moved if m.ndim > 1]
print(
    f"largest change: {max(m.abs().max().item() for m in moved):.1e} of a weight, "
    f"{max(r.abs().max().item() for r in rows):.1e} of a row's mean"
)

model.load_state_dict(params)  # so far it was only the form of the computation
