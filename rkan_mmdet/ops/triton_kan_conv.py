"""The KAN convolution by fused Triton kernels: x is read and y written once; only x is kept for the backward pass.

Polynomials in monomial form, in fp32, fp16 or bf16 (computed in fp32). Programs are laid over the pixels of all images
and over blocks of channels, whatever the strides of the tensors are.
"""

# ruff: noqa: RUF005  (Triton concatenates tuples, and unpacks none)
from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .bases import Polynomial
from .eager import is_compiling, kan_conv2d_eager

# Outputs of one channel that a lane makes (rows, columns): more share more tanh, until registers hold too few programs.
# Going back, inputs that it takes at a time, each way: with more their loads wait for one another.
_OUTPUTS, _OUTPUTS_OF_STRIDES, _INPUTS = (5, 3), (4, 2), 2
# Lanes of a program, one a thread. Going back it is one warp, which adds up its sums without a barrier.
_LANES, _BACKWARD_LANES = 128, 32
# Programs that share the backward pass, each with its own sums for the gradients of the weights: what an H100 holds.
_PROGRAMS = 16 * 132


@triton.jit
def _tanh(x):
    # 1 - 2 e / (1 + e) loses digits near 0, where Cephes' series is exact; rsqrt is one instruction, a division five
    square = x * x
    series = square * -5.70498872745e-3 + 2.06390887954e-2
    series = (series * square - 5.37397155531e-2) * square + 1.33314422036e-1
    series = (series * square - 3.33332819422e-1) * (square * x) + x
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))  # 2 / log(2)
    root = tl.rsqrt(1 + e)
    ratio = 1 - 2 * (e * (root * root))
    return tl.where(square < 0.390625, series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def _at(pointer, image, c, h, w, sn, sc, sh, sw):
    """Where pixels (BLOCK_P) of channels (1, BLOCK_C) lie; one image may have more elements than 32 bits count."""
    pixels = image.to(tl.int64) * sn + h.to(tl.int64) * sh + w.to(tl.int64) * sw
    return pointer + pixels[:, None] + c.to(tl.int64) * sc


@triton.jit
def _place(block, block_c, channels, tiles_h, tiles_w, tiles, TH, TW, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Image, first row and column (BLOCK_P) and channel (1, BLOCK_C) of tiles, and which of these are there."""
    tile = block * BLOCK_P + tl.arange(0, BLOCK_P)
    c = (block_c * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    band = tile // tiles_w
    image = band // tiles_h
    top, left = (band - image * tiles_h) * TH, (tile - band * tiles_w) * TW
    return image, top, left, c, (tile < tiles)[:, None] & (c < channels)


# Helpers, since an index in the bodies of unrolled loops can not have a name there.
@triton.jit
def _add_value(totals, N: tl.constexpr, weights, FIRST: tl.constexpr, DEGREE: tl.constexpr, x, u):
    """The totals with what a tap gives for x; Horner, from the highest power."""
    value = tl.zeros_like(x) + weights[FIRST + DEGREE]
    for m in tl.static_range(DEGREE - 1):
        value = value * u + weights[FIRST + DEGREE - 1 - m]
    return totals[:N] + (totals[N] + weights[FIRST] * x + value * u,) + totals[N + 1 :]


@triton.jit
def _slope(weights, FIRST: tl.constexpr, DEGREE: tl.constexpr, u):
    """The derivative by u of what a tap gives."""
    slope = tl.zeros_like(u) + weights[FIRST + DEGREE] * DEGREE
    for m in tl.static_range(DEGREE - 1):
        slope = slope * u + weights[FIRST + DEGREE - 1 - m] * (DEGREE - 1 - m)
    return slope


@triton.jit
def _add_products(sums, FIRST: tl.constexpr, grad, factors, COUNT: tl.constexpr):
    """The sums with the gradients of a tap's weights: of x and of the powers of u."""
    products = ()
    for m in tl.static_range(COUNT):
        products = products + (sums[FIRST + m] + grad * factors[m],)
    return sums[:FIRST] + products + sums[FIRST + COUNT :]


@triton.jit
def _weights(
    linear_ptr, basis_ptr, scale_ptr, bias_ptr, k, MONOMIALS: tl.constexpr, DEGREE: tl.constexpr, TAPS: tl.constexpr
):  # fmt: skip
    """The weights of kernel k in registers: tap by tap those of x and of the powers of u; and the constant."""
    weights = ()
    constant = 0.0
    if bias_ptr is not None:
        constant += tl.load(bias_ptr + k)
    for tap in tl.static_range(TAPS):
        scale = 1.0
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + k * TAPS + tap)
        coefficients = ()
        for j in tl.static_range(DEGREE + 1):
            coefficients = coefficients + (tl.load(basis_ptr + (k * TAPS + tap) * (DEGREE + 1) + j) * scale,)
        weights = weights + (tl.load(linear_ptr + k * TAPS + tap),)
        for m in tl.static_range(DEGREE + 1):
            weight = coefficients[m] * MONOMIALS[m * (DEGREE + 2)]
            for j in tl.static_range(m + 1, DEGREE + 1):
                if MONOMIALS[j * (DEGREE + 1) + m] != 0:
                    weight += coefficients[j] * MONOMIALS[j * (DEGREE + 1) + m]
            if m:
                weights = weights + (weight,)
            else:
                constant += weight
    return weights + (constant,)


# Sizes make no variants that would be compiled when images of other sizes come; of strides that they are 1 does.
_SIZES = ['channels', 'height', 'width', 'out_height', 'out_width', 'tiles_h', 'tiles_w', 'tiles', 'programs']
_STRIDES = [tensor + dimension for tensor in 'xygd' for dimension in 'nchw']


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_STRIDES)
def _forward(
    x_ptr, y_ptr, linear_ptr, basis_ptr, scale_ptr, bias_ptr,
    channels, height, width, out_height, out_width, tiles_h, tiles_w, tiles,
    xn, xc, xh, xw, yn, yc, yh, yw,
    MONOMIALS: tl.constexpr, DEGREE: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each lane makes TH x TW outputs of one channel, and takes the tanh of an input once for all of them."""
    k = tl.program_id(2)
    image, top, left, c, inside = _place(
        tl.program_id(0), tl.program_id(1), channels, tiles_h, tiles_w, tiles, TH, TW, BLOCK_P, BLOCK_C
    )
    h, w = top * SH - PH, left * SW - PW
    at = _at(x_ptr, image, c, h, w, xn, xc, xh, xw)
    columns = ()
    for q in tl.static_range((TW - 1) * SW + (KW - 1) * DW + 1):
        columns = columns + (((w + q >= 0) & (w + q < width))[:, None],)
    weights = _weights(linear_ptr, basis_ptr, scale_ptr, bias_ptr, k, MONOMIALS, DEGREE, KH * KW)
    totals = ()
    for _ in tl.static_range(TH * TW):
        totals = totals + (tl.zeros((BLOCK_P, BLOCK_C), tl.float32) + weights[KH * KW * (DEGREE + 1)],)
    for r in tl.static_range((TH - 1) * SH + (KH - 1) * DH + 1):
        row = inside & ((h + r >= 0) & (h + r < height))[:, None]
        row_at = at + r * xh
        for q in tl.static_range((TW - 1) * SW + (KW - 1) * DW + 1):
            x = tl.load(row_at + q * xw, mask=row & columns[q], other=0.0).to(tl.float32)
            u = _tanh(x)
            for i in tl.static_range(KH):
                for j in tl.static_range(KW):
                    if (
                        r >= i * DH and (r - i * DH) % SH == 0 and (r - i * DH) // SH < TH
                        and q >= j * DW and (q - j * DW) % SW == 0 and (q - j * DW) // SW < TW
                    ):  # fmt: skip
                        totals = _add_value(
                            totals, (r - i * DH) // SH * TW + (q - j * DW) // SW,
                            weights, (i * KW + j) * (DEGREE + 1), DEGREE, x, u,
                        )  # fmt: skip
    at = _at(y_ptr, image, k * channels + c, top, left, yn, yc, yh, yw)
    for a in tl.static_range(TH):
        row = inside & (top + a < out_height)[:, None]
        row_at = at + a * yh
        for b in tl.static_range(TW):
            valid = row & (left + b < out_width)[:, None]
            tl.store(row_at + b * yw, totals[a * TW + b].to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_STRIDES)
def _backward(
    x_ptr, grad_ptr, linear_ptr, basis_ptr, scale_ptr, grad_x_ptr, partial_ptr,
    channels, height, width, out_height, out_width, tiles_h, tiles_w, tiles,
    xn, xc, xh, xw, gn, gc, gh, gw, dn, dc, dh, dw,
    KERNELS: tl.constexpr, MONOMIALS: tl.constexpr, DEGREE: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    OF_X: tl.constexpr, OF_WEIGHTS: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Laid over cells of SH x SW inputs, for which it is known at compile time which taps reach which outputs.

    Each lane takes TH x TW cells of one channel at a time. Programs take what is there in turn, and own a row of sums
    each, which are added up afterwards: the same order every time.
    """
    UP: tl.constexpr = (KH - 1) * DH // SH  # outputs above and left of a cell that its inputs reach
    ACROSS: tl.constexpr = (KW - 1) * DW // SW
    ROWS: tl.constexpr = TH + UP
    COLUMNS: tl.constexpr = TW + ACROSS
    PER_KERNEL: tl.constexpr = KH * KW * (DEGREE + 1) + 1  # the last is of the constant
    k = tl.program_id(2)
    weights = ()
    for step in tl.static_range(KERNELS):
        weights = weights + _weights(linear_ptr, basis_ptr, scale_ptr, None, k + step, MONOMIALS, DEGREE, KH * KW)
    sums = ()
    if OF_WEIGHTS:
        for _ in tl.static_range(KERNELS * PER_KERNEL):
            sums = sums + (tl.zeros((BLOCK_P, BLOCK_C), tl.float32),)
    for block in range(tl.program_id(0), tl.cdiv(tiles, BLOCK_P), tl.num_programs(0)):
        image, top, left, c, inside = _place(
            block, tl.program_id(1), channels, tiles_h, tiles_w, tiles, TH, TW, BLOCK_P, BLOCK_C
        )
        # all is read before anything is written, which reading would wait for
        grads = ()
        h, w = top - UP, left - ACROSS
        for step in tl.static_range(KERNELS):
            at = _at(grad_ptr, image, (k + step) * channels + c, h, w, gn, gc, gh, gw)
            for r in tl.static_range(ROWS):
                row = inside & ((h + r >= 0) & (h + r < out_height))[:, None]
                row_at = at + r * gh
                for q in tl.static_range(COLUMNS):
                    valid = row & ((w + q >= 0) & (w + q < out_width))[:, None]
                    grads = grads + (tl.load(row_at + q * gw, mask=valid, other=0.0).to(tl.float32),)
        h, w = top * SH - PH, left * SW - PW
        at = _at(x_ptr, image, c, h, w, xn, xc, xh, xw)
        xs = ()
        for r in tl.static_range(TH * SH):
            row = inside & ((h + r >= 0) & (h + r < height))[:, None]
            row_at = at + r * xh
            for q in tl.static_range(TW * SW):
                valid = row & ((w + q >= 0) & (w + q < width))[:, None]
                xs = xs + (tl.load(row_at + q * xw, mask=valid, other=0.0).to(tl.float32),)
        if OF_WEIGHTS:
            for step in tl.static_range(KERNELS):
                for a in tl.static_range(TH):
                    for b in tl.static_range(TW):
                        total = sums[(step + 1) * PER_KERNEL - 1] + grads[(step * ROWS + a + UP) * COLUMNS + b + ACROSS]
                        sums = sums[: (step + 1) * PER_KERNEL - 1] + (total,) + sums[(step + 1) * PER_KERNEL :]
        at = _at(grad_x_ptr, image, c, h, w, dn, dc, dh, dw)
        for r in tl.static_range(TH * SH):
            row = inside & ((h + r >= 0) & (h + r < height))[:, None]
            row_at = at + r * dh
            for q in tl.static_range(TW * SW):
                x = xs[r * TW * SW + q]
                u = _tanh(x)
                factors = (x, u)
                for m in tl.static_range(DEGREE - 1):
                    factors = factors + (factors[m + 1] * u,)
                by_x = tl.zeros_like(x)
                by_u = tl.zeros_like(x)
                for step in tl.static_range(KERNELS):
                    for i in tl.static_range(KH):
                        for j in tl.static_range(KW):
                            if (r - i * DH) % SH == 0 and (q - j * DW) % SW == 0:
                                grad = grads[
                                    (step * ROWS + (r - i * DH) // SH + UP) * COLUMNS + (q - j * DW) // SW + ACROSS
                                ]
                                if OF_X:
                                    by_x += grad * weights[step * PER_KERNEL + (i * KW + j) * (DEGREE + 1)]
                                    by_u += grad * _slope(
                                        weights, step * PER_KERNEL + (i * KW + j) * (DEGREE + 1), DEGREE, u
                                    )
                                if OF_WEIGHTS:
                                    sums = _add_products(
                                        sums, step * PER_KERNEL + (i * KW + j) * (DEGREE + 1), grad, factors, DEGREE + 1
                                    )
                if OF_X:
                    grad_x = (by_x + (1 - u * u) * by_u).to(grad_x_ptr.dtype.element_ty)
                    valid = row & ((w + q >= 0) & (w + q < width))[:, None]
                    tl.store(row_at + q * dw, grad_x, mask=valid)
    if OF_WEIGHTS:
        programs = tl.num_programs(0) * tl.num_programs(1)
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        for n in tl.static_range(KERNELS * PER_KERNEL):
            tl.store(partial_ptr + (k * PER_KERNEL + n) * programs + program, tl.sum(sums[n]))


@triton.jit
def _total(partial_ptr, row, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    return tl.sum(tl.load(partial_ptr + row * count + i, mask=i < count, other=0.0))


@triton.jit(do_not_specialize=_SIZES)
def _finish(
    partial_ptr, basis_ptr, scale_ptr, grad_linear_ptr, grad_basis_ptr, grad_scale_ptr, grad_bias_ptr, programs,
    MONOMIALS: tl.constexpr, DEGREE: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up what the programs left, and go from the powers of u to the functions of the basis; a tap each."""
    tap = tl.program_id(0)
    k = tl.program_id(1)
    row = k * (TAPS * (DEGREE + 1) + 1)
    constant = _total(partial_ptr, row + TAPS * (DEGREE + 1), programs, BLOCK)
    tl.store(grad_bias_ptr + k, constant, mask=tap == 0)
    tl.store(grad_linear_ptr + k * TAPS + tap, _total(partial_ptr, row + tap * (DEGREE + 1), programs, BLOCK))
    by_power = (constant,)
    for m in tl.static_range(1, DEGREE + 1):
        by_power = by_power + (_total(partial_ptr, row + tap * (DEGREE + 1) + m, programs, BLOCK),)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + k * TAPS + tap)
    grad_scale = 0.0
    for j in tl.static_range(DEGREE + 1):
        grad = 0.0
        for m in tl.static_range(j + 1):
            grad += by_power[m] * MONOMIALS[j * (DEGREE + 1) + m]
        at = (k * TAPS + tap) * (DEGREE + 1) + j
        grad_scale += grad * tl.load(basis_ptr + at)
        tl.store(grad_basis_ptr + at, grad * scale)
    tl.store(grad_scale_ptr + k * TAPS + tap, grad_scale)


def _layout(x: Tensor, rows: int, columns: int, tile: tuple[int, int], lanes: int) -> tuple[int, int, int, int, int]:
    """Tiles of rows x columns in each direction and in all, and the lanes of a program over tiles and over channels."""
    tiles_h, tiles_w = -(-rows // tile[0]), -(-columns // tile[1])
    tiles, channels = x.shape[0] * tiles_h * tiles_w, x.shape[1]
    # neighbours are channels in channels_last, pixels in NCHW
    if x.stride(1) == 1:
        lanes_c = min(lanes, triton.next_power_of_2(channels))
        return tiles_h, tiles_w, tiles, lanes // lanes_c, lanes_c
    lanes_p = min(lanes, triton.next_power_of_2(max(tiles, 1)))
    return tiles_h, tiles_w, tiles, lanes_p, lanes // lanes_p


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _out_size(x: Tensor, kernels: int, size: list, stride: list, padding: list, dilation: list) -> tuple[int, ...]:
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(x.shape[2:], size, stride, padding, dilation)
    ]
    return (x.shape[0], x.shape[1] * kernels, *out)


# Plainly defined: the wrapping of torch.library.custom_op costs the host as much as all the rest of a call.
torch.library.define(
    'rkan_mmdet::kan_conv2d',
    '(Tensor x, Tensor linear, Tensor basis, Tensor? scale, Tensor? bias, float[] monomials, int[] size, '
    'int[] stride, int[] padding, int[] dilation) -> Tensor',
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    'rkan_mmdet::kan_conv2d_backward',
    '(Tensor x, Tensor grad, Tensor linear, Tensor basis, Tensor? scale, float[] monomials, int[] size, '
    'int[] stride, int[] padding, int[] dilation, bool of_x, bool of_weights) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    tags=torch.Tag.pt2_compliant_tag,
)


def _gpu_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current GPU."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


@torch.library.impl('rkan_mmdet::kan_conv2d', ('cuda', 'cpu'))
def _kan_conv2d(
    x: Tensor,
    linear: Tensor,
    basis: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    monomials: list[float],
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """The weights are as of :func:`rkan_mmdet.ops.kan_conv2d`; row j of ``monomials`` holds the powers of P_j."""
    kernels = len(linear)
    y = torch.empty(
        _out_size(x, kernels, size, stride, padding, dilation),
        dtype=x.dtype,
        device=x.device,
        memory_format=_memory_format(x),
    )
    tile = _OUTPUTS if max(stride) == 1 else _OUTPUTS_OF_STRIDES
    *tiles, lanes_p, lanes_c = _layout(x, *y.shape[2:], tile, _LANES)
    if y.numel():
        with _gpu_of(x):
            _forward[(-(-tiles[2] // lanes_p), -(-x.shape[1] // lanes_c), kernels)](
                x, y, *_contiguous(linear, basis, scale, bias),
                *x.shape[1:], *y.shape[2:], *tiles, *x.stride(), *y.stride(),
                tuple(monomials), basis.shape[2] - 1, *size, *stride, *padding, *dilation, *tile, lanes_p, lanes_c,
                num_warps=_LANES // 32,
            )  # fmt: skip
    return y


@torch.library.register_fake('rkan_mmdet::kan_conv2d')
def _(x, linear, basis, scale, bias, monomials, *sizes):
    size = _out_size(x, len(linear), *sizes)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


@torch.library.impl('rkan_mmdet::kan_conv2d_backward', ('cuda', 'cpu'))
def _kan_conv2d_backward(
    x: Tensor,
    grad: Tensor,
    linear: Tensor,
    basis: Tensor,
    scale: Tensor | None,
    monomials: list[float],
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    of_x: bool,
    of_weights: bool,
) -> tuple[Tensor, ...]:
    """The gradients of x, linear, basis, scale and bias; empty ones if they are not wanted."""
    linear, basis, scale = _contiguous(linear, basis, scale)
    (kernels, taps, degree), monomials = basis.shape, tuple(monomials)
    degree, tile = degree - 1, [max(1, _INPUTS // s) for s in stride]
    # cells reach from the first row that an output begins at (in the padding) to the last row of x or of the outputs
    cells = [max(out, -(-(n + p) // s)) for out, n, p, s in zip(grad.shape[2:], x.shape[2:], padding, stride)]
    *tiles, lanes_p, lanes_c = _layout(x, *cells, tile, _BACKWARD_LANES)
    blocks_c = -(-x.shape[1] // lanes_c)
    grid = min(-(-tiles[2] // lanes_p), max(1, _PROGRAMS // max(1, blocks_c))), blocks_c
    programs = math.prod(grid)
    grad_x, *by_weight = _empty_gradients(x, linear, basis, of_x, of_weights)
    partial = linear.new_empty((kernels, taps * (degree + 1) + 1, programs) if of_weights else 0)
    # at once, but with several kernels the registers hold the sums of one at a time
    parts = [(of_x, of_weights)] if kernels == 1 else [(True, False)] * of_x + [(False, True)] * of_weights
    with _gpu_of(x):
        for part in parts if programs else []:
            at_once = 1 if part[1] else kernels
            _backward[(*grid, kernels // at_once)](
                x, grad, linear, basis, scale, grad_x, partial, *x.shape[1:], *grad.shape[2:], *tiles,
                *x.stride(), *grad.stride(), *(grad_x.stride() if of_x else (0, 0, 0, 0)),
                at_once, monomials, degree, *size, *stride, *padding, *dilation, *part, *tile, lanes_p, lanes_c,
                num_warps=_BACKWARD_LANES // 32,
            )  # fmt: skip
        if of_weights:
            block = triton.next_power_of_2(max(programs, 1))
            _finish[(taps, kernels)](
                partial, basis, scale, *by_weight, programs, monomials, degree, taps, block, num_warps=8
            )
    return grad_x, *by_weight


def _empty_gradients(x: Tensor, linear: Tensor, basis: Tensor, of_x: bool, of_weights: bool) -> tuple[Tensor, ...]:
    """Room for the gradients of x, linear, basis, scale and bias."""
    shapes = (linear.shape, basis.shape, linear.shape, len(linear)) if of_weights else (0, 0, 0, 0)
    return torch.empty_like(x) if of_x else x.new_empty(0), *(linear.new_empty(shape) for shape in shapes)


@torch.library.register_fake('rkan_mmdet::kan_conv2d_backward')
def _(x, grad, linear, basis, scale, monomials, size, stride, padding, dilation, of_x, of_weights):
    return _empty_gradients(x, linear, basis, of_x, of_weights)


class _KANConv2d(torch.autograd.Function):
    """Keeps ``x`` and the weights."""

    @staticmethod
    def forward(
        ctx, x: Tensor, linear: Tensor, basis_weight: Tensor, scale: Tensor | None, bias: Tensor | None,
        basis: Polynomial, *sizes: list,
    ) -> Tensor:  # fmt: skip
        ctx.basis, ctx.sizes = basis, sizes
        ctx.save_for_backward(x, linear, basis_weight, scale, bias)
        return torch.ops.rkan_mmdet.kan_conv2d(x, linear, basis_weight, scale, bias, basis.flat_monomials, *sizes)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        wanted, inputs = ctx.needs_input_grad[:5], ctx.saved_tensors
        if torch.is_grad_enabled() and not is_compiling():  # the gradient is to be differentiated in its turn
            y = kan_conv2d_eager(*inputs, ctx.basis, *ctx.sizes)
            chosen = [value for value, want in zip(inputs, wanted) if want]
            found = iter(torch.autograd.grad(y, chosen, grad, create_graph=True))
            grads = [next(found) if want else None for want in wanted]
        else:
            grads = torch.ops.rkan_mmdet.kan_conv2d_backward(
                inputs[0], grad, *inputs[1:4], ctx.basis.flat_monomials, *ctx.sizes, wanted[0], any(wanted[1:])
            )
        return *(value if want else None for value, want in zip(grads, wanted)), *(None,) * 5


def _count(basis_shape: tuple, out_shape: tuple) -> int:
    """As of depthwise convolutions of x and the powers of u, which the other backends run."""
    return 2 * math.prod(out_shape) * math.prod(basis_shape[1:])


@register_flop_formula(torch.ops.rkan_mmdet.kan_conv2d)
def _(x_shape, linear_shape, basis_shape, *settings, out_shape=None, **kwargs) -> int:
    return _count(basis_shape, out_shape)


@register_flop_formula(torch.ops.rkan_mmdet.kan_conv2d_backward)
def _(x_shape, grad_shape, linear_shape, basis_shape, *settings, out_shape=None, **kwargs) -> int:
    return sum(settings[-2:]) * _count(basis_shape, grad_shape)  # of_x, of_weights


def kan_conv2d_triton(
    x: Tensor,
    linear_weight: Tensor,
    basis_weight: Tensor,
    basis_scale: Tensor | None,
    linear_bias: Tensor | None,
    basis: Polynomial,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """See :func:`rkan_mmdet.ops.kan_conv2d`."""
    weights = (linear_weight, basis_weight, basis_scale, linear_bias)
    sizes = (list(kernel_size), list(stride), list(padding), list(dilation))
    if torch.is_grad_enabled():
        return _KANConv2d.apply(x, *weights, basis, *sizes)
    return torch.ops.rkan_mmdet.kan_conv2d(x, *weights, basis.flat_monomials, *sizes)
