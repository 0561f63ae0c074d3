"""Arguments are what their annotations say: one check, for all constructors and functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Self, Union, get_args, get_origin

from .errors import BadInput

__all__ = [
    "LARGEST",
    "Checked",
    "Count",
    "Index",
    "NonNegative",
    "Portion",
    "Positive",
    "Probability",
    "Range",
    "Several",
    "Share",
    "check_arguments",
    "check_call",
    "knobs_of_class",
    "missed",
    "parameters",
]

MOST = 2**31  # of whatever is counted
LARGEST = 1e30  # squared, about what single precision can hold; also keeps out infinity
SMALLEST = 1e-30


@dataclass(frozen=True)
class Range:
    """What a number must be, beside an int or a float; stands in `Annotated`.

    Attributes:
        words: the range, after "expected".
        least: smallest number that is right.
        most: largest.
    """

    words: str
    least: float
    most: float


Count = Annotated[int, Range("an integer >= 1", 1, MOST)]
Several = Annotated[int, Range("an integer >= 2", 2, MOST)]
Index = Annotated[int, Range("an integer >= 0", 0, 2**63)]
Positive = Annotated[float, Range("a positive, finite number", SMALLEST, LARGEST)]
NonNegative = Annotated[float, Range("a number >= 0", 0, LARGEST)]
Probability = Annotated[float, Range("a number between 0 and 1, neither included", 1e-7, 1 - 1e-7)]
Portion = Annotated[float, Range("a share in [0, 1)", 0, 1 - 1e-9)]
Share = Annotated[float, Range("a number from 0 to 1", 0, 1)]


class Checked:
    """A class whose constructor refuses what contradicts the annotations of its arguments.

    Knobs that a constructor hands on as `**knobs` are checked against the next class's.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Check, then make; copies are made without arguments, so none is missed here."""
        kind: Any = cls  # mypy takes a type of Self for something that has no hash
        check_arguments(knobs_of_class(kind), args, kwargs, owner=cls.__name__)
        return super().__new__(cls)


def check_call(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Refuse what contradicts the annotations of a function's arguments.

    Args:
        function: where it is called, in the first line: `check_call(fit, locals())`.
        values: of its arguments.
    """
    check_arguments(parameters(function), (), values, owner=function.__name__)


@cache
def knobs_of_class(cls: Any) -> dict[str, inspect.Parameter]:
    """Arguments of a constructor and of those it hands its `**knobs` to; types as annotations."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        mine = parameters(vars(base)["__init__"])
        handed_on = [n for n, p in mine.items() if p.kind is p.VAR_KEYWORD]
        own = {n: p for n, p in mine.items() if n not in ("self", "args", *handed_on)}
        found = {**found, **{n: p for n, p in own.items() if n not in found}}
        if not handed_on:
            break
    return found


@cache
def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Arguments of a function, with types as annotations instead of their source."""
    return {
        name: p.replace(annotation=_evaluated(p.annotation, function))
        for name, p in inspect.signature(function).parameters.items()
    }


def _evaluated(annotation: Any, function: Callable[..., Any]) -> Any:
    """What an annotation stands for; anything where its names are known to type checkers only."""
    if not isinstance(annotation, str):
        return Any if annotation is inspect.Parameter.empty else annotation
    try:
        return eval(annotation, getattr(function, "__globals__", {}))
    except (NameError, AttributeError):
        return Any


def check_arguments(
    known: dict[str, inspect.Parameter],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    owner: str,
) -> None:
    """Raise :class:`BadInput` for the first argument that its annotation does not allow.

    Missing and unknown arguments are left to Python.
    """
    places = [n for n, p in known.items() if p.kind is not p.KEYWORD_ONLY]
    for name, value in [*zip(places, args, strict=False), *kwargs.items()]:
        parameter = known.get(name)
        if parameter is None or value is parameter.default:
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if wanted := missed(value, parameter.annotation):
            raise BadInput(
                name, expected=wanted, got=_shown(value), fix=_fix(parameter, value, owner)
            )


def _fix(parameter: inspect.Parameter, value: object, owner: str) -> str:
    if isinstance(value, type):
        return f"Build it first: {value.__name__}(...)."
    if parameter.default is parameter.empty:
        return f"See help({owner})."
    return f"The default is {parameter.name}={parameter.default!r}."


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{type(value).__name__} {text[:60]}..."


def missed(value: Any, hint: Any) -> str:
    """What an annotation asks for, where the value is something else; empty where it is right."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, rule = inner[:2]
        if not isinstance(rule, Range):
            return missed(value, kind)
        wrong = missed(value, kind) or not rule.least <= value <= rule.most
        return rule.words if wrong else ""
    if origin in (Union, UnionType):
        each = [missed(value, part) for part in inner]
        words = dict.fromkeys(w for w in each if w != "None")  # the default, as the fix says
        return " or ".join(words) if all(each) else ""
    if origin in (tuple, Sequence):
        return _missed_entries(value, inner)
    if origin is Mapping:
        return _missed_values(value, *inner)
    if origin is Callable:
        return "" if callable(value) else "something to call"
    if origin is type:
        right = isinstance(value, type) and issubclass(value, inner[0])
        return "" if right else f"a kind of {inner[0].__name__}"
    if hint in (None, NoneType):
        return "" if value is None else "None"
    if hint in _PLAIN:
        expected, fits = _PLAIN[hint]
        return "" if fits(value) else expected
    if isinstance(hint, type) and origin is None:
        return _missed_class(value, hint)
    return ""


def _missed_entries(value: Any, inner: tuple[Any, ...]) -> str:
    """Sequences: entries of one kind, or a fixed number of them."""
    free = len(inner) == 1 or (len(inner) == 2 and inner[1] is Ellipsis)
    number = "a sequence, each entry" if free else f"{len(inner)} entries, each"
    if isinstance(value, str | bytes | dict | set):
        entries = None
    else:
        try:
            entries = value.tolist() if hasattr(value, "tolist") else list(value)
        except TypeError:
            entries = None
    kinds = [inner[0]] * len(entries) if free and isinstance(entries, list) else list(inner)
    known = isinstance(entries, list) and len(entries) == len(kinds)
    found = [missed(v, k) for v, k in zip(entries or [], kinds, strict=False)]
    if known and not any(found):
        return ""
    words = next(filter(None, found), "") or _words(inner[0])
    return f"{number} {words}"


def _missed_values(value: Any, _: Any, hint: Any) -> str:
    """Mappings, by what stands in them."""
    if not isinstance(value, Mapping):
        return "a mapping by name"
    found = next((m for v in value.values() if (m := missed(v, hint))), "")
    return f"a mapping by name, each entry {found}" if found else ""


def _missed_class(value: object, hint: type) -> str:
    """Instances; of protocols only where they can be told at run time, and never a class."""
    if hint in (Any, object, type) or hint.__module__.startswith("torch"):
        return ""  # tensors have checks of their own, with better advice
    protocol = getattr(hint, "_is_protocol", False)
    if protocol and not getattr(hint, "_is_runtime_protocol", False):
        return ""
    right = isinstance(value, hint) and not (protocol and isinstance(value, type))
    return "" if right else f"an instance of {hint.__name__}"


def _words(hint: Any) -> str:
    """What an annotation asks for."""
    if get_origin(hint) is Annotated:
        return str(get_args(hint)[1].words)
    return _PLAIN[hint][0] if hint in _PLAIN else "of its kind"


def _number(value: Any) -> bool:
    right = isinstance(value, Real) and not isinstance(value, bool)
    return right and bool(-LARGEST < value < LARGEST)  # NaN is in no range


_PLAIN: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda v: isinstance(v, bool)),
    int: ("an integer", lambda v: isinstance(v, Integral) and not isinstance(v, bool)),
    float: ("a finite number", _number),
    str: ("a string", lambda v: isinstance(v, str)),
}
