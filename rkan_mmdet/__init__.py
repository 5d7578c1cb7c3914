"""RKAN backbones for MMDetection 3; importing this registers them."""

import warnings

from .version import __version__

try:
    from mmengine.config.utils import MODULE2PACKAGE

    from . import backbones, hooks, visualization_hook  # noqa: F401
    from .checkpoint import allow_checkpoint_globals
except Exception as error:  # a broken build of mmcv fails in many ways
    # rkan_mmdet.ops needs torch alone and must not die of a broken MMDetection.
    warnings.warn(
        f'rkan_mmdet registers no backbone, since the MMDetection stack does not import: {error}. '
        '`python -m rkan_mmdet.doctor` says what mends it',
        stacklevel=2,
    )
else:
    allow_checkpoint_globals()
    MODULE2PACKAGE['rkan_mmdet'] = 'rkan_mmdet'  # configs may name `rkan_mmdet::` bases, which a wheel carries

__all__ = ['__version__']
