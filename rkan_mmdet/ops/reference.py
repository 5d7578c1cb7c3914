"""The KAN convolution by unfolding windows: slow, obvious, any dtype; the judge of every other implementation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .bases import Basis


def normalize_windows(windows: Tensor, normalization: str, arctan_scale: Tensor | None) -> Tensor:
    """Map the values of each window into the domain of a polynomial basis.

    Args:
        windows (Tensor[N, C, k*k, L]): The values of each window, padding zeros included.
        normalization (str): ``'tanh'``, or over the window ``'min-max'``, ``'arctan'``, ``'standardization'``.
        arctan_scale (Tensor[] or None): The learned factor of ``'arctan'``.

    Returns:
        Tensor[N, C, k*k, L]: The normalized values.
    """
    if normalization == 'tanh':
        return torch.tanh(windows)
    if normalization == 'min-max':
        low, high = windows.amin(2, keepdim=True), windows.amax(2, keepdim=True)
        return 2 * _over(windows - low, high - low) - 1
    centred = windows - windows.mean(2, keepdim=True)
    if normalization == 'standardization':
        return _over(centred, windows.std(2, keepdim=True))
    return 2 / math.pi * torch.atan(centred * arctan_scale)


def _over(values: Tensor, spread: Tensor) -> Tensor:
    """``values / (spread + 1e-8)``, in units in which ONNX's optimizer does not take the addition for one of 0."""
    return values * 1024 / (spread * 1024 + 1024e-8)


def kan_conv2d_reference(
    x: Tensor,
    linear_weight: Tensor,
    basis_weight: Tensor | None = None,
    basis_scale: Tensor | None = None,
    linear_bias: Tensor | None = None,
    *,
    basis: Basis,
    kernel_size: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    normalization: str = 'tanh',
    arctan_scale: Tensor | None = None,
) -> Tensor:
    """The same function as :func:`rkan_mmdet.ops.kan_conv2d`, whose docstring explains the arguments.

    Computed in the dtype of ``x``; differentiated by autograd alone.
    """
    pairs = dict(kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation)
    pairs = {name: (value, value) if isinstance(value, int) else tuple(value) for name, value in pairs.items()}
    n, c = x.shape[:2]
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x.shape[2:], *(pairs[k] for k in ('kernel_size', 'stride', 'padding', 'dilation')))
    ]
    windows = F.unfold(x, **pairs).reshape(n, c, linear_weight.shape[1], sizes[0] * sizes[1])
    outputs = []
    for k in range(linear_weight.shape[0]):
        y = torch.einsum('nctl,t->ncl', windows, linear_weight[k])
        if basis.num_functions:
            weight = basis_weight[k] if basis_scale is None else basis_weight[k] * basis_scale[k][:, None]
            u = windows
            if basis.on_domain:
                u = normalize_windows(windows, normalization, None if arctan_scale is None else arctan_scale[k])
            y = y + torch.einsum('nctlj,tj->ncl', torch.stack(basis.values(u), dim=-1), weight)
        outputs.append(y if linear_bias is None else y + linear_bias[k])
    return torch.cat(outputs, dim=1).unflatten(2, sizes)
