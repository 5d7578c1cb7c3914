"""The compiled CPU kernels of the KAN convolution (cpp_kan_conv.cpp), called by ctypes.

The system's C++ compiler builds them when they are first asked for, in seconds; they are kept in
``~/.cache/rkan_mmdet/kernels`` (``XDG_CACHE_HOME`` is obeyed).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
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


@lru_cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The kernels, or None and the reason; asked once a process."""
    if sys.platform != 'linux':
        return None, f"backend 'cpp' runs on Linux, but this is {sys.platform}"
    compiler = shutil.which('c++') or shutil.which('g++') or shutil.which('clang++')
    key = '\n'.join([SOURCE.read_text(), *FLAGS, platform.machine(), _processor()])
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'rkan_mmdet' / 'kernels'
    library = folder / f'kan_conv-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so'
    try:
        if not library.exists():
            if compiler is None:
                return None, "backend 'cpp' needs a C++ compiler (g++), and none was found"
            logger.info('compiling the CPU kernels of the KAN convolution, once: %s', library)
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                built, linked = Path(temporary, 'kan_conv.o'), Path(temporary, 'kan_conv.so')
                _run([compiler, *FLAGS, '-c', str(SOURCE), '-o', str(built)])
                # without -fopenmp: its functions are then found in the library that torch has loaded, whose threads
                # they must share
                _run([compiler, '-shared', str(built), '-o', str(linked)])
                os.replace(linked, library)  # whole or not at all: other processes may build it too
        return ctypes.CDLL(str(library)), ''
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return None, f"backend 'cpp' could not be built: {error}"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if 'error' in line] or done.stderr.splitlines()
        raise RuntimeError(f'{" ".join(command)} ended with {done.returncode}: {"".join(lines[:1])}')


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


def _sizes(x: Tensor, kernels: int, kernel_size: tuple[int, int], degree: int, *spec: tuple[int, int]) -> _Sizes:
    """``spec``: stride, padding and dilation."""
    stride, padding, dilation = spec
    extent = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[2:], kernel_size, stride, padding, dilation)
    ]
    return _Sizes(
        *x.shape, kernels, *extent, *kernel_size, *stride, *padding, *dilation, degree, torch.get_num_threads()
    )


def _pointers(tensor: Tensor | None, *dims: int) -> tuple[ctypes.c_void_p, ctypes.Array]:
    """Of the data of a tensor and of its strides, as two arguments."""
    strides = () if tensor is None else (tensor.stride(d) for d in dims)
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr()), (ctypes.c_int64 * 4)(*strides)


def _readable(x: Tensor) -> Tensor:
    """In float32, with its channels or its columns side by side."""
    x = x.float()
    return x if 1 in (x.stride(1), x.stride(3)) else x.contiguous()


def sum_planes(x: Tensor, weights: Tensor, bias: Tensor | None, *spec: tuple[int, int]) -> Tensor:
    """See :func:`rkan_mmdet.ops.eager.sum_planes`."""
    dtype, x = x.dtype, _readable(x)
    sizes = _sizes(x, weights.shape[1], weights.shape[-2:], len(weights) - 1, *spec)
    weights = weights.flatten(3)
    last = x.is_contiguous(memory_format=torch.channels_last)
    shape = sizes.batch, sizes.kernels * sizes.channels, sizes.out_height, sizes.out_width
    y = torch.empty(shape, memory_format=torch.channels_last if last else torch.contiguous_format)
    _load()[0].kan_conv_forward(
        ctypes.byref(sizes), *_pointers(x, 0, 1, 2, 3), *_pointers(weights, 0, 1, 2, 3), *_pointers(bias, 0, 1),
        *_pointers(y, 0, 1, 2, 3),
    )  # fmt: skip
    return y.to(dtype)


def gradients(
    x: Tensor, grad: Tensor, kernels: Tensor, spec: tuple, of_x: bool, of_kernels: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of x, and of the kernels (K, planes, kh, kw) as (planes, K, kh, kw); see :class:`rkan_mmdet.ops.eager.Spec`."""
    dtype, x, grad = x.dtype, _readable(x), _readable(grad)
    sizes = _sizes(x, len(kernels), kernels.shape[2:], kernels.shape[1] - 1, *spec[-3:])
    weights = kernels.permute(0, 2, 3, 1).contiguous()
    grad_x = torch.empty_like(x) if of_x else None
    sums = torch.zeros_like(weights, dtype=torch.float64) if of_kernels else None
    _load()[0].kan_conv_backward(
        ctypes.byref(sizes), *_pointers(x, 0, 1, 2, 3), *_pointers(grad, 0, 1, 2, 3), _pointers(weights)[0],
        *_pointers(grad_x, 0, 1, 2, 3), _pointers(sums)[0],
    )  # fmt: skip
    return None if grad_x is None else grad_x.to(dtype), None if sums is None else sums.float().permute(3, 0, 1, 2)
