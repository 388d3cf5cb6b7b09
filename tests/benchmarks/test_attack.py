"""The program of random games: its verdicts, and a game of each family."""

import math

import pytest
import torch

from benchmarks.attack.families import FAMILIES
from benchmarks.attack.judge import VERDICTS, Outcome, attack, judge

RIGHT = torch.tensor([3.0, 4.0], dtype=torch.float64)


def outcome(found, **options):
    return Outcome(found, RIGHT, 5.0, 0.1, **options)


def test_a_verdict_is_told_by_the_error_the_doubt_and_what_was_said():
    assert judge(outcome(RIGHT + 0.1), warned=False)[0] == "right"
    assert judge(outcome(-RIGHT), warned=False) == ("silent", 2.0)
    assert judge(outcome(-RIGHT), warned=True)[0] == "warned"
    assert judge(outcome(-RIGHT, told=True), warned=False)[0] == "told"
    assert judge(outcome(-RIGHT, doubt=torch.ones(2) * 10), warned=False)[0] == "no truth"
    assert judge(outcome(RIGHT * math.nan), warned=False)[0] == "silent"
    assert judge(Outcome(RIGHT, None, 1.0, 0.1), warned=False)[0] == "no truth"


def raising(error):
    def family(draw, warned):
        raise error

    return family


def test_an_error_of_no_line_of_the_library_is_raw():
    record = attack("anything", raising(RuntimeError("shape")), 0, 5)
    assert (record["verdict"], record["says"]) == ("raw", "RuntimeError: shape")
    assert (
        attack("anything", raising(ValueError("shape")), 0, 5)["verdict"] == "raw"
    )  # of ours, it would have been raised there


def test_a_game_that_takes_too_long_is_left():
    def endless(draw, warned):
        while True:
            pass

    assert attack("endless", endless, 0, 1)["verdict"] == "slow"


LIGHT = {
    "nudged": 1790,
    "batches": 1636,
    "unrolled": 1411,
    "learned": 1541,
    "tasks": 1654,
    "many": 1384,
    "projected": 1398,
    "gauss_newton": 1375,
}
"""Games that take little time."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_game_of_each_family(name):
    record = attack(name, FAMILIES[name][0], LIGHT.get(name, 3), 60)
    assert record["verdict"] in set(VERDICTS) - {"raw", "silent"}, record


def test_a_seed_is_a_game():
    one, same, other = (attack("damped", FAMILIES["damped"][0], seed, 60) for seed in (3, 3, 4))
    assert (one["about"], one["truth"]) == (same["about"], same["truth"])
    assert one["about"] != other["about"]
