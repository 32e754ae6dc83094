"""Checkpoints of a trial: `epoch-N` to continue from (weights, optimizer, position), `final` to use (weights alone).

Weights are safetensors, the optimizer's state is loaded with `weights_only`. A checkpoint appears whole or not at
all: on a disk its folder is renamed into place, on an object store `state.json` is written last.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable
from typing import Any

import pyarrow.fs as pafs
import safetensors.torch
import torch

from moe.dense import to_gpt2
from pipelines.faults import passing
from pipelines.journal import Journal

_STATE = "state.json"
FINAL = "final"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a trial continues from: tensors by name, the optimizer's state, and plain values."""

    weights: dict[str, torch.Tensor]
    tensors: dict[str, Any]
    values: dict[str, Any]


class Checkpoints:
    """The checkpoints of one trial."""

    def __init__(self, journal: Journal, trial_id: str) -> None:
        self.journal, self.fs = journal, journal.fs
        self.trial_id = trial_id
        self.root = f"{journal.checkpoints}/{trial_id}"

    def save(self, epoch: int, model: Any, tensors: dict[str, Any], values: dict[str, Any]) -> None:
        """Write the checkpoint of an epoch, then drop the older ones."""
        optimizer = io.BytesIO()
        torch.save(tensors, optimizer)
        files = {
            "model.safetensors": safetensors.torch.save(_unique(model)),
            "optimizer.pt": optimizer.getvalue(),
            _STATE: json.dumps({**values, "epoch": epoch}).encode(),
        }
        self._write(f"epoch-{epoch:04d}", files)
        self.prune(keep=epoch)

    def save_final(self, model: Any) -> None:
        """Write the trained model as a folder that `from_pretrained` reads; one without experts as GPT-2, a base for
        others."""
        if not model.config.moe_layer_indices:
            model = to_gpt2(model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            names = sorted(os.listdir(folder), key=lambda name: name == "config.json")
            self._write(FINAL, {name: _bytes(f"{folder}/{name}") for name in names})

    def load(self, device: torch.device) -> Checkpoint | None:
        """The newest whole checkpoint; None where there is none."""
        for name in reversed(self._epochs()):
            folder = f"{self.root}/{name}"
            if self.fs.get_file_info(f"{folder}/{_STATE}").type == pafs.FileType.File:
                return Checkpoint(
                    weights=safetensors.torch.load(self._read(f"{folder}/model.safetensors")),
                    tensors=torch.load(
                        io.BytesIO(self._read(f"{folder}/optimizer.pt")), map_location=device, weights_only=True
                    ),
                    values=json.loads(self._read(f"{folder}/{_STATE}")),
                )
        return None

    def prune(self, keep: int | None = None) -> None:
        """Delete the checkpoints to continue from, but one."""
        for name in self._epochs():
            if keep is None or name != f"epoch-{keep:04d}":
                self.fs.delete_dir(f"{self.root}/{name}")

    @property
    def final(self) -> str | None:
        """Folder of the trained model; None where it was not kept."""
        path = f"{self.root}/{FINAL}"
        return path if self.fs.get_file_info(f"{path}/config.json").type == pafs.FileType.File else None

    def _epochs(self) -> list[str]:
        selector = pafs.FileSelector(self.root, allow_not_found=True)
        names = (entry.base_name for entry in self.fs.get_file_info(selector))
        return sorted((name for name in names if name.startswith("epoch-")), key=lambda name: (len(name), name))

    def _write(self, name: str, files: dict[str, bytes]) -> None:
        target = f"{self.root}/{name}"
        if not self.journal.local:
            for file, data in files.items():
                with self.fs.open_output_stream(f"{target}/{file}") as sink:
                    sink.write(data)
            return
        temporary = f"{self.root}/.{name}-{uuid.uuid4().hex}"
        os.makedirs(temporary)
        try:
            for file, data in files.items():
                with open(f"{temporary}/{file}", "wb") as sink:
                    sink.write(data)
                    sink.flush()
                    os.fsync(sink.fileno())
            passing("checkpoint.write", target)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _read(self, path: str) -> bytes:
        with self.fs.open_input_stream(path) as source:
            return bytes(source.read())


def restore(model: Any, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights into a model of the same shape (tied tensors were written once)."""
    own = model.state_dict()
    with torch.no_grad():
        for name, value in checkpoint.weights.items():
            own[name].copy_(value)


def prune_finals(journal: Journal, keep: Iterable[str]) -> None:
    """Delete what no restore and no front member needs: trained models of other trials, leftovers of writes."""
    kept = set(keep)
    for entry in journal.fs.get_file_info(pafs.FileSelector(journal.checkpoints, allow_not_found=True)):
        for inner in journal.fs.get_file_info(pafs.FileSelector(entry.path, allow_not_found=True)):
            if inner.base_name.startswith(".") or (inner.base_name == FINAL and entry.base_name not in kept):
                journal.fs.delete_dir(inner.path)


def final_models(journal: Journal) -> dict[str, str]:
    """Folder of the trained model by trial id, where it was kept; models on object stores are left where they are."""
    if not journal.local:
        return {}
    entries = journal.fs.get_file_info(pafs.FileSelector(journal.checkpoints, allow_not_found=True))
    found = {entry.base_name: Checkpoints(journal, entry.base_name).final for entry in entries}
    return {trial_id: folder for trial_id, folder in found.items() if folder is not None}


def _unique(model: Any) -> dict[str, torch.Tensor]:
    """The state dict on the CPU; of tensors that share memory (tied embeddings) only the first."""
    found: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, value in model.state_dict().items():
        key = (value.data_ptr(), tuple(value.shape))
        if value.numel() and key in seen:
            continue
        seen.add(key)
        found[name] = value.detach().cpu().contiguous()
    return found


def _bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
