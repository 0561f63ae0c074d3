"""What a sweep costs beyond its cells, and how it scales from one worker to two.

Example:
    python benchmarks/sweep.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from record import record

from neuroguide.cluster import cluster
from neuroguide.crew import crew
from neuroguide.matrix import Matrix
from neuroguide.sweep import Run, sweep

MATRIX = Matrix.of(
    {
        "models": ["factor_analysis", "banana", "explaining_away"],
        "guides": ["mean_field_encoder", "full_covariance_encoder"],
        "metrics": ["c2st", "mean_error", "sd_ratio", "elbo_gap"],
        "device": "cpu",
        "reports": False,
        "sizes": {"steps": 300, "problems": 2, "draws": 250, "calibration": 50},
    }
)


def run(how: Run) -> tuple[float, list[float]]:
    """Wall time of a sweep, and the seconds that its cells say they took."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        found = sweep(MATRIX, Path(folder) / "store", how, progress=False)
        wall = time.perf_counter() - began
    assert all(row["status"] == "done" for row in found.rows), found.rows
    return wall, [row["cell_seconds"] for row in found.rows]


def tell(name: str, workers: int, wall: float, cells: list[float]) -> None:
    """One line; the overhead is what workers had that was not spent in cells."""
    overhead = (wall * workers - sum(cells)) / len(cells)
    middle = statistics.median(cells)
    print(f"| {name}, {workers} | {wall:.1f} s | {middle:.2f} s | {overhead:.2f} s |")
    record(f"overhead per cell, {name}, {workers}", overhead, [overhead])


def main() -> None:
    print("| workers | wall | median cell | beyond cells, per cell |\n|---|---|---|---|")
    walls = {}
    for workers in (1, 2):
        walls[workers], cells = run(partial(crew, workers=workers))
        tell("local", workers, walls[workers], cells)
    print(f"local: two workers are {walls[1] / walls[2]:.2f} times as fast as one")
    record("scaling, local", walls[1] / walls[2], [walls[1] / walls[2]])

    from distributed import LocalCluster

    for workers in (1, 2):
        with LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as dask:
            walls[workers], cells = run(partial(cluster, address=dask.scheduler_address))
        tell("Dask", workers, walls[workers], cells)
    print(f"Dask: two workers are {walls[1] / walls[2]:.2f} times as fast as one")
    record("scaling, Dask", walls[1] / walls[2], [walls[1] / walls[2]])


if __name__ == "__main__":
    main()
