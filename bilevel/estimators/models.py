"""scikit-learn estimators: linear models with a penalty for each feature, tuned by hypergradients."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import torch

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin  # type: ignore[import-untyped]
    from sklearn.utils.multiclass import check_classification_targets  # type: ignore[import-untyped]
    from sklearn.utils.validation import check_is_fitted, validate_data  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError(f"bilevel.estimators needs scikit-learn ({error}). pip install 'bilevel[sklearn]'") from error

from bilevel.estimators.losses import Logistic, RowLoss, Softmax, SquaredError, SquaredHinge
from bilevel.estimators.newton import Table
from bilevel.estimators.selection import selected


class _LinearTuned(BaseEstimator):  # type: ignore[misc]
    """What the estimators share: the table, the choice of penalties, and scores."""

    def __init__(
        self,
        *,
        groups: Any = None,
        folds: int = 5,
        repeats: int = 2,
        spreads: Any = (0.5, 1.0, 2.0),
        fit_intercept: bool = True,
        standardize: bool = True,
        random_state: int = 0,
        max_steps: int = 25,
    ) -> None:
        self.groups = groups
        self.folds = folds
        self.repeats = repeats
        self.spreads = spreads
        self.fit_intercept = fit_intercept
        self.standardize = standardize
        self.random_state = random_state
        self.max_steps = max_steps

    def _refuse(self, features: int) -> Any:
        """Raise `ValueError` for options that cannot work; each feature's group, numbered from 0."""
        name = type(self).__name__
        for option, least in (("folds", 2), ("repeats", 1), ("max_steps", 1), ("random_state", 0)):
            value = getattr(self, option)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: {option}={value!r}; expected an integer of at least {least}.")
        spreads = np.asarray(self.spreads, dtype=float)
        if spreads.ndim != 1 or not np.all(np.isfinite(spreads) & (spreads > 0.0)):
            raise ValueError(f"{name}: spreads={self.spreads!r}; expected finite numbers above 0, or ().")
        if self.groups is None:
            return np.arange(features)
        labels = np.asarray(self.groups)
        if labels.shape != (features,):
            raise ValueError(
                f"{name}: groups has shape {labels.shape}; expected a label for each of {features} features."
            )
        return np.unique(labels, return_inverse=True)[1]

    def _fitted(self, X: Any, targets: Any, labels: Any, loss: RowLoss, *, sparse: bool = False) -> None:
        groups = self._refuse(X.shape[1])
        if len(X) < 2:
            raise ValueError(f"{type(self).__name__}: n_samples=1; expected at least 2 rows, to hold one out.")
        center = X.mean(0) if self.fit_intercept else np.zeros(X.shape[1])
        scale = X.std(0) if self.standardize else np.ones(X.shape[1])
        # A column that is constant up to rounding is one.
        scale = np.where(scale > 10.0 * np.finfo(float).eps * np.abs(X).max(0), scale, 1.0)
        inputs = (X - center) / scale
        if self.fit_intercept:
            inputs = np.column_stack([inputs, np.ones(len(X))])
        table = Table(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(groups), loss, sparse)
        found = selected(
            table,
            labels,
            folds=int(self.folds),
            repeats=int(self.repeats),
            spreads=tuple(np.asarray(self.spreads, dtype=float).tolist()),
            seed=int(self.random_state),
            steps=int(self.max_steps),
        )
        weights = found.weights.numpy()
        self.coef_ = weights[: X.shape[1]].T / scale
        free = weights[-1] if self.fit_intercept else np.zeros(weights.shape[1])
        self.intercept_ = free - self.coef_ @ center
        self.spread_ = found.spread
        self.share_ = found.share
        self.spreads_ = np.asarray(found.spreads)
        self.held_out_losses_ = found.losses.numpy()
        self.held_out_errors_ = found.errors.numpy()
        self._told(found.penalties[:, table.groups].numpy(), found.single.numpy())

    def _told(self, penalties: Any, single: Any) -> None:
        """Keep penalties `[kinds, features]` and the single ones `[kinds]` as attributes."""
        self.penalties_, self.single_penalty_ = penalties[0], float(single[0])

    def _scores(self, X: Any) -> Any:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return X @ np.atleast_2d(self.coef_).T + self.intercept_


class _RegressorTuned(RegressorMixin, _LinearTuned):  # type: ignore[misc]
    def _regressed(self, X: Any, y: Any, *, sparse: bool) -> None:
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        y = np.asarray(y, dtype=np.float64)
        # In units of their own: a fold's loss is judged beside 1.
        size = y.std() if y.std() > 10.0 * np.finfo(float).eps * np.abs(y).max() else 1.0
        middle = y.mean() if self.fit_intercept else 0.0
        self._fitted(X, ((y - middle) / size)[:, None], None, SquaredError(), sparse=sparse)
        self.coef_ = self.coef_[0] * size
        self.intercept_ = float(self.intercept_[0] * size + middle)
        self.held_out_losses_ = self.held_out_losses_ * size**2
        self.held_out_errors_ = self.held_out_errors_ * size**2
        self._sized(size)

    def _sized(self, size: float) -> None:
        """Bring penalties that depend on the targets' size into units of the targets."""

    def predict(self, X: Any) -> Any:
        """`[rows]`."""
        return self._scores(X)[:, 0]


class RidgeTuned(_RegressorTuned):
    r"""Ridge regression with a penalty for each feature, or for each group of them, tuned by hypergradients.

    $$
    \min_w \frac12 \sum_i (y_i - x_i^\top w - b)^2 + \frac12 \sum_j \lambda_j w_j^2
    $$

    A penalty here is scikit-learn's `alpha`, of features of variance 1. All penalties minimise the cross-validated loss
    of five deals into folds, with a Gaussian prior on log penalties around a common level. Rows held out from all of
    that tuning judge the prior's width, one of `spreads`, beside the single penalty; where a width gains g with a
    standard error of s, the weights are 1 - s^2 / g^2 parts its own, and else those of the single penalty. With fewer
    than 20 rows, one group, or `spreads=()`, there is a single penalty.

    Dense float64 inputs; weights are not drawn at random, and no rows have weights. Costs (len(spreads) + 1)
    (repeats folds + 5) folds fits for each of up to `max_steps` steps.

    Args:
        groups: A label for each feature, `[features]`; features with one label share a penalty. None: each has its own.
        folds: Of the cross-validation, and as many again around it, which judge how far penalties may differ.
        repeats: How often the rows are dealt anew into these outer folds.
        spreads: Standard deviations of the logarithm of a penalty around the common level, tried beside the single
            penalty. () keeps the single one.
        fit_intercept: Whether there is an intercept, which has no penalty.
        standardize: Whether features are divided by their standard deviation before they are penalised.
        random_state: The seed of the folds.
        max_steps: The most steps of L-BFGS on the penalties; where it ends early they are nearer to the single one.

    Attributes:
        coef_: `[features]`, in the units of X.
        intercept_: A number.
        penalties_: Each feature's, `[features]`.
        single_penalty_: The best that all features could share.
        spread_: The chosen one; 0 is the single penalty.
        share_: Of the weights at `penalties_`; the rest is of those at the single penalty.
        held_out_losses_: Mean loss at each of `spreads_` on rows held out twice; `held_out_errors_` are standard errors
            of differences from the single penalty, by Nadeau and Bengio's correction for folds that overlap.

    Examples:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).standard_normal((60, 3))
        >>> RidgeTuned().fit(X, X[:, 0]).predict(X[:1]).shape
        (1,)
    """

    def fit(self, X: Any, y: Any) -> RidgeTuned:
        """From `X: [rows, features]` and `y: [rows]`. Raises `ValueError` for what scikit-learn refuses."""
        self._regressed(X, y, sparse=False)
        return self


class ElasticNetTuned(_RegressorTuned):
    r"""An elastic net with two penalties for each feature, or for each group of them, tuned by hypergradients.

    $$
    \min_w \frac12 \sum_i (y_i - x_i^\top w - b)^2 + \sum_j \kappa_j |w_j| + \frac12 \sum_j \lambda_j w_j^2
    $$

    Of features of variance 1; scikit-learn's `alpha` is (kappa + lambda) / rows and its `l1_ratio` kappa / (kappa +
    lambda). Features drop out, and the implicit derivative is that of the weights that stay; a penalty that
    drops a feature in all folds has none, and its prior brings it back to the common level. How far penalties
    may differ is judged as in `RidgeTuned`, beside one pair for all, and options are the same. Where the chosen weights
    are averaged with those of the single pair, a feature is out if it is in neither.

    The loss has kinks where a feature enters or leaves a fold, and there two one-sided derivatives, of which one is
    taken; L-BFGS may end at one, before the least loss.

    Args:
        groups: A label for each feature, `[features]`; features with one label share both penalties.
        folds: Of the cross-validation, and as many again around it.
        repeats: How often the rows are dealt anew into these outer folds.
        spreads: Standard deviations of the logarithm of a penalty around the common level; () keeps a single pair.
        fit_intercept: Whether there is an intercept, which has no penalty.
        standardize: Whether features are divided by their standard deviation before they are penalised.
        random_state: The seed of the folds.
        max_steps: The most steps of L-BFGS on the penalties.

    Attributes:
        coef_: `[features]`, in the units of X.
        intercept_: A number.
        l1_penalties_: kappa, `[features]`.
        l2_penalties_: lambda, `[features]`.
        single_l1_penalty_: The best that all could share, with `single_l2_penalty_`.
        spread_: The chosen one; 0 is the single pair.
        share_: As in `RidgeTuned`.
        held_out_losses_: Likewise, with `held_out_errors_`.

    Examples:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).standard_normal((60, 5))
        >>> int((ElasticNetTuned().fit(X, X[:, 0]).coef_ != 0.0).sum()) < 5
        True
    """

    def fit(self, X: Any, y: Any) -> ElasticNetTuned:
        """From `X: [rows, features]` and `y: [rows]`. Raises `ValueError` for what scikit-learn refuses."""
        self._regressed(X, y, sparse=True)
        return self

    def _told(self, penalties: Any, single: Any) -> None:
        self.l2_penalties_, self.l1_penalties_ = penalties
        self.single_l2_penalty_, self.single_l1_penalty_ = float(single[0]), float(single[1])

    def _sized(self, size: float) -> None:
        # Twice the targets are twice the weights for twice the slope of the absolute values.
        self.l1_penalties_ = self.l1_penalties_ * size
        self.single_l1_penalty_ *= size


class _ClassifierTuned(ClassifierMixin, _LinearTuned):  # type: ignore[misc]
    def _classes(self, X: Any, y: Any) -> tuple[Any, Any]:
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            (only,) = self.classes_.tolist()
            raise ValueError(f"{type(self).__name__}: y has 1 class, {only!r}; expected at least 2.")
        return X, labels

    def decision_function(self, X: Any) -> Any:
        """Scores: `[rows]` of the second of two classes, else `[rows, classes]`."""
        scores = self._scores(X)
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def predict(self, X: Any) -> Any:
        """The class of the largest score, `[rows]`."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0.0).astype(int) if scores.ndim == 1 else scores.argmax(1)]


class LogisticTuned(_ClassifierTuned):
    r"""Logistic regression, of two classes or more, with a penalty for each feature, tuned by hypergradients.

    $$
    \min_W \sum_i -\log p(y_i \mid x_i, W) + \frac12 \sum_j \lambda_j |w_j|^2
    $$

    A penalty here is the inverse of scikit-learn's `C`, of features of variance 1; classes share a feature's. How
    penalties are tuned and how far they may differ is as in `RidgeTuned`, and so are options and attributes, `coef_`
    being `[1 or classes, features]`. The intercept has a penalty of 1e-6. The logarithm of the common level has a prior
    of standard deviation 2 around 0, weights of variance 1: folds that a model separates would have it fall without
    end.

    Args:
        groups: A label for each feature, `[features]`; features with one label share a penalty.
        folds: Of the cross-validation, and as many again around it.
        repeats: How often the rows are dealt anew into these outer folds.
        spreads: Standard deviations of the logarithm of a penalty around the common level; () keeps the single one.
        fit_intercept: Whether there is an intercept.
        standardize: Whether features are divided by their standard deviation before they are penalised.
        random_state: The seed of the folds.
        max_steps: The most steps of L-BFGS on the penalties.
    """

    def fit(self, X: Any, y: Any) -> LogisticTuned:
        """From `X: [rows, features]` and labels `y: [rows]`. Raises `ValueError` for what scikit-learn refuses."""
        X, labels = self._classes(X, y)
        if len(self.classes_) == 2:
            self._fitted(X, labels.astype(float)[:, None], labels, Logistic())
        else:
            self._fitted(X, np.eye(len(self.classes_))[labels], labels, Softmax())
        return self

    def predict_log_proba(self, X: Any) -> Any:
        """Logarithms of probabilities, `[rows, classes]`."""
        scores = self._scores(X)
        if scores.shape[1] == 1:
            scores = np.column_stack([np.zeros(len(scores)), scores])
        return torch.from_numpy(scores).log_softmax(-1).numpy()

    def predict_proba(self, X: Any) -> Any:
        """Probabilities, `[rows, classes]`."""
        return np.exp(self.predict_log_proba(X))


class SquaredHingeTuned(_ClassifierTuned):
    r"""A linear support vector machine with squared hinge loss, and a penalty for each feature tuned by hypergradients.

    $$
    \min_w \frac12 \sum_i \max(0, 1 - y_i x_i^\top w)^2 + \frac12 \sum_j \lambda_j w_j^2
    $$

    Its loss is `sklearn.svm.LinearSVC`'s with C = 1 / (2 penalty); the hinge without its square has no
    curvature for a hypergradient to go by. More than two classes are each against the others, and share penalties. The
    rest is as in `LogisticTuned`; there are no probabilities. The second derivative jumps where a row
    reaches the margin, and the hypergradient there is that of one side.

    Args:
        groups: A label for each feature, `[features]`; features with one label share a penalty.
        folds: Of the cross-validation, and as many again around it.
        repeats: How often the rows are dealt anew into these outer folds.
        spreads: Standard deviations of the logarithm of a penalty around the common level; () keeps the single one.
        fit_intercept: Whether there is an intercept.
        standardize: Whether features are divided by their standard deviation before they are penalised.
        random_state: The seed of the folds.
        max_steps: The most steps of L-BFGS on the penalties.
    """

    def fit(self, X: Any, y: Any) -> SquaredHingeTuned:
        """From `X: [rows, features]` and labels `y: [rows]`. Raises `ValueError` for what scikit-learn refuses."""
        X, labels = self._classes(X, y)
        signs = np.eye(len(self.classes_))[labels] * 2.0 - 1.0
        self._fitted(X, signs[:, 1:] if len(self.classes_) == 2 else signs, labels, SquaredHinge())
        return self
