"""Problems whose follower is not convex: only its global optimum counts. Most are of Mitsos and Barton's collection."""

from __future__ import annotations

from torch import Tensor

from games.published.problem import Problem

MITSOS = "Mitsos and Barton, A test set for bilevel programs, MIT (2006)"
ONE = ((-1.0,), (1.0,))


def _polynomial(x: Tensor, y: Tensor) -> Tensor:
    return (
        y[0] ** 4
        + 4.0 / 30.0 * (1 - x[0]) * y[0] ** 3
        + (-0.02 * x[0] ** 2 + 0.16 * x[0] - 0.4) * y[0] ** 2
        + (0.004 * x[0] ** 3 - 0.036 * x[0] ** 2 + 0.08 * x[0]) * y[0]
    )


NONCONVEX = [
    Problem(
        name="Mitsos-Barton 2006, 3.12",
        source=MITSOS,
        F=lambda x, y: -x[0] + x[0] * y[0] + 10 * y[0] ** 2,
        f=lambda x, y: -x[0] * y[0] ** 2 + 0.5 * y[0] ** 4,
        box=ONE,
        y_box=ONE,
        best=0.0,
        x=(0.0,),
        y=(0.0,),
        convex=False,
    ),
    Problem(
        name="Mitsos-Barton 2006, 3.13",
        source=MITSOS,
        F=lambda x, y: x[0] - y[0],
        f=lambda x, y: 0.5 * x[0] * y[0] ** 2 - x[0] ** 3 * y[0],
        box=ONE,
        y_box=ONE,
        best=-1.0,
        x=(0.0,),
        y=(1.0,),
        ties=True,
        convex=False,
    ),
    Problem(
        name="Mitsos-Barton 2006, 3.14",
        source=MITSOS,
        F=lambda x, y: (x[0] - 0.25) ** 2 + y[0] ** 2,
        f=lambda x, y: y[0] ** 3 / 3.0 - x[0] * y[0],
        box=ONE,
        y_box=ONE,
        best=0.25,
        x=(0.25,),
        y=(0.5,),
        ties=True,
        convex=False,
    ),
    Problem(
        name="Mitsos-Barton 2006, 3.16",
        source=MITSOS,
        F=lambda x, y: 2 * x[0] + y[0],
        f=lambda x, y: -0.5 * x[0] * y[0] ** 2 - 0.25 * y[0] ** 4,
        box=ONE,
        y_box=ONE,
        best=-2.0,
        x=(-1.0,),
        y=(0.0,),
        ties=True,
        convex=False,
    ),
    Problem(
        name="Mitsos-Barton 2006, 3.17",
        source=MITSOS,
        F=lambda x, y: (x[0] + 0.5) ** 2 + 0.5 * y[0] ** 2,
        f=lambda x, y: 0.5 * x[0] * y[0] ** 2 + 0.25 * y[0] ** 4,
        box=ONE,
        y_box=ONE,
        best=0.1875,
        x=(-0.25,),
        y=(0.5,),
        convex=False,
    ),
    Problem(
        name="Mitsos-Barton 2006, 3.19",
        source=MITSOS,
        F=lambda x, y: x[0] * y[0] - y[0] + 0.5 * y[0] ** 2,
        f=lambda x, y: -x[0] * y[0] ** 2 + 0.5 * y[0] ** 4,
        box=ONE,
        y_box=ONE,
        best=-0.258,
        x=(0.189,),
        y=(0.4343,),
        ties=True,
        convex=False,
    ),
    Problem(
        name="Mitsos-Barton 2006, 3.20",
        source=MITSOS,
        F=lambda x, y: (x[0] - 0.25) ** 2 + y[0] ** 2,
        f=lambda x, y: y[0] ** 3 / 3.0 - x[0] ** 2 * y[0],
        box=ONE,
        y_box=ONE,
        best=0.3125,
        x=(0.5,),
        y=(0.5,),
        ties=True,
        convex=False,
    ),
    Problem(
        name="Mitsos-Barton 2006, 3.21",
        source=MITSOS,
        F=lambda x, y: (x[0] + 0.6) ** 2 + y[0] ** 2,
        f=_polynomial,
        box=ONE,
        y_box=ONE,
        best=0.2095,
        x=(-0.5545,),
        y=(0.4554,),
        ties=True,
        convex=False,
    ),
    Problem(
        name="Mitsos-Barton 2006, 3.24",
        source=MITSOS,
        F=lambda x, y: x[0] ** 2 - y[0],
        f=lambda x, y: ((y[0] - 1 - 0.1 * x[0]) ** 2 - 0.5 - 0.5 * x[0]) ** 2,
        box=((0.0,), (1.0,)),
        y_box=((0.0,), (3.0,)),
        best=-1.755,
        x=(0.2106,),
        y=(1.799,),
        ties=True,
        convex=False,
    ),
    Problem(
        name="Mirrlees 1999",
        source="Mirrlees, Review of Economic Studies 66 (1999); y within -2 and 2",
        F=lambda x, y: (x[0] - 2) ** 2 + (y[0] - 1) ** 2,
        f=lambda x, y: -x[0] * (-((y[0] + 1) ** 2)).exp() - (-((y[0] - 1) ** 2)).exp(),
        box=((0.5,), (2.0,)),
        y_box=((-2.0,), (2.0,)),
        best=1.0018,
        x=(1.0,),
        y=(0.95753,),
        ties=True,
        convex=False,
    ),
]
