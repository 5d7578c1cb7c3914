"""RKAN backbones for MMDetection 3; importing this registers them."""

import warnings

from .version import __version__

try:
    from . import backbones  # noqa: F401
except ImportError as error:
    # rkan_mmdet.ops needs torch alone and must not die of a broken MMDetection.
    warnings.warn(
        f'rkan_mmdet registers no backbone, since the MMDetection stack does not import: {error}', stacklevel=2
    )

__all__ = ['__version__']
