"""The table of docs/benchmarks.md: what was measured, by which command, when and on what machine."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Measured:
    """A committed file of numbers, the page that shows it, and the command that made it and its neighbours `also`."""

    question: str
    page: str
    command: str
    file: str
    also: tuple[str, ...] = ()


ALL = (
    Measured("Time and memory beside torch by hand", "performance.md#equal-work",
             "python benchmarks/equal_work/run.py", "performance/equal_work"),
    Measured("Seconds to an accuracy", "performance.md#accuracy-for-work",
             "python benchmarks/accuracy/run.py", "performance/accuracy"),
    Measured("The same along a run", "performance.md#along-a-run",
             "python benchmarks/accuracy/along.py", "performance/along"),
    Measured("What any preconditioner could save", "performance.md#along-a-run",
             "python benchmarks/accuracy/limits.py", "performance/limits"),
    Measured("Means of saving work over a whole run", "performance.md#a-whole-run",
             "python benchmarks/accuracy/whole_run.py", "performance/whole_run"),
    Measured("Compiled products", "performance.md#equal-work",
             "python -m benchmarks.compiled", "performance/compiled"),
    Measured("Growth with weights, leaders, steps", "performance.md#growth",
             "python benchmarks/growth.py", "performance/growth"),
    Measured("Growth with players", "performance.md#many-players",
             "python -m benchmarks.growth --players", "performance/players"),
    Measured("A hypergradient beside a training step", "performance.md#beside-a-training-step",
             "python -m benchmarks.device", "performance/device"),
    Measured("Responses side by side", "choosing.md#what-was-measured",
             "bilevel compare", "choosing/comparison"),
    Measured("Other libraries under the same laws", "conformance.md",
             "python benchmarks/conformance/run.py", "conformance/verdicts"),
    Measured("Random games against plain torch", "attacked.md",
             "python -m benchmarks.attack", "attacked/verdicts"),
    Measured("Hypergradients beside search", "search.md#what-was-measured",
             "python -m benchmarks.tuning", "search/results", also=("choice",)),
    Measured("Hypergradients within a search", "search-details.md#a-search-that-takes-hypergradients",
             "python -m benchmarks.tuning --slopes", "search/slopes"),
    Measured("Tuning in one run", "tuning-measured.md",
             "python benchmarks/one_run.py --seeds 3", "tuning/one_run"),
    Measured("Jobs as people have them", "tuning-measured.md#jobs-as-people-have-them",
             "python -m benchmarks.jobs", "tuning/jobs"),
    Measured("Which values a fresh training should have",
             "tuning-measured.md#which-values-a-fresh-training-should-have",
             "python -m benchmarks.advice", "tuning/advice"),
    Measured("One run beside TPE, Hyperband and ASHA", "tuning-measured.md#beside-tpe-hyperband-and-asha",
             "python -m benchmarks.fashion", "tuning/fashion"),
    Measured("A decay for each of 101,770 weights", "tuning-measured.md#a-decay-for-each-weight",
             "python -m benchmarks.many_decays", "tuning/many_decays"),
    Measured("Decays beside BatchNorm", "tuning-measured.md#batchnorm",
             "python benchmarks/batch_norm.py", "tuning/batch_norm"),
    Measured("The same in runs", "tuning-measured.md#batchnorm",
             "python benchmarks/batch_norm_runs.py", "tuning/batch_norm_runs"),
    Measured("Memory of long unrolls", "unrolling.md", "python benchmarks/memory.py", "unrolling/memory"),
    Measured("Networks of a learned response", "networks.md", "python benchmarks/structured.py", "networks/structured"),
    Measured("Many games at once", "many-games.md", "python benchmarks/batch.py", "many-games/batch"),
    Measured("Ranks that are killed, stopped, or out of disk", "processes-measured.md#what-was-interrupted",
             "python -m benchmarks.interrupted_ranks", "processes/interrupted"),
    Measured("Time on one, two and four ranks", "processes-measured.md",
             "python benchmarks/processes.py", "processes/processes"),
    Measured("Memory of sharded variables", "processes-measured.md#memory-of-sharded-variables",
             "python -m benchmarks.sharded_memory --tensors", "processes/memory"),
    Measured("What ranks send", "processes-measured.md#a-billion-weights-on-8-and-64-gpus-computed",
             "python -m benchmarks.cost_model --measure", "processes/counts"),
    Measured("Many tasks at once", "tasks.md", "python benchmarks/tasks.py", "tasks/tasks"),
    Measured("Few-shot regression", "tasks.md", "bilevel meta sinusoid", "tasks/sinusoid"),
    Measured("Constrained followers", "functions.md", "python -m benchmarks.constrained", "constraints/qp"),
    Measured("Constraints on the answer beside Cooper", "functions.md",
             "python -m benchmarks.leader_functions", "constraints/leader_functions"),
    Measured("54 problems of the literature", "problems.md", "bilevel problems --json FILE", "problems/results"),
    Measured("Commands that are interrupted", "resuming.md",
             "python -m benchmarks.interrupted_commands", "resuming/commands"),
    Measured("What grows over 10,000 steps", "resuming.md", "python -m benchmarks.long_runs", "resuming/long_runs"),
    Measured("A network's curvature by Gauss-Newton", "curvature.md",
             "python benchmarks/gauss_newton.py", "curvature/gauss_newton"),
    Measured("Confidence intervals of hypergradients", "minibatches.md",
             "python benchmarks/coverage.py", "minibatches/coverage"),
    Measured("Single loops on the field's benchmark", "minibatches-measured.md",
             "python benchmarks/single_loop.py", "minibatches/single_loop"),
    Measured("Samples to an accuracy", "minibatches-measured.md",
             "python -m benchmarks.samples", "minibatches/samples"),
    Measured("Hyper-cleaning", "reweighting-measured.md", "python -m benchmarks.cleaning",
             "reweighting/cleaning_linear", also=("cleaning_network", "cleaning_longer")),
    Measured("GANs on eight Gaussians", "gan.md", "bilevel gan ring", "gan/ring"),
    Measured("GANs on 25 Gaussians", "gan.md", "bilevel gan grid", "gan/grid"),
    Measured("GANs on digits", "gan.md", "bilevel gan digits mnist", "gan/digits", also=("mnist",)),
    Measured("Rates of GANs", "gan.md", "bilevel gan tuning", "gan/tuning", also=("finals",)),
    Measured("A mixture of language data", "mixture.md", "bilevel mixture --seed 0", "mixture/results",
             also=("seed1", "seed2", "seed3", "seed4")),
    Measured("Wrong labels", "reweighting-measured.md", "bilevel reweight --seeds 3", "reweighting/results",
             also=("fashion", "perceptron")),
    Measured("A penalty for each feature of a table", "estimators.md",
             "python -m benchmarks.estimators", "estimators/results"),
    Measured("The seed paper's figures", "paper.md", "bilevel paper", "paper/fig2", also=(
        "discrete", "distillation", "dropout", "exploration", "fig3", "fig4", "fig5", "implicit", "inner-optimizer",
        "learned-scale", "many",
    )),
)  # fmt: skip


def committed(file: Path) -> str:
    """The day on which the numbers came into the repository; a dash where there is no history to ask."""
    command = ["git", "log", "-1", "--format=%as", "--", str(file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=DOCS)
    except OSError:
        return "-"
    return done.stdout.strip() or "-"


def torch_of(found: dict) -> str:
    """The version of torch that the file was made with."""
    return str(found.get("versions", {}).get("torch", "-")).split("+")[0]


def table() -> list[list[str]]:
    """A row for each command; refuses a file of numbers that no row has."""
    listed = {name for one in ALL for name in (one.file, *(f"{Path(one.file).parent}/{other}" for other in one.also))}
    there = {str(file.relative_to(DOCS).with_suffix("")) for file in DOCS.rglob("*/*.json")}
    if there != listed:
        raise ValueError(f"ALL of docs/figures/benchmarks.py and docs/*/*.json differ in {sorted(there ^ listed)}.")
    rows = [["Question", "Command", "Committed", "torch"]]
    for one in ALL:
        file = DOCS / f"{one.file}.json"
        found = json.loads(file.read_text(encoding="utf-8"))
        rows.append([f"[{one.question}]({one.page})", f"`{one.command}`", committed(file), torch_of(found)])
    return rows


PARTS = {"table": table}
