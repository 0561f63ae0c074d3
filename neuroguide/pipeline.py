"""What the commands do with a run directory: learn the model, fit guides, compare them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import diagnostics
import inference
import zoo
from diagnostics.compare import EXACT
from diagnostics.rundir import RunDirectory
from inference import parallel
from inference.arguments import knobs_of_class
from inference.errors import BadInput
from inference.observation import take
from zoo.data import DATA, Data
from zoo.pretrained import pretrained_on

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = [
    "Fits",
    "Learned",
    "build_guide",
    "compare",
    "fit_guides",
    "learn_model",
    "nothing_to_learn",
    "trained",
]

Fits = dict[str, inference.Fit]
Learned = tuple[zoo.Model, Any, Fits]


def learn_model(run: RunDirectory, device: str, *, show: bool = True) -> Learned:
    """The model, learned on data where there are any, and the observations to compare on."""
    c = run.config
    if c.get("pretrained") and c["data"] is not None:
        raise BadInput(
            "pretrained", expected="the model as it comes", got=f"data={c['data']!r}",
            fix="Leave out --data, or --pretrained.",
        )  # fmt: skip
    cls = zoo.MODELS[c["model"]]
    if c["data"] is None:
        model = cls()
        x = model.observations()
        return model, x if not model.plated else take(x, slice(0, c["problems"])), {}
    data: Data = parallel.shared(lambda: DATA[c["data"]]())
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
        progress=show,
        title=f"the model, on {data.name}",
    )
    return model, data.validation[: c["problems"]], {"model": learned}


def build_guide(
    name: str, model: zoo.Model, knobs: Mapping[str, Any], seed: int
) -> inference.Guide:
    """A guide of the table; its first weights depend on the seed, too, unless a knob says else."""
    cls = inference.GUIDES[name]
    seeded = isinstance(cls, type) and "seed" in knobs_of_class(cls)
    seeds = {"seed": seed} if seeded else {}
    return cls(model, **{**seeds, **knobs})


def fit_guides(
    run: RunDirectory,
    model: zoo.Model,
    held_out: Any,
    fits: Fits,
    device: str,
    *,
    show: bool = True,
) -> dict[str, inference.Guide]:
    """Fit each guide: on the model's joint, or on the held-out problems if it is not amortised."""
    c = run.config
    fitted = {}
    for name in c["guides"]:
        guide = build_guide(name, model, c.get("knobs", {}), c["seed"])
        if c.get("pretrained"):
            ready = nothing_to_learn(guide)
            fitted[name] = guide if ready else pretrained_on(name, c["model"]).load(model)
            continue
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
            progress=show,
            title=name.replace("_", " "),
        )
        fitted[name] = done.guide
        if done.steps:
            fits[name] = done
    return fitted


def nothing_to_learn(guide: inference.Guide) -> bool:
    """Whether it is as it should be without any training."""
    return guide.amortised and not any(p.requires_grad for p in guide.parameters())


def trained(run: RunDirectory, model: str, guide: str) -> tuple[inference.Guide, Any]:
    """A guide that a run has trained, and the observations that the run keeps apart.

    Raises:
        BadInput: the run is of another model.
        BadCheckpoint: it has no such guide.
    """
    if run.config["model"] != model:
        raise BadInput(
            "model", expected=f"that of {run.path}, {run.config['model']}", got=model,
            fix="Name the run's own model, or another run.",
        )  # fmt: skip
    built, held_out, _ = learn_model(run, "auto")
    found = build_guide(guide, built, run.config.get("knobs", {}), run.config["seed"])
    return inference.Fit.load(run.checkpoint(guide), found).guide, held_out


def compare(
    run: RunDirectory,
    model: zoo.Model,
    guides: Mapping[str, inference.Guide],
    x: Any,
    fits: Fits,
    *,
    show: bool = True,
) -> Dataset:
    """Draw, compare, and keep both."""
    c = run.config
    sizes = {"draws": c["draws"], "chains": c["chains"], "seed": c["seed"]}
    trees = diagnostics.collect(model, guides, x, **sizes, progress=show)
    seen = {"reference": trees[EXACT], "seed": c["seed"]}
    for n, guide in guides.items():
        goal = fits[n].objective if n in fits else None
        diagnostics.watch(trees[n], guide, x, objective=goal, **seen)
    if shape := model.image_shape or ():
        for tree in trees.values():
            diagnostics.reconstruct(model, tree)
        diagnostics.dream(model, trees[EXACT], seed=c["seed"])
    comparison = diagnostics.compare_draws(trees, c.get("metrics"), progress=show)
    diagnostics.record(model, trees)
    run.write_draws(trees, model=c["model"], image_shape=",".join(map(str, shape)))
    run.write_comparison(comparison)
    return comparison
