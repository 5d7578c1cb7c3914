"""The KAN convolution: the function, the thin module, and the choice of a backend."""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from rkan_mmdet.checks import check_choice, check_int, check_pair

from . import cpp_kan_conv
from .bases import Basis, build_basis
from .eager import (
    MAX_MONOMIAL_DEGREE,
    is_compiling,
    is_exporting,
    is_monomial,
    kan_conv2d_eager,
    without_autocast,
)
from .reference import kan_conv2d_reference

logger = logging.getLogger('rkan_mmdet')

BACKENDS = ('auto', 'reference', 'eager', 'cpp', 'triton')
NORMALIZATIONS = ('tanh', 'min-max', 'arctan', 'standardization')


def _find_triton() -> str:
    """Why its kernels can not be imported; asked once, since torch.compile can not follow such questions."""
    for name in ('triton', 'pytorch-triton', 'pytorch-triton-rocm', 'triton-windows'):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        # the kernels hold their weights in tuples, which older ones do not take
        old = tuple(map(int, found.split('.')[:2])) < (3, 4)
        return f"backend 'triton' needs triton >= 3.4, but this is {found}" if old else ''
    return "backend 'triton' needs triton >= 3.4, which is not installed"


_NO_TRITON = _find_triton()


def can_run(backend: str, normalization: str = 'tanh', basis: Basis | None = None, x: Tensor | None = None) -> str:
    """Why a backend can not compute a KAN convolution; the empty string when it can.

    Args:
        backend (str): ``'reference'``, ``'eager'``, ``'cpp'`` or ``'triton'``.
        normalization (str): See :func:`kan_conv2d`. Defaults to ``'tanh'``.
        basis (Basis, optional): The functions; None asks of the backend in general. Defaults to None.
        x (Tensor, optional): The input; None asks of any. Defaults to None.

    Examples:
        >>> can_run('eager')
        ''
        >>> can_run('eager', 'min-max')
        "backend 'eager' evaluates the basis once a pixel, but normalization 'min-max' depends on the window"
    """
    check_choice('backend', backend, BACKENDS[1:])
    if backend != 'reference' and normalization != 'tanh':
        return (
            f'backend {backend!r} evaluates the basis once a pixel, but normalization {normalization!r} depends on '
            'the window'
        )
    if backend == 'triton':
        return _why_not_polynomial(backend, basis) or _why_not_triton(x)
    if backend == 'cpp':
        return _why_not_polynomial(backend, basis) or _why_not_cpp(x)
    return ''


def _why_not_polynomial(backend: str, basis: Basis | None) -> str:
    if basis is not None and not is_monomial(basis):
        return f'backend {backend!r} computes polynomials up to degree {MAX_MONOMIAL_DEGREE}, but basis is {basis!r}'
    if basis is not None and not basis.on_domain:
        return f'backend {backend!r} evaluates polynomials at tanh(x), but basis {basis!r} is evaluated at x'
    return ''


def _why_not_cpp(x: Tensor | None) -> str:
    if x is not None and x.device.type != 'cpu':
        return f"backend 'cpp' needs a tensor on a CPU, but x is on {x.device}"
    if x is not None and x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"backend 'cpp' computes float32, float16 and bfloat16, but x is {x.dtype}"
    if is_exporting():
        return ''  # which writes plain operators, as of 'eager'
    if is_compiling() and getattr(torch.compiler, 'is_exporting', None) is None:
        return "backend 'cpp' needs torch >= 2.7 under torch.compile: before, an export looked the same"
    if x is not None and not x.numel():
        return f"backend 'cpp' needs an input that is not empty, but x is {tuple(x.shape)}"
    if x is not None and type(x) not in (Tensor, nn.Parameter):
        return f"backend 'cpp' needs a tensor with memory of its own, but x is a {type(x).__name__}"
    return cpp_kan_conv.why_not()


def _why_not_triton(x: Tensor | None) -> str:
    if x is not None and not x.is_cuda and os.environ.get('TRITON_INTERPRET') != '1':
        return f"backend 'triton' needs a tensor on a GPU, but x is on {x.device}"
    if x is not None and x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"backend 'triton' computes float32, float16 and bfloat16, but x is {x.dtype}"
    if x is not None and x.is_cuda and not _NO_TRITON and not is_compiling():
        return _why_no_launch(x.device)
    return _NO_TRITON


@lru_cache
def _why_no_launch(device: torch.device) -> str:
    """Why Triton can not launch kernels on a GPU; it needs a C compiler and Python's headers to do so."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < (7, 0):
        return f"backend 'triton' needs a GPU of compute capability (7, 0), but {device} has {capability}"
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:
        return f"backend 'triton' can not launch kernels: {error}"
    return ''


def _choose(backend: str, normalization: str, basis: Basis, x: Tensor | None) -> str:
    if backend != 'auto':
        reason = can_run(backend, normalization, basis, x)
        if reason:
            raise ValueError(reason)
        return backend
    for candidate in ('triton', 'cpp', 'eager', 'reference'):
        # the interpreter of triton is for tests: nobody wants it unasked
        interpreted = candidate == 'triton' and x is not None and not x.is_cuda
        reason = 'x is not on a GPU' if interpreted else can_run(candidate, normalization, basis, x)
        if not reason:
            return candidate
        if not is_compiling():  # which can not trace a logger
            logger.debug('passed over: %s', reason)
    raise AssertionError('the reference runs everything')


def _check_normalization(normalization: str, basis: Basis, kernel_size: tuple[int, int]) -> str:
    check_choice('normalization', normalization, NORMALIZATIONS)
    if normalization != 'tanh' and kernel_size == (1, 1):
        raise ValueError(
            f"normalization must be 'tanh' with kernel_size 1, but got {normalization!r}: one value has no spread"
        )
    if normalization != 'tanh' and not basis.on_domain:
        raise ValueError(
            f"normalization must be 'tanh' (which is ignored) with basis {basis!r}, which is evaluated on the input "
            f'itself, but got {normalization!r}'
        )
    return normalization


def kan_conv2d(
    x: Tensor,
    linear_weight: Tensor,
    basis_weight: Tensor | None = None,
    basis_scale: Tensor | None = None,
    linear_bias: Tensor | None = None,
    *,
    basis: Basis | dict[str, Any],
    kernel_size: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    normalization: str = 'tanh',
    arctan_scale: Tensor | None = None,
    backend: str = 'auto',
) -> Tensor:
    r"""Convolve each channel with learnable functions in place of fixed weights.

    For each channel and each output position, with the inputs :math:`x_t` of the window (zero padding of ``x``) and
    :math:`u_t = \tanh(x_t)`:

    .. math:: y = \sum_t b_t x_t + \sum_t s_t \sum_j w_{t,j} P_j(u_t)

    The same kernel serves every channel. With ``K`` kernels the outputs are concatenated: all channels of kernel 0,
    then all channels of kernel 1, and so on. A padded pixel contributes :math:`P_j(0)`, which is not 0 for even j.
    Source: arXiv 2410.05500, section 3, and the authors' code.

    Args:
        x (Tensor[N, C, H, W]): The input. fp16 and bf16 are computed in fp32 and rounded once.
        linear_weight (Tensor[K, k*k]): The weights :math:`b` of the linear term, row by row of the window.
        basis_weight (Tensor[K, k*k, n] or None): The coefficients :math:`w` of the ``n`` functions of the basis.
            None only if it has none (``Linear``).
        basis_scale (Tensor[K, k*k] or None): The scales :math:`s`; None means 1.
        linear_bias (Tensor[K] or None): A bias a kernel; None means 0.
        basis (Basis or dict): The functions, as an instance or as ``dict(type='Chebyshev', degree=3)``.
        kernel_size (int or tuple): Size of the window. Defaults to 3.
        stride (int or tuple): Defaults to 1.
        padding (int or tuple): Zeros added on both sides. Defaults to 1.
        dilation (int or tuple): Defaults to 1.
        normalization (str): ``'tanh'``, evaluated once a pixel, or ``'min-max'``, ``'arctan'``,
            ``'standardization'``, taken over each window: many times slower, since every pixel is evaluated once a
            window. Bases that are evaluated on the input itself take ``'tanh'`` only, and ignore it.
            Defaults to ``'tanh'``.
        arctan_scale (Tensor[K] or None): The learned factor of ``'arctan'``, which needs it.
        backend (str): ``'auto'``, ``'triton'`` (on a GPU), ``'cpp'`` (on a CPU), ``'eager'`` or ``'reference'``; see
            :func:`can_run`. Defaults to ``'auto'``.

    Returns:
        Tensor[N, K*C, H', W']: The output, in the dtype and memory format of ``x``.

    Raises:
        ValueError: A shape or a value does not fit, or the backend can not run this.
        TypeError: An argument is of the wrong type.

    Examples:
        >>> x = torch.randn(2, 16, 32, 32)
        >>> b, w = torch.randn(1, 9), torch.randn(1, 9, 4)
        >>> kan_conv2d(x, b, w, basis=dict(type='Chebyshev', degree=3), stride=2).shape
        torch.Size([2, 16, 16, 16])
    """
    basis = build_basis(basis)
    check_choice('backend', backend, BACKENDS)
    sizes = dict(
        kernel_size=check_pair('kernel_size', kernel_size, 1),
        stride=check_pair('stride', stride, 1),
        padding=check_pair('padding', padding, 0),
        dilation=check_pair('dilation', dilation, 1),
    )
    _check_normalization(normalization, basis, sizes['kernel_size'])
    weights = (linear_weight, basis_weight, basis_scale, linear_bias, arctan_scale)
    _check_tensors(x, *weights, basis, normalization, sizes)
    return _compute(x, weights, basis, normalization, backend, sizes)


def _compute(
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    basis: Basis,
    normalization: str,
    backend: str,
    sizes: dict[str, tuple[int, int]],
) -> Tensor:
    """:func:`kan_conv2d` of arguments that fit each other; the weights in its order."""
    for size, k, p, d in zip(x.shape[2:], sizes['kernel_size'], sizes['padding'], sizes['dilation']):
        if size < 1:
            raise ValueError(f'x must have a height and a width of at least 1, but got {tuple(x.shape)}')
        if size + 2 * p < d * (k - 1) + 1:
            raise ValueError(
                f'the window (kernel_size={k}, dilation={d}) is larger than the padded input: '
                f'{d} * ({k} - 1) + 1 > {size} + 2 * {p}'
            )
    chosen = _choose(backend, normalization, basis, x)
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    # what there is nothing to do for is asked first: on a GPU the host's time counts
    weights = tuple(w if w is None or w.dtype == dtype else w.to(dtype) for w in weights)
    if chosen == 'triton':
        from .triton_kan_conv import kan_conv2d_triton  # triton need not be there

        return kan_conv2d_triton(x, *weights[:4], basis, **sizes)
    with without_autocast(x.device.type):
        if chosen in ('eager', 'cpp'):
            return kan_conv2d_eager(x, *weights[:4], basis, **sizes, cpp=chosen == 'cpp').to(x.dtype)
        y = kan_conv2d_reference(
            x.to(dtype), *weights[:4], basis=basis, normalization=normalization, arctan_scale=weights[4], **sizes
        ).to(x.dtype)
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        y = y.contiguous(memory_format=torch.channels_last)
    return y


def _check_tensors(
    x, linear_weight, basis_weight, basis_scale, linear_bias, arctan_scale, basis, normalization, sizes
) -> None:
    if x.dim() != 4 or not x.shape[1]:
        raise ValueError(f'x must be of shape (N, C, H, W), C at least 1, but got {tuple(x.shape)}')
    if not x.is_floating_point():
        raise TypeError(f'x must be a floating point tensor, but got {x.dtype}')
    taps = sizes['kernel_size'][0] * sizes['kernel_size'][1]
    if linear_weight.dim() != 2 or linear_weight.shape[1] != taps or not len(linear_weight):
        raise ValueError(
            f'linear_weight must be of shape (K, {taps}), K at least 1, for kernel_size={sizes["kernel_size"]}, '
            f'but got {tuple(linear_weight.shape)}'
        )
    kernels = linear_weight.shape[0]
    for name, tensor in (('basis_weight', basis_weight), ('basis_scale', basis_scale)):
        if basis.num_functions == 0 and tensor is not None:
            raise ValueError(f'{name} must be None with basis {basis!r}, which has no functions')
    if basis.num_functions and basis_weight is None:
        raise ValueError(f'basis_weight must be given with basis {basis!r}')
    if normalization == 'arctan' and arctan_scale is None:
        raise ValueError("arctan_scale must be given with normalization 'arctan'")
    for name, tensor, shape in (
        ('basis_weight', basis_weight, (kernels, taps, basis.num_functions)),
        ('basis_scale', basis_scale, (kernels, taps)),
        ('linear_bias', linear_bias, (kernels,)),
        ('arctan_scale', arctan_scale, (kernels,)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f'{name} must be of shape {shape} with basis {basis!r}, but got {tuple(tensor.shape)}')


class KANConv2d(nn.Module):
    """A depthwise convolution whose weights are learnable functions, shared by all channels.

    See :func:`kan_conv2d` for the function, the arguments and their source. The number of parameters does not depend
    on the number of channels.

    Args:
        in_channels (int): Number of input channels C.
        num_kernels (int): Number of independent kernels K; the output has ``C * K`` channels. Defaults to 1.
        kernel_size (int or tuple): Defaults to 3.
        stride (int or tuple): Defaults to 1.
        padding (int or tuple): Defaults to 1.
        dilation (int or tuple): Defaults to 1.
        basis (dict or Basis): Defaults to ``dict(type='Chebyshev', degree=3)``.
        normalization (str): Defaults to ``'tanh'``.
        backend (str): Defaults to ``'auto'``.

    Attributes:
        linear_weight (Parameter[K, k*k]): Starts Kaiming normal.
        basis_weight (Parameter[K, k*k, n]): Starts normal with variance 1 / (k*k*n). None if ``n`` is 0.
        basis_scale (Parameter[K, k*k]): Starts at 1. None for RBF and Linear.
        linear_bias (Parameter[K]): RBF only, else None.
        arctan_scale (Parameter[K]): Starts at 0.1. None unless ``normalization='arctan'``.

    Examples:
        >>> conv = KANConv2d(512, stride=2)
        >>> conv(torch.randn(2, 512, 40, 66)).shape
        torch.Size([2, 512, 20, 33])
        >>> sum(p.numel() for p in conv.parameters())
        54
    """

    def __init__(
        self,
        in_channels: int,
        num_kernels: int = 1,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        basis: dict[str, Any] | Basis = dict(type='Chebyshev', degree=3),  # noqa: B006 (read only)
        normalization: str = 'tanh',
        backend: str = 'auto',
    ) -> None:
        super().__init__()
        self.in_channels = check_int('in_channels', in_channels, 1)
        self.num_kernels = check_int('num_kernels', num_kernels, 1)
        self.out_channels = in_channels * num_kernels
        self.kernel_size = check_pair('kernel_size', kernel_size, 1)
        self.stride = check_pair('stride', stride, 1)
        self.padding = check_pair('padding', padding, 0)
        self.dilation = check_pair('dilation', dilation, 1)
        self.basis = build_basis(basis)
        self.normalization = _check_normalization(normalization, self.basis, self.kernel_size)
        self.backend = check_choice('backend', backend, BACKENDS)
        if backend != 'auto':
            _choose(backend, normalization, self.basis, None)

        taps, functions = self.kernel_size[0] * self.kernel_size[1], self.basis.num_functions
        self.linear_weight = nn.Parameter(torch.empty(num_kernels, taps))
        self.basis_weight = nn.Parameter(torch.empty(num_kernels, taps, functions)) if functions else None
        self.basis_scale = nn.Parameter(torch.empty(num_kernels, taps)) if self.basis.has_scale else None
        self.linear_bias = nn.Parameter(torch.empty(num_kernels)) if self.basis.has_bias else None
        self.arctan_scale = nn.Parameter(torch.empty(num_kernels)) if normalization == 'arctan' else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again from the initial distribution of the basis."""
        self.basis.reset_parameters(self.linear_weight, self.basis_weight, self.basis_scale, self.linear_bias)
        if self.arctan_scale is not None:
            nn.init.constant_(self.arctan_scale, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """``Tensor[N, C, H, W]`` to ``Tensor[N, K*C, H', W']``."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f'x must be of shape (N, {self.in_channels}, H, W), but got {tuple(x.shape)}')
        if not x.is_floating_point():
            raise TypeError(f'x must be a floating point tensor, but got {x.dtype}')
        weights = (self.linear_weight, self.basis_weight, self.basis_scale, self.linear_bias, self.arctan_scale)
        sizes = dict(kernel_size=self.kernel_size, stride=self.stride, padding=self.padding, dilation=self.dilation)
        return _compute(x, weights, self.basis, self.normalization, self.backend, sizes)

    def functions(self, x: Tensor) -> Tensor:
        """The learned function of each tap: what an input of value ``x`` at that tap adds to the output.

        All channels share them, so they are the whole truth about this layer (RBF's constant ``linear_bias`` apart).
        With a normalization over windows a tap's share is no function of its input alone; then ``x`` is taken as
        the normalized value in [-1, 1] and the linear term is left out.

        Args:
            x (Tensor[L]): Input values.

        Returns:
            Tensor[K, k*k, L]: The functions at ``x``.

        Examples:
            >>> KANConv2d(8).functions(torch.linspace(-3, 3, 50)).shape
            torch.Size([1, 9, 50])
        """
        x, windowed = x.to(self.linear_weight.dtype), self.normalization != 'tanh'
        y = self.linear_weight[..., None] * (torch.zeros_like(x) if windowed else x)
        if self.basis_weight is None:
            return y
        weight = self.basis_weight if self.basis_scale is None else self.basis_weight * self.basis_scale[..., None]
        u = torch.tanh(x) if self.basis.on_domain and not windowed else x
        return y + torch.einsum('ktj,jl->ktl', weight, torch.stack(self.basis.values(u)))

    def extra_repr(self) -> str:
        return (
            f'{self.in_channels}, num_kernels={self.num_kernels}, kernel_size={self.kernel_size}, '
            f'stride={self.stride}, padding={self.padding}, dilation={self.dilation}, basis={self.basis!r}, '
            f'normalization={self.normalization!r}, backend={self.backend!r}'
        )
