"""The compiled CPU kernels against the reference, and what happens where they can not be built."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from rkan_mmdet.backbones.fused_path import FusedKANConv2d
from rkan_mmdet.ops import KANConv2d, can_run, kan_conv2d
from rkan_mmdet.ops.eager import MAX_MONOMIAL_DEGREE, is_monomial
from rkan_mmdet.speed import count_multiply_adds

from .test_kan_conv import assert_rounded_once, assert_same, cases, run

# not by can_run: kernels that do not build where there is a compiler are a failure
needs_kernels = pytest.mark.skipif(
    sys.platform != 'linux' or not (shutil.which('g++') or shutil.which('c++')), reason='no Linux, or no C++ compiler'
)


@needs_kernels
def test_they_are_built_where_there_is_a_compiler() -> None:
    assert can_run('cpp') == ''


def in_order(x: torch.Tensor, order: tuple) -> torch.Tensor:
    """The same, laid out in another order."""
    return x.permute(order).contiguous().permute([order.index(d) for d in range(4)])


@needs_kernels
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases().filter(lambda case: is_monomial(KANConv2d(1, **case[3]).basis)))
def test_matches_the_reference(nan_memory: None, case: tuple) -> None:
    channels, batch, size, options, seed = case
    torch.manual_seed(seed)
    conv = KANConv2d(channels, **options)
    x = 2 * torch.randn(batch, channels, *size)
    upstream = torch.randn(conv(x).shape)
    expected = run(copy.deepcopy(conv).double(), x.double(), upstream.double(), 'reference')
    for order in ((0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0), (2, 3, 0, 1)):
        fast = run(conv, in_order(x, order), in_order(upstream, order), 'cpp')
        assert_same(fast, expected, 1e-5)


@needs_kernels
@pytest.mark.parametrize('degree', range(1, MAX_MONOMIAL_DEGREE + 1))
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'last'])
def test_many_blocks_and_strips(degree: int, memory_format: torch.memory_format, nan_memory: None) -> None:
    conv = KANConv2d(75, num_kernels=2, stride=2, basis=dict(type='Chebyshev', degree=degree))
    x = torch.randn(2, 75, 61, 83).contiguous(memory_format=memory_format)
    upstream = torch.randn_like(conv(x))
    fast = run(conv, x, upstream, 'cpp')
    assert fast['output'].is_contiguous(memory_format=memory_format)
    assert fast['x'].is_contiguous(memory_format=memory_format)
    assert_same(fast, run(conv.double(), x.double(), upstream.double(), 'reference'), 1e-5)


@needs_kernels
def test_tanh_is_exact_to_two_units() -> None:
    x = torch.cat([torch.linspace(-12, 12, 100001), torch.logspace(-38, 30, 5000), -torch.logspace(-38, 30, 5000)])
    u = kan_conv2d(
        x[None, None, None], torch.zeros(1, 1), torch.tensor([[[0.0, 1.0]]]),
        basis=dict(type='Chebyshev', degree=1), kernel_size=1, padding=0, backend='cpp',
    ).flatten()  # fmt: skip
    exact = torch.tanh(x.double())
    unit = torch.finfo(torch.float32).eps * exact.abs()
    assert ((u - exact).abs() <= 2 * unit + 1e-45).all()
    assert u.abs().max() <= 1


@needs_kernels
def test_nan_and_infinity_are_those_of_eager() -> None:
    conv = KANConv2d(40)
    x = torch.randn(1, 40, 6, 9)
    x[0, 3, 2, 2], x[0, 38, 4, 7], x[0, 1, 0, 0] = float('nan'), float('inf'), -1e30
    cpp, eager = (run(conv, x, torch.ones(1, 40, 6, 9), backend) for backend in ('cpp', 'eager'))
    for name in ('output', 'x'):
        torch.testing.assert_close(cpp[name], eager[name], equal_nan=True)
    assert cpp['output'].isnan().sum() == 9


@needs_kernels
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    conv = KANConv2d(5, stride=2)
    x = (2 * torch.randn(2, 5, 6, 7)).to(dtype)
    x[0, 0, 0, :4] = torch.tensor([1e4, -1e4, 0.0, 1e-4])
    upstream = torch.randn(2, 5, 3, 4).to(dtype)
    assert_rounded_once(run(conv, x, upstream, 'cpp'), run(conv, x.float(), upstream.float(), 'cpp'), dtype)


@needs_kernels
def test_the_number_of_threads_changes_nothing() -> None:
    conv = KANConv2d(70, stride=2)
    x, upstream = torch.randn(2, 70, 40, 50), torch.randn(2, 70, 20, 25)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            results.append(run(conv, x, upstream, 'cpp'))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


@needs_kernels
def test_weights_may_lie_anyhow_and_gradients_be_unwanted() -> None:
    conv = KANConv2d(3, kernel_size=(3, 2), num_kernels=2, stride=2)
    x = torch.randn(1, 3, 7, 8)
    wide = torch.zeros(2, 12)
    wide[:, ::2] = conv.linear_weight.detach()
    weights = wide[:, ::2], conv.basis_weight, conv.basis_scale
    options = dict(basis=conv.basis, kernel_size=(3, 2), stride=2)
    y, expected = (kan_conv2d(x, *weights, **options, backend=b) for b in ('cpp', 'reference'))
    torch.testing.assert_close(y, expected)
    y.sum().backward()  # an upstream gradient of one number in memory
    assert conv.basis_weight.grad is not None
    leaf = x.clone().requires_grad_()
    constant = [w.detach() for w in weights]
    of_x = [
        torch.autograd.grad(kan_conv2d(leaf, *constant, **options, backend=b).sum(), leaf)[0]
        for b in ('cpp', 'reference')
    ]
    torch.testing.assert_close(*of_x)


@needs_kernels
def test_it_is_what_auto_takes_on_a_cpu_deployed_too() -> None:
    def used(layer: torch.nn.Module, x: torch.Tensor) -> bool:
        with torch.autograd.profiler.profile() as profile:
            layer(x)
        return any(event.key == 'rkan_mmdet::planes_conv2d' for event in profile.key_averages())

    conv, x = KANConv2d(40, num_kernels=2, stride=2), torch.randn(1, 40, 9, 9)
    deployed = FusedKANConv2d(conv, scale=torch.full((80,), 2.0), shift=torch.arange(80.0))
    torch.testing.assert_close(deployed(x), 2 * conv(x) + torch.arange(80.0)[:, None, None])
    assert used(conv, x)
    assert used(deployed, x)
    assert not used(KANConv2d(40, backend='eager'), x)
    assert not used(FusedKANConv2d(KANConv2d(40, backend='eager')), x)
    assert not used(KANConv2d(40, basis=dict(type='Chebyshev', degree=MAX_MONOMIAL_DEGREE + 1)), x)
    assert not used(conv.double(), x.double())


@needs_kernels
def test_multiply_adds_are_counted() -> None:
    conv, x = KANConv2d(6, num_kernels=2, stride=2), torch.randn(1, 6, 8, 9, requires_grad=True)
    y = conv(x)
    forward = count_multiply_adds(lambda: conv(x))
    assert forward == y.numel() * 9 * 4  # nine taps and four planes
    assert count_multiply_adds(lambda: y.sum().backward()) == 2 * y.numel() * 9 * 4


@needs_kernels
@pytest.mark.skipif(not hasattr(torch.library, 'opcheck'), reason='torch < 2.4 has no opcheck')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_operators_keep_the_rules_of_torch(dtype: torch.dtype) -> None:
    x, weights, spec = torch.randn(2, 10, 7, 9).to(dtype), torch.randn(3, 2, 10, 1, 3, 3), ([2, 2], [1, 1], [1, 1])
    grad, kernels = torch.randn(2, 20, 4, 5).to(dtype), torch.randn(2, 3, 3, 3)
    images = [x, x.contiguous(memory_format=torch.channels_last), in_order(x, (3, 2, 1, 0)), in_order(x, (2, 0, 3, 1))]
    images.append(torch.randn(2, 10, 7, 18).to(dtype)[..., ::2])
    images.append(torch.randn(2, 10, 7, 12).to(dtype, memory_format=torch.channels_last)[..., :9])
    for image in images:
        torch.library.opcheck(torch.ops.rkan_mmdet.planes_conv2d, (image, weights, torch.randn(2, 10), *spec))
        for of in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(torch.ops.rkan_mmdet.planes_conv2d_backward, (image, grad, kernels, *spec, *of))


@needs_kernels
@pytest.mark.skipif(not hasattr(torch.compiler, 'is_exporting'), reason='torch < 2.7 does not say that it exports')
def test_compiled_code_calls_it() -> None:
    conv, x = KANConv2d(40, stride=2), torch.randn(1, 40, 9, 9)
    calls = []

    def look(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        calls.extend(node.target for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(conv, backend=look, fullgraph=True)(x), conv(x))
    assert any('planes_conv2d' in str(call) for call in calls)


@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        (dict(basis=KANConv2d(1, basis=dict(type='RBF')).basis), 'computes polynomials up to degree 5'),
        (dict(x=torch.ones(1, dtype=torch.double)), 'but x is torch.float64'),
        (dict(x=torch.ones(1, device='meta')), 'but x is on meta'),
        (dict(normalization='min-max'), 'depends on the window'),
    ],
    ids=['basis', 'dtype', 'device', 'normalization'],
)
def test_says_what_it_can_not_compute(arguments: dict, reason: str) -> None:
    assert reason in can_run('cpp', **arguments)


@needs_kernels
@pytest.mark.parametrize('order', [(3, 2, 1, 0), (0, 2, 3, 1), (0, 1, 3, 2)])
@pytest.mark.skipif(not hasattr(torch.compiler, 'is_exporting'), reason='torch < 2.7 does not say that it exports')
def test_compiled_code_takes_any_layout(order: tuple) -> None:
    conv = KANConv2d(6, num_kernels=2, stride=2)
    x, results = in_order(torch.randn(2, 6, 9, 8), order), []
    for layer in (conv, torch.compile(conv, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *conv.parameters()])])
    for plain, compiled in zip(*results):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_an_input_may_overlap_itself(nan_memory: None) -> None:
    x = torch.randn(7, 40).unfold(1, 3, 1).permute(1, 2, 0)[None]  # (1, 38, 3, 7)
    conv = KANConv2d(38)
    leaves = {backend: x.detach().requires_grad_() for backend in ('cpp', 'reference')}
    for conv.backend in leaves:
        conv(leaves[conv.backend]).sin().sum().backward()
    torch.testing.assert_close(leaves['cpp'].grad, leaves['reference'].grad)


def test_an_empty_input_is_not_its_business() -> None:
    for shape in ((1, 3, 0, 5), (1, 3, 5, 0), (0, 3, 5, 5)):
        assert 'not empty' in can_run('cpp', x=torch.ones(shape))
    assert KANConv2d(3)(torch.ones(0, 3, 5, 5)).shape == (0, 3, 5, 5)


@needs_kernels
def test_a_long_row_takes_no_more_than_its_buffers() -> None:
    """One thread's buffers of one row, however many threads there are."""
    code = (
        'import resource, torch; from rkan_mmdet.ops import *; torch.set_num_threads(4); '
        'conv = KANConv2d(1, kernel_size=(1, 3), padding=0, backend="cpp"); conv(torch.ones(1, 1, 1, 9)); '
        'peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; start = peak(); '
        'conv(torch.ones(1, 1, 1, 300000)); print((peak() - start) // 1024)'
    )
    assert int(in_a_process(code)) < 150  # MiB: 32 lanes of 300000 pixels, in three planes


@needs_kernels
def test_the_operators_check_what_the_kernels_trust() -> None:
    x, spec = torch.ones(1, 3, 5, 5), ([1, 1], [1, 1], [1, 1])
    for weights in (torch.ones(9, 1, 3, 1, 3, 3), torch.ones(4, 1, 3, 1, 3, 3, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match='2 to 6 planes, weights float32'):
            torch.ops.rkan_mmdet.planes_conv2d(x, weights, None, *spec)
    turned = torch.randn(4, 1, 3, 1, 3, 3).transpose(-1, -2)  # its taps do not lie in a row
    y, expected = (torch.ops.rkan_mmdet.planes_conv2d(x, w, None, *spec) for w in (turned, turned.contiguous()))
    torch.testing.assert_close(y, expected)


def in_a_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LAYER = 'import torch; from rkan_mmdet.ops import *; y = KANConv2d(4)(torch.ones(1, 4, 5, 5)); print(can_run("cpp"))'


@pytest.mark.parametrize(
    ('compiler', 'reason'),
    [
        (None, 'could not be built: a C\\+\\+ compiler'),
        ('#!/bin/sh\necho "x.cpp:1: error: out of luck" >&2; exit 3\n', 'could not be built: .* ended with 3: .*luck'),
        ('#!/bin/sh\nfor out; do :; done; echo nothing > "$out"\n', 'could not be built: .*'),
    ],
    ids=['none', 'fails', 'bad library'],
)
def test_without_a_working_compiler_eager_does_it(compiler: str | None, reason: str, tmp_path: Path) -> None:
    if compiler is not None:
        (tmp_path / 'c++').write_text(compiler)
        (tmp_path / 'c++').chmod(0o755)
    out = in_a_process(LAYER, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / 'cache'))
    assert re.match(f"backend 'cpp' {reason}", out)


@needs_kernels
def test_is_built_once_and_whole(tmp_path: Path) -> None:
    environment = {**os.environ, 'XDG_CACHE_HOME': str(tmp_path)}
    together = [
        subprocess.Popen([sys.executable, '-W', 'ignore', '-c', LAYER], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in together] == [b'', b'']
    (library,) = (tmp_path / 'rkan_mmdet' / 'kernels').iterdir()  # and nothing temporary beside it
    built = library.stat().st_mtime_ns
    in_a_process(LAYER, XDG_CACHE_HOME=str(tmp_path))
    assert library.stat().st_mtime_ns == built


def test_a_cache_that_can_not_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / 'rkan_mmdet').write_text('a file where a folder should be')
    assert 'could not be built' in in_a_process(LAYER, XDG_CACHE_HOME=str(tmp_path))


@needs_kernels
@pytest.mark.parametrize('content', [b'', b'not a library', None], ids=['empty', 'text', 'without its functions'])
def test_a_broken_library_is_built_again(content: bytes | None, tmp_path: Path) -> None:
    in_a_process(LAYER, XDG_CACHE_HOME=str(tmp_path))
    (library,) = (tmp_path / 'rkan_mmdet' / 'kernels').iterdir()
    if content is None:
        other = tmp_path / 'other.cpp'
        other.write_text('int nothing;')
        subprocess.run(['g++', '-shared', '-fPIC', str(other), '-o', str(library)], check=True)
        library.chmod(0o700)
        in_a_process(LAYER, XDG_CACHE_HOME=str(tmp_path))  # which has that one loaded, and takes plain torch
    else:
        library.write_bytes(content)
    assert in_a_process(LAYER, XDG_CACHE_HOME=str(tmp_path)).strip() == ''
    assert library.stat().st_size > 20_000


@needs_kernels
def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    in_a_process(LAYER, XDG_CACHE_HOME=str(tmp_path))
    folder = tmp_path / 'rkan_mmdet' / 'kernels'
    assert folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o777)
    assert 'others can write to it' in in_a_process(LAYER, XDG_CACHE_HOME=str(tmp_path))
