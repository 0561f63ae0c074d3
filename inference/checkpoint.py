"""Checkpoints: one safetensors file with a JSON header, never pickle."""

from __future__ import annotations

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
    result: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    return result


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and header to one file, atomically."""
    flat = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    flat = flat or {"empty": torch.zeros(0)}
    write_bytes(path, save_tensors(flat, {"neuroguide": json.dumps(dict(header))}))


def read(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and header of a checkpoint.

    Raises:
        BadCheckpoint: the file is missing, cut short or not one of ours.
    """
    try:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["neuroguide"])
        return load_tensors(data), header
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
