"""Is this a guide? Checks that every guide of the library passes, to run on your own."""

from __future__ import annotations

import random
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape

import numpy as np
import pyro
import torch

from .case import Case, Failed, NotHere
from .checks import CHECKS, WAIT_FOR
from .errors import Incompatible, NeuroguideError
from .guide import Guide
from .observation import Observation
from .show import first_line

__all__ = ["CHECKS", "Conformance", "Finding", "check_guide"]

PASSED, FAILED, NOT_HERE, WAITS = "passed", "failed", "does not apply", "waits"
COLOURS = {PASSED: "#0072B2", FAILED: "#D55E00", NOT_HERE: "#767676", WAITS: "#767676"}


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: of the check.
        asked: what it asks of a guide.
        outcome: "passed", "failed", "does not apply", or "waits" for another check to pass.
        detail: why it does not apply, or what it waits for, or what is wrong.
        expected: of a failure, what would have been right.
        got: of a failure, what came.
        fix: of a failure, what to do about it.
    """

    name: str
    asked: str
    outcome: str
    detail: str = ""
    expected: str = ""
    got: str = ""
    fix: str = ""


@dataclass(frozen=True, repr=False)
class Conformance:
    """What all checks found; shows itself as a table.

    Attributes:
        guide: name of the guide's class.
        findings: one for each check.
    """

    guide: str
    findings: list[Finding]

    @property
    def passed(self) -> bool:
        """No check failed."""
        return not any(f.outcome == FAILED for f in self.findings)

    def __getitem__(self, name: str) -> Finding:
        """The finding of a check."""
        return {f.name: f for f in self.findings}[name]

    def require(self) -> None:
        """Raise :class:`Incompatible`, which says the first failure, unless all checks passed."""
        for f in self.findings:
            if f.outcome == FAILED:
                who = f"{self.guide}, check {f.name!r}"
                raise Incompatible(who, expected=f.expected, got=f.got, fix=f.fix)

    def __repr__(self) -> str:
        lines = [self._head()]
        for f in self.findings:
            lines.append(f"  {f.name:<12} {f.outcome:<15} {f.asked}")
            lines += textwrap.wrap(
                f.detail, 120, initial_indent=" " * 31, subsequent_indent=" " * 31
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [
            f"<tr><td><b>{f.name}</b></td><td style='color:{COLOURS[f.outcome]}'>{f.outcome}</td>"
            f"<td style='text-align:left'>{escape(f.asked)}<br><i>{escape(f.detail)}</i></td></tr>"
            for f in self.findings
        ]
        return f"<p>{escape(self._head())}</p><table>{''.join(rows)}</table>"

    def _head(self) -> str:
        count = {o: sum(f.outcome == o for f in self.findings) for o in (PASSED, FAILED)}
        rest = len(self.findings) - sum(count.values())
        return f"{self.guide}: {count[PASSED]} passed, {count[FAILED]} failed, {rest} not asked"


@contextmanager
def _put_back(case: Case) -> Iterator[None]:
    """Whatever a faulty guide does to generators, the parameter store and itself is undone."""
    store = pyro.get_param_store()
    arrays, python = np.random.get_state(), random.getstate()
    kept = store.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        store.clear()
        store.set_state(kept)
        case.put_back()
        np.random.set_state(arrays)
        random.setstate(python)


def check_guide(guide: Guide, x: Observation, *, seed: int) -> Conformance:
    """Run every check that the library's own guides pass; none stops the others.

    Args:
        guide: made for a model, trained or not; its parameters and all global states are kept.
        x: a few observations; of a guide that is not amortised, those it was fitted to.
        seed: of everything random.

    Example:
        >>> import inference, zoo
        >>> model = zoo.FactorAnalysis(7, 3)
        >>> guide = inference.MeanFieldEncoder(model)
        >>> inference.check_guide(guide, model.observations()[:3], seed=0).passed
        True
    """
    case, unmet, findings = Case(guide, x, seed), set[str](), []
    with _put_back(case), torch.enable_grad():  # of which checks ask, wherever they are called
        for name, check in CHECKS.items():
            before = [n for n in WAIT_FOR.get(name, ()) if n in unmet]
            found = _waiting(name, check, before[0]) if before else _run(name, check, case)
            findings.append(found)
            unmet |= {name} if found.outcome in (FAILED, WAITS) else set()
    return Conformance(type(guide).__name__, findings)


def _waiting(name: str, check: Callable[[Case], None], before: str) -> Finding:
    return Finding(name, first_line(check), WAITS, f"for the check {before!r} to pass")


def _run(name: str, check: Callable[[Case], None], case: Case) -> Finding:
    asked = first_line(check)
    try:
        check(case)
    except NotHere as reason:
        return Finding(name, asked, NOT_HERE, str(reason))
    except Failed as failure:
        expected, got, fix = failure.args
    except NeuroguideError as error:
        expected, got, fix = "no error", str(error), ""
    except Exception as error:  # of the user's own code, whatever it is
        where = traceback.extract_tb(error.__traceback__)[-1]
        expected, got = "no error", f"{type(error).__name__}: {error}"
        fix = f"It was raised in {where.name}, {where.filename.rpartition('/')[2]}:{where.lineno}."
    else:
        return Finding(name, asked, PASSED)
    detail = f"expected {expected}; got {got}. {fix}"
    return Finding(name, asked, FAILED, detail, expected, got, fix)
