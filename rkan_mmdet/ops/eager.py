"""The KAN convolution by plain torch operators: basis first, windows never.

One kernel serves all channels and every tap sees the same function of its pixel, so the functions are evaluated once a
pixel, and each is then one depthwise convolution with the shared k x k kernel. Every plane is shifted to vanish at
x = 0, which makes zero padding exact; what the shift takes away is one constant, added everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    basis_weight: Tensor | None, linear_bias: Tensor | None, kernel_size: tuple[int, int], spec: _Spec
) -> tuple[Tensor | None, Tensor | None]:
    """The kernels (K, planes, kh, kw) of the functions, and the constant (K,) that is added to every output."""
    if basis_weight is None:
        return None, linear_bias
    basis = spec.basis
    if spec.monomial:
        basis_weight = basis_weight @ basis_weight.new_tensor(basis.monomials())
        constant = basis_weight[..., 0].sum(1)
    else:
        zero = torch.zeros((), dtype=basis_weight.dtype, device=basis_weight.device)
        constant = basis_weight.sum(1) @ torch.stack(basis.values(zero))
    kernels = (basis_weight[..., 1:] if isinstance(basis, Polynomial) else basis_weight).transpose(1, 2)
    kernels = kernels.reshape(*kernels.shape[:2], *kernel_size)
    return kernels, constant if linear_bias is None else constant + linear_bias


def _powers(u: Tensor, degree: int) -> Iterator[Tensor]:
    """u, u^2 .. u^degree. Each may be gone when the next is asked for: fresh memory costs more than the product."""
    yield u
    power = u
    for m in range(2, degree + 1):
        power = power * u if m == 2 or torch.is_grad_enabled() else power.mul_(u)
        yield power


def _planes(x: Tensor, spec: _Spec) -> Iterator[Tensor]:
    """x and its functions, each shifted to be 0 where x = 0, to be used one by one."""
    yield x
    if not spec.basis.num_functions:
        return
    u = torch.tanh(x) if spec.basis.on_domain else x
    if spec.monomial:
        yield from _powers(u, spec.basis.degree)
    else:
        skip = isinstance(spec.basis, Polynomial)  # P_0 is constant
        for value, zero in zip(spec.basis.values(u)[skip:], spec.basis.values(u.new_zeros(()))[skip:]):
            yield value - zero


def _slopes(x: Tensor, spec: _Spec) -> Iterator[Tensor | None]:
    """The derivatives by x of what :func:`_planes` gives, to be used one by one; None is 1."""
    yield None
    if not spec.basis.num_functions:
        return
    u = torch.tanh(x) if spec.basis.on_domain else x
    by_x = 1 - u * u if spec.basis.on_domain else None
    if spec.monomial:
        yield by_x
        for m, power in zip(range(2, spec.basis.degree + 1), _powers(u, spec.basis.degree - 1)):
            yield power * m * by_x
    else:
        for slope in spec.basis.derivatives(u)[isinstance(spec.basis, Polynomial) :]:
            yield slope if by_x is None else slope * by_x


def _join(linear: Tensor, functions: Tensor | None) -> Tensor:
    """The kernels of all planes, (K, planes, kh, kw). Not one input: the gradients of its parts would be views."""
    return linear[:, None] if functions is None else torch.cat([linear[:, None], functions], dim=1)


class _PlanesConv2d(torch.autograd.Function):
    """Sum over planes of depthwise convolutions; keeps ``x`` and computes the planes again for the backward pass."""

    @staticmethod
    def forward(x: Tensor, linear: Tensor, functions: Tensor | None, spec: _Spec) -> Tensor:
        channels, kernels = x.shape[1], _join(linear, functions)
        outputs: list[Tensor | None] = [None] * len(kernels)
        for p, plane in enumerate(_planes(x.to(kernels.dtype), spec)):
            for k, weight in enumerate(kernels[:, p]):
                weight = weight.expand(channels, 1, *weight.shape)
                part = F.conv2d(plane, weight, None, spec.stride, spec.padding, spec.dilation, channels)
                outputs[k] = part if p == 0 else outputs[k].add_(part)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        x, linear, functions, ctx.spec = inputs
        ctx.save_for_backward(x, linear, functions)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        saved, linear, functions = ctx.saved_tensors
        spec, channels, kernels = ctx.spec, saved.shape[1], _join(linear, functions)
        grad_x = grad_linear = grad_functions = None
        with torch.autocast(saved.device.type, enabled=False):
            x = saved.to(kernels.dtype)
            grads = grad.to(kernels.dtype).split(channels, dim=1)

            def convolution_backward(plane: Tensor, k: int, p: int, of_plane: bool) -> Tensor:
                weight = kernels[k, p].expand(channels, 1, *kernels.shape[2:])
                return torch.ops.aten.convolution_backward(
                    grads[k], plane, weight, None, spec.stride, spec.padding, spec.dilation, False, [0, 0], channels,
                    [of_plane, not of_plane, False],
                )[0 if of_plane else 1]  # fmt: skip

            if ctx.needs_input_grad[0]:
                for p, slope in enumerate(_slopes(x, spec)):
                    for k in range(len(grads)):
                        part = convolution_backward(x, k, p, True)  # only the shape of the plane counts here
                        part = part if slope is None else part * slope
                        grad_x = part if grad_x is None else grad_x + part
                grad_x = grad_x.to(saved.dtype)
            if any(ctx.needs_input_grad[1:3]):
                columns = [
                    torch.stack([convolution_backward(plane, k, p, False).sum((0, 1)) for k in range(len(grads))])
                    for p, plane in enumerate(_planes(x, spec))
                ]
                grad_linear = columns[0]
                grad_functions = None if functions is None else torch.stack(columns[1:], dim=1)
        return grad_x, grad_linear, grad_functions, None


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
    functions, constant = _fold(basis_weight, linear_bias, kernel_size, spec)
    y = _PlanesConv2d.apply(x, linear_weight.reshape(-1, *kernel_size), functions, spec)
    if constant is not None:
        y = y + constant.repeat_interleave(x.shape[1])[:, None, None]
    return y
