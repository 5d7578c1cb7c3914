"""The KAN convolution by plain torch operators: basis first, windows never.

One kernel serves all channels and every tap sees the same function of its pixel, so the functions are evaluated once a
pixel, and each is then one depthwise convolution with the shared k x k kernel. Every plane is shifted to vanish at
x = 0, which makes zero padding exact; what the shift takes away is one constant, added everywhere.

On a CPU some images, or some channels of one, are taken at a time, so that planes stay in the caches: fresh memory
costs more than arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpp_kan_conv  # noqa: F401 (defines operators)
from .bases import Basis, Polynomial

# Monomials cost one multiplication a plane and make the constants vanish, but lose digits as the degree grows.
MAX_MONOMIAL_DEGREE = 5
# Bytes of a plane that is worked on at once; by measurement (benchmarks/kan_conv.py).
PART_BYTES = 2**23


class Spec(NamedTuple):
    basis: Basis
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def is_monomial(basis: Basis) -> bool:
    """Whether the functions are computed as powers of u."""
    return isinstance(basis, Polynomial) and basis.degree <= MAX_MONOMIAL_DEGREE


@lru_cache
def _monomials_on(basis: Polynomial, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it serves training too
        return torch.tensor(basis.monomials(), dtype=dtype, device=device)


def _monomials(basis: Polynomial, weight: Tensor) -> Tensor:
    # Sent to a GPU once: sending waits until the GPU has done all before it. Not kept where it may be no real tensor.
    if type(weight) is Tensor and weight.is_cuda and not is_compiling():
        return _monomials_on(basis, weight.dtype, weight.device)
    return weight.new_tensor(basis.monomials())


def without_autocast(device: str) -> AbstractContextManager:
    """Autocast switched off on a type of device, where there is such a thing."""
    if device in ('cpu', 'cuda'):  # asked first, since older versions of torch.compile follow no `try`
        return torch.autocast(device, enabled=False)
    try:
        return torch.autocast(device, enabled=False)
    except RuntimeError:  # there is none
        return nullcontext()


def fold(
    basis_weight: Tensor | None, linear_bias: Tensor | None, kernel_size: tuple[int, int], basis: Basis
) -> tuple[Tensor | None, Tensor | None]:
    """The kernels (K, planes, kh, kw) of the functions, and the constant (K,) that is added to every output."""
    if basis_weight is None:
        return None, linear_bias
    # no matrix products: under torch.compile their gradients would be taken in autocast's half precision
    if is_monomial(basis):
        basis_weight = (basis_weight[..., None] * _monomials(basis, basis_weight)).sum(-2)
        constant = basis_weight[..., 0].sum(1)
    else:
        zero = torch.zeros((), dtype=basis_weight.dtype, device=basis_weight.device)
        constant = (basis_weight.sum(1) * torch.stack(basis.values(zero))).sum(1)
    kernels = (basis_weight[..., 1:] if isinstance(basis, Polynomial) else basis_weight).transpose(1, 2)
    kernels = kernels.reshape(*kernels.shape[:2], *kernel_size)
    return kernels, constant if linear_bias is None else constant + linear_bias


def _values(u: Tensor, basis: Basis) -> list[Tensor]:
    """The functions at u, each shifted to be 0 at 0."""
    skip = isinstance(basis, Polynomial)  # P_0 is constant
    return [value - zero for value, zero in zip(basis.values(u)[skip:], basis.values(u.new_zeros(()))[skip:])]


def _domain(x: Tensor, basis: Basis) -> Tensor:
    return torch.tanh(x) if basis.on_domain else x


def _functions(x: Tensor, basis: Basis) -> Iterator[Tensor]:
    """The planes besides x, each made when it is asked for; a power from the second on is gone when the next is."""
    if not basis.num_functions:
        return
    u = _domain(x, basis)
    if not is_monomial(basis):
        yield from _values(u, basis)
        return
    yield u
    power = u
    for m in range(2, basis.degree + 1):
        power = power * u if m == 2 else power.mul_(u)
        yield power


def _parts(x: Tensor) -> list[tuple[slice, slice]]:
    """Slices of the images and of the channels that are worked on one after the other."""
    (images, channels), count = x.shape[:2], 1
    if x.device.type == 'cpu':
        count = math.ceil(x.numel() * x.element_size() / PART_BYTES) or 1
    some = -(-images // count) or 1  # whole images first: in channels_last they are no copies
    count = -(-count // (-(-images // some) or 1))
    step = -(-channels // (16 * count)) * 16  # oneDNN takes 16 at a time
    return [
        (slice(image, image + some), slice(first, first + step))
        for image in range(0, max(images, 1), some)
        for first in range(0, channels, step)
    ]


def _cut(x: Tensor, part: tuple[slice, slice], dtype: torch.dtype) -> Tensor:
    # not to(memory_format=...), which gives a slice of a channels_last tensor as it is, and every convolution a copy
    return x[part].to(dtype).contiguous(memory_format=torch.channels_last)


def _put(target: Tensor, value: Tensor) -> None:
    """Write a part, which is channels_last, into the slice of a tensor of any memory format."""
    rows = (target.shape[3], 1)  # of an image that is one matrix as it lies
    if target.device.type == 'cpu' and target.stride()[2:] == rows and target.shape[1] > 1:
        for image, of_image in zip(target, value):  # as matrices, which torch transposes block by block
            image.flatten(1).copy_(of_image.permute(1, 2, 0).flatten(0, 1).t())
    else:
        target.copy_(value)


def _chain(u: Tensor, basis: Basis, by_plane: Callable[[int], Tensor]) -> Tensor:
    """What the functions add to the gradient of x: from those of their planes, each asked for when it is used; of
    powers, times their exponent."""
    if is_monomial(basis):
        total = by_plane(basis.degree)
        for p in range(basis.degree - 1, 0, -1):  # Horner
            total.mul_(u).add_(by_plane(p))
    else:
        slopes = basis.derivatives(u)[isinstance(basis, Polynomial) :]
        total = by_plane(1).mul_(slopes[0])
        for p, slope in enumerate(slopes[1:], 2):
            total.add_(by_plane(p).mul_(slope))
    return total.addcmul_(total * u, u, value=-1) if basis.on_domain else total


def expand(kernels: Tensor, channels: int) -> Tensor:
    """The kernels (K, planes, kh, kw) as depthwise ones, (planes, K, channels, 1, kh, kw)."""
    return kernels.transpose(0, 1)[:, :, None, None].expand(-1, -1, channels, -1, -1, -1).contiguous()


def _is_ready(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether convolutions take x as it is."""
    return x.dtype == dtype and x.is_contiguous(memory_format=torch.channels_last)


def sum_planes(x: Tensor, weights: Tensor, bias: Tensor | None, spec: Spec, cpp: bool = False) -> Tensor:
    """The sum over planes of depthwise convolutions, part by part; without a gradient.

    Args:
        x (Tensor[N, C, H, W]): The input.
        weights (Tensor[planes, K, C, 1, kh, kw]): The kernels of each channel.
        bias (Tensor[K, C] or None): Added to the outputs; a stride of 0 gives all channels the same.
        spec (Spec): Basis, stride, padding and dilation.
        cpp (bool): Whether the compiled kernels do it, which must be able to. Defaults to False.
    """
    if cpp:
        return torch.ops.rkan_mmdet.planes_conv2d(x, weights, bias, *spec[1:])
    if _is_ready(x, weights.dtype):
        return _sum_ready(x, weights, bias, spec)
    y = None
    for part in _parts(x):
        some = None if bias is None else bias[:, part[1]]
        sums = _sum_ready(_cut(x, part, weights.dtype), weights[:, :, part[1]], some, spec)
        if y is None:
            last = x.is_contiguous(memory_format=torch.channels_last)
            size = (x.shape[0], weights.shape[1] * x.shape[1], *sums.shape[2:])
            y = torch.empty(size, dtype=x.dtype, device=x.device,
                            memory_format=torch.channels_last if last else torch.contiguous_format)  # fmt: skip
        for total, target in zip(sums.chunk(weights.shape[1], dim=1), y.split(x.shape[1], dim=1)):
            _put(target[part], total)
    return y


def _sum_ready(x: Tensor, weights: Tensor, bias: Tensor | None, spec: Spec) -> Tensor:
    planes, kernels, count = weights.shape[:3]
    sums = [F.conv2d(x, weights[0, k], None if bias is None else bias[k], *spec[1:], count) for k in range(kernels)]
    for part in _parts(x) if planes > 1 else ():
        for p, plane in enumerate(_functions(x[part], spec.basis), 1):
            for k in range(kernels):
                # no name for what is added: memory that is free at once is used again while it is in the caches
                sums[k][part].add_(F.conv2d(plane, weights[p, k, part[1]], None, *spec[1:], plane.shape[1]))
    return sums[0] if kernels == 1 else torch.cat(sums, dim=1)


def join(linear: Tensor, functions: Tensor | None) -> Tensor:
    """The kernels of all planes, (K, planes, kh, kw). Not one input: the gradients of its parts would be views."""
    return linear[:, None] if functions is None else torch.cat([linear[:, None], functions], dim=1)


def shifted(x: Tensor, linear: Tensor, functions: Tensor | None, spec: Spec) -> Tensor:
    """The same sum over shifted slices: what a compiler fuses, and what autograd differentiates twice."""
    kernels = join(linear, functions)
    (pad_h, pad_w), size = spec.padding, kernels.shape[2:]
    padded = F.pad(x.to(kernels.dtype), (pad_w, pad_w, pad_h, pad_h))
    extent = [
        s * ((n - d * (k - 1) - 1) // s) + 1 for n, k, s, d in zip(padded.shape[2:], size, spec.stride, spec.dilation)
    ]
    planes = [padded]
    if spec.basis.num_functions:
        u = _domain(padded, spec.basis)
        planes += [u] if is_monomial(spec.basis) else _values(u, spec.basis)
    outputs = []
    for kernel in kernels:
        total = None
        for i in range(size[0]):
            for j in range(size[1]):
                top, left = i * spec.dilation[0], j * spec.dilation[1]
                weights = kernel[:, i, j]
                taps = [
                    plane.narrow(2, top, extent[0]).narrow(3, left, extent[1])[
                        :, :, :: spec.stride[0], :: spec.stride[1]
                    ]
                    for plane in planes
                ]
                if len(planes) < len(weights):  # powers of the last plane, by Horner
                    power = weights[-1] * taps[1]
                    for weight in weights[1:-1].flip(0):
                        power = (power + weight) * taps[1]
                    value = weights[0] * taps[0] + power
                else:
                    value = sum(weight * tap for weight, tap in zip(weights, taps))
                total = value if total is None else total + value
        outputs.append(total)
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]


def is_exporting() -> bool:
    """Whether the graph is written for another runtime: by torch.export (and so for ONNX), or by the older tracer."""
    exporting = getattr(torch.compiler, 'is_exporting', None)  # since torch 2.7
    return torch.jit.is_tracing() or (exporting is not None and exporting())


def is_compiling() -> bool:
    """Whether torch.compile looks on."""
    compiling = getattr(torch.compiler, 'is_compiling', None)  # since torch 2.3
    return compiling is not None and compiling()


def depthwise(x: Tensor, weights: Tensor, bias: Tensor | None, spec: Spec) -> Tensor:
    """:func:`sum_planes` as plain convolutions: what other runtimes have fast, and what autograd knows."""
    x = x.to(weights.dtype)
    planes, channels = [x], int(x.shape[1])  # the older tracer gives a tensor
    if spec.basis.num_functions:
        u = _domain(x, spec.basis)
        planes += [u] if is_monomial(spec.basis) else _values(u, spec.basis)
    for _ in range(len(weights) - len(planes)):
        planes.append(planes[-1] * u)  # the powers
    outputs = []
    for k in range(weights.shape[1]):
        total = F.conv2d(x, weights[0, k], None if bias is None else bias[k], *spec[1:], channels)
        for plane, weight in zip(planes[1:], weights[1:, k]):
            total = total + F.conv2d(plane, weight, None, *spec[1:], channels)
        outputs.append(total)
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]


class _PlanesConv2d(torch.autograd.Function):
    """Sum over planes of depthwise convolutions; keeps ``x`` and computes the planes again for the backward pass."""

    @staticmethod
    def forward(
        ctx, x: Tensor, linear: Tensor, functions: Tensor | None, constant: Tensor | None, spec: Spec,
        cpp: bool,
    ) -> Tensor:  # fmt: skip
        ctx.spec, ctx.cpp = spec, cpp
        ctx.save_for_backward(x, linear, functions)
        weights = expand(join(linear, functions), x.shape[1])
        bias = None if constant is None else constant[:, None].expand(-1, x.shape[1])
        return sum_planes(x, weights, bias, spec, cpp)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        saved, linear, functions = ctx.saved_tensors
        of_x, of_linear, of_functions, of_constant, *_ = ctx.needs_input_grad
        grad_constant = None
        if of_constant:
            by_kernel = grad.unflatten(1, (len(linear), -1))
            grad_constant = by_kernel.sum((0, 2, 3, 4), dtype=linear.dtype)
        with without_autocast(saved.device.type):
            if torch.is_grad_enabled() and not is_compiling():  # the gradient is to be differentiated in its turn
                inputs = [t for t, needed in zip((saved, linear, functions), ctx.needs_input_grad) if needed]
                y = shifted(saved, linear, functions, ctx.spec)
                grads = iter(torch.autograd.grad(y, inputs, grad.to(y.dtype), create_graph=True) if inputs else ())
                return (
                    *(next(grads) if needed else None for needed in (of_x, of_linear, of_functions)),
                    grad_constant,
                    None,
                    None,
                )
            compute = _gradients_cpp if ctx.cpp else _gradients
            grad_x, grad_kernels = compute(
                saved, grad, join(linear, functions), ctx.spec, of_x, of_linear or of_functions
            )
        return (
            grad_x if of_x else None,
            grad_kernels[0].clone() if of_linear else None,
            grad_kernels[1:].transpose(0, 1).clone() if of_functions else None,
            grad_constant,
            None,
            None,
        )


def _gradients_cpp(
    x: Tensor, grad: Tensor, kernels: Tensor, spec: Spec, of_x: bool, of_kernels: bool
) -> tuple[Tensor, Tensor]:
    return torch.ops.rkan_mmdet.planes_conv2d_backward(x, grad, kernels, *spec[1:], of_x, of_kernels)


def _gradients(
    x: Tensor, grad: Tensor, kernels: Tensor, spec: Spec, of_x: bool, of_kernels: bool
) -> tuple[Tensor | None, Tensor | None]:
    if is_monomial(spec.basis):  # the gradient of u^m by u is m u^(m-1): m goes into the kernel
        exponents = torch.arange(kernels.shape[1], dtype=kernels.dtype, device=x.device).clamp(min=1)
        kernels = kernels * exponents[:, None, None]
    weights = expand(kernels, x.shape[1])
    grads = grad.split(x.shape[1], dim=1)
    if _is_ready(x, kernels.dtype):
        everything = slice(None), slice(None)
        return _gradients_ready(x, [_cut(g, everything, kernels.dtype) for g in grads], weights, spec, of_x, of_kernels)
    grad_x, grad_kernels = torch.empty_like(x) if of_x else None, None
    for part in _parts(x):
        ready = [_cut(t, part, kernels.dtype) for t in (x, *grads)]
        of_part, by_part = _gradients_ready(ready[0], ready[1:], weights[:, :, part[1]], spec, of_x, of_kernels)
        if of_x:
            _put(grad_x[part], of_part)
        if of_kernels:
            grad_kernels = by_part if grad_kernels is None else grad_kernels.add_(by_part)
    return grad_x, grad_kernels


def _gradients_ready(
    x: Tensor, grads: list[Tensor], weights: Tensor, spec: Spec, of_x: bool, of_kernels: bool
) -> tuple[Tensor | None, Tensor | None]:
    basis = spec.basis

    def backward(grad: Tensor, plane: Tensor, weight: Tensor, *of: bool) -> tuple[Tensor | None, ...]:
        return torch.ops.aten.convolution_backward(
            grad, plane, weight, None, spec.stride, spec.padding, spec.dilation, False, [0, 0], len(weight),
            [*of, False],
        )  # fmt: skip

    def sum_of_planes(plane: Tensor, grads: list[Tensor], weights: Tensor) -> Tensor:  # only the plane's shape counts
        first, *others = (backward(g, plane, w, True, False)[0] for g, w in zip(grads, weights))
        return sum(others, first)

    grad_x = sum_of_planes(x, grads, weights[0]) if of_x else None
    grad_kernels = weights.new_zeros(*weights.shape[:2], *weights.shape[4:]) if of_kernels else None

    def add_kernels(p: int, plane: Tensor, grads: list[Tensor], weights: Tensor) -> None:
        for k, grad in enumerate(grads):
            grad_kernels[p, k].add_(backward(grad, plane, weights[k], False, True)[1].sum((0, 1)))

    if of_kernels:
        add_kernels(0, x, grads, weights[0])
    for part in _parts(x) if len(weights) > 1 else ():
        of_part, some = [_cut(g, part, g.dtype) for g in grads], weights[:, :, part[1]]
        u = None
        if of_kernels:
            for p, plane in enumerate(_functions(x[part], basis), 1):
                add_kernels(p, plane, of_part, some[p])
                if p == 1 and is_monomial(basis):
                    u = plane
        if of_x:
            u = _domain(x[part], basis) if u is None else u
            grad_x[part].add_(_chain(u, basis, lambda p: sum_of_planes(u, of_part, some[p])))  # noqa: B023
    return grad_x, grad_kernels


def kan_conv2d_eager(
    x: Tensor,
    linear_weight: Tensor,
    basis_weight: Tensor | None,
    basis_scale: Tensor | None,
    linear_bias: Tensor | None,
    basis: Basis,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    cpp: bool = False,
) -> Tensor:
    """See :func:`rkan_mmdet.ops.kan_conv2d`; with ``cpp`` by the compiled kernels."""
    if basis_scale is not None:
        basis_weight = basis_weight * basis_scale[..., None]
    spec = Spec(basis, stride, padding, dilation)
    functions, constant = fold(basis_weight, linear_bias, kernel_size, basis)
    linear = linear_weight.reshape(-1, *kernel_size)
    if is_exporting():
        channels = int(x.shape[1])
        bias = None if constant is None else constant[:, None].expand(-1, channels)
        return depthwise(x, expand(join(linear, functions), channels), bias, spec)
    if is_compiling() and not cpp:
        y = shifted(x, linear, functions, spec)
        return y if constant is None else y + constant.repeat_interleave(x.shape[1])[:, None, None]
    return _PlanesConv2d.apply(x, linear, functions, constant, spec, cpp)
