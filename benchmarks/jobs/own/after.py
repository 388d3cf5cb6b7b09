"""A loop of somebody's own: a cosine schedule, clipped gradients, the validation loss after each epoch."""

import sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

import bilevel as bl
from benchmarks.jobs.parts import convolutions, digits

seed = int(sys.argv[1])
torch.manual_seed(seed)
train, valid, test = digits(300, seed)
train_loader = DataLoader(train, batch_size=30, shuffle=True)
valid_loader = DataLoader(valid, batch_size=1000)
model = convolutions(lambda channels: nn.GroupNorm(4, channels))
epochs, history = 60, []


def adam(parameters):
    return torch.optim.Adam(parameters, lr=3e-3)


def cosine(optimizer):
    return CosineAnnealingLR(optimizer, epochs * len(train_loader))


def loss_on(loader):
    model.eval()
    with torch.no_grad():
        return sum(cross_entropy(model(x), y).item() for x, y in loader) / len(loader)


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


strengths = [bl.hyper.WeightDecay(), bl.hyper.Dropout(), bl.hyper.LabelSmoothing(), bl.hyper.Rotation()]
tuned = bl.tune(
    model, loss, loss, train_loader, valid_loader, epochs=epochs, hyper=strengths,
    optimizer=adam, scheduler=cosine, clip_norm=1.0,
    callbacks=[lambda step, record, variables: history.append(record["hyper"])],
)  # fmt: skip
model = tuned.model
