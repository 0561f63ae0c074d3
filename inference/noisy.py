"""Noisy weights that a program may use as tensors: local reparameterisation, for any program."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import GetSetDescriptorType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnf

__all__ = ["Ledger", "NoisyDrive", "NoisyWeight", "Use", "UsedTwice"]

Product = Callable[[Tensor, Tensor], Tensor]
SILENT = 1e-30  # variance that stands for none, so that its root has a gradient
ONE = torch.ones(())  # the input of a bias


class UsedTwice(RuntimeError):
    """Each use of a weight would see a weight of its own.

    No TypeError, for torch's operators turn those into NotImplemented.

    Args:
        site: of the weight.
    """

    def __init__(self, site: str) -> None:
        super().__init__(site)
        self.site = site


class Use(NamedTuple):
    """How a noisy weight met its inputs.

    Attributes:
        inputs: presynaptic activity.
        weights: means, in the shape in which the program had them.
        product: of inputs and weights.
    """

    inputs: Tensor
    weights: Tensor
    product: Product


class Ledger:
    """What became of the noisy weights in one run of a program.

    Attributes:
        draws: weights that were drawn, by site.
        uses: weights whose products were drawn in their place, by site.
        drives: all such products.
    """

    def __init__(self) -> None:
        self.draws: dict[str, Tensor] = {}
        self.uses: dict[str, Use] = {}
        self.drives: list[NoisyDrive] = []

    def weight(self, site: str, means: Tensor, variances: Tensor) -> NoisyWeight:
        """Normal(means, variances), all entries independent."""

        def draw() -> Tensor:
            if site not in self.draws:
                self.claim(site)
                self.draws[site] = _noisy(means, variances)
            return self.draws[site]

        return NoisyWeight.of(means, variances, draw, site, self)

    def drive(self, means: Tensor, variances: Tensor, sites: tuple[str, ...]) -> NoisyDrive:
        """Products of weights, of which each row is to be drawn on its own."""
        drive: NoisyDrive = _shell(NoisyDrive, means, variances)
        drive.sites, drive.value, drive.spent = sites, None, False
        self.drives.append(drive)
        return drive

    def claim(self, site: str, use: Use | None = None) -> None:
        """Note what a weight is used for.

        Raises:
            UsedTwice: it was used before.
        """
        if site in self.uses:
            raise UsedTwice(site)
        if use is not None:
            self.uses[site] = use


class _Noisy(Tensor):
    """Independent Normal numbers, posing as a tensor.

    Its storage has NaN, so that what gets past `__torch_function__` does not go unnoticed.
    """

    means: Tensor
    variances: Tensor

    def __repr__(self) -> str:  # type: ignore[override]
        """What its storage would not tell."""
        return f"{type(self).__name__} of shape {tuple(self.shape)}"

    @property
    def drawn(self) -> bool:
        """There is a draw, by which everybody must abide."""
        raise NotImplementedError

    def draw(self) -> Tensor:
        """One draw, always the same."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """By a rule if there is one, else with draws."""
        with torch._C.DisableTorchFunctionSubclass():
            rule = RULES.get(func)
            found = None if rule is None else rule(func, *args, **(kwargs or {}))
            if found is None:
                found = func(*_draws(args), **(_draws(kwargs) if kwargs else {}))
            return found


class NoisyWeight(_Noisy):
    """Weights with noise.

    Where they meet inputs, in a matrix product or as a bias, comes out what each row of inputs
    would drive, were all weights drawn anew for each row: local reparameterisation. Views are noisy
    weights, and so are sums and products with tensors that leave the shape as it is. Whatever else
    is done with weights is done with one draw of them.

    References:
        Variational Dropout and the Local Reparameterization Trick (Kingma, Salimans & Welling,
        2015), section 2.2 https://arxiv.org/abs/1506.02557
    """

    site: str
    ledger: Ledger
    make: Callable[[], Tensor]

    @classmethod
    def of(
        cls, means: Tensor, variances: Tensor, make: Callable[[], Tensor], site: str, ledger: Ledger
    ) -> NoisyWeight:
        """Weights of a site; `make` draws them."""
        weight: NoisyWeight = _shell(cls, means, variances)
        weight.make, weight.site, weight.ledger = make, site, ledger
        return weight

    def like(self, means: Tensor, variances: Tensor, make: Callable[[], Tensor]) -> NoisyWeight:
        """The same weights in another form."""
        return NoisyWeight.of(means, variances, make, self.site, self.ledger)

    @property
    def drawn(self) -> bool:
        """There is a draw, by which everybody must abide."""
        return self.site in self.ledger.draws

    def draw(self) -> Tensor:
        """One draw, always the same."""
        return self.make()


class NoisyDrive(_Noisy):
    """What noisy weights drive; drawn where it is used, unless a bias comes on top of it first.

    Attributes:
        sites: of the weights.
        value: the draw.
        spent: a bias has come on top.
    """

    sites: tuple[str, ...]
    value: Tensor | None
    spent: bool

    @property
    def drawn(self) -> bool:
        """There is a draw, by which everybody must abide."""
        return self.value is not None

    def draw(self) -> Tensor:
        """One draw, always the same."""
        if self.spent:
            raise UsedTwice(self.sites[0])
        if self.value is None:
            biased = len(self.sites) > 1  # else a row of zero inputs has no noise, and no gradient
            variances = self.variances if biased else self.variances + SILENT
            self.value = _noisy(self.means, variances)
        return self.value


# A rule gives what comes out, or None where draws have to do.


def _view(func: Any, weight: Any, *args: Any, **kwargs: Any) -> NoisyWeight | None:
    """The same entries in another shape, or some of them."""
    if not (isinstance(weight, NoisyWeight) and all(map(_plain, args))):
        return None
    means = func(weight.means, *args, **kwargs)
    if means.numel() > weight.means.numel():  # copies of an entry are not independent
        return None
    variances = func(weight.variances, *args, **kwargs)
    return weight.like(means, variances, lambda: func(weight.draw(), *args, **kwargs))


def _plain(arg: Any) -> bool:
    """Sizes, dims and slices; tensors and lists could pick an entry twice."""
    if isinstance(arg, tuple):
        return all(map(_plain, arg))
    return arg is None or isinstance(arg, int | slice | type(Ellipsis))


def _shift(func: Any, a: Any, b: Any, **kwargs: Any) -> _Noisy | None:
    """Weights plus constants, or biases on top of inputs or of what other weights drive."""
    if kwargs or isinstance(a, NoisyWeight) is isinstance(b, NoisyWeight):
        return None
    bias, other = (a, b) if isinstance(a, NoisyWeight) else (b, a)
    drive = other if isinstance(other, NoisyDrive) and not other.drawn else None
    below = _draws(other) if drive is None else drive.means
    means = func(bias.means, below) if bias is a else func(below, bias.means)
    if drive is None and means.shape == bias.means.shape:
        return bias.like(means, bias.variances, lambda: func(*_draws((a, b))))
    if bias.drawn or (drive is not None and (drive.spent or means.shape != drive.means.shape)):
        return None
    bias.ledger.claim(bias.site, Use(ONE, bias.means, lambda x, w: (x * w).expand(means.shape)))
    if drive is None:
        return bias.ledger.drive(means, bias.variances, (bias.site,))
    drive.spent = True
    variances = bias.variances + drive.variances
    return bias.ledger.drive(means, variances, (*drive.sites, bias.site))


def _scale(func: Any, a: Any, b: Any, **kwargs: Any) -> NoisyWeight | None:
    """Weights times constants."""
    weight, other = (a, b) if isinstance(a, NoisyWeight) else (b, a)
    if kwargs or not isinstance(weight, NoisyWeight) or isinstance(other, _Noisy):
        return None
    if func in DIVISIONS and weight is not a:
        return None

    def apply(value: Tensor) -> Tensor:
        scaled: Tensor = func(value, b) if weight is a else func(a, value)
        return scaled

    means = apply(weight.means)
    if means.shape != weight.means.shape:
        return None
    return weight.like(means, apply(apply(weight.variances)), lambda: apply(weight.draw()))


def _negative(func: Any, weight: Any, **kwargs: Any) -> NoisyWeight | None:
    if kwargs or not isinstance(weight, NoisyWeight):
        return None
    return weight.like(-weight.means, weight.variances, lambda: -weight.draw())


def _product(func: Any, a: Any, b: Any, **kwargs: Any) -> NoisyDrive | None:
    """Inputs times weights, or weights times inputs."""
    if kwargs:
        return None
    if isinstance(b, NoisyWeight) and not b.drawn:
        return _drive(_draws(a), b, func)
    if isinstance(a, NoisyWeight) and not a.drawn:
        return _drive(_draws(b), a, lambda x, w: func(w, x))
    return None


def _linear(func: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """Inputs times weights, plus biases."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    x, weight, bias = _draws(given["input"]), given["weight"], given.get("bias")
    local = isinstance(weight, NoisyWeight) and not weight.drawn
    drive = _drive(x, weight, func) if local else func(x, _draws(weight))
    if bias is None:
        return drive
    found = _shift(Tensor.add, drive, bias)
    return _draws(drive) + _draws(bias) if found is None else found


def _drive(inputs: Tensor, weight: NoisyWeight, product: Product) -> NoisyDrive:
    """Mean x M and variance x^2 V: what draws of the weights would have in each cell."""
    weight.ledger.claim(weight.site, Use(inputs, weight.means, product))
    means = product(inputs, weight.means)
    return weight.ledger.drive(means, product(inputs * inputs, weight.variances), (weight.site,))


def _metadata(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What does not depend on values."""
    return func(*args, **kwargs)


def _noisy(means: Tensor, variances: Tensor) -> Tensor:
    return means + variances.sqrt() * torch.randn_like(means)


def _draws(value: Any) -> Any:
    """Draws in place of what is noisy, in containers too."""
    if isinstance(value, _Noisy):
        return value.draw()
    if isinstance(value, tuple | list):
        return type(value)(map(_draws, value))
    if isinstance(value, dict):
        return {k: _draws(v) for k, v in value.items()}
    return value


@lru_cache(maxsize=64)
def _nan(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(torch.nan, dtype=dtype, device=device).expand(shape)


def _shell(cls: Any, means: Tensor, variances: Tensor) -> Any:
    shell = _nan(means.shape, means.dtype, means.device).as_subclass(cls)
    shell.means, shell.variances = means, variances
    return shell


def _functions(names: str) -> set[Any]:
    """Functions and methods of torch of these names, and what reads attributes."""
    places = [(where, name) for name in names.split() for where in (torch, Tensor)]
    found = [getattr(where, name) for where, name in places if hasattr(where, name)]
    return {f.__get__ if isinstance(f, GetSetDescriptorType) else f for f in found}


DIVISIONS = _functions("div divide true_divide __truediv__")
KINDS: dict[Callable[..., Any], str] = {
    _metadata: "shape dtype device layout ndim requires_grad is_leaf is_cuda is_sparse is_meta "
    "is_quantized dim ndimension size numel nelement element_size is_floating_point is_complex "
    "get_device __len__ __hash__ zeros_like ones_like empty_like full_like rand_like randn_like "
    "new_zeros new_ones new_empty new_full new_tensor",
    _view: "T mT t transpose permute swapaxes swapdims movedim moveaxis reshape view flatten "
    "unflatten squeeze unsqueeze narrow select expand contiguous __getitem__",
    _shift: "add sub subtract rsub __add__ __radd__ __sub__ __rsub__",
    _scale: "mul multiply div divide true_divide __mul__ __rmul__ __truediv__",
    _negative: "neg negative __neg__",
    _product: "matmul mm bmm mv __matmul__",
}
RULES = {func: rule for rule, names in KINDS.items() for func in _functions(names)}
RULES[nnf.linear] = _linear
