"""The KAN convolution by plain torch operators: basis first, windows never.

One kernel serves all channels and every tap sees the same function of its pixel, so the functions are evaluated once a
pixel, and each is then one depthwise convolution with the shared k x k kernel. Every plane is shifted to vanish at
x = 0, which makes zero padding exact; what the shift takes away is one constant, added everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .bases import Basis, Polynomial

# Monomials cost one multiplication a plane and make the constants vanish, but lose digits as the degree grows.
MAX_MONOMIAL_DEGREE = 5


class _Spec(NamedTuple):
    basis: Basis
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def monomial(self) -> bool:
        return isinstance(self.basis, Polynomial) and self.basis.degree <= MAX_MONOMIAL_DEGREE


def _fold(
    linear_weight: Tensor, basis_weight: Tensor | None, linear_bias: Tensor | None, kernel_size: tuple[int, int], spec
) -> tuple[Tensor, Tensor | None]:
    """The depthwise kernels (K, planes, kh, kw) and the constant (K,) that is added to every output."""
    planes, constant = [linear_weight[..., None]], linear_bias
    if basis_weight is not None:
        basis = spec.basis
        if spec.monomial:
            basis_weight = basis_weight @ basis_weight.new_tensor(basis.monomials())
            at_zero = basis_weight[..., 0].sum(1)
        else:
            zero = torch.zeros((), dtype=basis_weight.dtype, device=basis_weight.device)
            at_zero = basis_weight.sum(1) @ torch.stack(basis.values(zero))
        constant = at_zero if constant is None else constant + at_zero
        planes.append(basis_weight[..., 1:] if isinstance(basis, Polynomial) else basis_weight)
    kernels = torch.cat(planes, dim=-1).transpose(1, 2)
    return kernels.reshape(*kernels.shape[:2], *kernel_size), constant


def _planes(u: Tensor, spec: _Spec) -> list[Tensor]:
    """The functions of ``u``, each shifted to be 0 where x = 0."""
    if spec.monomial:
        out = [u]
        for _ in range(spec.basis.degree - 1):
            out.append(out[-1] * u)
        return out
    values, zeros = spec.basis.values(u), spec.basis.values(u.new_zeros(()))
    skip = isinstance(spec.basis, Polynomial)  # P_0 is constant
    return [value - zero for value, zero in zip(values[skip:], zeros[skip:])]


def _slopes(u: Tensor, spec: _Spec) -> list[Tensor | float]:
    """The derivatives of the planes by ``u``."""
    if spec.monomial:
        out, power = [1.0], u
        for m in range(2, spec.basis.degree + 1):
            out.append(power * m)
            power = power * u
        return out
    return spec.basis.derivatives(u)[isinstance(spec.basis, Polynomial) :]


class _PlanesConv2d(torch.autograd.Function):
    """Sum over planes of depthwise convolutions; keeps ``x`` and computes the planes again for the backward pass."""

    @staticmethod
    def forward(x: Tensor, kernels: Tensor, spec: _Spec) -> Tensor:
        channels = x.shape[1]
        x = x.to(kernels.dtype)
        planes = [x]
        if spec.basis.num_functions:
            planes += _planes(torch.tanh(x) if spec.basis.on_domain else x, spec)
        outputs = []
        for kernel in kernels:
            y = None
            for plane, weight in zip(planes, kernel):
                weight = weight.expand(channels, 1, *weight.shape)
                part = F.conv2d(plane, weight, None, spec.stride, spec.padding, spec.dilation, channels)
                y = part if y is None else y.add_(part)
            outputs.append(y)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        x, kernels, ctx.spec = inputs
        ctx.save_for_backward(x, kernels)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        saved, kernels = ctx.saved_tensors
        spec, channels = ctx.spec, saved.shape[1]
        with torch.autocast(saved.device.type, enabled=False):
            x, grad = saved.to(kernels.dtype), grad.to(kernels.dtype)
            u, planes, slopes = x, [x], [1.0]
            if spec.basis.num_functions:
                u = torch.tanh(x) if spec.basis.on_domain else x
                planes += _planes(u, spec)
                slopes += _slopes(u, spec)
            need_x, need_kernels = ctx.needs_input_grad[:2]
            grad_kernels: list[list[Tensor]] = []
            grad_planes: list[Tensor | None] = [None] * len(planes)
            for kernel, g in zip(kernels, grad.split(channels, dim=1)):
                grad_kernels.append([])
                for p, (plane, weight) in enumerate(zip(planes, kernel)):
                    weight = weight.expand(channels, 1, *weight.shape)
                    grad_plane, grad_weight, _ = torch.ops.aten.convolution_backward(
                        g, plane, weight, None, spec.stride, spec.padding, spec.dilation, False, [0, 0], channels,
                        [need_x, need_kernels, False],
                    )  # fmt: skip
                    if need_x:
                        grad_planes[p] = grad_plane if grad_planes[p] is None else grad_planes[p] + grad_plane
                    if need_kernels:
                        grad_kernels[-1].append(grad_weight.sum((0, 1)))
            grad_x = None
            if need_x:
                grad_x = grad_planes[0]
                if len(planes) > 1:
                    by_u = sum(g * slope for g, slope in zip(grad_planes[1:], slopes[1:]))
                    grad_x = grad_x + (by_u * (1 - u * u) if spec.basis.on_domain else by_u)
                grad_x = grad_x.to(saved.dtype)
            stacked = torch.stack([torch.stack(row) for row in grad_kernels]) if need_kernels else None
        return grad_x, stacked, None


def kan_conv2d_eager(
    x: Tensor,
    linear_weight: Tensor,
    basis_weight: Tensor | None,
    linear_bias: Tensor | None,
    basis: Basis,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """See :func:`rkan_mmdet.ops.kan_conv2d`; ``basis_weight`` comes with its scale multiplied in."""
    spec = _Spec(basis, stride, padding, dilation)
    kernels, constant = _fold(linear_weight, basis_weight, linear_bias, kernel_size, spec)
    y = _PlanesConv2d.apply(x, kernels, spec)
    if constant is not None:
        y = y + constant.repeat_interleave(x.shape[1])[:, None, None]
    return y
