"""Bad input through every door: each gets an error of ours, with argument, expectation, fact, fix.

What is bad is read off the annotations, so that a new model, guide or objective is fuzzed, too.
"""

from __future__ import annotations

import inspect
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

import diagnostics
import inference
import neuroguide
import zoo
from inference import GUIDES, OBJECTIVES, MeanFieldEncoder, NeuroguideError, UnknownName
from inference.arguments import (
    Count,
    Index,
    Positive,
    Probability,
    knobs_of_class,
    missed,
    parameters,
)

# ---------------------------------------------------------------------------- what is bad

TEXT = st.sampled_from(["nonsense", "", "0", "nan", "näm\u202fe"])
FRACTIONS = st.sampled_from([2.5, -0.5, math.nan, math.inf])
NO_INT = st.one_of(TEXT, FRACTIONS, st.booleans(), st.just([3]), st.just({}))
NO_FLOAT = st.one_of(TEXT, st.sampled_from([math.nan, math.inf, -math.inf, 1e300, 1j, [0.5], True]))
NOTHING = st.just(None)


def bad(hint: Any) -> st.SearchStrategy[Any]:
    """Values that an annotation rules out."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return st.one_of(bad(inner[0]), outside(*inner))
    if origin in (Union, UnionType):
        parts = [bad(part) for part in inner if part is not NoneType]
        return st.one_of(parts).filter(lambda v: missed(v, hint))
    if origin is Mapping:
        return st.one_of(TEXT.filter(bool), st.sampled_from([3, 2.5, {"a": 3}, object()]))
    if origin in (tuple, Sequence):
        wrong = st.one_of(st.sampled_from([3.5, "ab", True, object()]), NOTHING)
        return st.one_of(wrong, bad(inner[0]).map(lambda v: (v,)))
    if origin is type or hint is Path:
        return st.sampled_from([3, None, int, object(), 2.5])
    if hint is bool:
        return st.one_of(TEXT, NOTHING, st.sampled_from([2, 1, 0, 0.0]))
    if hint is int:
        return st.one_of(NO_INT, NOTHING)
    if hint is float:
        return st.one_of(NO_FLOAT, NOTHING)
    if hint is str:
        return st.one_of(TEXT.filter(bool), NOTHING, st.integers())
    return st.one_of(TEXT, NOTHING, st.integers(), st.just(object()), st.just(int))


def outside(kind: type, rule: Any) -> st.SearchStrategy[Any]:
    """Numbers outside a range."""
    if kind is int:
        return st.one_of(
            st.integers(max_value=rule.least - 1), st.integers(min_value=rule.most + 1)
        )
    low = st.floats(max_value=rule.least, exclude_max=True, allow_infinity=False)
    return st.one_of(low, st.floats(min_value=rule.most, exclude_min=True, allow_infinity=False))


def says_everything(error: NeuroguideError, name: str) -> bool:
    """Argument, expectation, fact and fix."""
    orders = [r"(.*?): expected (.+?); got (.+?)\. ?(\S.*)"]
    if isinstance(error, UnknownName):  # the fix may come first, for the names are many
        orders.append(r"(.*?): got (.+?)\. (Did you mean .+?\?) Expected (.+)")
    said = any(re.fullmatch(order, str(error), re.DOTALL) for order in orders)
    return said and name in str(error)


# ---------------------------------------------------------------------------- constructors

MODELS = [
    zoo.FactorAnalysis(7, 3, seed=1),
    zoo.SparseCoding(4),
    zoo.PoissonCoding(2),
    zoo.BayesianRegression(),
    zoo.StateSpace(steps=4),
]


def home(guide: Any) -> Any:
    """A model that a guide takes."""
    for model in MODELS:
        try:
            guide(model)
        except NeuroguideError:
            continue
        return model
    return None


def constructors():
    """Each constructor with what it needs, and its knobs."""
    for table, needs in ((GUIDES, True), (OBJECTIVES, False), (zoo.MODELS, False)):
        for made in table.values():
            if inspect.isclass(made):
                args = (home(made),) if needs else ()
                for name, p in knobs_of_class(made).items():
                    yield made, args, name, p.annotation


DOORS = [*constructors()]
KNOBS = [door for door in DOORS if door[2] != "model"]


# ---------------------------------------------------------------------------- functions

MODEL = MODELS[0]
X = MODEL.observations()[:3]
GUIDE = MeanFieldEncoder(MODEL, hidden=(4,))
COLLECTED = diagnostics.collect(MODEL, {"a": GUIDE}, X, draws=20, chains=2, seed=0, progress=False)
SIMULATED = {"model": MODEL, "guide": GUIDE, "problems": 4, "draws": 9, "seed": 0}
CALLS = {
    inference.fit: {"model": MODEL, "guide": GUIDE, "x": X, "steps": 1},
    diagnostics.draw: {"model": MODEL, "guide": GUIDE, "x": X, "seed": 0},
    diagnostics.collect: {"model": MODEL, "guides": {"a": GUIDE}, "x": X, "seed": 0},
    diagnostics.compare: {"model": MODEL, "guides": {"a": GUIDE}, "x": X, "seed": 0},
    diagnostics.compare_draws: {"trees": COLLECTED},
    diagnostics.sbc: SIMULATED,
    diagnostics.coverage: SIMULATED,
    diagnostics.tarp: SIMULATED,
    inference.Fit.load: {"path": "none.safetensors", "guide": GUIDE},
    diagnostics.RunDirectory.open: {"path": "none"},
    diagnostics.RunDirectory.create: {"path": "none", "config": {}},
}
NAMED = {  # what is said of them in words, and checked
    **dict.fromkeys(["steps", "batch_size", "draws", "chains", "problems"], Count),
    **dict.fromkeys(["thin", "simulations"], Count | None),
    "seed": Index, "lr": Positive, "levels": tuple[Probability, ...],
    "x": Tensor, "device": str,
}  # fmt: skip
WIDE = {"title", "exact", "dims", "config"}  # anything may be a title


@st.composite
def calls(draw):
    function = draw(st.sampled_from([*CALLS]))
    names = [n for n in inspect.signature(function).parameters if n not in WIDE]
    name = draw(st.sampled_from(names))
    hint = NAMED.get(name) or parameters(function)[name].annotation
    wrong = draw(tensors() if hint is Tensor else bad(hint))
    return function, CALLS[function], name, wrong


@st.composite
def tensors(draw):
    """Observations that are none of the model's: (B, 7), float32, finite."""
    shape = draw(st.sampled_from([(), (7,), (0, 7), (3, 6), (3, 8), (1, 3, 7), (7, 3)]))
    odd = X.clone()
    odd[draw(st.integers(0, 2)), draw(st.integers(0, 6))] = draw(
        st.sampled_from([math.nan, math.inf, -math.inf])
    )
    kinds = [torch.zeros(shape), odd, X.double(), X.int(), X.bool(), X.numpy(), X.tolist(), (X,)]
    return draw(st.sampled_from([*kinds, (), (X, X), "x", 3.5, X.to(torch.complex64)]))


@st.composite
def knocks(draw):
    made, args, name, hint = draw(st.sampled_from(DOORS))
    keywords = {} if name == "model" or not args else {"model": args[0]}
    return made, keywords, name, draw(bad(hint))


# ---------------------------------------------------------------------------- commands

ARGUMENTS = {"fit": ["factor_analysis", "flow"], "compare": ["factor_analysis"]}
SMALL = ["--steps", "1", "--quick"]
WRONG = {
    int: st.sampled_from(["-1", "x", "1.5", "", "nan", "-9", "1e3"]),
    float: st.sampled_from(["nan", "0", "-1", "x", "", "inf", "1e99"]),
    str: st.sampled_from(["nonsense", "flw", ""]),
}
OPTIONS = {
    **dict.fromkeys(["--steps", "--batch-size", "--seed"], int), "--lr": float,
    "--data": str, "--objective": str, "--device": str,
}  # fmt: skip
OF_COMPARE = {"--draws": int, "--chains": int, "--problems": int, "--guides": str}


@st.composite
def commands(draw):
    """A command line with one bad word."""
    name = draw(st.sampled_from([*ARGUMENTS]))
    if draw(st.integers(0, 4)) == 0:
        k = draw(st.integers(0, len(ARGUMENTS[name]) - 1))
        words = [*ARGUMENTS[name]]
        words[k] = draw(WRONG[str])
        return [name, *words, *SMALL]
    options = OPTIONS | (OF_COMPARE if name == "compare" else {})
    option = draw(st.sampled_from(sorted(options)))
    return [name, *ARGUMENTS[name], *SMALL, option, draw(WRONG[options[option]])]


def turned_away(words):
    with tempfile.TemporaryDirectory() as folder:
        result = CliRunner().invoke(neuroguide.app, [*words, "--out", f"{folder}/run"])
    assert result.exit_code == 2, (words, result.output, result.exception)
    assert "Traceback" not in result.output
    if "Usage:" not in result.stderr:  # typer's own, for what is no number at all
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr


# ---------------------------------------------------------------------------- tests


def refused(made, keywords, name, value):
    error = None
    try:
        made(**{**keywords, name: value})
    except NeuroguideError as raised:
        error = raised
    except TypeError as raised:
        if "multiple values" in str(raised):  # Python's own, as of unknown keywords
            return
        raise
    assert error, f"{made.__name__} takes {name}={value!r}"
    assert says_everything(error, name), error


MANY = {"deadline": None, "derandomize": True, "database": None}


@settings(max_examples=120, **MANY)
@given(knocks())
def test_constructors_refuse_bad_knobs(knock):
    refused(*knock)


@settings(max_examples=60, **MANY)
@given(calls())
def test_functions_refuse_bad_arguments(call):
    refused(*call)


@settings(max_examples=20, **MANY)
@given(commands())
def test_commands_refuse_bad_options(command):
    turned_away(command)


@pytest.mark.slow  # about 60 s
@settings(max_examples=600, **MANY)
@given(knocks())
def test_constructors_refuse_many_bad_knobs(knock):
    refused(*knock)


@pytest.mark.slow  # about 40 s
@settings(max_examples=330, **MANY)
@given(calls())
def test_functions_refuse_many_bad_arguments(call):
    refused(*call)


@pytest.mark.slow  # about 20 s
@settings(max_examples=70, **MANY)
@given(commands())
def test_commands_refuse_many_bad_options(command):
    turned_away(command)


@pytest.mark.parametrize("table", [GUIDES, OBJECTIVES, zoo.MODELS, zoo.data.DATA])
@settings(max_examples=25, **MANY)
@given(name=st.text(max_size=12))
def test_unknown_names_are_refused(table, name):
    if name in table:
        return
    with pytest.raises(UnknownName, match="one of"):
        table[name]


def test_what_is_right_is_taken():
    """Numpy's numbers, and lists where a tuple is."""
    assert zoo.FactorAnalysis(np.int64(7), 3).simulate(2, seed=0)
    assert zoo.SquareRoot(noise=1.0, centre=np.float32(0.5)).simulate(2, seed=0)
    assert MeanFieldEncoder(MODEL, hidden=[4]).knobs["hidden"] == [4]
    assert MeanFieldEncoder(MODEL, hidden=()).knobs["hidden"] == ()
