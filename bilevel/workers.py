"""Work done side by side: in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch

from bilevel.errors import WorkerError

Kind = TypeVar("Kind")

LOCAL = "local"
"""A Ray of this machine's own, started and stopped with the work."""

_ANSWERS = 5.0
"""Seconds within which a cluster must answer a knock."""

_RETRIES = 2
"""How often a piece of work is done anew whose worker has ended, with its machine for instance."""


def require_workers(asker: str, jobs: int, cluster: str | None) -> None:
    """Raise, before any work, for a number or an address that is none, and for packages that are missing.

    Raises:
        ValueError: For `jobs` that are no whole number from 1, nor -1.
        TypeError: For a `cluster` that is neither None nor a string.
        ImportError: Without joblib where `jobs` are more than one, without Ray where there is a cluster.
    """
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < -1 or jobs == 0:
        raise ValueError(f"{asker}: jobs={jobs!r}; expected a whole number from 1, or -1 for one a core.")
    if cluster is not None and (not isinstance(cluster, str) or not cluster):
        raise TypeError(
            f"{asker}: cluster={cluster!r}; expected the address of a Ray cluster, 'host:6379', 'ray://host:10001' or "
            "'auto', or 'local' for one on this machine, or None."
        )
    if jobs == 1 and cluster is None:
        return
    try:
        import cloudpickle  # noqa: F401, PLC0415 - tried before any work
        import joblib  # type: ignore[import-untyped]  # noqa: F401, PLC0415
    except ImportError as error:
        raise ImportError(f"Running in parallel needs joblib ({error}). pip install 'bilevel[data]'") from error
    if cluster is None:
        return
    try:
        with _interrupts_wait():
            import ray  # noqa: F401, PLC0415
    except ImportError as error:
        raise ImportError(f"A cluster needs Ray ({error}). pip install 'bilevel[cluster]'") from error


def side_by_side(
    work: Sequence[Callable[[], Kind]], *, jobs: int, cluster: str | None = None
) -> Iterator[tuple[int, Kind]]:
    """The number of each piece of work with what it returned, as it ends; from some backends all of them at the end.

    Each runs in a process of one thread, by joblib or by Ray; one after the other in this process where `jobs` is 1 and
    there is no cluster. An error in one of them, and Ctrl-C, stop the others. On a cluster a piece whose worker has
    ended is done anew.

    Args:
        work: Functions that can be pickled.
        jobs: How many at once; -1: as many as there are cores. On a cluster 1 is -1.
        cluster: The address of a Ray cluster, or 'local'.

    Raises:
        ConnectionError: Where nobody answers at a cluster's address.
        TypeError: For work that cannot be pickled.
        WorkerError: For a process that was killed, and for work that cannot be read where it is done.
    """
    if jobs == 1 and cluster is None:
        for index, one in enumerate(work):
            yield index, one()
    elif cluster is None:
        yield from _by_joblib(work, jobs)
    else:
        at_once = min(len(work), jobs) if jobs > 1 else None
        with on_cluster(cluster, at_once):
            yield from _by_ray(work, at_once)


def _by_joblib(work: Sequence[Callable[[], Kind]], jobs: int) -> Iterator[tuple[int, Kind]]:
    from joblib import Parallel, delayed  # noqa: PLC0415
    from joblib.externals.loky.process_executor import (  # type: ignore[import-untyped]  # noqa: PLC0415
        BrokenProcessPool,
    )
    from joblib.parallel import get_active_backend  # type: ignore[import-untyped]  # noqa: PLC0415

    # Some backends, a cluster's for instance, give all results at the end.
    as_they_end = get_active_backend()[0].supports_return_generator
    parallel = Parallel(n_jobs=jobs, return_as="generator_unordered" if as_they_end else "list", batch_size=1)
    try:
        yield from parallel(delayed(_done)(index, *_packed(one)) for index, one in enumerate(work))
    except BrokenProcessPool as error:
        raise WorkerError(
            f"A worker process ended before its work was done: {_one_line(error)} Where memory is short, fewer jobs at "
            "once need less."
        ) from error


def _by_ray(work: Sequence[Callable[[], Kind]], at_once: int | None) -> Iterator[tuple[int, Kind]]:
    """By tasks of Ray's own, which wait for a core each.

    Its backend for joblib takes processes with no claim to a core, so that one machine may get most of them; it loses
    all results when one of these ends, refuses more jobs than there are cores, and waits for ever for what cannot be
    pickled.
    """
    import ray  # noqa: PLC0415
    from ray.exceptions import RayError, RayTaskError  # noqa: PLC0415

    do = ray.remote(num_cpus=1, max_retries=_RETRIES)(_done)
    # No core waits for the next piece, and those that nobody can do yet are not kept by the cluster.
    resources: Any = ray.cluster_resources  # has no types
    limit = at_once or 2 * max(1, int(resources().get("CPU", 1)))
    todo, running = iter(enumerate(work)), set()
    try:
        for index, one in todo:
            running.add(do.remote(index, *_packed(one)))
            if len(running) == limit:
                break
        while running:
            (ended,), _ = ray.wait(list(running))
            running.remove(ended)
            yield ray.get(ended)
            for index, one in todo:
                running.add(do.remote(index, *_packed(one)))
                break
    except RayTaskError as error:  # which the work has raised
        raise error.cause from error
    except RayError as error:
        raise WorkerError(
            f"A worker of the Ray cluster ended before its work was done, {_RETRIES + 1} times: {_one_line(error)}"
        ) from error
    finally:
        for ref in running:
            ray.cancel(ref, force=True)


def _packed(work: Callable[[], object]) -> tuple[bytes, str]:
    """Work as it is sent, or why that cannot be: told by the worker, for the backends lose what is raised here."""
    import cloudpickle  # noqa: PLC0415

    try:
        return cloudpickle.dumps(work), ""
    except Exception as error:
        return b"", (
            f"This work cannot be sent to another process: {_one_line(error)}. Functions, games and data must be such "
            "that pickle can write them, without locks, open files or generators; or work in this process, with jobs=1 "
            "and no cluster."
        )


def _done(index: int, sent: bytes, refused: str) -> tuple[int, Any]:
    if refused:
        raise TypeError(refused)
    import cloudpickle  # noqa: PLC0415

    try:
        work = cloudpickle.loads(sent)
    except Exception as error:
        told = f"{type(error).__name__}: {_one_line(error)}"
        raise WorkerError(
            f"A worker on {socket.gethostname()} cannot read its work: {told}. Modules that it needs must be installed "
            "there, in the same versions."
        ) from None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the other cores have work of their own
    try:
        return index, work()
    except Exception as error:
        if _travels(error):
            raise
        raise WorkerError(f"{type(error).__name__}: {error}") from None
    finally:
        torch.set_num_threads(threads)  # some backends work in the process that asks


def _travels(error: Exception) -> bool:
    """Whether another process can read it: one whose `__init__` takes more than the message often cannot be."""
    import cloudpickle  # noqa: PLC0415

    try:
        pickle.loads(cloudpickle.dumps(error))
    except Exception:
        return False
    return True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


@contextmanager
def on_cluster(cluster: str | None, processes: int | None = None) -> Iterator[None]:
    """While a Ray cluster is joined; it is left, or stopped, in the end. None: while there is none.

    Around several calls of `side_by_side`, which then share the one that is up.
    """
    if cluster is None:
        yield
        return
    import ray  # noqa: PLC0415

    ours = not ray.is_initialized()
    try:
        if ours:
            with _interrupts_wait():
                _start(ray, cluster, processes)
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
        # By this address: without one Ray joins a cluster that this machine is part of.
        cores = None if processes is None else min(processes, os.cpu_count() or 1)
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
        return
    advice = "Start one by `ray start --head`, or say 'local' for one on this machine."
    _knock(cluster, advice)
    try:
        ray.init(address=cluster, **quiet)
    except (RuntimeError, OSError, ValueError) as error:
        raise ConnectionError(
            f"The Ray cluster {cluster!r} could not be joined: {_one_line(error)}. {advice}"
        ) from error


def _knock(cluster: str, advice: str) -> None:
    """Raise `ConnectionError` at once where nobody answers, or somebody else: Ray itself waits for minutes."""
    host, colon, port = cluster.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # 'auto', which Ray answers at once
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWERS) as wire:
            # Ray speaks HTTP/2, whose first frame is that of its settings; under TLS it is not seen.
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                wire.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
                if wire.recv(9)[3:4] != b"\x04":
                    raise OSError("what answers there is no Ray")
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"Nobody answers at the Ray cluster {cluster!r} ({error}). {advice}") from error
