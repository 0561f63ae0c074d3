"""What all HTML pages share: numbers as people write them, and templates."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from inference.files import write_bytes

__all__ = ["number", "write_page"]


def number(value: float) -> str:
    """Three significant digits, and words for what is no number."""
    if math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "-inf" if value < 0 else "inf"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 1e-4 else "0"


def write_page(target: Path, template: str, **content: Any) -> None:
    """Render a template of this package into a file, atomically."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("diagnostics", ".")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_bytes(target, environment.get_template(template).render(**content).encode())
