"""The command line: models, guides and objectives by name, from one run to a whole matrix."""

from __future__ import annotations

from .cli import app, main

__all__ = ["app", "main"]
