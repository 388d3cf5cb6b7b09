"""A loop of somebody's own: a cosine schedule, clipped gradients, the validation loss after each epoch."""

import sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

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


optimizer = adam(model.parameters())
scheduler = cosine(optimizer)
for _ in range(epochs):
    model.train()
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    history.append(loss_on(valid_loader))
