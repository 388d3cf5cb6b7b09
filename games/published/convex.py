"""Problems whose follower is convex."""

from __future__ import annotations

import math

from torch import Tensor

from games.published.problem import Function, Problem, stacked

INF = math.inf
FREE = ((-INF,), (INF,))


def _bard_1988(x: Tensor, y: Tensor) -> Tensor:
    return stacked(-3 * x[0] + y[0] + 3, x[0] - 0.5 * y[0] - 4, x[0] + y[0] - 7)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    return (y - x).square().sum()


CONVEX = [
    Problem(
        name="Aiyoshi-Shimizu 1984, 2",
        source="Aiyoshi and Shimizu, IEEE Transactions on Automatic Control 29 (1984); 5 was published, 0 is known",
        F=lambda x, y: 2 * x.sum() - 3 * y.sum() - 60,
        f=lambda x, y: (y - x + 20).square().sum(),
        G=lambda x, y: stacked(x[0] + x[1] + y[0] - 2 * y[1] - 40),
        g=lambda x, y: 2 * y - x + 10,
        box=((0.0, 0.0), (50.0, 50.0)),
        y_box=((-10.0, -10.0), (20.0, 20.0)),
        best=0.0,
        x=(0.0, 0.0),
        y=(-10.0, -10.0),
    ),
    Problem(
        name="Bard 1988, 1",
        source="Bard, Computers and Operations Research 15 (1988)",
        F=lambda x, y: (x[0] - 5) ** 2 + (2 * y[0] + 1) ** 2,
        f=lambda x, y: (y[0] - 1) ** 2 - 1.5 * x[0] * y[0],
        g=_bard_1988,
        box=((0.0,), (8.0,)),
        y_box=((0.0,), (INF,)),
        best=17.0,
        x=(1.0,),
        y=(0.0,),
    ),
    Problem(
        name="Bard 1988, 2",
        source="Bard, Computers and Operations Research 15 (1988); two followers, who share no function",
        F=lambda x, y: -(200 - y[0] - y[2]) * (y[0] + y[2]) - (160 - y[1] - y[3]) * (y[1] + y[3]),
        f=lambda x, y: (y[0] - 4) ** 2 + (y[1] - 13) ** 2 + (y[2] - 35) ** 2 + (y[3] - 2) ** 2,
        G=lambda x, y: stacked(x.sum() - 40),
        g=lambda x, y: stacked(
            0.4 * y[0] + 0.7 * y[1] - x[0],
            0.6 * y[0] + 0.3 * y[1] - x[1],
            0.4 * y[2] + 0.7 * y[3] - x[2],
            0.6 * y[2] + 0.3 * y[3] - x[3],
        ),
        box=((0.0,) * 4, (10.0, 5.0, 15.0, 20.0)),
        y_box=((0.0,) * 4, (20.0, 20.0, 40.0, 40.0)),
        best=-6600.0,
        x=(7.0, 3.0, 12.0, 18.0),
        y=(0.0, 10.0, 30.0, 0.0),
    ),
    Problem(
        name="Bard 1988, 3",
        source="Bard, Computers and Operations Research 15 (1988)",
        F=lambda x, y: -(x[0] ** 2) - 3 * x[1] - 4 * y[0] + y[1] ** 2,
        f=lambda x, y: 2 * x[0] ** 2 + y[0] ** 2 - 5 * y[1],
        G=lambda x, y: stacked(x[0] ** 2 + 2 * x[1] - 4),
        g=lambda x, y: stacked(
            -(x[0] ** 2) + 2 * x[0] - x[1] ** 2 + 2 * y[0] - y[1] - 3, -x[1] - 3 * y[0] + 4 * y[1] + 4
        ),
        box=((0.0, 0.0), (2.0, 2.0)),
        y_box=((0.0, 0.0), (INF, INF)),
        best=-12.6787,
        x=(0.0, 2.0),
        y=(1.875, 0.90625),
    ),
    Problem(
        name="Clark-Westerberg 1990a",
        source="Clark and Westerberg, Computers and Chemical Engineering 14 (1990)",
        F=lambda x, y: (x[0] - 3) ** 2 + (y[0] - 2) ** 2,
        f=lambda x, y: (y[0] - 5) ** 2,
        g=lambda x, y: stacked(-2 * x[0] + y[0] - 1, x[0] - 2 * y[0] + 2, x[0] + 2 * y[0] - 14),
        box=((0.0,), (8.0,)),
        y_box=FREE,
        best=5.0,
        x=(1.0,),
        y=(3.0,),
    ),
    Problem(
        name="Dempe 1992b",
        source="Dempe, Optimization 25 (1992)",
        F=lambda x, y: (x[0] - 3.5) ** 2 + (y[0] + 4) ** 2,
        f=lambda x, y: (y[0] - 3) ** 2,
        g=lambda x, y: stacked(y[0] ** 2 - x[0]),
        box=((0.0,), (10.0,)),
        y_box=FREE,
        best=28.25,
        x=(0.0,),
        y=(0.0,),
    ),
    Problem(
        name="De Silva 1978",
        source="De Silva, dissertation, George Washington University (1978)",
        F=lambda x, y: (x.square() - 2 * x + y.square()).sum(),
        f=_distance,
        box=((-5.0, -5.0), (5.0, 5.0)),
        y_box=((0.5, 0.5), (1.5, 1.5)),
        best=-1.0,
        x=(0.5, 0.5),
        y=(0.5, 0.5),
    ),
    Problem(
        name="Falk-Liu 1995",
        source="Falk and Liu, Mathematical Programming 70 (1995)",
        F=lambda x, y: (x.square() - 3 * x + y.square()).sum(),
        f=_distance,
        box=((-5.0, -5.0), (5.0, 5.0)),
        y_box=((0.5, 0.5), (1.5, 1.5)),
        best=-2.25,
        x=(0.75, 0.75),
        y=(0.75, 0.75),
    ),
    Problem(
        name="Floudas-Zlobec 1998",
        source="Floudas and Zlobec, in Multilevel Optimization, Kluwer (1998)",
        F=lambda x, y: x[0] ** 3 * y[0] + y[1],
        f=lambda x, y: -y[1] + 0 * x[0],
        g=lambda x, y: stacked(x[0] * y[0] - 10, y[0] ** 2 + x[0] * y[1] - 1),
        box=((0.0,), (1.0,)),
        y_box=((-1.0, 0.0), (1.0, 100.0)),
        best=1.0,
        x=(1.0,),
        y=(0.0, 1.0),
    ),
    Problem(
        name="Gumus-Floudas 2001, 1",
        source="Gumus and Floudas, Journal of Global Optimization 20 (2001)",
        F=lambda x, y: 16 * x[0] ** 2 + 9 * y[0] ** 2,
        f=lambda x, y: (x[0] + y[0] - 20) ** 4,
        G=lambda x, y: stacked(-4 * x[0] + y[0]),
        g=lambda x, y: stacked(4 * x[0] + y[0] - 50),
        box=((0.0,), (12.5,)),
        y_box=((0.0,), (50.0,)),
        best=2250.0,
        x=(11.25,),
        y=(5.0,),
    ),
    Problem(
        name="Shimizu-Aiyoshi 1981, 1",
        source="Shimizu and Aiyoshi, IEEE Transactions on Automatic Control 26 (1981)",
        F=lambda x, y: x[0] ** 2 + (y[0] - 10) ** 2,
        f=lambda x, y: (x[0] + 2 * y[0] - 30) ** 2,
        G=lambda x, y: stacked(-x[0] + y[0]),
        g=lambda x, y: stacked(x[0] + y[0] - 20),
        box=((0.0,), (15.0,)),
        y_box=((0.0,), (20.0,)),
        best=100.0,
        x=(10.0,),
        y=(10.0,),
    ),
    Problem(
        name="Shimizu-Aiyoshi 1981, 2",
        source="Shimizu and Aiyoshi, IEEE Transactions on Automatic Control 26 (1981)",
        F=lambda x, y: (x[0] - 30) ** 2 + (x[1] - 20) ** 2 - 20 * y[0] + 20 * y[1],
        f=_distance,
        G=lambda x, y: stacked(30 - x[0] - 2 * x[1], x[0] + x[1] - 25, x[1] - 15),
        box=((0.0, 0.0), (25.0, 25.0)),
        y_box=((0.0, 0.0), (10.0, 10.0)),
        best=225.0,
        x=(20.0, 5.0),
        y=(10.0, 5.0),
    ),
    Problem(
        name="Savard-Gauvin 1994",
        source="Savard and Gauvin, Operations Research Letters 15 (1994)",
        F=lambda x, y: (x[0] - 1) ** 2 + 2 * y[0] ** 2 - 2 * x[0],
        f=lambda x, y: (2 * y[0] - 4) ** 2 + (2 * y[0] - 1) ** 2 + x[0] * y[0],
        g=lambda x, y: stacked(
            4 * x[0] + 5 * y[0] - 12, 4 - 4 * x[0] - 5 * y[0], -4 * x[0] + 5 * y[0] - 4, 4 * x[0] - 4 * y[0] - 4
        ),
        box=((0.0,), (3.0,)),
        y_box=((0.0,), (INF,)),
        best=-1.4074,
        x=(17.0 / 9.0,),
        y=(8.0 / 9.0,),
    ),
    Problem(
        name="Yezza 1996, 4.1",
        source="Yezza, Journal of Optimization Theory and Applications 88 (1996)",
        F=lambda x, y: 0.5 * (y[0] - 2) ** 2 + 0.5 * (x[0] - y[0] - 2) ** 2,
        f=lambda x, y: 0.5 * y[0] ** 2 + x[0] - y[0],
        g=lambda x, y: stacked(y[0] - x[0]),
        box=((0.0,), (10.0,)),
        y_box=((0.0,), (INF,)),
        best=0.5,
        x=(3.0,),
        y=(1.0,),
    ),
    Problem(
        name="Lampariello-Sagratella 2017, 3.2",
        source="Lampariello and Sagratella, as collected in BOLIB",
        F=lambda x, y: x[0] ** 2 + y[0] ** 2,
        f=lambda x, y: (x[0] + y[0] - 1) ** 2,
        box=((-5.0,), (5.0,)),
        y_box=((-10.0,), (10.0,)),
        best=0.5,
        x=(0.5,),
        y=(0.5,),
    ),
    Problem(
        name="Lampariello-Sagratella 2017, 3.3",
        source="Lampariello and Sagratella, as collected in BOLIB",
        F=lambda x, y: x[0] ** 2 + (y[0] + y[1]) ** 2,
        f=lambda x, y: y[0] + 0 * x[0],
        g=lambda x, y: stacked(1 - x[0] - y[0] - y[1]),
        box=((0.0,), (2.0,)),
        y_box=((0.0, 0.0), (INF, INF)),
        best=0.5,
        x=(0.5,),
        y=(0.0, 0.5),
        ties=True,
    ),
    Problem(
        name="Macal-Hurter 1997",
        source="Macal and Hurter, Computers and Operations Research 24 (1997)",
        F=lambda x, y: (x[0] - 1) ** 2 + (y[0] - 1) ** 2,
        f=lambda x, y: 0.5 * y[0] ** 2 + 500 * y[0] - 50 * x[0] * y[0],
        box=((0.0,), (20.0,)),
        y_box=((-1000.0,), (1000.0,)),
        best=81.3279,
        x=(25051.0 / 2501.0,),
        y=(50 * 25051.0 / 2501.0 - 500,),
    ),
    Problem(
        name="Muu-Quy 2003, 1",
        source="Muu and Quy, Acta Mathematica Vietnamica 28 (2003)",
        F=lambda x, y: y.square().sum() + x[0] ** 2 - 4 * x[0],
        f=lambda x, y: y[0] ** 2 + 0.5 * y[1] ** 2 + y[0] * y[1] + (1 - 3 * x[0]) * y[0] + (1 + x[0]) * y[1],
        g=lambda x, y: stacked(2 * y[0] + y[1] - 2 * x[0] - 1),
        box=((0.0,), (2.0,)),
        y_box=((0.0, 0.0), (INF, INF)),
        best=-2.0769,
        x=(0.8461,),
        y=(0.7692, 0.0),
    ),
    Problem(
        name="Muu-Quy 2003, 2",
        source="Muu and Quy, Acta Mathematica Vietnamica 28 (2003); 0.6426 was published",
        F=lambda x, y: -7 * x[0] + 4 * x[1] + y[0] ** 2 + y[2] ** 2 - y[0] * y[2] - 4 * y[1],
        f=lambda x, y: (
            y[0] ** 2 + 0.5 * y[1] ** 2 + 0.5 * y[2] ** 2 + y[0] * y[1] + (1 - 3 * x[0]) * y[0] + (1 + x[1]) * y[1]
        ),
        G=lambda x, y: stacked(x[0] + x[1] - 1),
        g=lambda x, y: stacked(2 * y[0] + y[1] - y[2] + x[0] - 2 * x[1] + 2),
        box=((0.0, 0.0), (1.0, 1.0)),
        y_box=((0.0,) * 3, (INF,) * 3),
        best=23.0 / 36.0,
        x=(11.0 / 18.0, 7.0 / 18.0),
        y=(0.0, 0.0, 11.0 / 6.0),
    ),
    Problem(
        name="Henrion-Surowiec 2011",
        source="Henrion and Surowiec, Applicable Analysis 90 (2011), with c = 1",
        F=lambda x, y: x[0] ** 2 + y[0],
        f=lambda x, y: 0.5 * y[0] ** 2 - x[0] * y[0],
        box=((-5.0,), (5.0,)),
        y_box=((-10.0,), (10.0,)),
        best=-0.25,
        x=(-0.5,),
        y=(-0.5,),
    ),
    Problem(
        name="Colson 2002, BIPA2",
        source="Colson, BIPA: user's guide (2002)",
        F=lambda x, y: (x[0] - 5) ** 2 + (2 * y[0] + 1) ** 2,
        f=lambda x, y: (y[0] - 1) ** 2 - 1.5 * x[0] * y[0] + x[0] ** 3,
        g=_bard_1988,
        box=((0.0,), (8.0,)),
        y_box=((0.0,), (INF,)),
        best=17.0,
        x=(1.0,),
        y=(0.0,),
    ),
    Problem(
        name="Colson 2002, BIPA3",
        source="Colson, BIPA: user's guide (2002)",
        F=lambda x, y: (x[0] - 5) ** 4 + (2 * y[0] + 1) ** 4,
        f=lambda x, y: (y[0] - x[0]).exp() + x[0] ** 2 + 2 * x[0] * y[0] + y[0] ** 2 + 2 * x[0] + 6 * y[0],
        G=lambda x, y: stacked(x[0] + y[0] - 4),
        g=lambda x, y: stacked(-x[0] + y[0] - 2),
        box=((0.0,), (10.0,)),
        y_box=((0.0,), (INF,)),
        best=2.0,
        x=(4.0,),
        y=(0.0,),
    ),
    Problem(
        name="Colson 2002, BIPA4",
        source="Colson, BIPA: user's guide (2002)",
        F=lambda x, y: x[0] ** 2 + (y[0] - 10) ** 2,
        f=lambda x, y: x[0] ** 3 + 2 * y[0] ** 3 + x[0] - 2 * y[0] - x[0] ** 2,
        G=lambda x, y: stacked(x[0] + 2 * y[0] - 6),
        g=lambda x, y: stacked(-x[0] + 2 * y[0] - 3),
        box=((0.0,), (6.0,)),
        y_box=((0.0,), (INF,)),
        best=(1.0 / 3.0**0.5 - 10.0) ** 2,
        x=(0.0,),
        y=(1.0 / 3.0**0.5,),
    ),
    Problem(
        name="Colson 2002, BIPA5",
        source="Colson, BIPA: user's guide (2002)",
        F=lambda x, y: (x[0] - y[1]) ** 4 + (y[0] - 1) ** 2 + (y[0] - y[1]) ** 2,
        f=lambda x, y: 2 * x[0] + y[0].exp() + y[0] ** 2 + 4 * y[0] + 2 * y[1] ** 2 - 6 * y[1],
        g=lambda x, y: stacked(6 * x[0] + y[0] ** 2 + y[1].exp() - 15, 5 * x[0] + y[0] ** 4 - y[1] - 25),
        box=((0.0,), (2.3,)),
        y_box=((0.0, 0.0), (4.0, 2.0)),
        best=2.75,
        x=(1.94,),
        y=(0.0, math.log(15 - 6 * 1.94)),
    ),
    Problem(
        name="Hatz et al. 2013",
        source="Hatz, Leyffer, Schloder and Bock, Argonne preprint (2013), as collected in BOLIB",
        F=lambda x, y: -x[0] + 2 * y[0] + y[1],
        f=lambda x, y: (x[0] - y[0]) ** 2 + y[1] ** 2,
        box=((-5.0,), (5.0,)),
        y_box=((0.0, 0.0), (INF, INF)),
        best=0.0,
        x=(0.0,),
        y=(0.0, 0.0),
    ),
]


def _smd1_leader(x: Tensor, y: Tensor) -> Tensor:
    return x.square().sum() + y[:2].square().sum() + (x[2:] - y[2:].tan()).square().sum()


def _smd1_follower(x: Tensor, y: Tensor) -> Tensor:
    return x[:2].square().sum() + y[:2].square().sum() + (x[2:] - y[2:].tan()).square().sum()


def _smd2(sign: float) -> Function:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        own = x.square().sum() if sign < 0 else x[:2].square().sum()
        return own + sign * (y[:2].square().sum() + (x[2:] - y[2:].log()).square().sum())

    return loss


SCALABLE = [
    Problem(
        name="Sinha-Malo-Deb 2014, SMD1",
        source="Sinha, Malo and Deb, Evolutionary Computation 22 (2014), with p = 2, q = 2, r = 1",
        F=_smd1_leader,
        f=_smd1_follower,
        box=((-5.0,) * 3, (10.0,) * 3),
        y_box=((-5.0, -5.0, -1.57), (10.0, 10.0, 1.57)),
        best=0.0,
        x=(0.0,) * 3,
        y=(0.0,) * 3,
        y_start=(1.0, 1.0, 0.5),
    ),
    Problem(
        name="Sinha-Malo-Deb 2014, SMD2",
        source="Sinha, Malo and Deb, Evolutionary Computation 22 (2014), with p = 2, q = 2, r = 1",
        F=_smd2(-1.0),
        f=_smd2(1.0),
        box=((-5.0, -5.0, -5.0), (10.0, 10.0, 1.0)),
        y_box=((-5.0, -5.0, 1e-3), (10.0, 10.0, 2.718281828459045)),
        best=0.0,
        x=(0.0,) * 3,
        y=(0.0, 0.0, 1.0),
    ),
]
