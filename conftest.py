"""How the suite runs: one thread a worker, workers only where they pay, the same examples everywhere."""

import os

# Before torch is imported, and inherited by workers and by the processes that tests start.
# These problems are small: threads would mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
from pathlib import Path

import pytest
from hypothesis import settings

# An example that fails on one machine must fail on all: hypothesis draws by each test's own name.
# `--hypothesis-profile=default` draws others in each run.
settings.register_profile("fixed", derandomize=True, database=None)
settings.load_profile("fixed")


# What imports an extra at its top cannot be looked through for examples where that is not installed.
collect_ignore = [] if importlib.util.find_spec("optuna") else ["bilevel/search/optuna.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--ulp SEED`: other roundings, of which tests/other_rounding.py tells."""
    parser.addoption(
        "--ulp", type=int, metavar="SEED", help="round as another processor might (tests/other_rounding.py)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Round otherwise where that is asked for, and run a slow test that is named by itself."""
    if (seed := config.getoption("ulp")) is not None:
        spec = importlib.util.spec_from_file_location(
            "other_rounding", Path(__file__).parent / "tests/other_rounding.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.install(seed)
    if config.option.markexpr == "not slow" and any("::" in argument for argument in config.args):
        config.option.markexpr = ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """No workers for single files and tests, which are done before workers have started."""
    folders = [Path(argument.split("::")[0]).is_dir() for argument in config.args]
    return None if all(folders) else 0
