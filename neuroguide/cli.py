"""The command line: parse, then call fit, draw, compare and report."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

import diagnostics
import inference
import zoo
from diagnostics.compare import EXACT
from diagnostics.report import report as write_report
from diagnostics.report import table, telling
from diagnostics.results import FAILED, is_store
from diagnostics.rundir import RunDirectory
from inference import parallel
from inference.errors import BadInput, Incompatible, NeuroguideError, NoExactPosterior
from inference.files import atomic_path
from zoo.data import DATA
from zoo.stored import StoredDraws, reference_path
from zoo.table import rows

from . import pipeline
from .draw import draw
from .matrix import Matrix
from .sweep import sweep as run_sweep
from .sweep import where
from .train_pretrained import command as train_pretrained

__all__ = ["app", "main"]

P = ParamSpec("P")
R = TypeVar("R")
BASELINES = "mean_field_encoder,full_covariance_encoder,flow"
QUICK = {"steps": 200, "model_steps": 200, "draws": 250, "problems": 4}
USAGE, FAILURE, STOPPED = 2, 1, 130  # exit codes
GRACE = 5.0  # seconds that rank 0 has to say what is wrong

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Neural circuits as guides, judged against exact posteriors.",
)
out, err = Console(), Console(stderr=True)

Model = Annotated[str, typer.Argument(help="A model of `neuroguide list`.")]
DataSet = Annotated[str | None, typer.Option("--data", help="Learn the model on this data set.")]
Goal = Annotated[
    str | None,
    typer.Option(
        "--objective", show_default="the guide's own", help="An objective of `neuroguide list`."
    ),
]
Steps = Annotated[int, typer.Option(help="Training steps of each guide.")]
ModelSteps = Annotated[int, typer.Option(help="Training steps of the model, with --data.")]
Batch = Annotated[int, typer.Option(help="Problems per training step.")]
Rate = Annotated[float, typer.Option("--lr", help="First learning rate of the guides.")]
Seed = Annotated[int, typer.Option(help="Every random number depends on it alone.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Out = Annotated[
    Path | None, typer.Option("--out", help="Run directory.", show_default="runs/MODEL-DATA")
]
Quick = Annotated[bool, typer.Option("--quick", help="A small run, to see that it works.")]


def _friendly(command: Callable[P, R]) -> Callable[P, R]:
    """Expected errors become one line and an exit code: 2 for bad input, 1 for the rest."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            _check_ranks(command.__name__)
            return command(*args, **kwargs)
        except NeuroguideError as error:
            _complain(f"[bold red]error[/] {error}")
            usage = isinstance(error, BadInput | Incompatible | NoExactPosterior)
            raise typer.Exit(USAGE if usage else FAILURE) from None
        except KeyboardInterrupt:
            err.print("[yellow]stopped[/] The same command goes on where it stopped.")
            raise typer.Exit(STOPPED) from None

    return wrapped


def _check_ranks(command: str) -> None:
    """Of all commands one knows how to share its work."""
    if parallel.launched()[1] > 1 and command != "fit":
        raise BadInput(
            "torchrun", expected="neuroguide fit", got=f"neuroguide {command.strip('_')}",
            fix="Run it without torchrun.",
        )  # fmt: skip


def _complain(text: str) -> None:
    """On standard error; ranks other than 0 leave it to that one, which mostly says the same."""
    if me := parallel.launched()[0]:
        time.sleep(GRACE)  # torchrun ends this process as soon as rank 0 has gone
        text = f"rank {me}: {text}"
    err.print(text, highlight=False, soft_wrap=True)


@app.command("list")
@_friendly
def list_() -> None:
    """Models, guides, objectives and data sets.

    Example: neuroguide list
    """
    models = Table(Column("model", no_wrap=True), "latents", "x", "truth", "source", title="Models")
    for row in rows(zoo.MODELS):
        models.add_row(row.name, row.latents, row.observation, row.truth, row.paper)
    out.print(models)
    named: dict[str, inference.Table[Any]] = {
        "Guides": inference.GUIDES, "Objectives": inference.OBJECTIVES, "Data sets": DATA
    }  # fmt: skip
    for title, entries in named.items():
        found = Table("name", "what it is", title=title)
        for name, what in entries.rows():
            found.add_row(name, escape(what))
        out.print(found)


@app.command()
@_friendly
def fit(
    model: Model,
    guide: Annotated[str, typer.Argument(help="A guide of `neuroguide list`.")],
    data: DataSet = None,
    objective: Goal = None,
    steps: Steps = 2500,
    model_steps: ModelSteps = 2000,
    batch_size: Batch = 256,
    lr: Rate = 5e-3,
    problems: Annotated[
        int, typer.Option(help="Held-out observations, for guides that are fitted to each problem.")
    ] = 10,
    seed: Seed = 0,
    device: Device = "auto",
    out_dir: Out = None,
    quick: Quick = False,
) -> None:
    """Fit one guide and keep its checkpoint; a stopped run goes on where it stopped.

    Example: neuroguide fit factor_analysis flow --data digits --out runs/flow
    """
    config = {
        "command": "fit", "model": model, "data": data, "guides": [guide], "objective": objective,
        "steps": steps, "model_steps": model_steps, "batch_size": batch_size, "lr": lr,
        "problems": problems, "seed": seed,
    }  # fmt: skip
    path, config = out_dir or _default(model, data, guide), _quick(config, on=quick)
    with parallel.group(device) as rank:
        _check_names(config)
        run = parallel.shared(lambda: RunDirectory.create(path, config))
        built, held_out, fits = pipeline.learn_model(run, device)
        pipeline.fit_guides(run, built, held_out, fits, device)
    if rank:
        return
    run.write_losses(fits)
    run.write_health(fits)
    out.print(f"report     {write_report(run.path)}")
    out.print(f"checkpoint {run.checkpoint(guide)}")


@app.command()
@_friendly
def compare(
    model: Model,
    data: DataSet = None,
    guides: Annotated[str, typer.Option(help="Names, separated by commas.")] = BASELINES,
    objective: Goal = None,
    problems: Annotated[int, typer.Option(help="Held-out observations compared.")] = 10,
    draws: Annotated[int, typer.Option(help="Draws per chain.")] = 1000,
    chains: Annotated[int, typer.Option(help="Chains.")] = 4,
    steps: Steps = 2500,
    model_steps: ModelSteps = 2000,
    batch_size: Batch = 256,
    lr: Rate = 5e-3,
    seed: Seed = 0,
    device: Device = "auto",
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Guides that come trained, on the model as it is.")
    ] = False,
    out_dir: Out = None,
    quick: Quick = False,
) -> None:
    """Fit guides, draw from their posteriors, compare each with the exact one, write a report.

    With --data the model is learned first, by maximum likelihood; guides are trained on draws from
    the model's joint and compared on held-out observations.

    Example: neuroguide compare factor_analysis --data digits --guides flow,mean_field_encoder
    """
    config = {
        "command": "compare", "model": model, "data": data,
        "guides": [name.strip() for name in guides.split(",") if name.strip()],
        "objective": objective, "problems": problems, "draws": draws, "chains": chains,
        "steps": steps, "model_steps": model_steps, "batch_size": batch_size, "lr": lr,
        "seed": seed, **({"pretrained": True} if pretrained else {}),
    }  # fmt: skip
    _check_names(config)
    run = RunDirectory.create(out_dir or _default(model, data), _quick(config, on=quick))
    built, held_out, fits = pipeline.learn_model(run, device)
    fitted = pipeline.fit_guides(run, built, held_out, fits, device)
    run.write_losses(fits)
    run.write_health(fits)
    comparison = pipeline.compare(run, built, fitted, held_out, fits)
    out.print(_rich_table(comparison))
    out.print(f"report     {write_report(run.path)}")


app.command()(_friendly(draw))
app.command("train-pretrained")(_friendly(train_pretrained))


@app.command()
@_friendly
def show(
    model: Model,
    problem: Annotated[int, typer.Option(help="Which of its observations.")] = 0,
    out_path: Annotated[
        Path | None, typer.Option("--out", help="Picture.", show_default="MODEL.png")
    ] = None,
) -> None:
    """Say what a model is, and draw its prior and one posterior.

    Example: neuroguide show banana
    """
    built = zoo.MODELS[model]()
    out.print(escape(inspect.cleandoc(built.__doc__ or "")), highlight=False)
    path = out_path or Path(f"{model}.png")
    figure = diagnostics.plots.model(built, problem=problem)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or "png")
    out.print(f"picture    {path}")


@app.command()
@_friendly
def reference(
    model: Model,
    draws: Annotated[int, typer.Option(help="Draws per chain.")] = 2500,
    chains: Annotated[int, typer.Option(help="Chains.")] = 4,
    seed: Seed = 0,
    out_path: Annotated[
        Path | None, typer.Option("--out", help="File.", show_default="beside the model")
    ] = None,
) -> None:
    """Run a slow, asymptotically exact sampler on a model's own observations and keep its draws.

    The file holds method, command, seed, versions, R-hat, ESS and a hash of the model's source, and
    is not written unless R-hat is below 1.01.

    Example: neuroguide reference sparse_coding
    """
    built = zoo.MODELS[model]()
    path = out_path or reference_path(model)
    sizes = {"draws": draws, "chains": chains, "seed": seed}
    again = f"neuroguide reference {model} --draws {draws} --chains {chains} --seed {seed}"
    x = built.observations()
    StoredDraws.write(path, built.reference(), x, command=again, progress=True, **sizes)
    kept = StoredDraws(built, path).attrs
    out.print(f"R-hat {kept['rhat_max']:.4f}, smallest ESS {kept['ess_min']:.0f}")
    out.print(f"draws      {path}")


@app.command()
@_friendly
def sweep(
    matrix: Annotated[Path, typer.Argument(help="A TOML file: models, guides, objectives, seeds.")],
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Results store.", show_default="runs/MATRIX")
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Local processes, one thread each; 0: one for each core.")
    ] = 0,
    scheduler: Annotated[
        str | None,
        typer.Option(help="Run on the workers of this Dask scheduler: an address or its file."),
    ] = None,
    retry: Annotated[bool, typer.Option("--retry-failed", help="Try failed cells again.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what would be run.")] = False,
) -> None:
    """Fit, draw, compare and calibrate every cell of a matrix; write a store and a page of it.

    A stopped sweep goes on where it stopped, and a matrix may grow.

    Example: neuroguide sweep matrix.toml --workers 2
    """
    asked = Matrix.read(matrix)
    path = out_dir or Path("runs") / matrix.stem
    if plan:
        for cell in asked.cells:
            out.print(cell.name, highlight=False)
        return
    results = run_sweep(asked, path, where(workers, scheduler), retry=retry)
    out.print(f"matrix     {diagnostics.overview([path], path / 'matrix.html')}")
    out.print(f"table      {path / 'results.nc'}")
    states = [row["status"] for row in results.rows]
    out.print(", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)))
    if failed := [row for row in results.rows if row["status"] == FAILED]:
        for row in failed:
            err.print(f"[bold red]failed[/] {row['cell']}: {escape(row['error'])}", soft_wrap=True)
        raise typer.Exit(FAILURE)


@app.command()
@_friendly
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories, or results stores of `sweep`.")
    ],
    out_path: Annotated[
        Path | None, typer.Option("--out", help="One page of all runs, models by guides.")
    ] = None,
) -> None:
    """Write each run's report.html again, and with --out a page that sets them side by side.

    Example: neuroguide report runs/banana runs/necker --out runs/overview.html
    """
    for path in runs:
        if not is_store(path):  # its cells have reports already
            out.print(f"report     {write_report(path)}")
    if out_path is not None:
        out.print(f"overview   {diagnostics.overview(runs, out_path)}")


def _quick(config: dict[str, Any], *, on: bool) -> dict[str, Any]:
    """The config, with the small sizes where --quick was given."""
    small = {k: min(v, config[k]) for k, v in QUICK.items() if k in config}
    return config | small if on else config


def _default(*names: str | None) -> Path:
    return Path("runs") / "-".join(n or "joint" for n in names)


def _check_names(config: Mapping[str, Any]) -> None:
    """Every name is known before anything is computed or written."""
    zoo.MODELS[config["model"]]
    for name in config["guides"]:
        inference.GUIDES[name]
    if EXACT in config["guides"] and config["command"] == "compare":
        raise BadInput(
            "guides", expected="guides to compare with the exact posterior", got=EXACT,
            fix="Leave it out: it is always the reference row.",
        )  # fmt: skip
    if not config["guides"]:
        raise BadInput("guides", expected="at least one name", got="none", fix="--guides flow")
    if config["data"] is not None:
        DATA[config["data"]]
    if config["objective"] is not None:
        inference.OBJECTIVES[config["objective"]]


def _rich_table(comparison: Any) -> Table:
    """Metrics by guides, each value with its standard error, the floor in the first column."""
    comparison = telling(comparison)
    guides, cells_of = table(comparison)
    names = ["floor (exact)" if g == EXACT else g.replace("_", " ") for g in guides]
    found = Table(
        "metric",
        *names,
        title=f"{comparison.attrs['model']}: means over {comparison.sizes['problem']} problems",
        caption="green: within three standard errors of the floor; orange: above it",
    )
    style = {"floor": "dim", "plain": "none", "at": "green", "above": "dark_orange3"}
    for k, name in enumerate(comparison.metric.values):
        cells = [row[k] for row in cells_of]
        text = [f"[{style[c['state']]}]{c['text']}[/] [dim]{c['se']}[/]" for c in cells]
        found.add_row(escape(diagnostics.METRICS[str(name)].title), *text)
    return found


def main() -> None:
    """Entry point of the command `neuroguide`."""
    app()
