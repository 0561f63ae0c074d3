"""The picture of the README: prior and exact posterior of six models of two latents.

Usage: python benchmarks/gallery.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import diagnostics
import zoo
from diagnostics.style import GREY, new_figure
from inference.files import atomic_path
from inference.observation import take

# model, which of its observations, and the half-width of the window
SHOWN = (
    ("banana", 2, 3.2),
    ("product", 0, 3.2),
    ("ring", 0, 3.2),
    ("laplace_mixture", 0, 3.2),
    ("continuous_sprinkler", 4, 6.0),
    ("two_moons", 0, 1.05),
)
DRAWS = 4000


def main() -> None:
    """Write the picture."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/posteriors.png")
    figure = new_figure(10.5, 2.2)
    for ax, (name, problem, reach) in zip(figure.subplots(1, len(SHOWN)), SHOWN, strict=True):
        model = zoo.MODELS[name]()
        x = take(model.observations(), slice(problem, problem + 1))
        z = diagnostics.packed(diagnostics.draw(model, model.exact(), x, draws=DRAWS, seed=0))[0]
        prior = model.simulate(len(z) // 4, seed=0)[0]["z"]
        ax.scatter(prior[:, 0], prior[:, 1], s=2, color=GREY, alpha=0.5, lw=0)
        ax.scatter(z[:DRAWS, 0], z[:DRAWS, 1], s=2, color="#D55E00", alpha=0.4, lw=0)
        window = (-reach, reach)
        ax.set(xlim=window, ylim=window, xticks=[], yticks=[], aspect="equal")
        ax.set_title(model.title, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


if __name__ == "__main__":
    main()
