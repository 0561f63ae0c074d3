"""Networks of Benjamin & Kording (2020, 2023): four neurons, digits, oscillations.

Texts and numbers of the papers were not available: these are ours, on models of ours.

  toy          A drives b and c, b drives c, synapses are Gaussian (2023, figure 2). A's synapses
               are learned: each by predicting its cell from A alone, whatever b does to c; with b
               known to c, which is the likelihood; by the adversary, who sees both cells; by the
               energy score. Beside them a circuit that knows nothing of the structure.
               KL(circuit || teacher) of histograms of (b, c) over 20 x 20 bins, nats, at A = -1,
               at A = 1 and over all A; rms errors of the learned synapses
  digits       a recurrent generator of 10 latents learned with a recurrent guide in three games,
               against two encoders with densities: rms error per pixel of held-out digits that are
               drawn anew from their latents; KL of patterns awake and asleep and its floor; spread
               of draws over their error, on dreams; the guide's importance-weighted bound; the same
               of a full-covariance encoder that has learned from dreams of the finished model, so
               that models can be compared; docs/recognition_digits.png
  oscillation  amplitude of the alternation of evoked and dreamt states against -log p(x), of the
               model's own x and of others, shifted by two sds or stretched threefold; rank
               correlation over the model's own x; docs/recognition_oscillation_*.png

Cells are means over seeds and their range. Fits stay in the output folder, so that a stopped run
goes on where it stopped; tables are also written there as CSV.

Run: python benchmarks/benjamin2020_networks.py [--experiments toy,digits,oscillation]
     [--seeds 0,1,2] [--data digits] [--out runs/benjamin2020_networks]
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import diagnostics
import inference
import zoo
from diagnostics import plot_recognition, plot_signatures
from diagnostics.oscillations import ALTERNATION, oscillations
from diagnostics.patterns import wake_sleep_patterns
from diagnostics.signature_fits import rank_correlation
from inference import ELBO, Adversarial, EnergyScore, Oscillating, RecurrentRecognition
from inference.gauges import dispersion
from inference.objectives.wake_sleep import ReweightedWakeSleep
from zoo.data import DATA

Row = dict[str, float]
Rows = dict[str, list[Row]]
BINS, CELLS = 20, 100_000  # of histograms along an axis; pairs of cells in each
LATENTS, PARTICLES = 10, 500
TRIALS, OWN, OTHER = 16, 60, 30  # of an oscillation; problems of each sort


def trained(
    args: argparse.Namespace, name: str, model: zoo.Model, guide: inference.Guide,
    objective: inference.Objective, seed: int, **knobs: Any,
) -> inference.Fit:  # fmt: skip
    """A fit from file, or one that is made and filed; a game has its critics in either case."""
    path = args.out / f"{name}-{seed}.safetensors".replace(" ", "_").replace(",", "")
    return inference.fit(
        model, guide, objective=objective, seed=seed, checkpoint=path, progress=False, **knobs
    )


def show(title: str, rows: Rows, args: argparse.Namespace) -> None:
    """Means over seeds and their range, printed and filed."""
    names = list(dict.fromkeys(n for found in rows.values() for row in found for n in row))
    cells = {arm: [spanned([r[n] for r in found if n in r]) for n in names]
             for arm, found in rows.items()}  # fmt: skip
    print(f"\n{title}\n{'':<32}" + "".join(f"{n:>24}" for n in names))
    for arm, found in cells.items():
        print(f"{arm:<32}" + "".join(f"{c:>24}" for c in found), flush=True)
    with (args.out / f"{title.split(':')[0]}.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(["arm", "run", *names])
        for arm, runs in rows.items():
            table.writerows(
                [arm, k, *[row.get(n, "") for n in names]] for k, row in enumerate(runs)
            )


def spanned(values: list[float]) -> str:
    """Mean and range, or nothing."""
    if not values:
        return "-"
    mean, low, high = np.mean(values), min(values), max(values)
    return f"{mean:.3f}" if low == high else f"{mean:.3f} ({low:.3f} to {high:.3f})"


# --------------------------------------------------------------------------------------------- toy


class Circuit(inference.Guide):
    """Four neurons that learn A's synapses; the one from b to c, biases and noise are the model's.

    It runs with the synapse from b to c, whatever taught it.

    Args:
        model: the teacher.
    """

    model: zoo.FourNeurons

    def __init__(self, model: zoo.FourNeurons) -> None:
        super().__init__(model)
        self.means = nn.Parameter(torch.zeros(2))
        self.log_sds = nn.Parameter(torch.full((2,), 0.2).log())

    def cell(self, k: int, *inputs: Tensor) -> Normal:
        """Of b (k = 0) and c (k = 1), given A and, of c, perhaps b."""
        own, fixed = slice(k, k + 1), slice(2, 1 + len(inputs))
        means = torch.cat([self.means[own], self.model.means[fixed]])
        sds = torch.cat([self.log_sds[own].exp(), self.model.sds[fixed]])
        rates = torch.stack(inputs, -1)
        variance = rates.square() @ sds.square() + self.model.scale.square()
        return Normal(self.model.biases[k] + rates @ means, variance.sqrt())

    def rsample(self, x: Tensor, shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Cells with gradients, (*shape, B, 2)."""
        a = x[:, 0].expand(*shape, len(x))
        b = self.cell(0, a).rsample()
        return torch.stack([b, self.cell(1, a, b).rsample()], -1)

    def forward(self, x: Tensor) -> Any:
        """Sample b and c."""
        return self.emit(self.latents.unpack(self.rsample(x))[0], x)


class Prediction(inference.Objective):
    """Each cell by itself: max log p(b given A) + log p(c given A), the synapse b to c ignored.

    Args:
        lateral: c is predicted from A and b. That is the likelihood of the whole circuit.
    """

    needs = inference.HasRsample
    joint_only = True

    def __init__(self, *, lateral: bool = False) -> None:
        super().__init__(lateral=lateral)
        self.lateral = lateral

    def forward(self, model: Any, guide: Any, x: Any, z: Any = None) -> dict[str, Tensor]:
        """{"guide": its loss}."""
        a, b, c = x[:, 0], z["b"], z["c"]
        other = guide.cell(1, a, b) if self.lateral else guide.cell(1, a)
        return {"guide": -(guide.cell(0, a).log_prob(b) + other.log_prob(c)).mean()}


TAUGHT: Mapping[str, tuple[Callable[..., Any], Callable[[], inference.Objective], int]] = {
    "prediction, cell by cell": (Circuit, Prediction, 4000),
    "prediction, b known to c": (Circuit, lambda: Prediction(lateral=True), 4000),
    "adversarial": (Circuit, Adversarial, 800),
    "energy score": (Circuit, EnergyScore, 800),
    "recurrent circuit, adversarial": (RecurrentRecognition, Adversarial, 800),
}


def toy(args: argparse.Namespace) -> None:
    """Who learns A's synapses? The same start in all runs: seeds are those of training."""
    model = zoo.FourNeurons()
    rows: Rows = {"(other draws of the teacher)": [apart(model, model.exact())]}
    for arm, (make, goal, steps) in TAUGHT.items():
        rows[arm] = []
        for seed in args.seeds:
            guide = make(model)
            trained(args, f"toy-{arm}", model, guide, goal(), seed, steps=steps, batch_size=256)
            rows[arm].append(apart(model, guide) | mistaken(guide))
    show("toy: KL of histograms in nats; rms errors of A's synapses", rows, args)


def apart(model: zoo.FourNeurons, guide: inference.Guide) -> Row:
    """KL(circuit || teacher) of histograms."""
    everywhere = model.simulate(CELLS, seed=11)[1]
    stimuli = {f"A = {a:+d}": torch.full((CELLS, 1), float(a)) for a in (-1, 1)}
    return {
        n: divergence(guide, model.exact(), x) for n, x in (stimuli | {"all A": everywhere}).items()
    }


def divergence(guide: Any, teacher: Any, x: Tensor) -> float:
    """Of one draw for each row of x; half a count in each bin, the outer ones without end."""
    cells = []
    for seed, who in enumerate((guide, teacher)):
        z = who.draw(x, draws=1, chains=1, seed=seed).values
        cells.append(np.stack([z[n][0, 0].numpy() for n in ("b", "c")], -1))
    inner = np.quantile(cells[1], [0.005, 0.995], axis=0)
    edges = [np.array([-np.inf, *np.linspace(*ends, BINS - 1), np.inf]) for ends in inner.T]
    counts = [np.histogramdd(c, edges)[0] + 0.5 for c in cells]
    q, p = (c / c.sum() for c in counts)
    return float((q * np.log(q / p)).sum())


def mistaken(guide: inference.Guide) -> Row:
    """Errors of the synapses, of guides that have them."""
    if not isinstance(guide, Circuit):
        return {}
    model = guide.model
    pairs = {"means": (guide.means, model.means), "sds": (guide.log_sds.exp(), model.sds)}
    return {
        n: float((own.detach() - true[:2]).square().mean().sqrt())
        for n, (own, true) in pairs.items()
    }


# ------------------------------------------------------------------------------------------ digits

LEARNED: Mapping[str, tuple[Callable[..., Any], Callable[[], inference.Objective], int]] = {
    "adversarial": (RecurrentRecognition, lambda: Adversarial(penalty=10.0), 1500),
    "prior-contrastive": (RecurrentRecognition, inference.PriorContrastive, 1500),
    "oscillating": (RecurrentRecognition, Oscillating, 1500),
    "VAE": (inference.MeanFieldEncoder, ELBO, 3000),
    "reweighted wake-sleep": (inference.FullCovarianceEncoder, ReweightedWakeSleep, 3000),
}


def digits(args: argparse.Namespace) -> None:
    """A generator that is learned together with its guide."""
    data = DATA[args.data]()
    rows: Rows = {arm: [] for arm in LEARNED}
    pictures: dict[str, dict[str, Tensor]] = {"again": {}, "dreamt": {}}
    for arm, (make, goal, steps) in LEARNED.items():
        for seed in args.seeds:
            model = zoo.RecurrentGenerator.for_data(
                data.train, latents=LATENTS, units=64, seed=seed
            )
            guide = make(model, seed=seed)
            trained(
                args, f"{args.data}-{arm}", model, guide, goal(), seed, x=data.train, steps=steps,
                batch_size=128, lr=args.rate, learn_model=True,
            )  # fmt: skip
            rows[arm].append(judged(model, guide, data.train, data.validation, seed))
            if seed == args.seeds[0]:
                pictures["again"][arm] = again(model, guide, data.validation[:10])
                pictures["dreamt"][arm] = dreams(model, 10)
    show(f"{args.data}: learned with the model; see the head of the file", rows, args)
    shown = {"data": data.validation[:10]}
    for kind, found in pictures.items():
        shown |= {f"{arm},\n{kind}": x for arm, x in found.items()}
    plot_recognition.samples(shown, data.image_shape).savefig("docs/recognition_digits.png")


@torch.no_grad()
def again(model: zoo.Model, guide: inference.Guide, x: Tensor) -> Tensor:
    """What the model makes of one draw of the latents of x, without noise."""
    z = guide.draw(x, draws=1, chains=1, seed=3).values
    return model.predict({n: v[0, 0] for n, v in z.items()})


@torch.no_grad()
def dreams(model: zoo.Model, n: int) -> Tensor:
    """What it makes of draws from its prior, without noise."""
    return model.predict(model.simulate(n, seed=4)[0])


def judged(
    model: zoo.RecurrentGenerator, guide: inference.Guide, seen: Tensor, held: Tensor, seed: int
) -> Row:
    """A row of the table."""
    patterns = wake_sleep_patterns(model, guide, seen, seed=0)
    z, x = model.simulate(1000, seed=7)
    row = {
        "rms error": float((again(model, guide, held) - held).square().mean().sqrt()),
        "patterns": float(patterns["value"]), "floor": float(patterns["floor"]),
    }  # fmt: skip
    if isinstance(guide, inference.HasRsample):
        row["dispersion"] = dispersion(guide, x, z)
    if isinstance(guide, inference.HasDensity):
        row["bound"] = bound(guide, held)
    judge = inference.FullCovarianceEncoder(model)
    inference.fit(
        model, judge, objective=inference.ForwardKL(), steps=1500, batch_size=128, seed=seed,
        progress=False,
    )  # fmt: skip
    return row | {"noise": float(model.scale.detach()), "bound of model": bound(judge, held)}


@torch.no_grad()
def bound(guide: Any, x: Tensor) -> float:
    """The mean of log (1/K) sum_k p(x, z_k) / q(z_k given x), nats per picture."""
    found = guide.draw(x, draws=PARTICLES, chains=1, seed=5)
    log_w = guide.latents.log_joint(found.values, x) - found.stats["log_q"]
    return float((log_w[0].logsumexp(0) - np.log(PARTICLES)).mean())


# ------------------------------------------------------------------------------------- oscillation


def oscillation(args: argparse.Namespace) -> None:
    """Does the alternation of evoked and dreamt states grow with surprise?"""
    for model in (zoo.ExplainingAway(), zoo.LayeredGaussian()):
        x, sorts = stimuli(model)
        surprise = -model.exact().log_evidence(x).detach().numpy()
        rows: Rows = {}
        for seed in args.seeds:
            game, guide = Oscillating(), RecurrentRecognition(model, seed=seed)
            knobs = {"steps": 1000, "batch_size": 128}
            trained(args, f"oscillation-{model.title}", model, guide, game, seed, **knobs)
            for who, one in (("circuit", guide), ("exact posterior", model.exact())):
                tree = oscillations(game, one, x, trials=TRIALS, seed=0)
                for quantity in ("potentials", "rates"):
                    knobs = {"band": ALTERNATION, "quantity": quantity}
                    found = diagnostics.oscillation_against_surprise(
                        tree, surprise, seed=0, **knobs
                    )
                    rows.setdefault(f"{who}, {quantity}", []).append(grown(found, sorts))
                    if (seed, who, quantity) == (args.seeds[0], "circuit", "potentials"):
                        shown = found
        show(f"oscillation in {model.title}: rank correlation; mean amplitudes", rows, args)
        picture = f"docs/recognition_oscillation_{model.title.replace(' ', '_').lower()}.png"
        plot_signatures.oscillation_against_surprise(shown, group=sorts).savefig(picture)


def stimuli(model: zoo.Model) -> tuple[Tensor, list[str]]:
    """Draws of the model, others shifted or stretched about the mean, and what each is."""
    x = model.simulate(OWN + 2 * OTHER, seed=5)[1]
    own, shifted, stretched = x.split([OWN, OTHER, OTHER])
    mean, sd = x.mean(0), x.std(0)
    sorts = ["of the model"] * OWN + ["shifted"] * OTHER + ["stretched"] * OTHER
    return torch.cat([own, shifted + 2 * sd, mean + 3 * (stretched - mean)]), sorts


def grown(found: Any, sorts: list[str]) -> Row:
    """Rank correlation over the model's own x, and mean amplitude of each sort."""
    amplitude, surprise, sort = found.amplitude.values, found.surprise.values, np.array(sorts)
    own = sort == sorts[0]
    line = rank_correlation(surprise[own], amplitude[own], seed=0)
    return {
        "rank correlation": line.value,
        **{s: amplitude[sort == s].mean() for s in dict.fromkeys(sorts)},
    }


EXPERIMENTS = {"toy": toy, "digits": digits, "oscillation": oscillation}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--experiments", default=",".join(EXPERIMENTS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--data", default="digits", choices=["digits", "mnist", "fashion_mnist"])
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate on digits")
    parser.add_argument("--out", type=Path, default=Path("runs/benjamin2020_networks"))
    args = parser.parse_args()
    args.seeds = [int(s) for s in args.seeds.split(",")]
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.experiments.split(","):
        EXPERIMENTS[name](args)


if __name__ == "__main__":
    main()
