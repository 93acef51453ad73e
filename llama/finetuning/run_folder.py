"""The folder of a run: its settings, its checkpoints and its result.

    saved/
      run.json                   settings, data and model of the run
      adapter_config.json, adapter_model.safetensors     the result, once the run is done
      best/                      the adapter of the lowest eval loss so far
      checkpoint-100/            an adapter, and state.pt: all that the run needs to go on from here
      metrics.jsonl, loss.png, tensorboard/

Files are written under another name and renamed once they are complete: a run that is killed at any moment leaves its
last checkpoint intact.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.adapters.adapter import Adapter
from llama.adapters.files import read_adapter, write_adapter
from llama.checkpoint.folders import partial_folder, replace_text
from llama.checkpoint.source import PARTIAL
from llama.config import ModelArgs, read_json
from llama.errors import CheckpointError, TrainingError

RUN_FILE, STATE_FILE, BEST = "run.json", "state.pt", "best"
FORMAT = "llama-shards-run/1"
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


@dataclass(frozen=True)
class TrainState:
    """All that a run needs to go on, in whole tensors on the CPU, so that any number of ranks can read it.

    Everything random in a run (the order of the data, dropout) follows from the seed and the number of the step: there
    are no generators whose state has to be kept.

    Args:
        step: optimiser steps done.
        tensors: "weights/NAME" and the optimiser's "exp_avg/NAME" and "exp_avg_sq/NAME" of every trained tensor.
        n_updates: updates of the optimiser, fewer than the steps where float16 overflowed.
        scale: the loss scale, and the steps since it changed.
        best: the lowest eval loss so far and its step; None before the first evaluation.
    """

    step: int
    tensors: Mapping[str, Tensor]
    n_updates: int = 0
    scale: tuple[float, int] = (1.0, 0)
    best: tuple[float, int] | None = None


class RunFolder:
    """The folder of a run, to which only one process writes.

    Args:
        path: the folder, which `claim` makes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    # -- whose it is -------------------------------------------------------------------------------

    def check(self, description: Mapping[str, Any], resume: bool) -> None:
        """Refuse a folder that the run described by `description` must not use.

        Raises:
            TrainingError: when the folder holds something else, a run without `resume`, or a run of other settings.
        """
        self._check_place()
        # A run that is killed as it begins leaves nothing but partial files.
        if not self.path.exists() or all(entry.name.endswith(PARTIAL) for entry in self.path.iterdir()):
            return
        if not (self.path / RUN_FILE).exists():
            raise TrainingError(f"--output_dir {self.path} holds other files: choose an empty or a new folder")
        found = self._read_description()
        if not resume:
            raise TrainingError(
                f"--output_dir {self.path} holds a run already: add --resume to go on with it, or choose another folder"
            )
        different = [
            f"{key} {found.get(key)!r}, now {value!r}" for key, value in description.items() if found.get(key) != value
        ]
        if different:
            raise TrainingError(f"{self.path} was started with other settings and cannot go on: {'; '.join(different)}")

    def _check_place(self) -> None:
        """Refuse a path that is no writable folder and cannot be made one."""
        place = self.path.resolve()
        while not os.path.lexists(place):
            place = place.parent
        if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
            return
        if place == self.path.resolve() and not place.is_dir():
            raise TrainingError(f"--output_dir {self.path} is a file: name a folder")
        what = "you may not write to it" if place.is_dir() else "it is a file"
        raise TrainingError(f"--output_dir {self.path} cannot be made in {place}: {what}; choose another folder")

    def claim(self, description: Mapping[str, Any]) -> None:
        """Make the folder, remove partial files of an earlier part of the run, and write the run's description."""
        self.path.mkdir(parents=True, exist_ok=True)
        for left in self.path.glob(f"*{PARTIAL}"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if not (self.path / RUN_FILE).exists():
            replace_text(self.path / RUN_FILE, json.dumps({"format": FORMAT, **description}, indent=2) + "\n")

    def _read_description(self) -> dict[str, Any]:
        try:
            found = read_json(self.path / RUN_FILE)
        except CheckpointError as error:
            raise TrainingError(f"{error}; choose another --output_dir") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise TrainingError(f"{self.path / RUN_FILE} is none of ours ({FORMAT}): choose another --output_dir")
        return found

    # -- checkpoints -------------------------------------------------------------------------------

    def checkpoints(self) -> list[int]:
        """Return the steps of the checkpoints in the folder, ascending."""
        if not self.path.exists():
            return []
        matches = (_CHECKPOINT.match(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def folder(self, step: int) -> Path:
        """Return the path of a step's checkpoint."""
        return self.path / f"checkpoint-{step}"

    def save(self, state: TrainState, adapter: Adapter, args: ModelArgs, keep: int) -> None:
        """Write a checkpoint, read it back, and drop all but the newest `keep`.

        Raises:
            CheckpointError, AdapterError: when it cannot be written, such as to a full disk; nothing has changed then.
        """
        with partial_folder(self.folder(state.step)) as folder:
            write_adapter(folder, adapter, args)
            content = {
                "step": state.step,
                "tensors": dict(state.tensors),
                "n_updates": state.n_updates,
                "scale": list(state.scale),
                "best": list(state.best) if state.best else None,
            }
            # Serialised first: on a full disk, the system's error says so, where torch's own writer does not.
            buffer = io.BytesIO()
            torch.save(content, buffer)
            with (folder / STATE_FILE).open("wb") as file:
                file.write(buffer.getbuffer())
                os.fsync(file.fileno())
            _compare(state, _read_state(folder / STATE_FILE), folder)
        for step in self.checkpoints()[:-keep]:
            shutil.rmtree(self.folder(step))

    def save_best(self, adapter: Adapter, args: ModelArgs) -> None:
        """Replace the best adapter so far."""
        with partial_folder(self.path / BEST) as folder:
            write_adapter(folder, adapter, args)

    def save_result(self, adapter: Adapter, args: ModelArgs, use_best: bool) -> None:
        """Write the run's result to its folder: the best adapter so far, or `adapter`."""
        write_adapter(self.path, read_adapter(self.path / BEST, args) if use_best else adapter, args)

    def load(self, step: int) -> TrainState:
        """Return the state of a step's checkpoint.

        Raises:
            TrainingError: when the file is damaged.
        """
        return _read_state(self.folder(step) / STATE_FILE)


def _read_state(path: Path) -> TrainState:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        best = tuple(found["best"]) if found["best"] else None
        return TrainState(found["step"], found["tensors"], found["n_updates"], tuple(found["scale"]), best)
    # The error of torch.load depends on where a file is damaged.
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        told = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0].partition(". ")[0]
        reason = told or type(error).__name__
        raise TrainingError(
            f"{path} cannot be read ({reason}): delete {path.parent} and --resume goes on from the checkpoint before it"
        ) from None


def _compare(written: TrainState, found: TrainState, folder: Path) -> None:
    same = written.tensors.keys() == found.tensors.keys() and all(
        torch.equal(value, found.tensors[name]) for name, value in written.tensors.items()
    )
    if not same or written.step != found.step:
        raise TrainingError(f"{folder} does not hold what was written: is the disk sound?")
