"""A pretended second device: tensors that say they are elsewhere, and refuse what a GPU refuses.

A tensor of the device "lazy:0" wraps one of the CPU's and computes with it; what comes out says the
same. Nothing else in torch answers to that name, and autograd runs it in the caller's thread. As on
a GPU, operations that mix it with tensors of the CPU raise, except of those without dimensions and
of indices, and so do NumPy, generators of the CPU and products of integers. Numbers are the CPU's
but for rounding and for kernels that look for a CPU.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from functools import cache
from unittest import mock

import torch
from torch.utils import _foreach_utils
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["DEVICE", "Elsewhere", "second_device"]

DEVICE = torch.device("lazy:0")
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPIES = {"copy_", "_to_copy", "_copy_from"}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"}


class Elsewhere(torch.Tensor):
    """A tensor of the CPU that says it is on the second device."""

    @staticmethod
    def __new__(cls, inner):
        """The shell: shape, strides and dtype of `inner`, and no memory of its own."""
        shell = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        shell.inner = inner
        return shell

    def data_ptr(self):
        return self.inner.data_ptr()

    def as_subclass(self, cls):
        return _both(cls)(self.inner)

    def tolist(self):
        return self.inner.tolist()

    def __repr__(self, *, tensor_contents=None):
        return f"Elsewhere({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


@cache
def _both(cls):
    """A subclass of somebody else's whose tensors are elsewhere."""
    return type(cls.__name__, (cls, Elsewhere), {})


class Dispatch(TorchDispatchMode):
    """Takes the calls that name the second device without a tensor of it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """An operation of ATen on the CPU's tensors; what it makes is on the second device or not."""
    name = func.overloadpacket.__name__
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    away = [t for t in tensors if isinstance(t, Elsewhere)]
    wanted = kwargs.get("device")
    there = bool(away) if wanted is None else torch.device(wanted).type == DEVICE.type
    if name not in COPIES:
        check(name, args, kwargs, there=there, away=away, tensors=tensors)
    if wanted is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    inner = lambda t: t.inner if isinstance(t, Elsewhere) else t  # noqa: E731
    plain_args, plain_kwargs = pytree.tree_map(inner, (args, kwargs))
    found = func(*plain_args, **plain_kwargs)
    if away and torch.Tag.inplace_view in func.tags:
        reshape_shell(func, args, kwargs)
    if there and name == "_to_copy" and any(found is inner(t) for t in tensors):
        found = found.clone()
    known = {id(t.inner): t for t in away}  # what was changed in place stays the same tensor

    def outer(t):
        if not isinstance(t, torch.Tensor) or not there:
            return t
        return known[id(t)] if id(t) in known else Elsewhere(t)

    if name in COPIES and not there:
        return found
    if func._schema.is_mutable and name in COPIES:
        return args[0]
    return pytree.tree_map(outer, found)


def reshape_shell(func, args, kwargs):
    """Let `unsqueeze_` and its like change the shape that the shell tells, too."""
    before = torch._C._meta_in_tls_dispatch_include()
    with no_dispatch():
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            func(*args, **kwargs)
        finally:
            torch._C._set_meta_in_tls_dispatch_include(before)


def check(name, args, kwargs, *, there, away, tensors):
    """What CUDA refuses."""
    strangers = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim()]
    if name in INDEXED:
        indices = [t for t in args[1] if t is not None]
        strangers = [t for t in strangers if not any(t is i for i in indices)]
    if there and strangers:
        shapes = [tuple(t.shape) for t in strangers]
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device; those of shapes {shapes} "
            f"are on cpu, others on {DEVICE}"
        )
    if name in INDEXED and not isinstance(args[0], Elsewhere) and away:
        raise RuntimeError(f"{name}: indices should be on cpu, as the indexed tensor is")
    generator = kwargs.get("generator")
    if there and generator is not None:
        raise RuntimeError(f"{name}: expected a generator of {DEVICE}, found one of the cpu")
    if there and name in PRODUCTS and not away[0].is_floating_point():
        raise RuntimeError(f"{name}: not implemented on {DEVICE} for {away[0].dtype}")


@contextmanager
def second_device():
    """The device exists inside the block, and optimisers fuse their steps on it."""
    name = "_get_fused_kernels_supported_devices"
    fused = [*getattr(_foreach_utils, name)(), DEVICE.type]
    with ExitStack() as stack:
        for module in (_foreach_utils, sys.modules[torch.optim.Optimizer.__module__]):
            stack.enter_context(mock.patch.object(module, name, return_value=fused))
        stack.enter_context(Dispatch())
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor fills on the CPU, and then moves
        yield
