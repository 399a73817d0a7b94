"""The inner loop of a sweep with linear feedback (OPTQ, arXiv:2210.17323; LDLQ, arXiv:2307.13304) on a uniform grid.

    sweep_columns: target [out, c], error [out, c], update [c, c], scale and zero [out] -> codes [out, c]

    x_j = target_j + Σ_{i<j} e_i M_ij,   q_j = clamp(round(x_j / s) + z, 0, top),   e_j = w_j − s · (q_j − z)

In torch a column is seven operations, each of a few microseconds; in C, sixteen rows are rounded at once. The
specification is the loop in `quant/rounding.py`; sums are in another order than a product of matrices has.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from .. import build

_COLUMNS = 128  # COLUMNS of native.c
_SMALL = 2**12  # weights; below, waking other threads costs more than they save


def sweeps(target: Tensor) -> bool:
    """Whether `sweep_columns` is there for this target [out, c]: float32 on a CPU, few columns, with a compiler."""
    plain = type(target) is Tensor and target.is_cpu and target.dtype == torch.float32
    return plain and target.shape[1] <= _COLUMNS and _library() is not None


def sweep_columns(
    target: Tensor, error: Tensor, update: Tensor, scale: Tensor, zero: Tensor, top: int, *, whole_zeros: bool
) -> Tensor:
    """The codes [out, c] float32 of a target that `sweeps`; error [out, c] is W and becomes W − Ŵ, in place.

    update [c, c]: the feedback M, of which the part above the diagonal counts; scale, zero [out]. Without `whole_zeros`
    a code is round(x / s + z). error and update may be parts of larger matrices.
    """
    library = _library()
    assert library is not None and error.shape == target.shape
    rows = error if error.stride(1) == 1 else error.contiguous()
    update = update if update.stride(1) == 1 else update.contiguous()
    parts = [target.contiguous(), scale.contiguous(), zero.contiguous()]
    codes = torch.empty_like(parts[0])
    library.sweep_columns(
        parts[0].data_ptr(),
        *target.shape,
        rows.data_ptr(),
        rows.stride(0),
        update.data_ptr(),
        update.stride(0),
        parts[1].data_ptr(),
        parts[2].data_ptr(),
        top,
        whole_zeros,
        codes.data_ptr(),
        torch.get_num_threads() if target.numel() > _SMALL else 1,
    )
    if rows is not error:
        error.copy_(rows)
    return codes


@cache
def _library() -> ctypes.CDLL | None:
    library = build.library("sweep")
    if library is not None:
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.sweep_columns.argtypes = [
            pointer, size, size, pointer, size, pointer, size, pointer, pointer,
            ctypes.c_float, number, pointer, number,
        ]  # fmt: skip
        library.sweep_columns.restype = None
    return library
