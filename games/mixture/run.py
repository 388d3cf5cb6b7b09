"""The runs: two methods that learn the mixture in one training run, and two mixtures that are given."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

import bilevel as bl
from bilevel.dynamics import F2SA2, ValueFunction
from games.mixture.problem import ADAM, Corpus, held_out_loss, train_loss

Show = Callable[[int, float, Sequence[float]], None]
"""Called as a run goes on: training steps so far, the loss that the mixture saw, and the shares."""
LEARNED = ("Nudged", "ValueFunction")
GIVEN = ("uniform", "oracle")
METHODS = (*LEARNED, *GIVEN)
INNER = 10
"""Training steps of the model for each step of the mixture."""
LEADERS: dict[str, dict[str, Any]] = {
    "Nudged": {"lr": 0.45, "betas": (0.5, 0.99)},
    "ValueFunction": {"lr": 0.15, "betas": (0.5, 0.9)},
}
"""Of Adam, which moves the mixture."""


@dataclass(frozen=True, eq=False)
class Row:
    """One run.

    Attributes:
        method: Its name.
        shares: Of the sources, in the end.
        loss: Of the model on test text of the clean sources that no run has seen, in nats a character.
        steps: Training steps of the model.
        gradients: Gradients of both losses together.
        seconds: Of the run.
        curve: Training steps, and the shares after them.
        below: Training steps after which all of the noise together had less than one per cent for good; None if never.
        warnings: What the library told.
    """

    method: str
    shares: list[float]
    loss: float
    steps: int
    gradients: int
    seconds: float
    curve: list[tuple[int, list[float]]] = field(repr=False, default_factory=list)
    below: int | None = None
    warnings: tuple[str, ...] = ()


def row_of(content: Mapping[str, Any]) -> Row:
    """A row from what a file has of it."""
    curve = [(int(step), list(shares)) for step, shares in content["curve"]]
    return Row(**{**content, "curve": curve, "warnings": tuple(content["warnings"])})


def run(method: str, corpus: Corpus, *, steps: int, seed: int, show: Show, checkpoint: Path | None = None) -> Row:
    """One method, or one given mixture, for so many training steps of the model.

    `checkpoint` is a file of `Store.checkpoint`, from which a method that learns goes on, bit for bit.
    """
    began = time.perf_counter()
    if method in GIVEN:
        clean = torch.tensor([not source.noise for source in corpus.sources], device=corpus.device)
        given = torch.zeros(len(clean), device=corpus.device)
        if method == "oracle":
            given = torch.where(clean, given, -torch.inf)
        row = _given(method, corpus, given, steps=steps, seed=seed, show=show)
    else:
        row = _learned(method, corpus, steps=steps, seed=seed, show=show, checkpoint=checkpoint)
    seconds = row.seconds or time.perf_counter() - began
    return Row(**{**vars(row), "seconds": seconds})


def _given(method: str, corpus: Corpus, mixture: Tensor, *, steps: int, seed: int, show: Show) -> Row:
    """Plain training, in torch alone."""
    model, shares = corpus.model(seed), torch.softmax(mixture, 0).tolist()
    optimizer = ADAM(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step in range(1, steps + 1):
            loss = train_loss(model, mixture, corpus.train())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step % INNER == 0:
                show(step, float(loss.detach()), shares)
    return Row(method, shares, _judged(corpus, model, dict(model.named_parameters())), steps, steps, 0.0)


def _learned(method: str, corpus: Corpus, *, steps: int, seed: int, show: Show, checkpoint: Path | None) -> Row:
    game, moves = corpus.game(seed), max(1, steps // INNER)
    names = [f"share {index}" for index in range(len(corpus.sources))]

    def shares(variables: Mapping[str, Any]) -> dict[str, float]:
        return dict(zip(names, torch.softmax(variables["mixture"], 0).tolist(), strict=True))

    def look(step: int, record: Mapping[str, float], variables: Mapping[str, Any]) -> None:
        show(step * INNER, record["mixture"], [record[name] for name in names])

    leader = partial(torch.optim.Adam, **LEADERS[method])
    falling = partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.05, total_iters=moves)
    options: dict[str, Any] = {"steps": moves, "seed": seed, "callbacks": (look,), "record": shares}
    options["checkpoint"] = checkpoint
    options |= {"optimizer": leader, "scheduler": falling}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.BilevelWarning)  # they are in the solution
        if method == "Nudged":
            # A language model is never at its optimum: no accuracy is asked for, and the nudge is held.
            nudged = bl.Nudged(ADAM, steps=INNER, nudge=1e-2, tolerance=None)
            solution = bl.solve(game, model=nudged, **options)
        else:
            # Two language models that go on from where they were drift apart, and the model is between them.
            rule = ValueFunction(ADAM, method=F2SA2(nudge=0.1, steps=INNER, rejoin=True))
            solution = bl.solve(game, dynamics=rule, **options)
    # From the history, which a run that goes on has from its beginning.
    curve = [(int(record["step"]) * INNER, [record[name] for name in names]) for record in solution.history]
    noisy = [index for index, source in enumerate(corpus.sources) if source.noise]
    loss = _judged(corpus, corpus.model(seed), solution.variables["model"])
    found = Row(method, curve[-1][1], loss, moves * INNER, solution.gradients, solution.seconds, curve)
    return Row(**{**vars(found), "below": below(curve, noisy), "warnings": solution.warnings})


def below(curve: Sequence[tuple[int, Sequence[float]]], noisy: Sequence[int], share: float = 0.01) -> int | None:
    """The steps after which the noise together had less than a share, and kept below it; None if never."""
    since: int | None = None
    for step, shares in curve:
        if sum(shares[index] for index in noisy) >= share:
            since = None
        elif since is None:
            since = step
    return since


def _judged(corpus: Corpus, model: torch.nn.Module, weights: Mapping[str, Tensor]) -> float:
    with torch.no_grad():
        return float(held_out_loss(lambda codes: functional_call(model, dict(weights), (codes,)), corpus.last_word()))
