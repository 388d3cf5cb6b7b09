"""Hyperparameters that a training loss has not: how many numbers each is, in which range, and what it changes."""

from bilevel.hyper.declared.base import Declaration, Loss
from bilevel.hyper.declared.criterion import ClassWeights, Focusing, LabelSmoothing, Temperature
from bilevel.hyper.declared.dropout import Dropout
from bilevel.hyper.declared.inputs import Brightness, Cutout, Mixup, Noise, Rotation, Shift, Zoom
from bilevel.hyper.declared.weights import L1Penalty, WeightDecay

__all__ = [
    "Brightness",
    "ClassWeights",
    "Cutout",
    "Declaration",
    "Dropout",
    "Focusing",
    "L1Penalty",
    "LabelSmoothing",
    "Loss",
    "Mixup",
    "Noise",
    "Rotation",
    "Shift",
    "Temperature",
    "WeightDecay",
    "Zoom",
]
