"""Forward, backward and update as one function, compiled into one graph.

BatchNorm's statistics, clipping and metrics are part of it, and everything is updated in place.

    python examples/whole_step.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gcfunc

STEPS = 60


def bars(n: int) -> tuple[Tensor, Tensor]:
    """Noisy images, each with a row (0) or a column (1) that is brighter."""
    images, labels = 0.5 * torch.randn(n, 1, 8, 8), torch.randint(2, (n,))
    for image, label in zip(images, labels.tolist(), strict=True):
        image.select(1 + label, int(torch.randint(8, ()))).add_(1)
    return images, labels


def loss_fn(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and what else is worth knowing."""
    return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()


torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 2)
)
opt = gcfunc.sgd(lr=0.05, momentum=0.9, gc="gc")
# Gradients are clipped, then centralized; BatchNorm's statistics are part of the step too.
step = gcfunc.compile(gcfunc.train_step(model, loss_fn, opt, has_aux=True, clip_norm=1.0))
train = step.init()  # TrainState(params, buffers, state)

for i in range(STEPS):
    # In place: use the train that is returned. The first call compiles.
    train, loss, accuracy = step(train, *bars(64))
    if i % 15 == 0 or i == STEPS - 1:
        print(f"step {i:2}: loss {loss.item():.4f}, accuracy {accuracy.item():.2f}")

# Centralized gradients move the weights, but not the means of their rows. The model still has the
# weights of the start.
moved = [train.params[name] - start.detach() for name, start in model.named_parameters()]
rows = [m.flatten(1).mean(1) for m in moved if m.ndim > 1]
print(
    f"largest change: {max(m.abs().max().item() for m in moved):.1e} of a weight, "
    f"{max(r.abs().max().item() for r in rows):.1e} of a row's mean"
)

model.load_state_dict(train.params | train.buffers, strict=False)
