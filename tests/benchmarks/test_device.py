"""The program of a device's times, on the CPU and small."""

import json
import sys

import pytest

from benchmarks import device


@pytest.mark.slow
def test_every_response_is_held_against_the_cpu_and_timed(tmp_path, monkeypatch):
    target = tmp_path / "device.json"
    monkeypatch.setattr(
        sys, "argv", ["device", "--device", "cpu", "--sizes", "500", "--rounds", "1", "--output", str(target)]
    )
    device.main()
    found = json.loads(target.read_text())
    assert found["device"] == "CPU, one thread"
    # The same program on the same processor: but for the order of sums there is no difference.
    assert all(row["difference"] <= 1e-12 for row in found["right"]), found["right"]
    assert {row["row"] for row in found["times"]} == {"a training step", *device.timed()}
    for row in found["times"]:
        assert row["float32"]["seconds"] > 0.0 < row["float32"]["copies"]
        assert row["row"] == "a training step" or row["bfloat16"]["cosine"] > 0.9
