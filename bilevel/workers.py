"""Work done side by side: in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch

Kind = TypeVar("Kind")

LOCAL = "local"
"""A Ray of this machine's own, started and stopped with the work."""

_ANSWERS = 5.0
"""Seconds within which a cluster must answer a knock."""


def require_workers(asker: str, jobs: int, cluster: str | None) -> None:
    """Raise, before any work, for a cluster that is no address, and for packages that are missing.

    Raises:
        TypeError: For a `cluster` that is neither None nor a string.
        ImportError: Without joblib where `jobs` are more than one, without Ray where there is a cluster.
    """
    if cluster is not None and (not isinstance(cluster, str) or not cluster):
        raise TypeError(
            f"{asker}: cluster={cluster!r}; expected the address of a Ray cluster, 'host:6379', 'ray://host:10001' or "
            "'auto', or 'local' for one on this machine, or None."
        )
    if jobs == 1 and cluster is None:
        return
    try:
        import joblib  # type: ignore[import-untyped]  # noqa: F401, PLC0415 - tried before any work
    except ImportError as error:
        raise ImportError(f"Running in parallel needs joblib ({error}). pip install 'bilevel[data]'") from error
    if cluster is None:
        return
    try:
        with _interrupts_wait():
            import ray  # noqa: F401, PLC0415
            from ray.util.joblib import register_ray  # noqa: F401, PLC0415
    except ImportError as error:
        raise ImportError(f"A cluster needs Ray ({error}). pip install 'bilevel[cluster]'") from error


def side_by_side(
    work: Sequence[Callable[[], Kind]], *, jobs: int, cluster: str | None = None
) -> Iterator[tuple[int, Kind]]:
    """The number of each piece of work with what it returned, as it ends; from a cluster all of them at the end.

    Each runs in a process of one thread, by joblib; one after the other in this process where `jobs` is 1 and there is
    no cluster. An error in one of them, and Ctrl-C, stop the others.

    Args:
        work: Functions that can be pickled.
        jobs: How many at once; -1: as many as there are cores. On a cluster 1 is -1.
        cluster: The address of a Ray cluster, or 'local'.

    Raises:
        ConnectionError: Where nobody answers at a cluster's address.
    """
    if jobs == 1 and cluster is None:
        for index, one in enumerate(work):
            yield index, one()
        return
    from joblib import Parallel, delayed  # noqa: PLC0415
    from joblib.parallel import get_active_backend  # type: ignore[import-untyped]  # noqa: PLC0415

    with on_cluster(cluster, min(len(work), jobs) if jobs > 1 else None):
        at_once = -1 if cluster is not None and jobs == 1 else jobs
        # A cluster's backend gives all results at the end.
        as_they_end = get_active_backend()[0].supports_return_generator
        parallel = Parallel(n_jobs=at_once, return_as="generator_unordered" if as_they_end else "list", batch_size=1)
        yield from parallel(delayed(_done)(index, one) for index, one in enumerate(work))


def _done(index: int, work: Callable[[], Kind]) -> tuple[int, Kind]:
    torch.set_num_threads(1)  # the other cores have work of their own
    return index, work()


@contextmanager
def on_cluster(cluster: str | None, processes: int | None = None) -> Iterator[None]:
    """While joblib's work goes to a Ray cluster; it is left, or stopped, in the end. None: while it does not.

    Around several calls of `side_by_side`, which then share the one that is up.
    """
    if cluster is None:
        yield
        return
    import joblib  # noqa: PLC0415
    import ray  # noqa: PLC0415
    from ray.util.joblib import register_ray  # noqa: PLC0415

    ours = not ray.is_initialized()
    try:
        if ours:
            with _interrupts_wait():
                _start(ray, cluster, processes)
        register_ray()
        with joblib.parallel_config("ray"):
            yield
    finally:
        if ours:
            with _interrupts_wait():
                ray.shutdown()


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM come when this is over; a second one does not wait.

    While Ray starts, an exception that a handler raises may come up in a callback that nobody waits for, and be lost,
    or leave half a cluster behind; and Ray puts a handler of its own in the place of SIGTERM's.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    # Signals arrive in the main thread; a handler that C code has set cannot be put back.
    if threading.current_thread() is not threading.main_thread() or None in before.values():
        yield
        return
    came: list[int] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        if came:
            restore()
            signal.raise_signal(number)
        came.append(number)

    for number in numbers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
        if came:
            signal.raise_signal(came[0])


def _start(ray: Any, cluster: str, processes: int | None) -> None:
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": False}
    if cluster == LOCAL:
        ray.init(num_cpus=processes, include_dashboard=False, **quiet)
        return
    advice = "Start one by `ray start --head`, or say 'local' for one on this machine."
    _knock(cluster, advice)
    try:
        ray.init(address=cluster, **quiet)
    except (RuntimeError, OSError, ValueError) as error:
        told = " ".join(str(error).split())[:200]
        raise ConnectionError(f"The Ray cluster {cluster!r} could not be joined: {told}. {advice}") from error


def _knock(cluster: str, advice: str) -> None:
    """Raise `ConnectionError` at once where nobody answers, which Ray itself waits for long."""
    host, colon, port = cluster.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # 'auto', which Ray answers at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWERS).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"Nobody answers at the Ray cluster {cluster!r} ({error}). {advice}") from error
