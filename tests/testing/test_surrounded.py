"""What users met is found: each defect by its law, planted in a response and in the library itself."""

from functools import partial

import pytest
import torch

import bilevel as bl
from bilevel.testing import check_response
from bilevel.testing.laws import ALARMS, CALIBRATION, LAWS, OPTIMIZERS, READING, RESTING, SETTLING, SURROUNDINGS

from .surrounded import BROKEN, MET

OF_USE = (*OPTIMIZERS, *READING, *SURROUNDINGS, *ALARMS, *SETTLING, *RESTING, *CALIBRATION)
BY_NAME = {law.name: law for law in LAWS}
SGD = partial(torch.optim.SGD, lr=0.5)
# Those that test_laws.py does not hold to all laws; and two in each run.
SHIPPED = {
    "unrolled": bl.Unrolled(SGD),
    "implicit": bl.Implicit(SGD),
    "implicit by roots": bl.Implicit(bl.ScipyRoot(), linear_solver=bl.GMRES()),
    "unrolled cold": bl.Unrolled(SGD, warm_start=False),
    "unrolled truncated": bl.Unrolled(SGD, backprop_steps=1),
    "unrolled Adam": bl.Unrolled(partial(torch.optim.Adam, lr=0.05)),
    "nudged": bl.Nudged(SGD),
    "last step": bl.responses.LastStep(SGD),
    "single loop": bl.SingleLoop(SGD),
    "learned": bl.Hypernetwork(partial(torch.optim.Adam, lr=1e-2), scale=0.1, warmup=20),
}


@pytest.mark.parametrize("name", MET)
def test_a_defect_of_a_response_is_caught_by_its_law(name):
    law, mutant = MET[name]
    (row,) = check_response(mutant, laws=[BY_NAME[law]], raises=False).rows
    assert row.verdict == "fails" and "raised" not in row.note, row  # by its answer, not by a crash


@pytest.mark.parametrize("name", BROKEN)
def test_a_defect_of_the_library_is_caught_by_its_law(name, monkeypatch):
    law, response, plant = BROKEN[name]
    plant(monkeypatch)
    (row,) = check_response(response, laws=[BY_NAME[law]], raises=False).rows
    assert row.verdict == "fails" and "raised" not in row.note, row


FAST = ("implicit",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in SHIPPED])
def test_shipped_responses_obey_the_laws_of_use(name):
    report = check_response(SHIPPED[name], laws=OF_USE)
    held = {row.law for row in report.rows if row.verdict == "holds"}
    assert {"names", "batches", "workers", "modules", "interrupts", "memory", "certificates"} <= held, str(report)


def test_every_law_of_use_has_a_defect_of_its_own():
    planted = {law for law, *_ in (*MET.values(), *BROKEN.values())}
    assert planted == {law.name for law in OF_USE}
