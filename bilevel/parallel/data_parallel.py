"""How a game is shared among processes, as configuration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from typing import Any, final

from bilevel.errors import ParallelError, require_kinds
from bilevel.game import Game
from bilevel.parallel.agreement import of_the_call, of_the_game, of_the_machine, require_agreement, require_sampler
from bilevel.parallel.batches import Examples, is_sharded
from bilevel.parallel.game import Dealing, ParallelGame
from bilevel.parallel.ranks import Ranks
from bilevel.parallel.trial import refuse_functions_of_batches, tried


@final
@dataclass(frozen=True)
class DataParallel:
    r"""One game in many processes, each of which evaluates the losses on a part of every batch.

        solution = bl.solve(game, weights=response, parallel=bl.DataParallel())   # in torchrun's processes

    Every rank holds all variables and states, and computes a share of each gradient and of each product with a Hessian;
    one sum over ranks then makes it that of the whole batch,

    $$\nabla f = \frac{\sum_r n_r \nabla f_r}{\sum_r n_r}$$

    for \(n_r\) examples on rank r, the same bits on all ranks. So any response answers as in one process, up to the
    order of sums: only what losses draw at random (dropout) is drawn by each rank anew. A batch is read whole by every
    rank, which takes its share of the rows; data with a `DistributedSampler` are read in parts.

    A loss must be a mean over the examples of its batch, plus terms without any; on the first batch that is tried.
    In one's own loop: `game = bl.DataParallel().game(game)`. In one process it is that game, and nothing is sent.

    Costs a sum of the follower's variables a gradient or product, of the leader's besides where it is wanted, and in
    `solve` one of a few numbers a step. The process group is the program's, or made from torchrun's environment.

    Args:
        sharded: Whether each rank's data are a part of its own; None: those with a `DistributedSampler` are.
        examples: From a part of a batch to how many examples a loss is a mean over; None: its rows.
        coupled: Accept losses that are no means over examples (BatchNorm): each part is then a batch of its own, and
            a hypergradient holds running statistics fixed.
        timeout: Seconds after which a rank that others wait for is given up, by `ParallelError` on these.

    Raises:
        ParallelError: Where ranks do not play the same game; where one has ended, or hangs, on all others.
        ValueError, TypeError, CapturedTensorError: For losses and data that cannot be shared, by `game`.

    Source: Li et al. 2020 (arXiv 2006.15704) for plain gradients; Shoeybi et al. 2019 (arXiv 1909.08053) for the pair
    of transposed sums that makes it hold for derivatives of any order.

    Examples:
        >>> import torch
        >>> from bilevel import Player
        >>> game = Game(y=Player(lambda y, batch: (y - batch).square().mean(), torch.zeros(()), data=[torch.ones(4)]))
        >>> shared = DataParallel().game(game)
        >>> shared.ranks.size, shared.loss("y", {"y": torch.zeros(())}, torch.ones(4)).item()
        (1, 1.0)
    """

    sharded: bool | None = None
    examples: Examples | None = None
    coupled: bool = False
    timeout: float = 600.0

    def __post_init__(self) -> None:
        require_kinds(self)
        if not 0.0 < self.timeout < float("inf"):
            raise ValueError(f"DataParallel: timeout={self.timeout}; expected seconds, above 0.")
        if self.examples is not None and not callable(self.examples):
            raise TypeError(
                f"DataParallel: examples={self.examples!r}; expected a function from a batch to a number, or None."
            )

    def game(self, game: Game) -> Any:
        """The game as these ranks play it together; all of them must ask for it, and ask it alike.

        Of `Tasks` each rank plays a share of every batch of tasks, of `Games` some of the games. Raises, on all ranks,
        where they disagree or where a loss cannot be shared.
        """
        ranks = Ranks(game.device, self.timeout)
        try:
            asked = of_the_call(game, self._in_words) | of_the_machine(game.device)
            require_agreement(ranks, asked, "DataParallel")
            found = ranks.together(lambda: shared(game, ranks, self))
            # Not before each knows its own data: those that are dealt out differ.
            own = ranks.together(lambda: of_the_game(game, found.sharded, self.examples))
            require_agreement(ranks, own, "DataParallel")
        except BaseException as error:
            ranks.leave(error if not isinstance(error, ParallelError) else None)
            raise
        return found

    @property
    def _in_words(self) -> dict[str, str]:
        counts = "None" if self.examples is None else "a function"
        options = {"sharded": self.sharded, "examples": counts, "coupled": self.coupled, "timeout": self.timeout}
        return {f"{key}=": str(value) for key, value in options.items()}


@singledispatch
def shared(game: object, ranks: Ranks, parallel: DataParallel) -> Any:
    """A game as ranks play it together; rooms above this one register kinds of games of their own."""
    raise TypeError(f"DataParallel: the game is a {type(game).__name__}; expected a Game, Games or Tasks.")


@shared.register
def _(game: Game, ranks: Ranks, parallel: DataParallel) -> ParallelGame:
    """One game, each of whose batches is dealt out."""
    if type(game) is not Game:
        raise TypeError(
            f"DataParallel: the game is {type(game).__name__}; expected a Game, Games or Tasks that are not shared "
            "out yet."
        )
    players = game.players
    with_data = [name for name, player in players.items() if player.data is not None]
    given = parallel.sharded
    sharded = frozenset(n for n in with_data if (is_sharded(players[n].data) if given is None else given))
    refuse_functions_of_batches(players)
    for name in with_data:
        require_sampler(ranks, name, players[name].data)
    advancing = {n: tried(game, n, examples=parallel.examples, coupled=parallel.coupled) for n in players}
    return ParallelGame.of(game, ranks, Dealing(sharded, parallel.examples, advancing))
