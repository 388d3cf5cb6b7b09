"""A model's hyperparameters, tuned while it is trained."""

from bilevel.tuning._tune import tune
from bilevel.tuning.callbacks import EarlyStopping
from bilevel.tuning.loggers import CSVLogger, MLflowLogger, TensorBoardLogger, WandbLogger
from bilevel.tuning.retraining import Retrained, retrain
from bilevel.tuning.tuned import TrainedOn, Tuned

__all__ = [
    "CSVLogger",
    "EarlyStopping",
    "MLflowLogger",
    "Retrained",
    "TensorBoardLogger",
    "TrainedOn",
    "Tuned",
    "WandbLogger",
    "retrain",
    "tune",
]
