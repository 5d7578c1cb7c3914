"""The KAN convolution by fused Triton kernels: x is read and y written once; only x is kept for the backward pass.

Polynomials in monomial form, in fp32, fp16 or bf16 (computed in fp32). Programs are laid over the pixels of all images
and over blocks of channels, whatever the strides of the tensors are.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .bases import Basis
from .eager import fold

# Pixels and channels a program. In channels_last neighbours are channels, in NCHW pixels.
_LAST_BLOCKS, _FIRST_BLOCKS = (16, 64), (256, 4)


@triton.jit
def _tanh(x):
    # (1 - e) / (1 + e) loses digits near 0, where the series is exact to fp32
    square = x * x
    series = x * (1 + square * (-1.0 / 3 + square * (2.0 / 15)))
    e = tl.exp(-2 * tl.abs(x))
    ratio = (1 - e) / (1 + e)
    return tl.where(square < 0.01, series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def _forward(
    x_ptr, y_ptr, linear_ptr, functions_ptr, constant_ptr,
    channels, height, width, out_height, out_width, pixels,
    xn, xc, xh, xw, yn, yc, yh, yw,
    DEGREE: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    k = tl.program_id(2)
    image, oh, ow = pixel // (out_height * out_width), pixel // out_width % out_height, pixel % out_width
    inside = (pixel < pixels)[:, None] & (c < channels)
    offset = (image.to(tl.int64) * xn)[:, None] + c * xc
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32) + tl.load(constant_ptr + k)
    for i in tl.static_range(KH):
        for j in tl.static_range(KW):
            h, w = oh * SH - PH + i * DH, ow * SW - PW + j * DW
            valid = (h >= 0) & (h < height) & (w >= 0) & (w < width)
            x = tl.load(x_ptr + offset + (h * xh + w * xw)[:, None], mask=inside & valid[:, None], other=0.0)
            x = x.to(tl.float32)
            u = _tanh(x)
            value = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            for m in tl.static_range(DEGREE):  # Horner, from the highest power
                value = (value + tl.load(functions_ptr + ((k * DEGREE + DEGREE - 1 - m) * KH + i) * KW + j)) * u
            total += value + tl.load(linear_ptr + (k * KH + i) * KW + j) * x
    offset = (image.to(tl.int64) * yn + oh * yh + ow * yw)[:, None] + (k * channels + c) * yc
    tl.store(y_ptr + offset, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x_ptr, grad_ptr, linear_ptr, functions_ptr, grad_x_ptr, partial_ptr,
    channels, height, width, out_height, out_width, pixels,
    xn, xc, xh, xw, gn, gc, gh, gw, dn, dc, dh, dw,
    KERNELS: tl.constexpr, DEGREE: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    OF_X: tl.constexpr, OF_WEIGHTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Laid over the pixels of x, so that its tanh is taken once; the gradients of the outputs come to it tap by tap."""
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    image, h, w = pixel // (height * width), pixel // width % height, pixel % width
    inside = (pixel < pixels)[:, None] & (c < channels)
    offset = (image.to(tl.int64) * xn + h * xh + w * xw)[:, None] + c * xc
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    u = _tanh(x)
    by_x = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    by_u = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    # each program owns a row of sums, which are added up afterwards: the same order every time
    partial = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    partial = partial_ptr + partial * (KERNELS * (DEGREE + 1) * KH * KW)
    for k in tl.static_range(KERNELS):
        for i in tl.static_range(KH):
            for j in tl.static_range(KW):
                down, right = h + PH - i * DH, w + PW - j * DW
                oh, ow = down // SH, right // SW
                valid = (down >= 0) & (right >= 0) & (down % SH == 0) & (right % SW == 0)
                valid = valid & (oh < out_height) & (ow < out_width)
                offset = (image.to(tl.int64) * gn + oh * gh + ow * gw)[:, None] + (k * channels + c) * gc
                grad = tl.load(grad_ptr + offset, mask=inside & valid[:, None], other=0.0).to(tl.float32)
                if OF_X:
                    by_x += grad * tl.load(linear_ptr + (k * KH + i) * KW + j)
                    slope = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
                    for m in tl.static_range(DEGREE):
                        weight = tl.load(functions_ptr + ((k * DEGREE + DEGREE - 1 - m) * KH + i) * KW + j)
                        slope = slope * u + weight * (DEGREE - m)
                    by_u += grad * slope
                if OF_WEIGHTS:
                    tl.store(partial + (k * (DEGREE + 1) * KH + i) * KW + j, tl.sum(grad * x))
                    product = grad
                    for m in tl.static_range(DEGREE):
                        product = product * u
                        tl.store(partial + ((k * (DEGREE + 1) + m + 1) * KH + i) * KW + j, tl.sum(product))
    if OF_X:
        offset = (image.to(tl.int64) * dn + h * dh + w * dw)[:, None] + c * dc
        grad_x = by_x + (1 - u * u) * by_u
        tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)


def _blocks(x: Tensor) -> tuple[int, int]:
    return _LAST_BLOCKS if x.stride(1) == 1 else _FIRST_BLOCKS


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _out_size(x: Tensor, linear: Tensor, stride: list, padding: list, dilation: list) -> tuple[int, ...]:
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[2:], linear.shape[1:], stride, padding, dilation)
    ]
    return (x.shape[0], x.shape[1] * linear.shape[0], *size)


# schemas: torch 2.4 reads no annotations that are strings
@torch.library.custom_op(
    'rkan_mmdet::kan_conv2d',
    mutates_args=(),
    schema='(Tensor x, Tensor linear, Tensor functions, Tensor constant, int[] stride, int[] padding, int[] dilation)'
    ' -> Tensor',
)
def _kan_conv2d(
    x: Tensor,
    linear: Tensor,
    functions: Tensor,
    constant: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    y = torch.empty(
        _out_size(x, linear, stride, padding, dilation), dtype=x.dtype, device=x.device, memory_format=_memory_format(x)
    )
    linear, functions, constant = linear.contiguous(), functions.contiguous(), constant.contiguous()
    (kernels, degree, *size), (block_p, block_c) = functions.shape, _blocks(x)
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    grid = (triton.cdiv(pixels, block_p), triton.cdiv(x.shape[1], block_c), kernels)
    if y.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current GPU
            _forward[grid](
                x, y, linear, functions, constant, *x.shape[1:], *y.shape[2:], pixels, *x.stride(), *y.stride(),
                degree, *size, *stride, *padding, *dilation, block_p, block_c,
            )  # fmt: skip
    return y


@_kan_conv2d.register_fake
def _(x, linear, functions, constant, stride, padding, dilation):
    size = _out_size(x, linear, stride, padding, dilation)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


@torch.library.custom_op(
    'rkan_mmdet::kan_conv2d_backward',
    mutates_args=(),
    schema='(Tensor x, Tensor grad, Tensor linear, Tensor functions, int[] stride, int[] padding, int[] dilation, '
    'bool of_x, bool of_weights) -> (Tensor, Tensor)',
)
def _kan_conv2d_backward(
    x: Tensor,
    grad: Tensor,
    linear: Tensor,
    functions: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    of_x: bool,
    of_weights: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of all weights, (K, degree + 1, kh, kw); an empty tensor for one that is not wanted."""
    linear, functions = linear.contiguous(), functions.contiguous()
    (kernels, degree, *size), (block_p, block_c) = functions.shape, _blocks(x)
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    grid = (triton.cdiv(pixels, block_p), triton.cdiv(x.shape[1], block_c))
    grad_x = torch.empty(x.shape if of_x else 0, dtype=x.dtype, device=x.device)
    if of_x:
        grad_x = torch.empty_like(x)
    partial = torch.empty(
        (grid[0] * grid[1] if of_weights else 0, kernels, degree + 1, *size), dtype=torch.float32, device=x.device
    )
    if x.numel():
        with torch.cuda.device_of(x):
            _backward[grid](
                x, grad, linear, functions, grad_x, partial, *x.shape[1:], *grad.shape[2:], pixels,
                *x.stride(), *grad.stride(), *(grad_x.stride() if of_x else (0, 0, 0, 0)),
                kernels, degree, *size, *stride, *padding, *dilation, of_x, of_weights, block_p, block_c,
            )  # fmt: skip
    return grad_x, partial.sum(0)


@_kan_conv2d_backward.register_fake
def _(x, grad, linear, functions, stride, padding, dilation, of_x, of_weights):
    grad_x = torch.empty_like(x) if of_x else x.new_empty(0)
    kernels, degree, *size = functions.shape
    return grad_x, x.new_empty((kernels, degree + 1, *size), dtype=torch.float32)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    x, linear, functions, _, *ctx.sizes = inputs
    ctx.save_for_backward(x, linear, functions)


def _differentiate(ctx, grad: Tensor) -> tuple:
    x, linear, functions = ctx.saved_tensors
    of_x, of_linear, of_functions, of_constant = ctx.needs_input_grad[:4]
    grad_x = grad_linear = grad_functions = grad_constant = None
    if of_x or of_linear or of_functions:
        grad_x, weights = _kan_conv2d_backward(x, grad, linear, functions, *ctx.sizes, of_x, of_linear or of_functions)
        grad_x = grad_x if of_x else None
        grad_linear, grad_functions = weights[:, 0].clone(), weights[:, 1:].clone()
    if of_constant:
        n, _, *size = grad.shape
        grad_constant = grad.reshape(n, linear.shape[0], -1, *size).sum((0, 2, 3, 4), dtype=torch.float32)
    return grad_x, grad_linear, grad_functions, grad_constant, None, None, None


_kan_conv2d.register_autograd(_differentiate, setup_context=_setup_context)


def _count(functions_shape: tuple, out_shape: tuple) -> int:
    """As of depthwise convolutions of x and the powers of u, which the other backends run."""
    return 2 * math.prod(out_shape) * (functions_shape[1] + 1) * math.prod(functions_shape[2:])


@register_flop_formula(torch.ops.rkan_mmdet.kan_conv2d)
def _(x_shape, linear_shape, functions_shape, *sizes, out_shape=None, **kwargs) -> int:
    return _count(functions_shape, out_shape)


@register_flop_formula(torch.ops.rkan_mmdet.kan_conv2d_backward)
def _(x_shape, grad_shape, linear_shape, functions_shape, *sizes, out_shape=None, **kwargs) -> int:
    of_x, of_weights = sizes[-2:]
    return (of_x + of_weights) * _count(functions_shape, grad_shape)


def kan_conv2d_triton(
    x: Tensor,
    linear_weight: Tensor,
    basis_weight: Tensor,
    linear_bias: Tensor | None,
    basis: Basis,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """See :func:`rkan_mmdet.ops.kan_conv2d`; ``basis_weight`` comes with its scale multiplied in."""
    functions, constant = fold(basis_weight, linear_bias, kernel_size, basis)
    linear = linear_weight.reshape(-1, *kernel_size)
    return _kan_conv2d(x, linear, functions, constant, list(stride), list(padding), list(dilation))
