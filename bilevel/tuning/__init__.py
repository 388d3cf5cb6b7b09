"""A model's hyperparameters, tuned while it is trained."""

from bilevel.tuning._tune import tune
from bilevel.tuning.callbacks import EarlyStopping
from bilevel.tuning.loggers import CSVLogger, MLflowLogger, TensorBoardLogger, WandbLogger
from bilevel.tuning.retrained import Retrained
from bilevel.tuning.retraining import retrain
from bilevel.tuning.tuned import Tuned

__all__ = [
    "CSVLogger",
    "EarlyStopping",
    "MLflowLogger",
    "Retrained",
    "TensorBoardLogger",
    "Tuned",
    "WandbLogger",
    "retrain",
    "tune",
]
