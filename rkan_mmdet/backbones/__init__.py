"""Backbones with residual KAN paths beside their stages."""

from .residual_path import ResidualPath
from .rkan import (
    RKANRegNet,
    RKANRes2Net,
    RKANResNeSt,
    RKANResNet,
    RKANResNetV1d,
    RKANResNeXt,
    attach_paths,
)

__all__ = [
    'RKANRegNet',
    'RKANRes2Net',
    'RKANResNeSt',
    'RKANResNeXt',
    'RKANResNet',
    'RKANResNetV1d',
    'ResidualPath',
    'attach_paths',
]
