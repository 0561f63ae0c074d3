"""`python -m neuroguide`, which is what torchrun starts."""

from __future__ import annotations

from .cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
