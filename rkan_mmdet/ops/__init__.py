"""The KAN convolution: needs torch alone."""

from .bases import BASES, Basis, Polynomial, build_basis
from .kan_conv import BACKENDS, NORMALIZATIONS, KANConv2d, can_run, kan_conv2d
from .reference import kan_conv2d_reference

__all__ = [
    'BACKENDS',
    'BASES',
    'NORMALIZATIONS',
    'Basis',
    'KANConv2d',
    'Polynomial',
    'build_basis',
    'can_run',
    'kan_conv2d',
    'kan_conv2d_reference',
]
