"""Regularisers and augmentations whose strengths are tensors, differentiable in them."""

from bilevel.hyper.criterion import cross_entropy
from bilevel.hyper.declared import (
    Brightness,
    ClassWeights,
    Cutout,
    Declaration,
    Dropout,
    Focusing,
    L1Penalty,
    LabelSmoothing,
    Mixup,
    Noise,
    Rotation,
    Shift,
    Temperature,
    WeightDecay,
    Zoom,
)
from bilevel.hyper.images import Mixed, affine, brightness, cutout, mixup
from bilevel.hyper.layers import dropout_layers, with_dropout
from bilevel.hyper.noise import alpha_dropout, dropout, gaussian_dropout, noise
from bilevel.hyper.penalties import elastic_net, l1_penalty, penalty
from bilevel.hyper.tuning import Tuning

__all__ = [
    "Brightness",
    "ClassWeights",
    "Cutout",
    "Declaration",
    "Dropout",
    "Focusing",
    "L1Penalty",
    "LabelSmoothing",
    "Mixed",
    "Mixup",
    "Noise",
    "Rotation",
    "Shift",
    "Temperature",
    "Tuning",
    "WeightDecay",
    "Zoom",
    "affine",
    "alpha_dropout",
    "brightness",
    "cross_entropy",
    "cutout",
    "dropout",
    "dropout_layers",
    "elastic_net",
    "gaussian_dropout",
    "l1_penalty",
    "mixup",
    "noise",
    "penalty",
    "with_dropout",
]
