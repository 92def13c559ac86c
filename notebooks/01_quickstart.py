# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # gcfunc in one sitting
#
# gcfunc gives PyTorch optimizers that are plain functions:
#
# ```python
# new_params, new_state = opt.step(params, grads, state)
# ```
#
# The step changes nothing in place, and any of them can do **gradient centralization** (GC):
# before the optimizer looks at a weight's gradient, each output unit's part of it has its mean
# subtracted ([Yong et al. 2020](https://arxiv.org/abs/2004.01461)).
#
# This notebook trains a small network on real images and goes through
#
# 1. a training loop of your own,
# 2. the same loop with the step compiled,
# 3. a learning-rate schedule that never recompiles,
# 4. what GC does to a gradient,
# 5. training with and without GC, side by side,
# 6. saving a run and taking it up again, bit for bit.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.func import grad_and_value

import gcfunc

torch.set_num_threads(1)  # with tensors this small, more threads only wait for one another

BLUE, ORANGE, GREY = "#3b6fb6", "#e07b39", "#8a8f98"
plt.rcParams.update(
    {
        "figure.dpi": 110,
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.titlesize": "medium",
        "legend.frameon": False,
    }
)

# %% [markdown]
# ## The data and the model
#
# The images are scikit-learn's handwritten digits, 8 by 8 pixels, which come with the package. A
# fifth is held out for testing.

# %%
digits = load_digits()
images = (
    torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
)  # (N, 1, 8, 8) in [0, 1]
labels = torch.tensor(digits.target)
train, test = train_test_split(
    torch.arange(len(labels)), test_size=360, stratify=labels, random_state=0
)
train_x, train_y, test_x, test_y = images[train], labels[train], images[test], labels[test]
print(f"{len(train)} images to learn from, {len(test)} held out")

# %%
figure, axes = plt.subplots(1, 10, figsize=(9, 1.2))
for digit, axis in enumerate(axes):
    axis.imshow(train_x[train_y == digit][0, 0], cmap="gray_r")
    axis.set_title(digit)
    axis.axis("off")
plt.show()

# %% [markdown]
# Two convolutions and a linear layer. A functional optimizer keeps no reference to the model: the
# parameters are a dictionary of tensors that you hold, and `functional_call` runs the model with
# them.
#
# Mind the `detach()`. The step is differentiable, so with parameters that require gradients
# autograd would record every step of training and memory would grow without end.


# %%
def build():
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


model = build()


def initial_params(seed):
    torch.manual_seed(seed)
    return {name: p.detach().clone() for name, p in build().named_parameters()}


for name, p in initial_params(0).items():
    print(f"{name:10}{tuple(p.shape)}")

# %% [markdown]
# Three helpers: the loss as a function of the parameters, the shuffled batches of an epoch, and
# the share of test images that come out right. The order of the batches depends on `epoch` and
# `seed` alone, so any stretch of training can be run again exactly.


# %%
def loss_of(params, x, y):
    return nn.functional.cross_entropy(gcfunc.functional_call(model, params, x), y)


def batches(epoch, seed=0, size=64):
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    for index in torch.randperm(len(train_x), generator=generator).split(size):
        yield train_x[index], train_y[index]


def accuracy(params):
    predicted = gcfunc.functional_call(model, params, test_x).argmax(1)
    return (predicted == test_y).double().mean().item()


# %% [markdown]
# ## 1. A loop of your own
#
# Three objects go around: `params`, `grads` and `state`. `grad_and_value` makes a function that
# returns the gradients of a loss, in a dictionary just like `params`, and the loss itself.
# `gc="gc"` turns GC on for every weight; without it you have plain SGD.

# %%
opt = gcfunc.sgd(lr=0.1, momentum=0.9, weight_decay=5e-4, gc="gc")
gradients = grad_and_value(loss_of)

start = initial_params(seed=0)
params, state = start, opt.init(start)

scores = []
for epoch in range(6):
    for x, y in batches(epoch):
        grads, loss = gradients(params, x, y)
        params, state = opt.step(params, grads, state)
    scores.append(accuracy(params))

print("test accuracy after each epoch:", *(f"{score:.1%}" for score in scores))

# %% [markdown]
# Nothing was overwritten on the way. The parameters that training began with are still what they
# were, and the state is an ordinary tree of tensors to look into.

# %%
print(f"test accuracy: {accuracy(start):.1%} at the start, {accuracy(params):.1%} now")
print("steps taken:", state.step.item())
print("kept for each parameter:", *state.slots)
print("hyperparameters:", {name: round(h.item(), 6) for name, h in state.hyperparams.items()})

# %% [markdown]
# ## 2. The same, compiled
#
# `torch.compile` turns the whole step, GC included, into one graph of fused kernels.
# `fullgraph=True` makes it an error should any part of it be left out.

# %%
compiled_step = torch.compile(opt.step, fullgraph=True)


def fit(step, params, state, epochs):
    for epoch in epochs:
        for x, y in batches(epoch):
            grads, _ = gradients(params, x, y)
            params, state = step(params, grads, state)
    return params, state


# %% [markdown]
# Does it compute the same? Fusing rearranges the arithmetic, so expect the last bits to differ;
# float32 has a relative precision of 1.2e-7. Training carries such differences along, so here they
# are after one step and after one epoch.


# %%
def distance(a, b):
    """The largest difference in any tensor, relative to that tensor's largest entry."""
    return max(((a[n] - b[n]).abs().max() / b[n].abs().max()).item() for n in b)


x, y = next(batches(epoch=0))
grads, _ = gradients(start, x, y)
steps = (compiled_step, opt.step)
after_step = distance(*(step(start, grads, opt.init(start))[0] for step in steps))
after_epoch = distance(*(fit(step, start, opt.init(start), range(1))[0] for step in steps))

print(f"compiled against eager, after one step:   {after_step:.1e}")
print(f"compiled against eager, after one epoch:  {after_epoch:.1e}")
assert after_step < 1e-6
assert after_epoch < 1e-3

# %% [markdown]
# ## 3. A schedule that never recompiles
#
# Hyperparameters live in the state as tensors, so for the compiled step a new learning rate is
# only new data. `gcfunc.update_hyperparams` gives back a state with another value in it.
#
# Here the rate warms up for one epoch and then falls along a cosine. The stance
# `fail_on_recompile` makes PyTorch raise an error if anything at all asks for another compilation.

# %%
epochs = 8
warmup = len(list(batches(epoch=0)))
total = epochs * warmup


def schedule(step, peak=0.15):
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = torch.tensor((step - warmup) / (total - warmup))
    return peak * (1 + torch.cos(torch.pi * progress).item()) / 2


params, state = start, opt.init(start)
rates, losses = [], []
with torch.compiler.set_stance("fail_on_recompile"):
    for epoch in range(epochs):
        for x, y in batches(epoch):
            state = gcfunc.update_hyperparams(state, lr=schedule(len(rates)))
            grads, loss = gradients(params, x, y)
            params, state = compiled_step(params, grads, state)
            rates.append(state.hyperparams["lr"].item())
            losses.append(loss.item())

print(f"{len(set(rates))} learning rates in {len(rates)} steps, no recompilation")
print(f"test accuracy {accuracy(params):.1%}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
left.plot(rates, color=BLUE)
left.set(title="learning rate", xlabel="step", ylim=0)
right.plot(losses, color=GREY, linewidth=0.8)
right.set(title="loss of each batch", xlabel="step", yscale="log")
plt.show()

# %% [markdown]
# Would it really have raised? This is the usual way to write a step, with the rate as a Python
# number, under the same stance:

# %%
by_hand = torch.compile(lambda w, g, lr: w - lr * g, backend="eager")
w = torch.ones(3)
by_hand(w, w, 0.1)

with torch.compiler.set_stance("fail_on_recompile"):
    try:
        by_hand(w, w, 0.05)
    except RuntimeError as error:
        print("RuntimeError:", str(error).partition(". ")[0])

# %% [markdown]
# ## 4. What GC does
#
# Take a convolution's weight, shape `(32, 16, 3, 3)`: 32 output units with 144 numbers each. Seen
# as a matrix each unit is a row, and GC subtracts from every row of the gradient that row's mean.
# `gcfunc.centralize` is this one operation, by itself.

# %%
x, y = next(batches(epoch=0))
grads, _ = gradients(start, x, y)
centered = gcfunc.centralize(grads)

before, after = grads["3.weight"].flatten(1), centered["3.weight"].flatten(1)
print(f"largest row mean before: {before.mean(1).abs().max():.1e}")
print(f"largest row mean after:  {after.mean(1).abs().max():.0e}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
units = range(len(before))
left.bar(units, before.mean(1), color=BLUE, label="before")
left.plot(units, after.mean(1), "o", color=ORANGE, markersize=4, label="after")
left.set(title="mean of each row", xlabel="output unit")
left.legend()

row = before.mean(1).abs().argmax()
right.plot(before[row], color=BLUE, linewidth=1, label="before")
right.plot(after[row], color=ORANGE, linewidth=1, label="after")
right.axhline(0, color=GREY, linewidth=0.8)
right.set(title=f"the gradient of unit {row}", xlabel="input weight")
right.legend()
plt.show()

# %% [markdown]
# Within a row GC moves everything by the same amount, so the differences between a unit's inputs
# stay. How much of a gradient is taken away varies from layer to layer. Here all layers have
# inputs of 0 or more (pixels, or what a ReLU lets through), which pushes the gradients of one unit
# to the same side.

# %%
for name, g in grads.items():
    removed = (g - centered[name]).square().sum() / g.square().sum()
    print(f"{name:10} {removed:6.1%} of the squared length removed")

# %% [markdown]
# ### Which weights
#
# `gc="gc"` goes by shape: everything with at least two dimensions. That is right for this network,
# and wrong for an embedding, whose rows are entries of a table rather than output units.
# `gcfunc.select` asks the model's modules instead and answers with a mask.

# %%
for name, chosen in gcfunc.select(model).items():
    print(f"{name:10} {chosen}")

# %%
gcfunc.select(nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 4)))

# %% [markdown]
# The mask goes into `GC(where=...)`, and that into any optimizer:

# %%
gcfunc.adamw(lr=1e-3, gc=gcfunc.GC(where=gcfunc.select(model)))

# %% [markdown]
# ## 5. With GC and without
#
# Does it help? A fair look needs more than one run, and more than one learning rate, because a
# single one can be picked to flatter either side. Here are three rates, six seeds each. The two
# runs of a pair start from the same weights and see the same batches in the same order: GC is all
# that differs.

# %%
rates, seeds, epochs = (0.05, 0.1, 0.2), range(6), 8
optimizers = {
    "without GC": gcfunc.sgd(lr=0.1, momentum=0.9, weight_decay=5e-4),
    "with GC": gcfunc.sgd(lr=0.1, momentum=0.9, weight_decay=5e-4, gc="gc"),
}


def curve(opt, lr, seed):
    """Train loss and test accuracy after each epoch, as rows of a tensor."""
    params = initial_params(seed)
    state = gcfunc.update_hyperparams(opt.init(params), lr=lr)
    points = []
    for epoch in range(epochs):
        for x, y in batches(epoch, seed):
            grads, _ = gradients(params, x, y)
            params, state = opt.step(params, grads, state)
        points.append((loss_of(params, train_x, train_y).item(), accuracy(params)))
    return torch.tensor(points, dtype=torch.float64).T


# curves[label]: (rates, seeds, loss or accuracy, epochs)
curves = {
    label: torch.stack([torch.stack([curve(opt, lr, seed) for seed in seeds]) for lr in rates])
    for label, opt in optimizers.items()
}

# %%
figure, axes = plt.subplots(2, len(rates), figsize=(9.5, 5), sharex=True, sharey="row")
for label, color in zip(optimizers, (GREY, ORANGE), strict=True):
    for row, ylabel in enumerate(("train loss", "test accuracy")):
        for column, lr in enumerate(rates):
            runs, axis = curves[label][column, :, row], axes[row, column]
            x = range(1, epochs + 1)
            axis.plot(x, runs.mean(0), color=color, label=label)
            axis.fill_between(x, runs.amin(0), runs.amax(0), color=color, alpha=0.2, linewidth=0)
            axes[0, column].set(title=f"lr = {lr}", yscale="log")
            axes[1, column].set(xlabel="epoch", ylim=(0.8, 1.0))
            axes[row, 0].set(ylabel=ylabel)
axes[0, 0].legend()
axes[1, 0].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
plt.show()

# %% [markdown]
# Lines are means over the seeds; bands reach from the lowest seed to the highest; the loss is on a
# logarithmic scale, and the accuracy's axis starts at 80%. Below, the same in numbers, without GC
# -> with it. In brackets: in how many pairs GC had the lower loss, and the mean of the accuracy
# differences within pairs, in points, with its standard error.

# %%
plain, gc = curves["without GC"], curves["with GC"]
for when in (3, epochs):
    print(f"after epoch {when}")
    for column, lr in enumerate(rates):
        (a_loss, a_score), (b_loss, b_score) = (c[column, :, :, when - 1].T for c in (plain, gc))
        gain = 100 * (b_score - a_score)
        print(
            f"  lr {lr:<4}   train loss {a_loss.mean():.4f} -> {b_loss.mean():.4f}"
            f" (lower in {(b_loss < a_loss).sum()} of {len(seeds)})"
            f"   accuracy {a_score.mean():.1%} -> {b_score.mean():.1%}"
            f" ({gain.mean():+.1f} ± {gain.std() / len(seeds) ** 0.5:.1f})"
        )

print("each at its own best rate, the one with the lowest train loss in the end")
for label, runs in curves.items():
    last = runs[..., -1].mean(1)
    best = last[:, 0].argmin()
    print(f"  {label:10}   lr {rates[best]:<4}   accuracy {last[best, 1]:.1%}")

# %% [markdown]
# How to read this:
#
# - A difference within 2.6 standard errors of zero, which is Student's t for six seeds, is no
#   evidence either way. With 360 test images, one image is 0.28 points.
# - A gap at one learning rate is a statement about that rate. In practice each side would be used
#   at its own best rate, hence the last lines; with only three rates they are a rough answer. How
#   wide the range of good rates is counts too.
# - This is a small network on small, easy images, without normalization layers and with inputs
#   that are not centered. It says little about large ones; the paper's results come from deep
#   networks with normalization.
#
# What carries over to your own problem is the method: pairs, several seeds, several rates. One
# optimizer object served every learning rate here, because the rate is in the state.

# %% [markdown]
# ## 6. Save and resume
#
# A run is its parameters and its state. `gcfunc.state_dict` flattens the state to a dictionary of
# tensors, which `torch.load` reads back under `weights_only=True`, and `gcfunc.load_state_dict`
# puts it into a fresh state.
#
# Half way through a run, with a rate of 0.03 instead of the 0.1 that `opt` was built with:

# %%
params, state = start, gcfunc.update_hyperparams(opt.init(start), lr=0.03)
params, state = fit(opt.step, params, state, range(3))

checkpoint = {"params": params, "state": gcfunc.state_dict(state)}
for name, tensor in checkpoint["state"].items():
    print(f"{name:28} {tuple(tensor.shape)!s:16} {tensor.dtype}")

# %%
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "checkpoint.pt"
    torch.save(checkpoint, file)
    loaded = torch.load(file, weights_only=True)

loaded_params = loaded["params"]
loaded_state = gcfunc.load_state_dict(opt.init(loaded_params), loaded["state"])
print("step", loaded_state.step.item(), "and lr", loaded_state.hyperparams["lr"].item())

# %% [markdown]
# Three more epochs, once without the interruption and once from the file. Equal here means every
# bit of every tensor.

# %%
params, state = fit(opt.step, params, state, range(3, 6))
loaded_params, loaded_state = fit(opt.step, loaded_params, loaded_state, range(3, 6))

expected, resumed = gcfunc.state_dict(state), gcfunc.state_dict(loaded_state)
assert all(torch.equal(params[name], loaded_params[name]) for name in params)
assert all(torch.equal(expected[name], resumed[name]) for name in expected)
print(f"{len(params)} parameters and {len(expected)} tensors of the state are equal, bit for bit")

# %% [markdown]
# When training is over, the parameters go back into the module:

# %%
model.load_state_dict(params)
with torch.no_grad():
    print(f"test accuracy {(model(test_x).argmax(1) == test_y).double().mean():.1%}")

# %% [markdown]
# ## From here
#
# - Other algorithms take the same three lines: `gcfunc.adam`, `adamw`, `adagrad`, `radam`,
#   `ranger`, and `lookahead` around any of them.
# - `gcfunc.partition` gives groups of parameters their own optimizer, for instance no decay on
#   biases.
# - `help(gcfunc.sgd)` and its sisters hold the mathematics, with a small example each.
