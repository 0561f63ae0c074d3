"""Checkpoints: one safetensors file with a JSON header, never pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.optim import Optimizer

from .errors import BadCheckpoint
from .files import write_bytes

__all__ = [
    "Tensors",
    "digest",
    "optimizer_state",
    "plain",
    "read",
    "restore_optimizer",
    "subset",
    "versions",
    "write",
]

Tensors = dict[str, Tensor]


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    from importlib.metadata import version

    return {name: version(name) for name in ("neuroguide", "torch", "pyro-ppl", "numpy")}


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back: tuples become lists."""
    result: dict[str, Any] = json.loads(_text(settings))
    return result


def _text(settings: Mapping[str, Any]) -> str:
    """As JSON, numbers of numpy among them."""
    return json.dumps(dict(settings), default=lambda value: value.item())


def digest(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """SHA-256 of everything in a checkpoint: a flipped bit anywhere makes another."""
    found = hashlib.sha256(json.dumps(plain(header), sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        found.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        found.update(t.numpy().tobytes())
    return found.hexdigest()


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and header to one file, atomically."""
    flat = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    flat = flat or {"empty": torch.zeros(0)}
    said = {"neuroguide": _text(header), "sha256": digest(flat, header)}
    write_bytes(path, save_tensors(flat, said))


def read(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and header of a checkpoint.

    Raises:
        BadCheckpoint: the file is missing, cut short, changed since it was written or not one of
            ours. Files of version 0.7 and before have no check sum.
    """
    try:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        said = json.loads(data[8 : 8 + length])["__metadata__"]
        header, tensors = json.loads(said["neuroguide"]), load_tensors(data)
        if "sha256" not in said or said["sha256"] == digest(tensors, header):
            return tensors, header
        found = "an unreadable file (its check sum is that of another)"
        fix = "The file has been changed since it was written; delete it and fit again."
    except FileNotFoundError:
        found, fix = "no such file", "Check the path, or fit again."
    except Exception as error:  # safetensors, JSON and Unicode each have their own
        found = f"an unreadable file ({type(error).__name__}: {error})"
        fix = "The file is cut short or was not written by neuroguide; delete it and fit again."
    raise BadCheckpoint(str(path), expected="a neuroguide checkpoint", got=found, fix=fix)


def subset(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    """The tensors below prefix/, without it."""
    start = f"{prefix}/"
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def optimizer_state(name: str, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Tensors of an optimiser's state, as optimizer/NAME/PARAMETER/KEY."""
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            yield f"optimizer/{name}/{index}/{key}", torch.as_tensor(value)


def restore_optimizer(name: str, optimizer: Optimizer, tensors: Tensors) -> None:
    """Undo :func:`optimizer_state`."""
    state: dict[int, dict[str, Tensor]] = {}
    for path, value in subset(tensors, f"optimizer/{name}").items():
        index, key = path.split("/")
        state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
