"""The compiled CPU kernels of the KAN convolution (cpp_kan_conv.cpp), called by ctypes.

The system's C++ compiler builds them when they are first asked for, in seconds; they are kept in
``~/.cache/rkan_mmdet/kernels`` (``XDG_CACHE_HOME`` is obeyed).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import flop_counter

logger = logging.getLogger('rkan_mmdet')

SOURCE = Path(__file__).with_suffix('.cpp')
FLAGS = ('-std=c++17', '-O3', '-march=native', '-fopenmp', '-fPIC')


def _processor() -> str:
    """What ``-march=native`` depends on: a home may be shared by unlike machines."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor()
    return '\n'.join(sorted({line for line in lines if line.startswith(('flags', 'Features', 'model name'))}))


def _cache() -> Path:
    """The folder of the libraries. What lies there is run: nobody else may write to it."""
    base = Path(os.environ.get('XDG_CACHE_HOME') or '.')
    folder = (base if base.is_absolute() else Path.home() / '.cache') / 'rkan_mmdet' / 'kernels'
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _check_owner(path: Path) -> None:
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f'{path} belongs to another user, or others can write to it')


def _build(library: Path) -> None:
    compiler = shutil.which('g++') or shutil.which('c++')
    if compiler is None:
        raise FileNotFoundError('a C++ compiler (g++) is needed, and none was found')
    logger.info('compiling the CPU kernels of the KAN convolution, once: %s', library)
    with tempfile.TemporaryDirectory(dir=library.parent) as temporary:
        built, linked = Path(temporary, 'kan_conv.o'), Path(temporary, 'kan_conv.so')
        _run([compiler, *FLAGS, '-c', str(SOURCE), '-o', str(built)])
        # without -fopenmp: its functions are then found in the library that torch has loaded, whose threads they share
        _run([compiler, '-shared', str(built), '-o', str(linked)])
        linked.chmod(0o700)
        with open(linked, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(linked, library)  # whole or not at all: other processes may build it too


def _open(library: Path) -> ctypes.CDLL:
    _check_owner(library)
    kernels = ctypes.CDLL(str(library))
    for function in (kernels.kan_conv_forward, kernels.kan_conv_backward):
        function.restype = ctypes.c_bool
    return kernels


@lru_cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The kernels, or None and the reason; asked once a process."""
    if sys.platform != 'linux':
        return None, f"backend 'cpp' runs on Linux, but this is {sys.platform}"
    try:
        key = '\n'.join([SOURCE.read_text(), *FLAGS, platform.machine(), _processor()])
        folder = _cache()
        _check_owner(folder)
        library = folder / f'kan_conv-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so'
        if library.exists():
            try:
                return _open(library), ''
            except (OSError, AttributeError) as error:
                logger.info('%s does not load and is built again: %s', library, error)
        _build(library)
        return _open(library), ''
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        return None, f"backend 'cpp' could not be built: {error}"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if 'error' in line] or done.stderr.splitlines()
        raise RuntimeError(f'{" ".join(command)} ended with {done.returncode}: {"".join(lines[:1])}')


@torch.compiler.assume_constant_result
def why_not() -> str:
    """Why the kernels can not be had here; the empty string when they can."""
    return _load()[1]


class _Sizes(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *('batch', 'channels', 'height', 'width', 'kernels', 'out_height', 'out_width', 'kernel_h', 'kernel_w'),
            *('stride_h', 'stride_w', 'pad_h', 'pad_w', 'dilation_h', 'dilation_w', 'degree', 'threads'),
        )
    )


def _sizes(x: Tensor, y: Tensor, degree: int, *kernel: list[int]) -> _Sizes:
    """``kernel``: its size, stride, padding and dilation."""
    height_width = (number for pair in kernel for number in pair)
    kernels = y.shape[1] // x.shape[1]
    return _Sizes(*x.shape, kernels, *y.shape[2:], *height_width, degree, torch.get_num_threads())


def _pointers(tensor: Tensor | None, *dims: int) -> tuple[ctypes.c_void_p, ctypes.Array]:
    """Of the data of a tensor and of its strides, as two arguments."""
    strides = () if tensor is None else (tensor.stride(d) for d in dims)
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr()), (ctypes.c_int64 * 4)(*strides)


def _readable(x: Tensor) -> Tensor:
    """In float32, with its channels or its columns side by side."""
    x = x.float()
    return x if 1 in (x.stride(1), x.stride(3)) else x.contiguous()


def _empty(x: Tensor, *size: int, dtype: torch.dtype | None = None) -> Tensor:
    """In the memory format of x."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format)


def _check(x: Tensor, planes: int, *weights: Tensor | None) -> None:
    """What the kernels take on trust."""
    if not x.numel() or not 2 <= planes <= 6 or any(w is not None and w.dtype != torch.float32 for w in weights):
        kinds = [w.dtype for w in weights if w is not None]
        raise ValueError(f'x must not be empty, of 2 to 6 planes, weights float32: got {x.shape}, {planes}, {kinds}')


# The sum of depthwise convolutions of x and of the powers of tanh(x), and its gradients. As operators, so that
# torch.compile takes them as they are.
_library = torch.library.Library('rkan_mmdet', 'FRAGMENT')
_library.define(
    'planes_conv2d(Tensor x, Tensor weights, Tensor? bias, int[] stride, int[] padding, int[] dilation) -> Tensor'
)
_library.define(
    'planes_conv2d_backward(Tensor x, Tensor grad, Tensor kernels, int[] stride, int[] padding, int[] dilation, '
    'bool of_x, bool of_kernels) -> (Tensor, Tensor)'
)


def _empty_output(x: Tensor, weights: Tensor, *spec: list[int], dtype: torch.dtype | None = None) -> Tensor:
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(x.shape[2:], weights.shape[-2:], *spec)]
    return _empty(x, x.shape[0], weights.shape[1] * x.shape[1], *size, dtype=dtype)


def sum_planes(
    x: Tensor, weights: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """See :func:`rkan_mmdet.ops.eager.sum_planes`."""
    _check(x, len(weights), weights, bias)
    y = _empty_output(x, weights, stride, padding, dilation, dtype=torch.float32)
    dtype, x, taps = x.dtype, _readable(x), weights.flatten(3)
    sizes = _sizes(x, y, len(weights) - 1, weights.shape[-2:], stride, padding, dilation)
    if not _load()[0].kan_conv_forward(
        ctypes.byref(sizes), *_pointers(x, 0, 1, 2, 3), *_pointers(taps, 0, 1, 2, 3), *_pointers(bias, 0, 1),
        *_pointers(y, 0, 1, 2, 3),
    ):  # fmt: skip
        raise MemoryError(f'no memory for a KAN convolution of {tuple(x.shape)}')
    return y.to(dtype)


def gradients(
    x: Tensor, grad: Tensor, kernels: Tensor, stride: list[int], padding: list[int], dilation: list[int],
    of_x: bool, of_kernels: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of x, and of the kernels (K, planes, kh, kw) as (planes, K, kh, kw); empty ones if they are not wanted."""
    _check(x, kernels.shape[1], kernels)
    grad_x = _empty(x, *x.shape, dtype=torch.float32) if of_x else None
    dtype, x, grad = x.dtype, _readable(x), _readable(grad)
    sizes = _sizes(x, grad, kernels.shape[1] - 1, kernels.shape[2:], stride, padding, dilation)
    weights = kernels.permute(0, 2, 3, 1).contiguous()
    sums = torch.zeros_like(weights, dtype=torch.float64) if of_kernels else None
    if not _load()[0].kan_conv_backward(
        ctypes.byref(sizes), *_pointers(x, 0, 1, 2, 3), *_pointers(grad, 0, 1, 2, 3), _pointers(weights)[0],
        *_pointers(grad_x, 0, 1, 2, 3), _pointers(sums)[0],
    ):  # fmt: skip
        raise MemoryError(f'no memory for the gradients of a KAN convolution of {tuple(x.shape)}')
    return (
        x.new_empty(0, dtype=dtype) if grad_x is None else grad_x.to(dtype),
        x.new_empty(0) if sums is None else sums.float().permute(3, 0, 1, 2).contiguous(),
    )


_library.impl('planes_conv2d', sum_planes, 'CPU')
_library.impl('planes_conv2d_backward', gradients, 'CPU')
_library.impl('planes_conv2d', lambda x, weights, bias, *spec: _empty_output(x, weights, *spec), 'Meta')
_library.impl(
    'planes_conv2d_backward',
    lambda x, grad, kernels, stride, padding, dilation, of_x, of_kernels: (
        _empty(x, *x.shape) if of_x else x.new_empty(0),
        kernels.new_empty(kernels.transpose(0, 1).shape if of_kernels else 0),
    ),
    'Meta',
)


def _count_forward(x_shape, weights_shape, *settings, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(out_shape) * weights_shape[0] * math.prod(weights_shape[-2:])


def _count_backward(x_shape, grad_shape, kernels_shape, *settings, out_shape=None, **kwargs) -> int:
    return sum(settings[-2:]) * 2 * math.prod(grad_shape) * math.prod(kernels_shape[1:])  # of_x, of_kernels


FLOP_FORMULAS = {
    torch.ops.rkan_mmdet.planes_conv2d: _count_forward,
    torch.ops.rkan_mmdet.planes_conv2d_backward: _count_backward,
}
if hasattr(flop_counter, 'register_flop_formula'):  # since torch 2.2
    for operator, formula in FLOP_FORMULAS.items():
        flop_counter.register_flop_formula(operator)(formula)
