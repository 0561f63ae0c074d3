"""Tables from the names of the command line to what they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from .errors import UnknownName
from .show import card, columns, first_line

__all__ = ["Table"]

T = TypeVar("T")


class Table(dict[str, T]):
    """A dict whose names can be completed: `GUIDES.flow` is `GUIDES["flow"]`.

    It shows each name with what it is, and an unknown name raises an error that suggests one.

    Args:
        what: what an entry is, for titles and errors, "guide".
        entries: by name.
        say: one line about an entry; by default the first of its docstring.
    """

    def __init__(
        self, what: str, entries: Mapping[str, T], *, say: Callable[[T], str] = first_line
    ) -> None:
        super().__init__(entries)
        self._what, self._say = what, say

    def __missing__(self, name: str) -> T:
        raise UnknownName(self, name, self._what)

    def __getattr__(self, name: str) -> T:
        if name.startswith("_"):  # what copying and showing look for
            raise AttributeError(name)
        try:
            return self[name]
        except UnknownName as error:
            raise AttributeError(str(error)) from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]

    def __reduce__(self) -> tuple[object, ...]:
        return dict, (dict(self),)  # a copy for another process needs no lines to show

    def rows(self) -> list[tuple[str, str]]:
        """Each name and what it is."""
        return [(name, self._say(entry)) for name, entry in self.items()]

    def __repr__(self) -> str:
        return columns(self.rows())

    def _repr_html_(self) -> str:
        return card(f"{len(self)} {self._what}s", self.rows())
