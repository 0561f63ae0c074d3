"""One fit on several processes, the ranks: who they are, and what they tell one another.

Started by torchrun. Without it everything here is a world of one rank, and costs nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .checkpoint import plain
from .errors import BadInput, Incompatible, NeuroguideError

__all__ = [
    "LostRank",
    "agree",
    "average",
    "everyone",
    "group",
    "launched",
    "rank",
    "same",
    "shared",
    "world",
]

T = TypeVar("T")

PATIENCE = 300.0  # seconds that a rank waits for the others, the slowest checkpoint included


class LostRank(NeuroguideError, ConnectionError):
    """Another rank has ended, or has not been heard of for too long."""


def launched() -> tuple[int, int]:
    """Rank and number of ranks that torchrun has given this process; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def world() -> int:
    """Ranks that work together; 1 where no process group has been set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this process is; 0 speaks and writes for all."""
    return dist.get_rank() if world() > 1 else 0


@contextmanager
def group(device: str = "auto", *, patience: float = PATIENCE) -> Iterator[int]:
    """The process group of torchrun's ranks inside the block; yields this process's rank.

    Ranks talk by gloo, tensors on GPUs by NCCL, one card for each rank of a machine. Without
    torchrun, or where there is a group already, nothing is set up.

    Args:
        device: as of `inference.fit`; a card's own name, "cuda:0", is shared by all ranks, by gloo.
        patience: seconds that a rank waits for the others.

    Raises:
        BadInput: more ranks on this machine than GPUs.
        LostRank: the others did not come.
    """
    if launched()[1] == 1 or world() > 1:
        yield rank()
        return
    cards = device in ("auto", "cuda") and torch.cuda.is_available()
    if cards:
        _take_card()
    with _heard():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cards else "gloo", timeout=timedelta(seconds=patience)
        )
    yield rank()
    # after an error NCCL could wait here for ranks that wait elsewhere: the process ends anyway
    dist.destroy_process_group()


def _take_card() -> None:
    """The card of this rank becomes the default."""
    card, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if card >= cards:
        raise BadInput(
            "ranks on this machine",
            expected=f"at most {cards}, one for each GPU",
            got=f"number {card + 1}",
            fix=f"torchrun --nproc-per-node {cards}, or device='cpu'.",
        )
    torch.cuda.set_device(card)


@contextmanager
def _heard() -> Iterator[None]:
    """Turn what torch says of broken connections and of timeouts into one error."""
    try:
        yield
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        raise LostRank(
            f"rank {launched()[0]}",
            expected="word from the other ranks",
            got=re.sub(r"^\[\S*\] ", "", line).split(". ")[0].strip(),  # less the place in gloo
            fix="See what they say; with a checkpoint the same command goes on where it stopped.",
        ) from error


def agree(settings: Mapping[str, Any]) -> None:
    """Refuse ranks that would each do something else.

    Raises:
        Incompatible: settings differ.
    """
    if world() == 1:
        return
    first, *others = everyone(plain(settings))
    for k, theirs in enumerate(others, 1):
        if differ := [name for name in first if theirs.get(name) != first[name]]:
            raise Incompatible(
                f"rank {k}",
                expected=", ".join(f"{name}={first[name]!r}" for name in differ),
                got=", ".join(f"{name}={theirs.get(name)!r}" for name in differ),
                fix="Call fit with the same arguments on all ranks; each takes its part of x.",
            )


def average(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Means over all ranks, by one message; the same bits on each."""
    if world() == 1:
        return list(tensors)
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    with _heard():
        dist.all_reduce(flat)
    pieces = (flat / world()).split([t.numel() for t in tensors])
    return [m.view(t.shape).to(t.dtype) for m, t in zip(pieces, tensors, strict=True)]


def same(tensors: Sequence[Tensor]) -> None:
    """Write rank 0's values into the tensors of all ranks."""
    if world() == 1:
        return
    with torch.no_grad(), _heard():
        for t in tensors:
            sent = t.detach().contiguous()
            dist.broadcast(sent, 0)
            t.copy_(sent)


def everyone(value: T) -> list[T]:
    """The value of each rank, on all of them; anything that can be pickled."""
    if world() == 1:
        return [value]
    found: list[T] = [value] * world()
    with _heard():
        dist.all_gather_object(found, value)
    return found


def shared(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, which alone does it, for all ranks.

    Raises:
        NeuroguideError: whatever rank 0 has raised, on all ranks.
    """
    if world() == 1:
        return work()
    box: list[object] = [None, None]
    own: NeuroguideError | None = None
    if rank() == 0:
        try:
            box = [work(), None]
        except NeuroguideError as error:
            own, box = error, [None, (type(error), str(error))]
    with _heard():
        dist.broadcast_object_list(box)
    if own is not None:
        raise own
    if isinstance(box[1], tuple):
        raise _again(*box[1])
    return box[0]  # type: ignore[return-value]


def _again(kind: type[NeuroguideError], text: str) -> NeuroguideError:
    """An error as it was, from its text alone."""
    error = kind.__new__(kind, text)
    error.args = (text,)
    return error
