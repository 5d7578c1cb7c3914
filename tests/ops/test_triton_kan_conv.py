"""The Triton kernels against the reference, on a GPU or else through Triton's interpreter (see conftest.py)."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip('triton', reason='triton is not installed')

from rkan_mmdet.ops import KANConv2d, can_run, kan_conv2d
from rkan_mmdet.ops.bases import Chebyshev
from rkan_mmdet.ops.kan_conv import _why_no_launch

from .test_kan_conv import assert_rounded_once, run

pytestmark = pytest.mark.skipif(bool(can_run('triton')), reason=can_run('triton'))
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
CASES = [
    dict(basis=dict(type='Chebyshev', degree=3), stride=2),
    dict(basis=dict(type='Legendre', degree=2), num_kernels=2),
    dict(basis=dict(type='Hermite', degree=1), kernel_size=(1, 2), padding=0, stride=(2, 3)),
    dict(basis=dict(type='Jacobi', degree=5), kernel_size=(3, 2), padding=(2, 1), dilation=(2, 1), stride=(1, 2)),
]


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'last'])
@pytest.mark.parametrize('case', CASES, ids=lambda c: c['basis']['type'])
def test_matches_the_reference(case: dict, memory_format: torch.memory_format, nan_memory: None) -> None:
    torch.manual_seed(0)
    conv = KANConv2d(35, **case).to(DEVICE)  # more than a block of channels, and a part of one
    x = (2 * torch.randn(2, 35, 5, 4, device=DEVICE)).contiguous(memory_format=memory_format)
    upstream = torch.randn_like(conv(x))
    fast = run(conv, x, upstream, 'triton')
    slow = run(conv.double(), x.double(), upstream.double(), 'reference')
    assert fast['output'].is_contiguous(memory_format=memory_format)
    for name, value in slow.items():
        error = (fast[name] - value).abs().max() / (1 + value.abs().max())
        assert error < 2e-6, f'{name} differs by {error:.1e}'


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = KANConv2d(3, stride=2).to(DEVICE)
    x = (2 * torch.randn(1, 3, 6, 7, device=DEVICE)).to(dtype)
    x[0, 0, 0, :4] = torch.tensor([1e4, -1e4, 0.0, 1e-4])
    upstream = torch.randn(1, 3, 3, 4, device=DEVICE).to(dtype)
    half, single = run(conv, x, upstream, 'triton'), run(conv, x.float(), upstream.float(), 'triton')
    assert_rounded_once(half, single, dtype, units=0 if DEVICE == 'cuda' else 1)  # the interpreter cuts bfloat16 off


def test_weight_gradients_are_the_same_every_time() -> None:
    conv = KANConv2d(34).to(DEVICE)
    x = torch.randn(1, 34, 5, 5, device=DEVICE)
    first, second = (run(conv, x, x, 'triton') for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_only_what_is_asked_for() -> None:
    conv = KANConv2d(2, backend='triton').to(DEVICE).requires_grad_(False)
    x = torch.randn(1, 2, 4, 4, device=DEVICE, requires_grad=True)
    conv(x).sum().backward()
    assert x.grad is not None
    conv.requires_grad_(True)
    conv(x.detach()).sum().backward()
    assert all(p.grad is not None for p in conv.parameters())
    assert conv(x[:0]).shape == (0, 2, 4, 4)


def test_the_operator_is_registered_soundly() -> None:
    from rkan_mmdet.ops import triton_kan_conv  # noqa: F401

    x = torch.randn(1, 3, 5, 4, device=DEVICE)
    linear, basis, scale, bias = (torch.randn(*shape, device=DEVICE) for shape in ((2, 9), (2, 9, 3), (2, 9), (2,)))
    settings = [Chebyshev(degree=2).flat_monomials, [3, 3], [2, 1], [1, 1], [1, 1]]
    last = x.contiguous(memory_format=torch.channels_last)
    for operand, optional, wanted in ((x, (scale, bias), (True, True)), (last, (None, None), (False, True))):
        arguments = (operand, linear, basis, *optional, *settings)
        torch.library.opcheck(torch.ops.rkan_mmdet.kan_conv2d.default, arguments)
        grad = torch.ops.rkan_mmdet.kan_conv2d(*arguments)
        arguments = (operand, grad, linear, basis, optional[0], *settings, *wanted)
        torch.library.opcheck(torch.ops.rkan_mmdet.kan_conv2d_backward.default, arguments)


def test_compiles_whole() -> None:
    conv = KANConv2d(3, stride=2, backend='triton').to(DEVICE)
    x = torch.randn(1, 3, 5, 4, device=DEVICE, requires_grad=True)
    compiled = torch.compile(conv, backend='aot_eager', fullgraph=True)
    outs = []
    for function in (conv, compiled):
        y = function(x)
        outs.append((y, *torch.autograd.grad(y.sin().sum(), [x, *conv.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*outs))


def test_its_gradient_is_differentiated_too() -> None:
    x = torch.randn(1, 2, 4, 5, device=DEVICE, requires_grad=True)
    conv, found = KANConv2d(2, stride=2).to(DEVICE), []
    for conv.backend in ('triton', 'eager'):
        (grad,) = torch.autograd.grad(conv(x).sin().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [x, *conv.parameters()]))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings('ignore:(overflow|invalid value) encountered:RuntimeWarning')  # of Triton's interpreter
def test_odd_values() -> None:
    x = torch.tensor([float('nan'), float('inf'), -float('inf'), 1e30, -1e30, 1e-30, 0.0], device=DEVICE)
    x, conv, found = x.view(7, 1, 1, 1), KANConv2d(1).to(DEVICE), []
    for backend in ('triton', 'eager'):
        found.append(run(conv, x, torch.ones_like(x), backend))
    for name in ('output', 'x'):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_its_tanh_is_exact() -> None:
    x = torch.cat([torch.linspace(-9, 9, 2000), torch.linspace(-0.3, 0.3, 600), torch.logspace(-30, -2, 100)])
    u = kan_conv2d(  # no linear term, and T_1(u) = u
        x.to(DEVICE).view(1, 1, 1, -1), torch.zeros(1, 1, device=DEVICE),
        torch.tensor([[[0.0, 1.0]]], device=DEVICE), basis=dict(type='Chebyshev', degree=1),
        kernel_size=1, padding=0, backend='triton',
    ).flatten().cpu()  # fmt: skip
    expected = x.double().tanh()
    assert ((u - expected) / expected)[expected != 0].abs().max() < 6e-7  # 5 units


def test_its_multiply_adds_are_counted() -> None:
    conv = KANConv2d(3, num_kernels=2, stride=2).to(DEVICE)
    x = torch.randn(1, 3, 6, 5, device=DEVICE, requires_grad=True)
    conv.backend = 'triton'
    conv(x)  # the first call imports the kernels with their formulas, which a counter looks up when it is made
    counts = []
    for conv.backend in ('triton', 'eager'):
        with FlopCounterMode(display=False) as counter:
            y = conv(x)
        counts.append(counter.get_total_flops())
    assert counts[1] == counts[0] > 0
    conv.backend = 'triton'
    with FlopCounterMode(display=False) as counter:
        conv(x).sum().backward()
    once = 2 * 4 * 9 * y.numel()  # x, u, u^2, u^3 through nine taps; the gradients of x and of the weights as much each
    assert counter.get_total_flops() == 3 * once


def test_a_gpu_that_can_not_launch_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    _why_no_launch.cache_clear()
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: (6, 1))
    assert 'capability (7, 0), but cuda:3 has (6, 1)' in _why_no_launch(torch.device('cuda', 3))

    class Driver:
        @property
        def active(self) -> object:
            raise RuntimeError('Failed to find C compiler')

    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: (9, 0))
    monkeypatch.setattr('triton.runtime.driver', Driver())
    assert _why_no_launch(torch.device('cuda', 4)).endswith('can not launch kernels: Failed to find C compiler')
    _why_no_launch.cache_clear()


@pytest.mark.skipif(DEVICE != 'cpu', reason='takes 8 GiB of a GPU')
def test_an_image_of_more_elements_than_32_bits_count() -> None:
    """Its memory is never touched but for some pixels, since a system gives pages when they are written to."""
    x = torch.empty(300 * 2**23)
    for size, strides in (((4, 12), (0, 2**31, 16, 1)), ((290, 5), (0, 1, 2**23, 4))):
        view = x.as_strided((1, 2, *size), strides)
        view.copy_(torch.randn(view.shape))
        conv, slow = (KANConv2d(2, stride=2, backend=backend) for backend in ('triton', 'reference'))
        slow.load_state_dict(conv.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(conv(view), slow(view), rtol=1e-4, atol=1e-5)


def test_what_it_can_not_do_is_said() -> None:
    x = torch.randn(1, 2, 4, 4)
    assert 'up to degree 5' in can_run('triton', basis=KANConv2d(2, basis=dict(type='RBF')).basis)
    assert 'but x is torch.float64' in can_run('triton', x=x.double().to(DEVICE))
    assert 'depends on the window' in can_run('triton', 'arctan')
    with pytest.raises(ValueError, match='up to degree 5'):
        KANConv2d(2, basis=dict(type='Chebyshev', degree=6), backend='triton')
    weights = dict(linear_weight=torch.randn(1, 9), basis_weight=torch.randn(1, 9, 4), basis=dict(type='Chebyshev'))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv('TRITON_INTERPRET', raising=False)
        with pytest.raises(ValueError, match='needs a tensor on a GPU, but x is on cpu'):
            kan_conv2d(x, **weights, backend='triton')
        kan_conv2d(x, **weights)
