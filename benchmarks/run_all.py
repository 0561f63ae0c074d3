"""Every benchmark that fits into half an hour on two cores, and the table of their numbers.

Each benchmark is a process of its own with one thread. Those that measure a quality run two at a
time, then those that measure a speed one by one. Output and numbers of each stay in build/bench, so
that a stopped run goes on where it stopped; what failed or ran out of time is tried again, and
stands in the table until it works. Then benchmarks/RESULTS.md is written.

Usage: python benchmarks/run_all.py [--again] [--only NAME,NAME] [--patience 3] [--write-only]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from record import FILE
from results import KEPT, RESULTS, page
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from inference.files import atomic_path

ROOT = Path(__file__).parent.parent
STOP = threading.Event()  # set by an interrupt: children end


@dataclass(frozen=True)
class Benchmark:
    """A command, how long it should take on an idle core, and whether it measures a speed.

    Attributes:
        name: of its files in build/bench.
        command: of Python, from the root of the repository.
        minutes: expected; it is stopped after a multiple of them.
        speed: nothing else may run beside it.
    """

    name: str
    command: str
    minutes: float
    speed: bool = False


def script(name: str, *arguments: str, minutes: float, speed: bool = False) -> Benchmark:
    """A file of this folder."""
    return Benchmark(name, " ".join([f"benchmarks/{name}.py", *arguments]), minutes, speed)


def sbi(task: str, minutes: float) -> Benchmark:
    """All contestants on one simulation-based task."""
    command = f"benchmarks/opponents_sbi.py --tasks {task} --seeds 0 --problems 5"
    return Benchmark(f"opponents_sbi {task}", command, minutes)


QUIET = (  # longest first, so that the two cores end together
    sbi("two_moons", 6.0),
    sbi("gaussian_mixture_sbi", 5.0),
    script("factor_analysis", "10", minutes=4.0),
    script("poisson_posteriors", "--quick --out build/bench/poisson_posteriors", minutes=4.0),
    script(
        "benjamin2020",
        '--models "explaining away 2" --guides "mean field;adversarial;energy score" --seeds 0',
        "--out build/bench/benjamin2020/fits.csv",
        minutes=1.0,
    ),
    script("vafaii2024", "--guides ip --steps 300", minutes=1.2),
    script("malkin2024", "--experiments slopes", minutes=1.2),
    script("aitchison2018", "--experiments ladder --seeds 0 --steps 500", minutes=1.0),
)
SPEED = (
    Benchmark(
        "demo",
        "-m neuroguide compare factor_analysis --data digits --out build/bench/demo",
        1.5,
        speed=True,
    ),
    script("import_time", minutes=1.0, speed=True),
    script("loop_overhead", minutes=1.0, speed=True),
    script("opponents_nuts", minutes=2.0, speed=True),
    script("reservoir_speed", minutes=2.0, speed=True),
    script("vafaii_speed", minutes=1.5, speed=True),
    script("malkin_speed", "--rounds 30", minutes=1.0, speed=True),
    script("adversarial_speed", "--rounds 5", minutes=2.0, speed=True),
    script("zoo_draws", minutes=1.0, speed=True),
    script("diagnostics_speed", minutes=1.5, speed=True),
    script("gpu", "--quick", minutes=1.0, speed=True),
    script("sweep", minutes=1.5, speed=True),
    script("parallel", "--rounds 3", minutes=1.0, speed=True),
)
BENCHMARKS = QUIET + SPEED


def busy() -> float | None:
    """Seconds that all cores of the machine have worked since it started; None if not told."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, irq, soft, steal = (int(f) for f in fields)
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def ended(child: subprocess.Popen[bytes], limit: float) -> tuple[int | None, float]:
    """Exit code of a child, None if it had to be stopped, and the processor time it took."""
    began = time.perf_counter()
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            child.returncode = os.waitstatus_to_exitcode(status)
            return child.returncode, usage.ru_utime + usage.ru_stime
        if STOP.is_set() or time.perf_counter() - began > limit:
            os.killpg(child.pid, signal.SIGKILL)  # of the child's own session
            _, _, usage = os.wait4(child.pid, 0)
            child.returncode = -signal.SIGKILL
            return None, usage.ru_utime + usage.ru_stime
        time.sleep(0.2)


def run(one: Benchmark, patience: float) -> bool:
    """One benchmark in a process of its own; keeps what came of it; whether it went well."""
    text, numbers = KEPT / f"{one.name}.txt", KEPT / f"{one.name}.numbers"
    numbers.unlink(missing_ok=True)
    if one.speed:  # what is resumed would look fast
        shutil.rmtree(KEPT / one.name, ignore_errors=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", FILE: str(numbers)}
    before, began = busy(), time.perf_counter()
    with text.open("wb") as out, text.with_suffix(".err").open("wb") as err:
        command = [sys.executable, *shlex.split(one.command)]
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True
        )
        code, own = ended(child, 60 * patience * one.minutes)
    took, after = time.perf_counter() - began, busy()
    if STOP.is_set():
        return False
    kept = json.loads(numbers.read_text()) if numbers.exists() else {}
    found = {
        "command": one.command,
        "ok": code == 0,
        "why": "" if code == 0 else "out of time" if code is None else f"exit code {code}",
        "seconds": took,
        "processor seconds": own,
        "cores of others": None if before is None else max(0.0, (after - before - own) / took),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "numbers": kept | {"seconds": {"value": took, "each": []}},
    }
    numbers.unlink(missing_ok=True)
    with atomic_path(KEPT / f"{one.name}.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1))
    return code == 0


def done(one: Benchmark) -> bool:
    """It has run, with this command, and without error."""
    path = KEPT / f"{one.name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    return bool(kept.get("ok")) and kept["command"] == one.command


class Watch:
    """A bar that knows how long everything should take.

    Args:
        todo: what is to be run.
        console: where to.
    """

    def __init__(self, todo: Sequence[Benchmark], console: Console) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        self.progress = Progress(*columns, TimeElapsedColumn(), console=console)
        self.task = self.progress.add_task("benchmarks", total=len(todo))
        self.left, self.spent, self.began = list(todo), 0.0, time.perf_counter()
        self.lock = threading.Lock()
        self.tell()

    def over(self, one: Benchmark, *, ok: bool) -> None:
        """One more has ended."""
        with self.lock:
            self.left.remove(one)
            self.spent += lone(one)
            self.progress.console.print(f"{one.name}: {'done' if ok else 'failed'}")
            self.progress.advance(self.task)
            self.tell()

    def tell(self) -> None:
        """How long is left, at the pace so far."""
        elapsed = (time.perf_counter() - self.began) / 60
        pace = elapsed / self.spent if self.spent else 1.0
        minutes = pace * sum(map(lone, self.left))
        self.progress.update(self.task, description=f"benchmarks, about {minutes:.0f} min left")


def lone(one: Benchmark) -> float:
    """Minutes by which a benchmark makes the whole run longer."""
    return one.minutes if one.speed else one.minutes / 2


def carry_out(todo: Sequence[Benchmark], patience: float, console: Console) -> None:
    """Qualities two at a time, then speeds one by one."""
    watch = Watch(todo, console)

    def each(one: Benchmark) -> None:
        if not STOP.is_set():
            watch.over(one, ok=run(one, patience))

    with watch.progress:
        for speed, workers in ((False, 2), (True, 1)):
            with ThreadPoolExecutor(workers) as pool:
                waiting = [pool.submit(each, one) for one in todo if one.speed is speed]
                try:
                    for future in waiting:
                        future.result()
                except KeyboardInterrupt:
                    STOP.set()
                    raise


def main() -> None:
    """Run what is left, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--again", action="store_true", help="also what is done, from its beginning"
    )
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--patience", type=float, default=3.0, help="limit over expected time")
    parser.add_argument("--write-only", action="store_true", help="run nothing, write the page")
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else [b.name for b in BENCHMARKS]
    todo = [b for b in BENCHMARKS if b.name in chosen and (args.again or not done(b))]
    KEPT.mkdir(parents=True, exist_ok=True)
    for one in todo if args.again else []:  # what it keeps for itself
        shutil.rmtree(KEPT / one.name, ignore_errors=True)
    console = Console(stderr=True)
    for kind in (signal.SIGINT, signal.SIGTERM):  # also where a shell lets jobs ignore interrupts
        signal.signal(kind, signal.default_int_handler)
    try:
        if todo and not args.write_only:
            carry_out(todo, args.patience, console)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
    with atomic_path(RESULTS) as temporary:
        temporary.write_text(page([b.name for b in BENCHMARKS]))
    console.print(f"{RESULTS.relative_to(ROOT)} is written")
    left = [one.name for one in todo if not done(one)]
    if left and not args.write_only:
        raise SystemExit(f"not done: {', '.join(left)}; the same command tries again")


if __name__ == "__main__":
    main()
