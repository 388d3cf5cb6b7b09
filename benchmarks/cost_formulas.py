"""What a step of the hyperparameters of a large network costs on many GPUs, computed from what was counted here.

`benchmarks.cost_model` counts. Seconds and bytes for networks and machines that are not here come by the formulas of
`Model` and from the hardware that is assumed in `Hardware`, which nobody has measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COUNTS = ROOT / "docs" / "processes" / "counts.json"
MEMORY = ROOT / "docs" / "processes" / "memory.json"
SIZES = (1, 2, 4)
GRAPHS = {"Unrolled, 3 steps": 3, "Unrolled, 3 steps of Adam": 3, "Unrolled, Segments": 2}
"""Of how many batches a response holds the activations at once; of the others one."""


@dataclass(frozen=True)
class Hardware:
    """A machine of GPUs as it is assumed, of about an H100's size: not measured.

    Args:
        memory: Bytes of a GPU.
        flops: Operations a second that a network's layers reach in TF32, some 40 % of the peak.
        near: Bytes a second and GPU within a machine of `together` GPUs.
        far: The same between machines.
        latency: Seconds that a message takes at least.
    """

    memory: float = 80e9
    flops: float = 200e12
    near: float = 300e9
    far: float = 40e9
    together: int = 8
    latency: float = 20e-6


@dataclass(frozen=True)
class Network:
    """What is trained, with variables in float32.

    Args:
        weights: How many.
        tokens: Examples or tokens of a GPU's part of a batch.
        layers: Each of which is one message.

    Activations are taken as 16 numbers a unit and layer, of layers of 12 width^2 weights: a transformer's.
    """

    weights: float
    tokens: int = 2048
    layers: int = 24

    @property
    def activations(self) -> float:
        """Bytes of a token's graph."""
        return 4.0 * 16.0 * self.layers * (self.weights / (12.0 * self.layers)) ** 0.5


@dataclass(frozen=True)
class Response:
    """What was counted of a response.

    Args:
        gradients: Of the follower, in a step of the leader.
        products: With second derivatives.
        gathered: How often all weights are gathered in a step, sharded.
        summed: How often all of a gradient is summed over ranks, sharded.
        vectors: How many times the weights' memory one process needs at its peak.
        shared: The part of it that falls as 1/p with the number of ranks; the rest does not.
        graphs: Of how many batches activations are held at once.
    """

    gradients: int
    products: int
    gathered: float
    summed: float
    vectors: float
    shared: float
    graphs: int


@dataclass(frozen=True)
class Model:
    """The costs of a step of the leader."""

    response: Response
    network: Network
    gpus: int
    hardware: Hardware = Hardware()

    @property
    def flops(self) -> float:
        """Of a GPU: 6 operations a weight and token for a gradient, the leader's too, and 12 for a product."""
        passes = self.response.gradients + 1 + 2 * self.response.products
        return 6.0 * self.network.weights * self.network.tokens * passes

    def memory(self, *, sharded: bool) -> float:
        """Bytes of a GPU."""
        own = 4.0 * self.network.weights * self.response.vectors
        kept = self.response.shared / self.gpus + 1.0 - self.response.shared if sharded else 1.0
        return own * kept + self.response.graphs * self.network.activations * self.network.tokens

    def sent(self, *, sharded: bool) -> float:
        """Bytes that a GPU sends, in rings: a gather (p - 1)/p of the whole, a sum twice that."""
        count = self.response.gradients + 1 + self.response.products
        gathered, summed = (self.response.gathered, self.response.summed) if sharded else (0.0, float(count))
        return 4.0 * self.network.weights * (gathered + 2.0 * summed) * (self.gpus - 1) / self.gpus

    def seconds(self, *, sharded: bool) -> tuple[float, float]:
        """Of arithmetic and of messages, one after the other, as the library does them."""
        hardware, count = self.hardware, self.response.gradients + 1 + self.response.products
        speed = hardware.near if self.gpus <= hardware.together else hardware.far
        uses = self.response.gathered + self.response.summed if sharded else float(count)
        messages = 0.0 if self.gpus == 1 else uses * (self.network.layers if sharded else 1)
        waits = messages * 2.0 * (self.gpus - 1) * hardware.latency
        return self.flops / hardware.flops, self.sent(sharded=sharded) / speed + waits


def responses(counts: Path = COUNTS, memory: Path = MEMORY) -> dict[str, Response]:
    """What was counted, by response."""
    rows = {(row["response"], row["ranks"]): row for row in json.loads(counts.read_text(encoding="utf-8"))["rows"]}
    content = json.loads(memory.read_text(encoding="utf-8"))
    held = {(row["response"], row["ranks"]): row for row in content["rows"]}
    found = {}
    for name in dict.fromkeys(row["response"] for row in content["rows"]):
        if (name, 4) not in rows or any((name, size) not in held for size in SIZES):
            continue
        many, one = rows[name, 4], held[name, 1]
        shares = {p: held[name, p]["bytes"] / one["bytes"] for p in SIZES[1:]}
        found[name] = Response(
            many["gradients"],
            many["products"],
            many["gathered"],
            many["summed"],
            one["bytes"] / (4.0 * content["weights"]),
            shared(shares),
            GRAPHS.get(name, 1),
        )
    return found


def shared(shares: dict[int, float]) -> float:
    """The s of s/p + 1 - s that is nearest to the measured shares, in least squares."""
    above = sum((1.0 - share) * (1.0 - 1.0 / p) for p, share in shares.items())
    below = sum((1.0 - 1.0 / p) ** 2 for p in shares)
    return min(1.0, above / below) if below else 1.0


# Tables --------------------------------------------------------------------------------------------------------------


def extrapolated(weights: float = 1e9, gpus: Sequence[int] = (8, 64)) -> list[list[str]]:
    """A row for each response: what one step costs, sharded, computed."""
    lines = [["Response", "g", "h", *(text for p in gpus for text in (f"GB, {p} GPUs", "computing, s", "sending, s"))]]
    for name, response in responses().items():
        line = [name, str(response.gradients), str(response.products)]
        for p in gpus:
            model = Model(response, Network(weights), p)
            line += [f"{model.memory(sharded=True) / 1e9:.0f}", *(f"{s:.2f}" for s in model.seconds(sharded=True))]
        lines.append(line)
    return lines


def advised(sizes: Sequence[float] = (1e7, 1e8, 1e9, 1e10), gpus: Sequence[int] = (1, 8, 64)) -> list[list[str]]:
    """A row for each size of a network: which responses fit on so many GPUs, the quickest step first."""
    lines = [["weights", *(f"{p} GPU{'s' * (p > 1)}" for p in gpus)]]
    for weights in sizes:
        line = [f"{weights:,.0f}"]
        for p in gpus:
            fits = []
            for name, response in responses().items():
                model = Model(response, Network(weights), p)
                ways = [way for way in (False, True) if model.memory(sharded=way) <= 0.9 * model.hardware.memory]
                if ways:
                    fits.append((min(sum(model.seconds(sharded=way)) for way in ways), name, ways == [True] and p > 1))
            told = [f"{name}{' (sharded)' * only}" for _, name, only in sorted(fits)]
            every = len(told) == len(responses()) and not any("sharded" in text for text in told)
            line.append("all" if every else "; ".join(told) or "none")
        lines.append(line)
    return lines


def checked() -> list[list[str]]:
    """A row for each response: the memory of a rank by the formula and as it was measured, in MiB."""
    content = json.loads(MEMORY.read_text(encoding="utf-8"))
    lines = [["Response", "1 process", *(f"{p} ranks, {what}" for p in SIZES[1:] for what in ("formula", "measured"))]]
    held = {(row["response"], row["ranks"]): row["bytes"] / 2**20 for row in content["rows"]}
    for name, response in responses().items():
        line = [name, f"{held[name, 1]:.1f}"]
        for p in SIZES[1:]:
            line.append(f"{held[name, 1] * (response.shared / p + 1.0 - response.shared):.1f}")
            line.append(f"{held[name, p]:.1f} ({held[name, p] / held[name, 1]:.2f})")
        lines.append(line)
    return lines
