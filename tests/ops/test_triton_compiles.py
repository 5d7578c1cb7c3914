"""The Triton kernels as a compiler makes them for a GPU, which need not be there; the interpreter compiles nothing."""

import os
import subprocess
import sys

import pytest

pytest.importorskip('triton', reason='triton is not installed')

from rkan_mmdet.ops import can_run

pytestmark = pytest.mark.skipif(bool(can_run('triton')), reason=can_run('triton'))

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rkan_mmdet.ops import triton_kan_conv as kernels
from rkan_mmdet.ops.bases import Chebyshev

def ptx(kernel, dtype, stride, tile, lanes, **constants):
    degree, names = 2, kernel.arg_names
    constants |= dict(MONOMIALS=tuple(Chebyshev(degree=degree).flat_monomials), DEGREE=degree, KH=3, KW=3, SH=stride,
                      SW=stride, PH=1, PW=1, DH=1, DW=1, TH=tile[0], TW=tile[1], BLOCK_P=lanes, BLOCK_C=1)
    images = ('x_ptr', 'y_ptr', 'grad_ptr', 'grad_x_ptr')
    signature = {name: 'constexpr' if name in constants else dtype if name in images
                 else '*fp32' if name.endswith('_ptr') else 'i32' for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    return triton.compile(source, target=GPUTarget('cuda', 90, 32), options=dict(num_warps=lanes // 32)).asm['ptx']

for dtype, stride in (('*fp32', 1), ('*bf16', 2)):
    outputs = kernels._OUTPUTS if stride == 1 else kernels._OUTPUTS_OF_STRIDES
    text = ptx(kernels._forward, dtype, stride, outputs, kernels._LANES, bias_ptr=None)
    assert text.count('st.global') == outputs[0] * outputs[1]
    cells = [kernels._INPUTS // stride] * 2
    text = ptx(kernels._backward, dtype, stride, cells, kernels._BACKWARD_LANES, KERNELS=1, OF_X=True, OF_WEIGHTS=True)
    after_loads = text[text.rindex('ld.global') :]
    stores = after_loads[: after_loads.index('bra')].count('st.global')  # of the loop, which is the last to read
    assert stores == kernels._INPUTS**2, f'{stores} of the stores are after all loads'
"""


def test_they_compile_and_read_before_they_write() -> None:
    """A load that follows a store waits for it, since they may be of the same memory."""
    env = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
