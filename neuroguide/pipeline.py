"""What the commands do with a run directory: learn the model, fit guides, compare them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import diagnostics
import inference
import zoo
from diagnostics.compare import EXACT
from diagnostics.rundir import RunDirectory
from inference.observation import take
from zoo.data import DATA, Data

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["Fits", "Learned", "compare", "fit_guides", "learn_model"]

Fits = dict[str, inference.Fit]
Learned = tuple[zoo.Model, Any, Fits]


def learn_model(run: RunDirectory, device: str) -> Learned:
    """The model, learned on data where there are any, and the observations to compare on."""
    c = run.config
    cls = zoo.MODELS[c["model"]]
    if c["data"] is None:
        model = cls()
        x = model.observations()
        return model, x if not model.plated else take(x, slice(0, c["problems"])), {}
    data: Data = DATA[c["data"]]()
    model = cls.for_data(data.train)
    model.image_shape = data.image_shape
    learned = inference.fit(
        model,
        model.exact(),
        data.train,
        objective=inference.ELBO(),
        steps=c["model_steps"],
        lr=1e-2,
        batch_size=c["batch_size"],
        seed=c["seed"],
        learn_model=True,
        device=device,
        checkpoint=run.checkpoint("model"),
        title=f"the model, on {data.name}",
    )
    return model, data.validation[: c["problems"]], {"model": learned}


def fit_guides(
    run: RunDirectory,
    model: zoo.Model,
    held_out: Any,
    fits: Fits,
    device: str,
) -> dict[str, inference.Guide]:
    """Fit each guide: on the model's joint, or on the held-out problems if it is not amortised."""
    c = run.config
    fitted = {}
    for name in c["guides"]:
        guide = inference.GUIDES[name](model)
        objective = inference.OBJECTIVES[c["objective"]]() if c["objective"] else None
        done = inference.fit(
            model,
            guide,
            None if guide.amortised else held_out,
            objective=objective,
            steps=c["steps"],
            batch_size=c["batch_size"],
            lr=c["lr"],
            seed=c["seed"],
            device=device,
            checkpoint=run.checkpoint(name),
            title=name.replace("_", " "),
        )
        fitted[name] = done.guide
        if done.steps:
            fits[name] = done
    return fitted


def compare(
    run: RunDirectory, model: zoo.Model, guides: Mapping[str, inference.Guide], x: Any, fits: Fits
) -> Dataset:
    """Draw, compare, and keep both."""
    c = run.config
    sizes = {"draws": c["draws"], "chains": c["chains"], "seed": c["seed"]}
    trees = diagnostics.collect(model, guides, x, **sizes, progress=True)
    seen = {"reference": trees[EXACT], "seed": c["seed"]}
    for n, guide in guides.items():
        goal = fits[n].objective if n in fits else None
        diagnostics.watch(trees[n], guide, x, objective=goal, **seen)
    if shape := model.image_shape or ():
        for tree in trees.values():
            diagnostics.reconstruct(model, tree)
        diagnostics.dream(model, trees[EXACT], seed=c["seed"])
    comparison = diagnostics.compare_draws(trees, progress=True)
    diagnostics.record(model, trees)
    run.write_draws(trees, model=c["model"], image_shape=",".join(map(str, shape)))
    run.write_comparison(comparison)
    return comparison
