"""Safe loading of MMEngine's checkpoints: what may be unpickled is listed here, and nothing else runs."""

from __future__ import annotations

import pickle

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

_STATISTICS = ('min', 'max', 'current', 'mean')


def _guarded_getattr(owner: object, name: str) -> object:
    """Stands in for ``getattr`` while unpickling: a HistoryBuffer pickles its statistics as ``getattr(cls, name)``."""
    if owner is HistoryBuffer and name in _STATISTICS:
        return getattr(owner, name)
    raise pickle.UnpicklingError(f'refused: the file asks for getattr({owner!r}, {name!r})')


def allow_checkpoint_globals() -> None:
    """Let ``torch.load(weights_only=True)``, the default since torch 2.6, read what MMEngine writes.

    Called when :mod:`rkan_mmdet` is imported. Allowed are exactly the log history (``HistoryBuffer``) and the numpy
    arrays in it. Does nothing before torch 2.6, whose list can not name a stand-in for ``getattr``.
    """
    if tuple(int(part) for part in torch.__version__.split('.')[:2]) < (2, 6):
        return
    multiarray = getattr(np, '_core', None) or np.core  # numpy 2, numpy 1
    dtypes = {type(np.dtype(kind)) for kind in ('f8', 'f4', 'i8', 'i4', '?')}
    functions = (multiarray.multiarray._reconstruct, multiarray.multiarray.scalar)
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            np.ndarray,
            np.dtype,
            *dtypes,
            # checkpoints written under either numpy name these two by another path
            *((function, f'numpy.{core}.multiarray.{function.__name__}')
              for function in functions for core in ('core', '_core')),
            (_guarded_getattr, 'builtins.getattr'),
        ]
    )  # fmt: skip
