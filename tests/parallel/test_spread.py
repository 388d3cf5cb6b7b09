"""Variables that are spread over ranks: answers of one process, files for any number of ranks, refusals by name."""

import json
import re

import pytest
import torch

from bilevel.solving import checkpoint

pytestmark = pytest.mark.slow

# As in test_data_parallel: sums over nine examples and 80 weights in another order, magnified by a linear solve.
TOLERANCE = 1e-12
WEIGHTS = 5 * 7 + 7 + 7 * 3 + 3


def check(lines):
    for rank in lines:
        for told in rank:
            assert told["error"] <= TOLERANCE, told
            assert told["same"], told
    return [told["response"] for told in lines[0]]


def test_responses_answer_as_with_whole_variables(played):
    lines = played("spread_answers", 2, "ReverseMode", "SingleLoop")
    assert check(lines) == ["ReverseMode", "SingleLoop"]
    for told in zip(*lines, strict=True):
        held = [each["held"] for each in told]
        assert sum(held) == WEIGHTS
        assert max(held) < 0.65 * WEIGHTS  # rows are dealt out in whole


def test_every_response_on_parts(played):
    lines = played("spread_answers", 2)
    assert len(check(lines)) == 10
    assert all(sum(told["held"] for told in each) == WEIGHTS for each in zip(*lines, strict=True))


def test_a_rank_may_hold_nothing_of_a_small_tensor(played):
    lines = played("spread_answers", 4, "clipped", "SingleLoop")  # of four ranks the last has none of three rows
    assert check(lines) == ["clipped", "SingleLoop"]
    assert min(told["held"] for told in lines[-1]) < WEIGHTS / 8


def test_a_rank_may_hold_nothing_at_all(played):
    names = ["ReverseMode", "Segments", "Nudged", "ConjugateGradient", "Diagonal", "Neumann"]
    lines = played("spread_small", 4, *names)
    assert check(lines) == names
    assert {told["held"] for told in lines[-1]} == {0}


def test_the_leader_need_not_name_every_part(played):
    names = ["Adam", "ConjugateGradient", "Diagonal"]
    assert check(played("spread_spare", 2, *names)) == names


def test_what_acts_on_each_entry_keeps_parts_and_gathers_nothing(played):
    for rank in played("spread_by_entry", 3):  # of three ranks the last has none of two entries
        *cases, written = rank
        for told in cases:
            assert told["error"] <= TOLERANCE, told
            assert told["gathered"] == told["expected"], told
        assert re.search("fill_ writes to a tensor of which each rank holds a part", written["text"])


def test_no_graph_of_parts_holds_itself(played):
    for rank in played("spread_keeps", 2, "Segments", "Nudged", "SingleLoop", "ConjugateGradient"):
        for told in rank:
            assert told["last"] == told["first"], told


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_modules_and_single_dtensors(played, size):
    assert check(played("spread_layouts", size)) == ["tensor parallel", "partly"]


@pytest.mark.parametrize("size", [2, 4])
def test_games_of_spread_players_are_solved_as_in_one_process(played, size):
    for rank in played("spread_solves", size, ""):
        for told in rank:
            assert told["error"] <= TOLERANCE, told
            assert told["values"] <= TOLERANCE, told
            assert "DTensor" in told["kinds"]


def test_a_checkpoint_goes_on_with_any_number_of_ranks(played, tmp_path):
    path = tmp_path / "run.pt"
    played("spread_resumes", 3, str(path), "2")
    assert not [leaf for leaf in tensors(checkpoint.load(path)) if type(leaf) is not torch.Tensor]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.pt"]
    played("spread_resumes", 2, str(path), "4")
    ((end,),) = played("spread_resumes", 1, str(path), "6")
    ((whole,),) = played("spread_resumes", 1, "", "6")
    assert end["steps"] == whole["steps"] == 6
    assert end["decay"] == pytest.approx(whole["decay"], rel=TOLERANCE)
    assert end["weights"] == pytest.approx(whole["weights"], rel=TOLERANCE, abs=TOLERANCE)


def tensors(tree):
    if isinstance(tree, dict):
        return [leaf for part in tree.values() for leaf in tensors(part)]
    if isinstance(tree, list | tuple):
        return [leaf for part in tree for leaf in tensors(part)]
    return [tree] if isinstance(tree, torch.Tensor) else []


WORDS = {
    "mesh": r"Player 'y': init is a DTensor over a mesh of \[1, 2\] processes; expected one dimension",
    "domain": r"Player 'y': its variables are DTensors, spread over processes, and domain= would see one rank's part",
    "policy": r"sharded by fully_shard with MixedPrecisionPolicy.* torch.autocast inside the loss",
    "gathered": r"gathered just now. Call module.reshard\(\)",
    "alone": r"solve: this process is one of 2 ranks.*parallel=bilevel.DataParallel\(\)",
    "Hypernetwork": r"Hypernetwork works on whole vectors, and those of player 'weights' are spread",
    "GMRES": r"linear_solver=GMRES.* works on whole vectors",
    "ForwardMode": r"ForwardMode works on whole vectors",
    "Scipy": r"Scipy.* works on whole vectors",
    "Games": r"Games works on whole vectors",
    "product": r"aten\.(mm|permute) was asked of a tensor of which each rank holds a part",
    "beside": r"aten\.add was asked of a tensor \[.*\] that each rank holds whole and another",
}


def test_what_does_not_work_on_parts_is_refused_by_name(played):
    lines = played("spread_refusals", 2)
    for rank in lines:
        found = {told["case"]: told for told in rank}
        for case, words in WORDS.items():
            assert re.search(words, found[case]["text"]), json.dumps(found[case])
    assert lines[0][-1] == lines[1][-1]
    assert lines[0][-1]["case"] == "sums"
