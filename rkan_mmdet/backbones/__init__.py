"""Backbones with residual KAN paths beside their stages."""

from .fused_path import fuse_paths
from .plugins import SEPlugin
from .residual_path import ResidualPath
from .rkan import (
    RKANBackbone,
    RKANRegNet,
    RKANRes2Net,
    RKANResNeSt,
    RKANResNet,
    RKANResNetV1d,
    RKANResNeXt,
    attach_paths,
    probe_stage,
)

__all__ = [
    'RKANBackbone',
    'RKANRegNet',
    'RKANRes2Net',
    'RKANResNeSt',
    'RKANResNeXt',
    'RKANResNet',
    'RKANResNetV1d',
    'ResidualPath',
    'SEPlugin',
    'attach_paths',
    'fuse_paths',
    'probe_stage',
]
