"""Records of a run as it goes: a CSV file, TensorBoard, Weights & Biases, MLflow. Each is a callback."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel.files import write_whole
from bilevel.solving.history import Record
from bilevel.tuning.values import numbers


def _rows(record: Record, variables: Mapping[str, Any], leader: str) -> dict[str, float]:
    """A record, with the hyperparameters in it even where nobody recorded them."""
    own = numbers(leader, variables[leader]) if leader in variables else {}
    return {**own, **record}


class CSVLogger:
    """A row for each step, at once on the disk. A run that is resumed goes on in the same file, no step twice.

    Args:
        path: The file.
        leader: The player whose variables are written beside the record.
    """

    def __init__(self, path: str | os.PathLike[str], *, leader: str = "hyper") -> None:
        self.path, self.leader = Path(path), leader
        self._columns: list[str] = []
        self._last = -1
        if not self.path.parent.is_dir():
            raise ValueError(f"CSVLogger: {self.path}: its folder does not exist. Create it first.")

    def __call__(self, step: int, record: Record, variables: Mapping[str, Any]) -> None:
        """Write a step; a first step begins the file anew."""
        row = _rows(record, variables, self.leader)
        goes_on, self._last = self._last == step - 1 and self.path.exists(), step
        if goes_on:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns, extrasaction="ignore").writerow(row)
            return
        before = self._before(step) if step > 1 and self.path.exists() else []
        self._columns = list(row)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows([*before, row])
        write_whole(self.path, text.getvalue().encode())

    def _before(self, step: int) -> list[dict[str, str]]:
        """The rows of earlier steps, which a run that goes on from a checkpoint keeps."""
        # What a process that was killed was about to write has no end of its line, and is no row.
        whole = [line for line in self.path.read_bytes().decode().splitlines(keepends=True) if line.endswith("\n")]
        rows = list(csv.DictReader(whole))
        if rows and "step" not in rows[0]:
            raise ValueError(f"CSVLogger: {self.path} is no file of a run: it has no column 'step'. Give another path.")
        return [row for row in rows if int(float(row["step"])) < step]


class TensorBoardLogger:
    """Scalars for TensorBoard, under the names that they have in the history. Needs `tensorboard`.

    Args:
        folder: Of the event files.
        leader: The player whose variables are written beside the record.
    """

    def __init__(self, folder: str | os.PathLike[str], *, leader: str = "hyper") -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise ImportError("TensorBoardLogger needs tensorboard: pip install tensorboard.") from error
        self._writer: Any = SummaryWriter(str(folder))
        self.leader = leader

    def __call__(self, step: int, record: Record, variables: Mapping[str, Any]) -> None:
        """Write a step."""
        for name, value in _rows(record, variables, self.leader).items():
            if name != "step":
                self._writer.add_scalar(name, value, step)
        self._writer.flush()


class WandbLogger:
    """To a run of Weights & Biases. Needs `wandb`.

    Args:
        run: What `wandb.init(...)` gave; default: the present run.
        leader: The player whose variables are written beside the record.
    """

    def __init__(self, run: Any = None, *, leader: str = "hyper") -> None:
        if run is None:
            try:
                import wandb  # noqa: PLC0415 - an extra
            except ImportError as error:
                raise ImportError("WandbLogger needs wandb: pip install wandb, or pass a run.") from error
            run = wandb.run
            if run is None:
                raise ValueError("WandbLogger: there is no present run. Call wandb.init(...) first, or pass its run.")
        self._run, self.leader = run, leader

    def __call__(self, step: int, record: Record, variables: Mapping[str, Any]) -> None:
        """Write a step."""
        row = _rows(record, variables, self.leader)
        self._run.log({name: value for name, value in row.items() if name != "step"}, step=step)


class MLflowLogger:
    """To the active run of MLflow. Needs `mlflow`.

    Args:
        client: What has `log_metrics(metrics, step=)`; default: the module `mlflow`.
        leader: The player whose variables are written beside the record.
    """

    def __init__(self, client: Any = None, *, leader: str = "hyper") -> None:
        if client is None:
            try:
                import mlflow  # noqa: PLC0415 - an extra
            except ImportError as error:
                raise ImportError("MLflowLogger needs mlflow: pip install mlflow, or pass a client.") from error
            client = mlflow
        self._client, self.leader = client, leader

    def __call__(self, step: int, record: Record, variables: Mapping[str, Any]) -> None:
        """Write a step; brackets are not allowed in MLflow's names."""
        row = _rows(record, variables, self.leader)
        metrics = {n.replace("[", ".").replace("]", ""): value for n, value in row.items() if n != "step"}
        self._client.log_metrics(metrics, step=step)
