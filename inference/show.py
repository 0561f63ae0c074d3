"""How tables, models, guides and fits show themselves: aligned text, and HTML in notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["card", "columns", "curve", "first_line", "knobs_of", "title_of"]

LONGEST = 60  # letters of a knob that are shown


def first_line(entry: object) -> str:
    """The first line of a docstring."""
    return (entry.__doc__ or "").strip().split("\n")[0]


def title_of(model: object) -> str:
    """The printable name of a model: its own, or that of its class."""
    return str(getattr(model, "title", type(model).__name__))


def columns(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns of text, the first padded."""
    kept = list(rows)
    width = max((len(name) for name, _ in kept), default=0)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in kept)


def card(title: str, rows: Sequence[tuple[str, str]], *, after: str = "") -> str:
    """An HTML table with a heading; `after` is HTML that follows it."""
    cell = "text-align:left;vertical-align:top"
    lines = "".join(
        f"<tr><th style='{cell}'>{escape(name)}</th><td style='{cell}'>{escape(text)}</td></tr>"
        for name, text in rows
    )
    return f"<div><strong>{escape(title)}</strong><table>{lines}</table>{after}</div>"


def knobs_of(knobs: Mapping[str, Any]) -> list[str]:
    """What was set, as one would write it: hidden=(64, 64)."""
    return [f"{k}={_short(v)}" for k, v in knobs.items()]


def curve(values: Sequence[float], *, width: int = 240, height: int = 48) -> str:
    """A line through the values, from left to right, as SVG; the highest tenth is cut off."""
    if len(values) < 2:
        return ""
    low, high = min(values), sorted(values)[int(0.9 * (len(values) - 1))]
    span = (high - low) or 1.0
    xs = [width * k / (len(values) - 1) for k in range(len(values))]
    ys = [height * (1 - min((v - low) / span, 1.0)) for v in values]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    line = f"<polyline points='{path}' fill='none' stroke='#0072B2' stroke-width='1.2'/>"
    return (
        f"<svg width='{width}' height='{height}' viewBox='0 -1 {width} {height + 2}'>{line}</svg>"
    )


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else f"{type(value).__name__}(...)"
