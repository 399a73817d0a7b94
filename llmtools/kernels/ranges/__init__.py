"""The search for a group's range on a uniform grid: which share of its whole range stores it with the least error.

    argmin_k Σ_j |ŵ_j − w_j|^2.4, or with an importance [c] argmin_k Σ_j importance_j · (ŵ_j − w_j)²

    best_shares: group [n, c], low and high [n, 1], shares [K], importance [c] -> [n] int64, the first of equal ones

The specification in torch is the grid's own arithmetic, K times (`quant/grids/affine.py`). Ranges are here the same to
the last bit; their errors agree to about 1e-6, and so do the choices wherever two ranges are further apart than that.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from .. import build

_LANES = 16  # as in native.h
_SMALL = 2**12  # weights; below, waking other threads costs more than they save


class Kind(ctypes.Structure):
    """The grid: `Kind` of native.c."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("symmetric", ctypes.c_int),
        ("whole_zeros", ctypes.c_int),
        ("top", ctypes.c_float),
        ("least", ctypes.c_float),
        ("most", ctypes.c_float),
    )


def searches(group: Tensor) -> bool:
    """Whether `best_shares` is there for groups of this device and type: float32 on a CPU, with a compiler."""
    return type(group) is Tensor and group.is_cpu and group.dtype == torch.float32 and _library() is not None


def best_shares(
    group: Tensor, low: Tensor, high: Tensor, shares: Tensor, kind: Kind, importance: Tensor | None = None
) -> Tensor:
    """See the package's docstring; for groups that `searches`."""
    library = _library()
    assert library is not None and low.shape == high.shape == (len(group), 1)
    short = -len(shares) % _LANES
    shares = torch.cat([shares, shares[-1:].expand(short)]).to(group)  # what is repeated is not the first of equal ones
    tensors = [group.contiguous(), low.contiguous(), high.contiguous()]
    weights = None if importance is None else importance.to(group).contiguous()
    best = torch.empty(len(group), dtype=torch.int64, device="cpu")
    library.best_shares(
        tensors[0].data_ptr(),
        None if weights is None else weights.data_ptr(),
        *group.shape,
        tensors[1].data_ptr(),
        tensors[2].data_ptr(),
        shares.data_ptr(),
        len(shares),
        kind,
        best.data_ptr(),
        torch.get_num_threads() if group.numel() > _SMALL else 1,
    )
    return best


@cache
def _library() -> ctypes.CDLL | None:
    library = build.library("ranges")
    if library is not None:
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.best_shares.argtypes = [
            pointer, pointer, size, size, pointer, pointer, pointer, size, ctypes.POINTER(Kind), pointer, number,
        ]  # fmt: skip
        library.best_shares.restype = None
    return library
