"""Train any guide with any objective: one call, one loop."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint as files
from . import parallel, prepare
from .arguments import Count, Index, Positive, check_call
from .errors import BadCheckpoint, BadInput, Incompatible
from .gauges import said
from .guide import Guide, HasClosedForm, check_counts, check_positive
from .latents import ModelLike, Values
from .loop import Batches, Loop, Trainer
from .objective import Objective
from .observation import Observation, fingerprint, parts
from .progress import bar
from .seeds import reseed, seeded, stream
from .show import card, curve

__all__ = ["Fit", "fit"]


@dataclass(repr=False)
class Fit:
    """A trained guide and how it came about.

    Attributes:
        guide: the guide, trained in place.
        losses: by player, one loss per step in the objective's units.
        seconds: wall time of the steps, summed over resumed runs.
        settings: guide, knobs, objective, steps, batch_size, lr, seed, learn_model, and check sums
            of data and model: what must agree for a run to be resumed.
        health: gauges that are looked at every 50 steps: their `step`, the norm of each player's
            gradient, and what the objective has (:meth:`inference.Objective.health`), such as a
            critic's accuracy, where .5 is chance, and the dispersion of draws, where 1 is right.
        objective: what it was trained with, critics included; None of a fit that was loaded.
    """

    guide: Guide
    losses: dict[str, np.ndarray[Any, Any]]
    seconds: float
    settings: dict[str, Any]
    health: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    objective: Objective | None = None

    @property
    def warnings(self) -> list[str]:
        """What its gauges say that one should know, in sentences: collapse, a lost game."""
        return said(self.health)

    @property
    def steps(self) -> int:
        """Steps done."""
        return max((len(v) for v in self.losses.values()), default=0)

    @property
    def seed(self) -> int:
        """The seed."""
        return int(self.settings["seed"])

    def _rows(self) -> list[tuple[str, str]]:
        """What it was and how it ended; losses are means over the last tenth of the steps."""
        last = {n: float(np.mean(v[-max(1, len(v) // 10) :])) for n, v in self.losses.items()}
        told = ", ".join(f"{n} {v:.4g}" for n, v in last.items())
        return [
            ("guide", type(self.guide).__name__),
            ("objective", str(self.settings["objective"])),
            ("steps", f"{self.steps:,} in {self.seconds:.1f} s"),
            ("last losses", told or "none"),
            ("warnings", " ".join(self.warnings) or "none"),
        ]

    def __repr__(self) -> str:
        return f"Fit({', '.join(f'{name}: {text}' for name, text in self._rows())})"

    def _repr_html_(self) -> str:
        return card("Fit", self._rows(), after="".join(map(curve, self._curves())))

    def _curves(self) -> list[list[float]]:
        """Losses, as means over 1/120 of the steps."""
        return [
            [float(c.mean()) for c in np.array_split(v, min(120, len(v)))]
            for v in self.losses.values()
            if len(v)
        ]

    def save(self, path: str | Path) -> None:
        """Write guide, losses and, where learned, model to one safetensors file, atomically."""
        self._write(Path(path), {})

    @classmethod
    def load(cls, path: str | Path, guide: Guide) -> Fit:
        """Read a fit into `guide`, built with the class, model and knobs of the saved one.

        Raises:
            BadCheckpoint: missing, corrupt, or of another class, knobs or shapes.
        """
        check_call(cls.load, locals())
        tensors, header = files.read(Path(path))
        same = {"guide": type(guide).__name__, "knobs": guide.knobs}
        _agree(Path(path), {k: header["settings"].get(k) for k in same}, same)
        run = cls(guide, {}, header["seconds"], header["settings"])
        run._fill(Path(path), tensors)
        return run

    def _keep(self, path: Path, trainers: list[Trainer]) -> None:
        """Write a checkpoint to resume from; the guide's weights in it are the averaged ones."""
        state = {n: v.detach().clone() for t in trainers for n, v in t.state()}
        with ExitStack() as averages:
            for t in trainers:
                averages.enter_context(t.averaged())
            self._write(path, state)

    def _write(self, path: Path, extra: dict[str, Tensor]) -> None:
        tensors = {f"guide/{n}": t for n, t in self.guide.state_dict().items()}
        for kind, curves in (("loss", self.losses), ("health", self.health)):
            tensors |= {f"{kind}/{n}": torch.from_numpy(v) for n, v in curves.items()}
        if self.settings["learn_model"]:
            tensors |= {f"model/{n}": t for n, t in self.guide.model.state_dict().items()}
        header = {
            "settings": self.settings,
            "seconds": self.seconds,
            "ranks": parallel.world(),
            "versions": files.versions(),
        }
        files.write(path, tensors | extra, header)

    def _fill(self, path: Path, tensors: files.Tensors) -> None:
        self.losses = {n: t.numpy() for n, t in files.subset(tensors, "loss").items()}
        self.health = {n: t.numpy() for n, t in files.subset(tensors, "health").items()}
        try:
            self.guide.restore(files.subset(tensors, "guide"))
            if self.settings["learn_model"]:
                self.guide.model.load_state_dict(files.subset(tensors, "model"))
        except (RuntimeError, BadInput) as error:
            raise BadCheckpoint(
                str(path),
                expected="parameters shaped as the guide's and model's",
                got=str(error).replace("\n", " "),
                fix="Build model and guide with the sizes of the saved run.",
            ) from error


def fit(
    model: ModelLike,
    guide: Guide,
    x: Observation | None = None,
    *,
    objective: Objective | None = None,
    steps: Count = 2000,
    batch_size: Count = 256,
    simulations: Count | None = None,
    lr: Positive = 5e-3,
    seed: Index = 0,
    learn_model: bool = False,
    device: str = "auto",
    checkpoint: str | Path | None = None,
    progress: bool = True,
    title: str = "",
) -> Fit:
    """Train a guide, in place.

    Each player has Adam, with a learning rate that rises over the first twentieth of the steps and
    falls to zero along a half cosine. All randomness of a step comes from (seed, step), so a killed
    run that finds its checkpoint ends with the numbers of an unbroken one. A guide with nothing to
    learn, such as an exact posterior, comes back at once.

    In a process group, such as torchrun's, all ranks call it with the same arguments and train one
    guide: each on its own data and noise, with the mean gradient; see :mod:`inference.parallel`.

    Args:
        model: the model; its parameters stay fixed unless `learn_model`.
        guide: the guide, built for this model.
        x: observations to train on; None means fresh draws from the model's joint.
        objective: by default the one the guide was published with.
        steps: steps in all, those of a resumed run included.
        batch_size: problems per step, of each rank; all of x where the guide has parameters for
            each problem. Where the data set is one problem, rows per step if objective and guide
            take some (`subsamples`, `takes_rows`) and the model has them in a plate, else all of x.
        simulations: how often the model may be simulated, where x is None: the same draws are used
            again and again, which the guide can overfit; None makes fresh draws for each step.
        lr: first learning rate of players without their own.
        seed: an integer >= 0.
        learn_model: learn the model's parameters too.
        device: "auto" takes a GPU if there is one.
        checkpoint: file to resume from, where it exists, and to save to every ten seconds.
        progress: show a bar with loss and time left.
        title: name at the bar; by default the guide's class.

    Raises:
        BadInput: x, a count or the seed is not what it should be.
        Incompatible: model, guide, objective and data cannot work together, or ranks disagree.
        Diverged: a loss is not finite; the last checkpoint is kept.
        BadCheckpoint: the checkpoint is corrupt or belongs to other settings.
        LostRank: another rank has ended.
    """
    check_call(fit, locals())
    check_counts(steps=steps, batch_size=batch_size)
    stream(seed)
    check_positive("lr", lr, usual=5e-3)
    if guide.model is not model:
        raise Incompatible(
            "guide", expected="a guide of this model", got="another's", fix="Build Guide(model)."
        )
    chosen = objective or (guide.objective() if guide.objective else None)
    x = prepare.place(device, [model, guide, chosen], x)
    prepare.check(guide, chosen, x, learn_model=learn_model)
    x, z = (x, None) if simulations is None else prepare.simulations(guide, x, simulations, seed)
    trainers = prepare.trainers(guide, chosen, learn_model=learn_model, lr=lr)
    settings = {
        "guide": type(guide).__name__,
        "knobs": guide.knobs,
        "objective": type(chosen).__name__ if chosen else "none",
        "objective_knobs": chosen.knobs if chosen else {},
        "data": "joint" if x is None else fingerprint(*parts(x), *(z or {}).values()),
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "learn_model": learn_model,
    }
    settings["model"] = _start_alike(settings, [model, guide, chosen], trainers)
    run = Fit(guide, {}, 0.0, settings, objective=chosen)
    path = None if checkpoint is None else Path(checkpoint)
    _resume(path, run, trainers)
    if chosen is None or not trainers:
        return run

    def save() -> None:
        if path is not None and not parallel.rank():
            run._keep(path, trainers)

    if isinstance(guide, HasClosedForm):
        _settle(run, guide, chosen, x, z, show=progress)
        save()
    else:
        loop = Loop(run, chosen, trainers, x, z, save)
        loop.run(show=progress, title=title or type(guide).__name__)
    return _end_alike(run)


def _start_alike(settings: dict[str, Any], modules: list[Any], trainers: list[Trainer]) -> str:
    """All ranks start from rank 0's model, guide and critics; returns the model's check sum."""
    parallel.agree(settings)
    states = [m.state_dict() if isinstance(m, nn.Module) else {} for m in modules]
    averages = [mean for t in trainers for mean in t.average]
    parallel.same([t for state in states for t in state.values()] + averages)
    return fingerprint(*states[0].values()) if isinstance(modules[0], nn.Module) else ""


def _end_alike(run: Fit) -> Fit:
    """What a rank may have of its own, buffers and gauges, is rank 0's at the end."""
    parallel.same([*run.guide.state_dict().values()])
    run.health, run.seconds = parallel.shared(lambda: (run.health, run.seconds))
    return run


def _settle(
    run: Fit,
    guide: HasClosedForm,
    objective: Objective,
    x: Observation | None,
    z: Values | None,
    *,
    show: bool,
) -> None:
    """Hand a guide with a closed form its batches; nothing where that is done already.

    All ranks do the same here: sums are the guide's own affair.
    """
    if run.steps:
        return
    began, steps = time.perf_counter(), run.settings["steps"]
    show = show and not parallel.rank()
    batches = Batches(run.guide, x, run.settings["batch_size"], run.seed, z)
    with seeded(run.seed), bar(type(guide).__name__, steps, show=show) as advance:
        for k in range(steps):
            reseed(run.seed, 0, k)
            objective.progress = k / steps
            guide.absorb(objective, *batches(k))
            advance()
    run.losses = {"guide": np.array([guide.settle()], np.float32)}
    run.seconds = time.perf_counter() - began


def _resume(path: Path | None, run: Fit, trainers: list[Trainer]) -> None:
    """Go on from the checkpoint, where rank 0 finds one."""
    found = parallel.shared(lambda: files.read(path) if path and path.exists() else None)
    if found is None:
        return
    path, (tensors, header) = path or Path("checkpoint"), found
    _agree(path, header["settings"], run.settings)
    run._fill(path, tensors)
    run.seconds = header["seconds"]
    for t in trainers:
        t.restore(tensors)


def _agree(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    plain = files.plain(wanted)
    differ = [k for k in plain if plain[k] != saved.get(k)]
    if differ:
        raise BadCheckpoint(
            str(path),
            expected=", ".join(f"{k}={plain[k]!r}" for k in differ),
            got=", ".join(f"{k}={saved.get(k)!r}" for k in differ),
            fix="Use the settings of the saved run, or another checkpoint path.",
        )
