"""What an installed copy must do anywhere: run this by the Python of an environment that holds the wheel.

Without an option: three responses, and the command `check`. With --laws a small conformance too, by Hypothesis.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy
import scipy
import torch

import bilevel as bl
import games

REPOSITORY = Path(__file__).resolve().parents[1]
SGD = partial(torch.optim.SGD, lr=0.25)
RESPONSES = (
    bl.Unrolled(SGD, steps=30),
    bl.Implicit(SGD, steps=50),
    bl.Hypernetwork(SGD, scale=0.5, steps=20),
)
MINE = """
from functools import partial
import torch, bilevel as bl

zero = torch.tensor(0.0, dtype=torch.float64)
sgd = partial(torch.optim.SGD, lr=0.25)
game = bl.Game(x=bl.Player(lambda y: (y - 3) ** 2, zero), y=bl.Player(lambda x, y: (y - 2 * x) ** 2, zero))
right = bl.Implicit(sgd, steps=100, tolerance=1e-8)
short = bl.Unrolled(sgd, steps=1)
"""


def is_the_installed_copy() -> None:
    """What is imported is not the repository beside this file."""
    for package in (bl, games):
        where = Path(str(package.__file__)).resolve()
        assert where.parent.parent != REPOSITORY, f"{where} is the repository's; run this where it is not on the path"
    assert bl.__version__ == version("bilevel")


def solves() -> None:
    """The leader of a follower who wants y = 2 x, and who wants y = 3 itself, ends at x = 1.5 by every response."""
    zero = torch.tensor(0.0, dtype=torch.float64)
    game = bl.Game(x=bl.Player(lambda y: (y - 3) ** 2, zero), y=bl.Player(lambda x, y: (y - 2 * x) ** 2, zero))
    for response in RESPONSES:
        found = bl.solve(game, y=response, optimizer=partial(torch.optim.SGD, lr=0.1), steps=50)
        assert abs(found.variables["x"].item() - 1.5) < 1e-3, f"{response}: {found.variables}"


def checks() -> None:
    """`bilevel check` says yes of a right hypergradient, and no of one that sees half of it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "mine.py").write_text(MINE, encoding="utf-8")
        for response, right in (("right", True), ("short", False)):
            command = [sys.executable, "-m", "games", "check", "mine.py:game", "--response", response, "--json"]
            # Inherited: a test runs this with the wheel's folder on PYTHONPATH.
            done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False)
            assert done.returncode == (0 if right else 3), done.stdout + done.stderr
            json.loads(done.stdout)


def laws() -> None:
    """Answers and states of the responses, on games that Hypothesis draws."""
    from bilevel.testing.laws import ANSWERS, STATE  # noqa: PLC0415 - needs Hypothesis

    for response in RESPONSES[:2]:
        bl.testing.check_response(response, laws=(*ANSWERS, *STATE), examples=2)


if __name__ == "__main__":
    is_the_installed_copy()
    solves()
    checks()
    if "--laws" in sys.argv:
        laws()
    print(
        f"works: bilevel {bl.__version__}, Python {platform.python_version()}, torch {torch.__version__},"
        f" numpy {numpy.__version__}, scipy {scipy.__version__}"
    )
