"""Penalties for each feature beside scikit-learn's cross-validated estimators, on tables that come with scikit-learn.

Each table is split into training and test rows, seven to three, anew for each seed; features are standardised by the
training rows. Regression is judged by the mean squared error on the test rows in units of the target's variance,
classification by the log loss. Writes JSON, after each split; a run that was stopped goes on with the splits that are
missing from the file.

    python -m benchmarks.estimators --output docs/estimators/results.json
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine, make_regression
from sklearn.linear_model import ElasticNetCV, LogisticRegressionCV, RidgeCV
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from benchmarks.head import head
from bilevel.estimators import ElasticNetTuned, LogisticTuned, RidgeTuned

NOISE = 30


def diabetes(seed: int) -> tuple[Any, Any]:
    X, y = load_diabetes(return_X_y=True)
    return X, y


def noisy_diabetes(seed: int) -> tuple[Any, Any]:
    X, y = load_diabetes(return_X_y=True)
    return np.hstack([X, np.random.default_rng(seed).standard_normal((len(X), NOISE))]), y


def sparse(seed: int) -> tuple[Any, Any]:
    X, y = make_regression(200, 60, n_informative=8, noise=60.0, random_state=seed)
    return X, y


def cancer(seed: int) -> tuple[Any, Any]:
    X, y = load_breast_cancer(return_X_y=True)
    return X, y


def wine(seed: int) -> tuple[Any, Any]:
    X, y = load_wine(return_X_y=True)
    return X, y


def iris(seed: int) -> tuple[Any, Any]:
    X, y = load_iris(return_X_y=True)
    return X, y


def digits(seed: int) -> tuple[Any, Any]:
    """Five hundred rows: is the digit odd."""
    X, y = load_digits(return_X_y=True)
    rows = np.random.default_rng(seed).permutation(len(X))[:500]
    return X[rows], y[rows] % 2


REGRESSION = {"diabetes": diabetes, "diabetes and 30 columns of noise": noisy_diabetes, "8 of 60 columns": sparse}
CLASSIFICATION = {"breast cancer": cancer, "wine": wine, "iris": iris, "digits, odd or even": digits}


def models(regression: bool) -> dict[str, Any]:
    """The single penalty is ours with spreads=(): the same folds, the same loss; so is the single pair of a net."""
    if regression:
        return {
            "tuned": RidgeTuned(),
            "single": RidgeTuned(spreads=()),
            "RidgeCV": RidgeCV(np.logspace(-3, 5, 25)),
            "net": ElasticNetTuned(),
            "single net": ElasticNetTuned(spreads=()),
            "ElasticNetCV": ElasticNetCV(l1_ratio=[0.1, 0.5, 0.9, 1.0], max_iter=20_000),
        }
    theirs = LogisticRegressionCV(Cs=10, scoring="neg_log_loss", max_iter=5_000, use_legacy_attributes=False)
    return {"tuned": LogisticTuned(), "single": LogisticTuned(spreads=()), "LogisticRegressionCV": theirs}


def measured(name: str, seed: int) -> dict[str, Any]:
    """One split."""
    regression = name in REGRESSION
    X, y = (REGRESSION if regression else CLASSIFICATION)[name](seed)
    if regression:
        y = (y - y.mean()) / y.std()
    labels = None if regression else y
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.3, random_state=seed, stratify=labels)
    scaler = StandardScaler().fit(X)
    X, X_test = scaler.transform(X), scaler.transform(X_test)
    found: dict[str, Any] = {
        "set": name,
        "seed": seed,
        "rows": len(X),
        "features": X.shape[1],
        "test": {},
        "seconds": {},
    }
    for kind, model in models(regression).items():
        begun = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn's of options that change their names, and of its steps
            model.fit(X, y)
        found["seconds"][kind] = time.process_time() - begun
        if regression:
            found["test"][kind] = float(np.mean((model.predict(X_test) - y_test) ** 2))
        else:
            found["test"][kind] = float(log_loss(y_test, model.predict_proba(X_test)))
        if kind in ("tuned", "net"):
            found[kind] = {
                "spread": float(model.spread_),
                "share": float(model.share_),
                "gains": (model.held_out_losses_[0] - model.held_out_losses_).tolist(),
                "errors": model.held_out_errors_.tolist(),
            }
        if kind == "tuned":
            found["penalties"] = model.penalties_.tolist()
            found["single_penalty"] = float(model.single_penalty_)
    return found


def main() -> None:
    """Every table, every seed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    options.add_argument("--output", type=Path, default=Path("estimators.json"))
    given = options.parse_args()
    torch.set_num_threads(1)
    results = json.loads(given.output.read_text())["results"] if given.output.exists() else []
    done = {(row["set"], row["seed"]) for row in results}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        for name in (*REGRESSION, *CLASSIFICATION):
            if (name, seed) in done:
                continue
            row = measured(name, seed)
            print(name, seed, {k: round(v, 4) for k, v in row["test"].items()}, row["tuned"], flush=True)
            results.append(row)
            found = {**head("scikit-learn"), "results": results}
            part = given.output.with_suffix(".part")
            part.write_text(json.dumps(found, indent=1) + "\n")
            part.replace(given.output)


if __name__ == "__main__":
    main()
