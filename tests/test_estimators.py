"""Linear models with a penalty for each feature."""

import pickle
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, make_regression
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import ElasticNet, LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from bilevel.estimators import ElasticNetTuned, LogisticTuned, RidgeTuned, SquaredHingeTuned
from bilevel.estimators.blocks import KnownBlocks
from bilevel.estimators.losses import Logistic, RowLoss, Softmax, SquaredError, SquaredHinge
from bilevel.estimators.newton import Table, fitted, logs_of
from bilevel.estimators.selection import folds_of, gained
from bilevel.estimators.sparse import fitted_sparse
from bilevel.estimators.tuned import Stack
from bilevel.linear import LinearOperator

ALL = (RidgeTuned, ElasticNetTuned, LogisticTuned, SquaredHingeTuned)


def stack_of(loss, *, groups=(0, 1, 2, 0), rows=30, seed=0, sparse=False):
    """Two stacks of three folds, with targets as the loss takes them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, len(groups) + 1, generator=generator, dtype=torch.float64)
    inputs[:, -1] = 1.0
    noisy = inputs[:, :3] + 0.7 * torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot(noisy.argmax(1), 3).double()
    targets = {
        SquaredError: noisy[:, :1],
        Logistic: (noisy[:, :1] > 0.0).double(),
        Softmax: one_hot,
        SquaredHinge: 2.0 * one_hot - 1.0,
    }[type(loss)]
    folds = torch.arange(rows) % 3
    valid = torch.stack([(folds == k).double() for k in range(3)])
    train = torch.stack([1.0 - valid, (1.0 - valid) * (torch.arange(rows) < 24)])
    spread, unit = torch.tensor([0.8, 2.0]).double(), torch.tensor([1.0, 0.7]).double()
    return Stack(
        Table(inputs, targets, torch.tensor(groups), loss, sparse), train, valid.expand(2, 3, rows), spread, unit
    )


@pytest.mark.parametrize(
    ("loss", "sparse"),
    [(SquaredError(), False), (SquaredError(), True), (Logistic(), False), (Softmax(), False), (SquaredHinge(), False)],
    ids=lambda x: type(x).__name__ if isinstance(x, RowLoss) else "sparse" if x else "dense",
)
def test_the_hypergradient_is_that_of_refitted_folds(loss, sparse):
    stack = stack_of(loss, sparse=sparse)
    level = torch.tensor([[0.3], [1.1]]).double()
    deviation = torch.tensor([[0.2, -0.5, 0.7], [0.0, 1.0, -1.0]]).double()
    if sparse:
        level = torch.cat([level, torch.tensor([[0.8], [0.5]]).double()], 1)
        deviation = torch.cat([deviation, torch.tensor([[-0.3, 0.4, 1.4], [0.2, 0.8, 0.3]]).double()], 1)
    game = stack.game(level, deviation)
    value, slopes, found = stack.hypergradient(game, level, deviation)
    if sparse:  # some weights are out, and none is so near to a kink that a difference would cross it
        assert 0 < int((found == 0.0).sum()) < found.numel() - 6
        assert float(found[found != 0.0].abs().min()) > 1e-3

    def total(level, deviation):
        weights, _ = stack.optimum(logs_of({"level": level, "deviation": deviation}))
        prior = 0.5 * (deviation / stack.spread[:, None]).square().sum()
        if isinstance(loss, Logistic | Softmax):  # a likelihood's level has a prior of its own
            size = stack.table.inputs[:, :4].square().mean()
            prior = prior + 0.5 * ((level - size.log()) / 2.0).square().sum()
        return (stack.losses(weights) / stack.unit).sum() + prior

    torch.testing.assert_close(value, total(level, deviation), rtol=1e-12, atol=0.0)
    # Central differences: truncation h^2, and rounding of a total of some tens by 1e-15 / h; 1e-8 and 1e-9 at 1e-4.
    h = 1e-4
    for name, at in (("level", level), ("deviation", deviation)):
        for place in np.ndindex(*at.shape):
            ends = []
            for sign in (1.0, -1.0):
                moved = at.clone()
                moved[place] += sign * h
                ends.append(total(*((moved, deviation) if name == "level" else (level, moved))))
            difference = (ends[0] - ends[1]) / (2.0 * h)
            assert abs(float(slopes[name][place] - difference)) <= 1e-6 * max(1.0, abs(float(difference)))


@pytest.mark.parametrize(
    "loss", [SquaredError(), Logistic(), Softmax(), SquaredHinge()], ids=lambda x: type(x).__name__
)
def test_a_losss_derivatives_are_its_own(loss):
    stack = stack_of(loss)
    scores = torch.linspace(-1.9, 2.1, stack.table.targets.numel(), dtype=torch.float64).view_as(stack.table.targets)
    scores.requires_grad_()
    slopes, second = loss.derivatives(scores.detach(), stack.table.targets)
    total = loss.rows(scores, stack.table.targets).sum()
    (first,) = torch.autograd.grad(total, scores, create_graph=True)
    torch.testing.assert_close(slopes, first.detach())
    for column in range(scores.shape[1]):
        (row,) = torch.autograd.grad(first[:, column].sum(), scores, retain_graph=True)
        torch.testing.assert_close(second[:, column], row)


def test_ridge_weights_are_the_closed_form():
    table = stack_of(SquaredError()).table
    counts = torch.ones(1, 30, dtype=torch.float64)
    penalties = table.penalties(torch.tensor([[0.1, 1.0, -2.0]]).double())
    weights, matrices = fitted(table, counts, penalties, torch.zeros(1, 5, 1, dtype=torch.float64))
    matrix = table.inputs.T @ table.inputs + penalties[0].diag()
    torch.testing.assert_close(matrices[0], matrix)
    torch.testing.assert_close(weights[0], torch.linalg.solve(matrix, table.inputs.T @ table.targets))


def test_an_elastic_net_meets_its_own_conditions_and_is_scikit_learns():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(40, 60, generator=generator, dtype=torch.float64)  # more columns than rows
    targets = inputs[:, :3].sum(1, keepdim=True) + torch.randn(40, 1, generator=generator, dtype=torch.float64)
    table = Table(inputs, targets, torch.arange(60), SquaredError(), sparse=True)
    sizes = torch.logspace(-1.0, 2.0, 7, dtype=torch.float64)
    lasso, squares = sizes[:, None].expand(7, 60), (0.3 * sizes)[:, None].expand(7, 60)
    start = torch.randn(7, 60, 1, generator=generator, dtype=torch.float64)
    found, _ = fitted_sparse(table, torch.ones(7, 40, dtype=torch.float64), squares, lasso, start)
    assert bool((found[-1] == 0.0).all())  # no slope at 0 is as large as 100
    for size, weights in zip(sizes.tolist(), found[..., 0], strict=True):
        slope = inputs.T @ (inputs @ weights - targets[:, 0]) + 0.3 * size * weights
        inside = weights != 0.0
        # It ends at 1e-11 of the slopes at 0, which are of some tens.
        torch.testing.assert_close(slope[inside], -size * weights[inside].sign(), rtol=0.0, atol=1e-8)
        assert float(slope[~inside].abs().max()) <= size + 1e-8
        theirs = ElasticNet(
            alpha=1.3 * size / 40, l1_ratio=1.0 / 1.3, fit_intercept=False, tol=1e-12, max_iter=1_000_000
        ).fit(inputs.numpy(), targets[:, 0].numpy())
        np.testing.assert_allclose(weights.numpy(), theirs.coef_, rtol=1e-5, atol=1e-6)


def test_an_elastic_net_of_more_columns_than_rows_ends_at_small_penalties():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    targets = torch.randn(6, 1, generator=generator, dtype=torch.float64)
    table = Table(inputs, targets, torch.arange(12), SquaredError(), sparse=True)
    sizes = torch.logspace(-4.0, 0.0, 5, dtype=torch.float64)
    lasso, squares = sizes[:, None].expand(5, 12), (1e-3 * sizes)[:, None].expand(5, 12)
    counts, start = torch.ones(5, 6, dtype=torch.float64), torch.zeros(5, 12, 1, dtype=torch.float64)
    found, _ = fitted_sparse(table, counts, squares, lasso, start)
    for size, weights in zip(sizes.tolist(), found[..., 0], strict=True):
        slope = inputs.T @ (inputs @ weights - targets[:, 0]) + 1e-3 * size * weights
        inside = weights != 0.0
        # It ends at 1e-11 of the slopes at 0, which are of some units.
        torch.testing.assert_close(slope[inside], -size * weights[inside].sign(), rtol=0.0, atol=1e-9)
        assert float(slope[~inside].abs().max()) <= size + 1e-9


@pytest.fixture
def rows():
    generator = np.random.default_rng(0)
    X = generator.standard_normal((120, 12)) * np.logspace(-2, 2, 12)
    scores = X[:, 0] * 100.0 + X[:, 1] * 30.0 + 0.5 * generator.standard_normal(120)
    return X, scores


@pytest.mark.parametrize(
    ("tuned", "theirs"),
    [
        (RidgeTuned(spreads=()), lambda penalty: Ridge(alpha=penalty)),
        (LogisticTuned(spreads=()), lambda penalty: LogisticRegression(C=1.0 / penalty, tol=1e-10, max_iter=10_000)),
    ],
    ids=["ridge", "logistic"],
)
def test_a_single_penalty_is_scikit_learns(rows, tuned, theirs):
    X, scores = rows
    y = scores + 5.0 if isinstance(tuned, RidgeTuned) else scores > 0.0
    tuned.fit(X, y)
    assert np.ptp(tuned.penalties_) == 0.0
    pipeline = make_pipeline(StandardScaler(), theirs(tuned.single_penalty_)).fit(X, y)
    found = tuned.predict(X) if isinstance(tuned, RidgeTuned) else tuned.decision_function(X)
    wanted = pipeline.predict(X) if isinstance(tuned, RidgeTuned) else pipeline.decision_function(X)
    # Their solver ends at a gradient of 1e-10; our intercept has a penalty of 1e-6 beside a curvature of some rows.
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_single_pair_of_penalties_is_scikit_learns(rows):
    X, scores = rows
    y = 7.0 * scores + 5.0 * np.random.default_rng(1).standard_normal(120)
    tuned = ElasticNetTuned(spreads=()).fit(X, y)
    l1, l2 = tuned.single_l1_penalty_, tuned.single_l2_penalty_
    theirs = ElasticNet(alpha=(l1 + l2) / 120, l1_ratio=l1 / (l1 + l2), tol=1e-12, max_iter=1_000_000)
    wanted = make_pipeline(StandardScaler(), theirs).fit(X, y).predict(X)
    np.testing.assert_allclose(tuned.predict(X), wanted, rtol=1e-6, atol=1e-6 * y.std())
    assert np.ptp(tuned.l1_penalties_) == 0.0
    assert np.ptp(tuned.l2_penalties_) == 0.0


@pytest.mark.filterwarnings("error")
def test_a_single_penalty_is_not_next_to_none_where_folds_are_separated():
    # One deal of these 100 rows is separated in every fold, and loses the less the weaker the penalty is: the least
    # loss of that deal is at 8e-4, which triples the loss on other rows.
    X, y = load_breast_cancer(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, train_size=100, random_state=0)
    tuned, tenth = LogisticTuned(spreads=()).fit(X, y), LogisticTuned(spreads=(), standardize=False)
    scale = X.std(0)
    tenth.fit((X - X.mean(0)) / scale / 10.0, y)
    assert tuned.single_penalty_ > 0.02
    # A penalty is in units of the features' squares; L-BFGS ends within 1e-4 of a slope of 0 in its logarithm.
    assert tenth.single_penalty_ == pytest.approx(tuned.single_penalty_ / 100.0, rel=1e-2)
    weak = LogisticRegression(C=1.0 / 8e-4, max_iter=10_000).fit((X - X.mean(0)) / scale, y)
    lost = log_loss(y_test, tuned.predict_proba(X_test))
    assert lost < 0.6 * log_loss(y_test, weak.predict_proba((X_test - X.mean(0)) / scale))


def test_known_blocks_refine_where_rounding_leaves_too_much():
    # Blocks that are known to five digits leave 1e-5 of |b|, and a refinement the square of that.
    scales = torch.logspace(0.0, -1.0, 6, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    matrix = basis @ scales.square().diag() @ basis.T
    off = matrix * (1.0 + 1e-5)
    b = torch.ones(6, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = KnownBlocks(matrices=off[None], rtol=1e-8).solve(LinearOperator(lambda v: matrix @ v), b)
    assert found.products == 2
    assert float(found.residual_norm) <= 1e-8 * float(b.norm())


def test_a_squared_hinge_is_linear_svcs(rows):
    X, scores = rows
    X, y = X / X.std(0), scores > 0.0
    tuned = SquaredHingeTuned(spreads=(), fit_intercept=False).fit(X, y)
    theirs = LinearSVC(C=0.5 / tuned.single_penalty_, fit_intercept=False, tol=1e-12, max_iter=1_000_000, dual=False)
    # Both features and weights are as they are: the scale is that of X.std(0) = 1.
    np.testing.assert_allclose(tuned.decision_function(X), theirs.fit(X, y).decision_function(X), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_features_that_matter_are_penalised_less_and_predictions_improve():
    # 8 of 60 columns matter, far more than the noise: the test error falls by a quarter.
    X, y, truth = make_regression(200, 60, n_informative=8, noise=60.0, coef=True, random_state=0)
    X, X_test, y, y_test = train_test_split(X, (y - y.mean()) / y.std(), test_size=0.3, random_state=0)
    tuned, single = RidgeTuned().fit(X, y), RidgeTuned(spreads=()).fit(X, y)
    assert tuned.spread_ > 0.0
    assert np.median(tuned.penalties_[truth != 0.0]) < np.median(tuned.penalties_[truth == 0.0])
    tuned_error, single_error = (((m.predict(X_test) - y_test) ** 2).mean() for m in (tuned, single))
    assert tuned_error < 0.9 * single_error


@pytest.mark.slow
def test_features_that_do_not_matter_drop_out():
    X, y, truth = make_regression(200, 60, n_informative=8, noise=60.0, coef=True, random_state=0)
    X, X_test, y, y_test = train_test_split(X, (y - y.mean()) / y.std(), test_size=0.3, random_state=0)
    sparse, ridge = (kind(repeats=1, folds=3, max_steps=8).fit(X, y) for kind in (ElasticNetTuned, RidgeTuned))
    assert bool((sparse.coef_[truth != 0.0] != 0.0).all())
    assert int((sparse.coef_ != 0.0).sum()) < 40
    errors = [((m.predict(X_test) - y_test) ** 2).mean() for m in (sparse, ridge)]
    assert errors[0] < errors[1]


def test_weights_are_averaged_as_far_as_the_evidence_is_weak(rows):
    X, scores = rows
    y = scores + 60.0 * np.random.default_rng(2).standard_normal(120)
    tuned, single = RidgeTuned(spreads=(2.0,)).fit(X, y), RidgeTuned(spreads=()).fit(X, y)
    gain = tuned.held_out_losses_[0] - tuned.held_out_losses_[1]
    share = max(0.0, 1.0 - (tuned.held_out_errors_[1] / gain) ** 2) if gain > 0.0 else 0.0
    assert tuned.share_ == pytest.approx(share)
    assert tuned.spread_ == (2.0 if share else 0.0)
    if not share:
        np.testing.assert_allclose(tuned.coef_, single.coef_)


def test_folds_that_overlap_are_no_independent_evidence():
    differences = torch.tensor([0.1, 0.3, 0.2, 0.4, 0.0]).double()
    mean, error = gained(differences, 5)
    assert mean == pytest.approx(0.2)
    # Variance .025, times 1/5 + 1/4.
    assert error == pytest.approx((0.025 * 0.45) ** 0.5)
    _, repeated = gained(differences.repeat(100), 5)
    # However often it is repeated the part that folds share stays: the square root of .02 / 4.
    assert repeated == pytest.approx((0.02 * (0.25 + 1.0 / 500.0)) ** 0.5, rel=1e-2)


def test_a_group_shares_its_penalty(rows):
    X, scores = rows
    groups = ["signal"] * 2 + ["rest"] * 10
    tuned = RidgeTuned(groups=groups, spreads=(2.0,)).fit(X, scores)
    assert np.ptp(tuned.penalties_[:2]) == 0.0
    assert np.ptp(tuned.penalties_[2:]) == 0.0


def test_a_clone_and_a_pickle_fit_and_predict_the_same(rows):
    X, scores = rows
    tuned = RidgeTuned(spreads=(1.0,), folds=3, max_steps=5).fit(X, scores)
    again = clone(tuned)
    assert again.get_params() == tuned.get_params()
    np.testing.assert_array_equal(again.fit(X, scores).coef_, tuned.coef_)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(tuned)).predict(X), tuned.predict(X))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"folds": 1}, "folds=1; expected an integer of at least 2"),
        ({"spreads": (0.0,)}, "expected finite numbers above 0"),
        ({"spreads": (np.nan,)}, "expected finite numbers above 0"),
        ({"groups": [0, 1]}, r"groups has shape \(2,\); expected a label for each of 12 features"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"repeats": 0}, "repeats=0"),
        ({"random_state": None}, "random_state=None"),
    ],
)
def test_options_that_cannot_work_are_refused(rows, options, told):
    X, scores = rows
    with pytest.raises(ValueError, match=told):
        RidgeTuned(**options).fit(X, scores)


def test_what_is_not_fitted_says_so(rows):
    with pytest.raises(NotFittedError):
        RidgeTuned().predict(rows[0])
    with pytest.raises(ValueError, match="y has 1 class, 'red';"):
        LogisticTuned().fit(rows[0], np.full(120, "red"))


def test_folds_hold_each_class_in_equal_parts():
    labels = np.repeat([0, 1], [10, 20])
    fold = folds_of(labels, np.arange(30), 5, (0, 0))
    for k in range(5):
        assert np.bincount(labels[fold == k]).tolist() == [2, 4]


def test_as_many_folds_as_rows_are_few(rows):
    X, scores = rows
    tuned = RidgeTuned(folds=20, max_steps=2, spreads=(1.0,)).fit(X[:20, :3], scores[:20])
    assert tuned.held_out_losses_.shape == (2,)
    assert RidgeTuned().fit(X[:19], scores[:19]).spreads_.tolist() == [0.0]


@pytest.mark.slow
@parametrize_with_checks([kind(folds=3, max_steps=5) for kind in ALL])  # the usual 5 and 25 take four times as long
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)
