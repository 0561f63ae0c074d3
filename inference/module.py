"""A PyroModule that never touches the global parameter store."""

from __future__ import annotations

from typing import Any

import pyro
from pyro.nn import PyroModule
from pyro.nn.module import _is_module_local_param_enabled
from torch import nn

from .arguments import Checked

__all__ = ["LocalModule", "localise"]


class LocalModule(Checked, PyroModule):  # type: ignore[misc]
    """A :class:`pyro.nn.PyroModule` whose parameters live in the module alone.

    Pyro copies the parameters of a called module into one global store, where two modules of the
    same class then share them (pyro #3209). Here every call runs under `module_local_params`.
    Arguments of its constructor are checked against their annotations.
    """

    def __init__(self) -> None:
        with pyro.settings.context(module_local_params=True):
            super().__init__()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run `forward` with module-local parameters."""
        if _is_module_local_param_enabled():  # in a fit; the setting takes a twentieth of a step
            return super().__call__(*args, **kwargs)
        with pyro.settings.context(module_local_params=True):
            return super().__call__(*args, **kwargs)


def localise(module: nn.Module) -> None:
    """Let a PyroModule that was made elsewhere run under `module_local_params`.

    Its context lacks the store for that mode unless the mode was on when it was made.
    """
    for part in module.modules():
        if isinstance(part, PyroModule) and not hasattr(part._pyro_context, "param_state"):
            part._pyro_context.param_state = {"params": {}, "constraints": {}}
