"""What a generative model is here, and how any Pyro model becomes one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from inference.errors import BadInput, Incompatible, NoExactPosterior
from inference.guide import Guide, check_counts
from inference.guides.nuts import NUTS
from inference.latents import Latents, Values
from inference.module import LocalModule, localise
from inference.observation import Observation, check_observation, parts
from inference.show import card, first_line

__all__ = ["Model", "Paper", "from_pyro"]


@dataclass(frozen=True)
class Paper:
    """Where a model comes from.

    Attributes:
        authors: as cited, "Rubin & Thayer".
        year: of publication.
        title: of the paper.
        url: arXiv or DOI.
        equations: those the model uses.
    """

    authors: str
    year: int
    title: str
    url: str
    equations: str = ""

    def __str__(self) -> str:
        return f"{self.authors} {self.year}"


class Model(LocalModule):
    """A generative model: a Pyro program of latents z and an observation x.

    Attributes:
        title: printable name.
        paper: source.
        dims: names of the axes of each site after the problem axis, for ArviZ.
        image_shape: how to fold an observation into a picture, where it is one.
    """

    title: ClassVar[str]
    paper: ClassVar[Paper]
    dims: Mapping[str, Sequence[str]] = {}
    image_shape: tuple[int, ...] | None = None
    tuple_of: int = 0

    def extra_repr(self) -> str:
        """Its latents and the shape of its observations, inside the brackets."""
        if not hasattr(self, "x_0"):  # not yet built
            return ""
        return f"{Latents(self).described()}; x: {self._seen()}"

    def _seen(self) -> str:
        return ", ".join(str(tuple(t.shape)) for t in parts(self.observations()))

    def _repr_html_(self) -> str:
        latents = Latents(self)
        problems = "of which each row is a problem" if latents.plated else "all of them one problem"
        rows = [
            ("what it is", first_line(self)),
            ("latents", latents.described()),
            ("observations", f"{self._seen()}, {problems}"),
            ("source", f"{self.paper}: {self.paper.title} {self.paper.url}"),
        ]
        return card(self.title, rows)

    def forward(self, x: Observation | None = None) -> Any:
        """The generative process; x is None means: simulate one problem."""
        raise NotImplementedError

    def keep(self, x: Observation) -> None:
        """Make x the model's own observations; as buffers they follow its device and dtype."""
        self.tuple_of = len(x) if isinstance(x, tuple) else 0
        for k, t in enumerate(parts(x)):
            self.register_buffer(f"x_{k}", t, persistent=False)

    def belonging_to(self, x: Tensor) -> Self:
        """This model with rows of data x (N, F) as its own observations, in x's dtype and place."""
        self.image_shape = None
        self.keep(x[:100].clone())
        placed: Self = self.to(x)
        return placed

    def keep_draws(
        self, like: Observation, n: int = 100, *, before: Tensor | None = None, seed: int
    ) -> None:
        """Make n draws from the joint the model's own observations.

        Args:
            like: one observation or more, of the right shapes; inputs among them are cycled.
            n: draws.
            before: famous or hard observations that stand before the draws.
            seed: draws depend on it alone.
        """
        self.keep(like)
        drawn = self.simulate(n, seed=seed)[1]
        self.keep(drawn if before is None else torch.cat([before, *parts(drawn)]))

    def observations(self) -> Observation:
        """Canonical or real inputs, (B, ...)."""
        tensors = tuple(getattr(self, f"x_{k}") for k in range(self.tuple_of or 1))
        return tensors if self.tuple_of else tensors[0]

    @property
    def plated(self) -> bool:
        """Each row of x is a problem of its own."""
        return Latents(self).plated

    def exact(self) -> Guide:
        """The exact posterior, a guide.

        Raises:
            NoExactPosterior: there is none; the message names what to use instead.
        """
        raise NoExactPosterior(
            self.title,
            expected="an exact posterior",
            got="a model without one",
            fix="Compare with reference=inference.NUTS(model), or use sbc, coverage, tarp; a small "
            "model of your own gets one by from_pyro(exact=zoo.Quadrature), or zoo.Enumerated.",
        )

    def reference(self) -> Guide:
        """A slow, asymptotically exact guide, for stored draws: NUTS unless the model says."""
        return NUTS(self)

    def predict(self, z: Values) -> Tensor:
        """Mean of the observation given latents (..., B, *shape): for reconstructions.

        Raises:
            NotImplementedError: the model does not say.
        """
        raise NotImplementedError

    def source(self) -> str:
        """Source text of the generative process; `for_data` is no part of it."""
        text = inspect.getsource(type(self))
        for member in vars(type(self)).values():
            if isinstance(member, classmethod):
                text = text.replace(inspect.getsource(member.__func__), "")
        return text

    def simulate(self, n: int, *, seed: int) -> tuple[Values, Observation]:
        """Latents and observations of n problems from the joint.

        Args:
            n: problems.
            seed: draws depend on it alone.

        Returns:
            latents by site name, each (n, *shape), and x of shape (n, ...).
        """
        check_counts(n=n)
        return Latents(self).joint(n, seed=seed)

    @classmethod
    def for_data(cls, x: Tensor, **knobs: Any) -> Self:
        """A model sized for data (N, F), ready to be learned from them.

        Raises:
            BadInput: the model has no parameters to learn.
        """
        raise BadInput(
            "data",
            expected="a model that can be learned from data",
            got=cls.__name__,
            fix="Leave --data out: its own observations are used.",
        )


class _PyroModel(Model):
    """A user's Pyro program under our contract."""

    title = "user's model"
    paper = Paper("you", 0, "your own model", "")

    def __init__(
        self,
        program: Callable[..., Any],
        x: Observation,
        title: str,
        exact: Callable[[Model], Guide] | None,
        dims: Mapping[str, Sequence[str]],
    ) -> None:
        super().__init__()
        if isinstance(program, nn.Module):
            localise(program)
            nn.Module.add_module(self, "program", program)  # keeps the program's own Pyro context
        else:
            self.__dict__["program"] = program
        self.keep(x)
        self.title, self.dims = title, dims  # type: ignore[misc]
        self.__dict__["make_exact"] = exact

    def _get_name(self) -> str:  # what nn.Module calls itself when shown
        return self.title

    def forward(self, x: Observation | None = None) -> Any:
        """The user's program, called with the tensors of x."""
        return self.program(*parts(self.observations() if x is None else x))

    def source(self) -> str:
        """Source of the user's program, or its byte code where there is no file."""
        program = type(self.program) if isinstance(self.program, nn.Module) else self.program
        try:
            return inspect.getsource(program)
        except (OSError, TypeError):
            code = getattr(program, "__code__", None)
            return repr((code.co_code, code.co_consts)) if code else repr(program)

    def exact(self) -> Guide:
        """The user's exact posterior, where one was given."""
        make = self.__dict__["make_exact"]
        guide: Guide = make(self) if make else super().exact()
        return guide


def from_pyro(
    program: Callable[..., Any],
    x: Observation,
    *,
    title: str = "",
    exact: Callable[[Model], Guide] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Model:
    """Any Pyro model with one observed site.

    With every latent inside the plate "data", each row of x is an independent problem. With none
    inside it, the whole of x is one problem.

    Args:
        program: called as program(x), or program(*x) where x is a tuple such as (inputs, labels).
        x: example observations; guides take shapes and dtype from them.
        title: printable name; by default the program's.
        exact: makes the exact posterior from the model, `zoo.Enumerated` for instance.
        dims: names of each site's axes after the problem axis.

    Raises:
        BadInput: x is not finite, or not a tensor; a site has axes that are neither a plate nor
            an event.
        Incompatible: no latent or not one observed site; latents both inside and outside the plate
            "data"; a structure that changes from call to call; parameters made with `pyro.param`.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def program(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(1.0, 2.0))
        ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> from_pyro(program, torch.tensor([0.3, 1.2])).title
        'program'
    """
    check_observation(x, x)
    name = title or getattr(program, "__name__", type(program).__name__)
    model = _PyroModel(program, x, name, exact, dims or {})
    try:
        Latents(model)
    except NotImplementedError as error:
        if "pyro.param" not in str(error):
            raise
        raise Incompatible(
            name,
            expected="parameters that live in a module",
            got="a pyro.param statement",
            fix="Make the program a PyroModule with PyroParam attributes.",
        ) from error
    except ValueError as error:
        _explain_shape(error)
        raise
    return model


def _explain_shape(error: ValueError) -> None:
    """Raise :class:`BadInput` in place of Pyro's error for an axis that belongs to no plate."""
    pattern = r"Shape mismatch inside plate\('(.+?)'\) at site (\S+) dim (-?\d+), (\d+) vs (\d+)"
    found = re.match(pattern, str(error))
    if not found:
        return
    plate, site, dim, rows, size = found.groups()
    raise BadInput(
        f"site {site!r}",
        expected=f"size {rows} along dim {dim}, that of the plate {plate!r}",
        got=f"size {size}",
        fix=f"If that axis is part of one value of {site!r}, end its distribution with "
        f".to_event(1), as in dist.Normal(zeros({size}), 1.0).to_event(1); if its entries are "
        "independent, put it into a plate of its own, and give both plates a dim.",
    ) from error
