"""SIGKILL at random moments: the next run goes on, and ends with the numbers of an unbroken one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from inference import checkpoint as files

# Imports take seconds, so one process imports and each run is a fork of it.
SERVER = """
import os, sys
import matplotlib
matplotlib.use("agg")
import torch
torch.set_num_threads(1)
import inference, zoo, neuroguide
from inference import loop
loop.SAVE_EVERY = 0.0

def function(path):
    model = zoo.FactorAnalysis(7, 3, seed=1)
    guide = inference.MeanFieldEncoder(model, hidden=(6,))
    inference.fit(model, guide, steps=STEPS, batch_size=8, seed=3, progress=False,
                  checkpoint=path + "/checkpoints/mean_field_encoder.safetensors")

def command(path):
    sys.argv = ["neuroguide", "fit", "factor_analysis", "mean_field_encoder", "--steps", "STEPS",
                "--batch-size", "8", "--out", path]
    neuroguide.main()

for line in sys.stdin:
    what, path = line.split()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            {"function": function, "command": command}[what](path)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Runs:
    """One kind of run, again and again."""

    def __init__(self, what, steps):
        code = SERVER.replace("STEPS", str(steps))
        self.what, self.process = what, subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, path, *, kill_after=None):
        """Seconds it took, or None if it was killed."""
        self.process.stdin.write(f"{self.what} {path}\n")
        self.process.stdin.flush()
        pid, began = int(self.process.stdout.readline()), time.monotonic()
        timer = threading.Timer(kill_after or 0, os.kill, (pid, signal.SIGKILL))
        if kill_after is not None:
            timer.start()
        status = int(self.process.stdout.readline())
        timer.cancel()
        assert status in (0, signal.SIGKILL), f"ended with status {status}"
        return None if status else time.monotonic() - began

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def numbers(path):
    """Parameters, losses, gauges and the optimiser's state."""
    return files.read(path / "checkpoints" / "mean_field_encoder.safetensors")[0]


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


def survives(what, kills, steps, tmp_path):
    """So many kills, at moments spread evenly over a run; one that ends begins anew."""
    rng, runs = random.Random(0), Runs(what, steps)
    try:
        whole = runs(tmp_path / "whole")
        wanted, killed, ended, midway = numbers(tmp_path / "whole"), 0, 0, 0
        while killed < kills or not ended:
            path = tmp_path / f"run{ended}"
            moment = rng.uniform(0, whole) if killed < kills else None
            if runs(path, kill_after=moment) is None:
                killed += 1
                kept = path / "checkpoints" / "mean_field_encoder.safetensors"
                if kept.exists():
                    midway += 0 < len(numbers(path)["loss/guide"]) < steps
                continue
            same(numbers(path), wanted)
            if what == "command":
                for name in ("losses.csv", "config.json"):
                    assert (path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
                assert (path / "report.html").exists()
                assert not [*path.rglob(".*.part")]
            ended += 1
    finally:
        runs.close()
    assert midway, "no kill in mid-run: it shows nothing"


def test_three_kills_of_a_fit(tmp_path):
    """About 15 s, most of it imports."""
    survives("function", 3, 80, tmp_path)


@pytest.mark.slow  # about 60 s
def test_kills_of_a_fit(tmp_path):
    survives("function", 25, 400, tmp_path)


@pytest.mark.slow  # about 120 s
def test_kills_of_the_command(tmp_path):
    survives("command", 25, 200, tmp_path)
