"""The KAN convolution against the unfolding reference: values and every gradient, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rkan_mmdet.ops import KANConv2d, Polynomial, can_run, eager, kan_conv2d, kan_conv2d_reference
from rkan_mmdet.ops.eager import MAX_MONOMIAL_DEGREE

BASES = [
    *(dict(type=name, degree=d) for name in ('Chebyshev', 'Legendre', 'Hermite', 'Jacobi') for d in (1, 3)),
    dict(type='Chebyshev', degree=MAX_MONOMIAL_DEGREE),
    dict(type='Chebyshev', degree=MAX_MONOMIAL_DEGREE + 1),
    dict(type='Hermite', degree=MAX_MONOMIAL_DEGREE + 1),
    dict(type='RBF', grid_size=3),
    dict(type='BSpline', grid_size=3, order=3),
    dict(type='Linear'),
]


def run(conv: KANConv2d, x: torch.Tensor, upstream: torch.Tensor, backend: str) -> dict:
    """The output and every gradient, by name."""
    conv.backend = backend
    x = x.clone().requires_grad_()
    conv.zero_grad()
    y = conv(x)
    y.backward(upstream)
    return dict(output=y.detach(), x=x.grad, **{name: p.grad.clone() for name, p in conv.named_parameters()})


def assert_same(actual: dict, expected: dict, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = 1 + value.abs().max()
        error = (actual[name] - value).abs().max() / scale
        assert error <= tolerance, f'{name} differs by {error:.1e}'


def assert_rounded_once(half: dict, single: dict, dtype: torch.dtype, units: float = 0) -> None:
    """Of the same numbers: what is of the input's type is rounded once, gradients of the weights are not at all."""
    for name, value in single.items():
        expected, rtol = (value.to(dtype), units * torch.finfo(dtype).eps) if name in ('output', 'x') else (value, 1e-6)
        torch.testing.assert_close(half[name], expected, rtol=rtol, atol=1e-7, msg=name)


@st.composite
def cases(draw: st.DrawFn) -> tuple:
    pair = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
    kernel, dilation = draw(pair(1, 4)), draw(pair(1, 3))
    padding = draw(pair(0, 3))
    smallest = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding)]
    size = [s + draw(st.integers(0, 6)) for s in smallest]
    options = dict(
        kernel_size=kernel, stride=draw(pair(1, 3)), padding=padding, dilation=dilation,
        num_kernels=draw(st.integers(1, 3)), basis=draw(st.sampled_from(BASES)),
    )  # fmt: skip
    return draw(st.sampled_from([1, 2, 3, 35])), draw(st.integers(1, 3)), size, options, draw(st.integers(0, 2**16))


@settings(max_examples=300, deadline=None)
@given(cases(), st.sampled_from([64, 4000, eager.PART_BYTES]), st.permutations(range(4)))
def test_eager_matches_the_reference(case: tuple, part_bytes: int, order: list) -> None:
    channels, batch, size, options, seed = case
    torch.manual_seed(seed)
    conv = KANConv2d(channels, **options).double()
    x = 2 * torch.randn(batch, channels, *size, dtype=torch.double)
    x = x.permute(order).contiguous().permute([order.index(d) for d in range(4)])  # the same, laid out in another order
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, 'PART_BYTES', part_bytes)  # some channels at a time, or all at once
        upstream = torch.randn_like(conv(x))
        assert_same(run(conv, x, upstream, 'eager'), run(conv, x, upstream, 'reference'), 1e-11)


@pytest.mark.parametrize('basis', BASES, ids=str)
def test_gradcheck(basis: dict) -> None:
    conv = KANConv2d(2, num_kernels=2, stride=2, basis=basis, backend='eager').double()
    x = torch.randn(1, 2, 5, 4, dtype=torch.double, requires_grad=True)
    parameters = dict(conv.named_parameters())

    def function(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(conv, dict(zip(parameters, values)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters.values()))
    if isinstance(conv.basis, Polynomial):
        assert torch.autograd.gradgradcheck(function, (x, *parameters.values()))


def test_it_is_the_published_formula() -> None:
    """Equation by equation on one window, with nothing of ours but the function itself."""
    x = torch.randn(1, 1, 3, 3, dtype=torch.double)
    b, s, w = (torch.randn(*shape, dtype=torch.double) for shape in ((1, 9), (1, 9), (1, 9, 4)))
    expected = 0.0
    for k, value in enumerate(x.flatten()):
        u = torch.tanh(value)
        chebyshev = (1.0, u, 2 * u * u - 1, 4 * u**3 - 3 * u)
        expected += b[0, k] * value + s[0, k] * sum(w[0, k, j] * p for j, p in enumerate(chebyshev))
    for backend in ('eager', 'reference'):
        y = kan_conv2d(x, b, w, s, basis=dict(type='Chebyshev', degree=3), padding=0, backend=backend)
        torch.testing.assert_close(y.squeeze(), expected)


def test_a_padded_pixel_counts_as_x_zero() -> None:
    """T_2(0) = -1: a convolution of an image of zeros is the same at the border as inside."""
    conv = KANConv2d(1, basis=dict(type='Chebyshev', degree=2)).double()
    y = conv(torch.zeros(1, 1, 5, 5, dtype=torch.double))
    assert y.abs().max() > 0
    torch.testing.assert_close(y, y[:, :, 2:3, 2:3].expand_as(y))


def test_kernels_are_concatenated_and_shared_by_channels() -> None:
    conv = KANConv2d(3, num_kernels=2).double()
    x = torch.randn(1, 3, 6, 6, dtype=torch.double)
    y = conv(x)
    assert y.shape == (1, 6, 6, 6)
    for k in range(2):
        one = KANConv2d(1).double()
        one.load_state_dict({name: p[k : k + 1] for name, p in conv.state_dict().items()})
        for c in range(3):
            torch.testing.assert_close(y[:, 3 * k + c : 3 * k + c + 1], one(x[:, c : c + 1]))
    assert sum(p.numel() for p in KANConv2d(2048).parameters()) == 9 + 9 + 36


@pytest.mark.parametrize('normalization', ['min-max', 'arctan', 'standardization'])
def test_windowwise_normalizations(normalization: str) -> None:
    conv = KANConv2d(2, num_kernels=2, normalization=normalization).double()
    x = torch.randn(1, 2, 4, 5, dtype=torch.double, requires_grad=True)
    y = conv(x)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    for k in range(2):
        window = padded[0, 1, 1:4, 2:5].flatten()  # of the output pixel (1, 2) of channel 1
        mean = window.mean()
        u = {
            'min-max': lambda w: 2 * (w - w.min()) / (w.max() - w.min() + 1e-8) - 1,
            'standardization': lambda w, m=mean: (w - m) / (((w - m) ** 2).sum() / 8).sqrt().add(1e-8),
            'arctan': lambda w, m=mean, k=k: 2 / torch.pi * torch.atan((w - m) * conv.arctan_scale[k]),
        }[normalization](window)
        values = torch.stack(conv.basis.values(u), dim=-1)
        expected = (conv.linear_weight[k] * window).sum() + (
            conv.basis_scale[k] * (conv.basis_weight[k] * values).sum(-1)
        ).sum()
        torch.testing.assert_close(y[0, 2 * k + 1, 1, 2], expected)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in conv.parameters())
    assert 'depends on the window' in can_run('eager', normalization)
    with pytest.raises(ValueError, match='depends on the window'):
        KANConv2d(2, normalization=normalization, backend='eager')


@pytest.mark.parametrize('basis', BASES, ids=str)
def test_every_parameter_is_used(basis: dict) -> None:
    conv = KANConv2d(3, basis=basis)
    conv(torch.randn(2, 3, 6, 6)).square().sum().backward()
    for name, parameter in conv.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        assert parameter.grad.stride() == parameter.stride(), name  # or DDP copies it, and warns


@pytest.mark.parametrize('backend', ['eager', 'reference'])
def test_memory_format_and_dtype_are_kept(backend: str) -> None:
    conv = KANConv2d(4, stride=2, backend=backend)
    x = torch.randn(2, 4, 9, 9).to(memory_format=torch.channels_last)
    assert conv(x).is_contiguous(memory_format=torch.channels_last)
    assert conv(x.contiguous()).is_contiguous()
    torch.testing.assert_close(conv(x), conv(x.contiguous()))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert conv(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('backend', ['eager', 'reference'])
def test_half_precision_is_computed_in_fp32_and_rounded_once(dtype: torch.dtype, backend: str) -> None:
    conv = KANConv2d(4, backend=backend)
    x = torch.randn(2, 4, 9, 9).to(dtype)
    assert torch.equal(conv(x), conv(x.float()).to(dtype))
    assert torch.equal(conv.to(dtype)(x), conv.float()(x.float()).to(dtype))


def test_huge_inputs_stay_finite() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for degree in (3, 10):
            conv = KANConv2d(2, basis=dict(type='Chebyshev', degree=degree))
            torch.nn.init.constant_(conv.linear_weight, 0.1)  # the sum of nine stays within fp16
            x = torch.tensor([-1e4, 1e4, 0.0, 1.0]).repeat(8).reshape(1, 2, 4, 4).to(dtype).requires_grad_()
            y = conv(x)
            y.float().sum().backward()
            assert y.isfinite().all()
            assert x.grad.isfinite().all()
            assert all(p.grad.isfinite().all() for p in conv.parameters())


def test_autocast_keeps_fp32_inside() -> None:
    conv = KANConv2d(4)
    x = torch.randn(1, 4, 8, 8)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(conv(x), conv(x.clone()))
        y, low = conv(x), conv(x.bfloat16())
    assert y.dtype == torch.float32
    assert torch.equal(y, conv(x))
    assert low.dtype == torch.bfloat16


def test_only_the_input_is_kept_for_the_backward_pass() -> None:
    conv, saved = KANConv2d(8, stride=2), []
    x = torch.randn(2, 8, 32, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        conv(x)
    unique = {t.data_ptr(): t.numel() for t in saved}
    assert sum(unique.values()) <= 1.1 * x.numel()


def test_devices_without_autocast() -> None:
    conv = KANConv2d(4, stride=2).to('meta')
    assert conv(torch.empty(2, 4, 9, 8, device='meta')).shape == (2, 4, 5, 4)


def test_an_image_without_pixels_is_named() -> None:
    with pytest.raises(ValueError, match=r'height and a width of at least 1, but got \(2, 4, 0, 8\)'):
        KANConv2d(4, padding=2)(torch.empty(2, 4, 0, 8))


def test_the_reference_takes_plain_ints() -> None:
    conv = KANConv2d(2, stride=2)
    x = torch.randn(1, 2, 7, 7)
    sizes = dict(kernel_size=3, stride=2, padding=1, dilation=1)
    y = kan_conv2d_reference(x, conv.linear_weight, conv.basis_weight, conv.basis_scale, basis=conv.basis, **sizes)
    torch.testing.assert_close(y, conv(x))


def test_initialisation() -> None:
    conv = KANConv2d(1, num_kernels=4000)
    assert conv.linear_weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.02)
    assert conv.basis_weight.std().item() == pytest.approx(1 / 36**0.5, rel=0.02)
    assert (conv.basis_scale == 1).all()
    rbf = KANConv2d(1, num_kernels=4000, basis=dict(type='RBF'))
    assert rbf.basis_weight.abs().max() <= 2
    assert rbf.basis_weight.std().item() == pytest.approx(0.8796, rel=0.02)  # of a unit normal cut at two sigma
    assert rbf.linear_bias.abs().max() <= 1 / 3
    spline = KANConv2d(1, num_kernels=200, basis=dict(type='BSpline'))
    inner = torch.linspace(-1, 1 - 1e-6, 4)
    fitted = spline.basis_weight @ torch.stack(spline.basis.values(inner))
    assert fitted.abs().max() <= 0.05 / 3 * 1.001
    assert fitted.abs().max() > 0.04 / 3


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(in_channels=0), ValueError, 'in_channels must be an int >= 1, but got 0'),
        (dict(num_kernels=1.0), TypeError, 'num_kernels must be an int'),
        (dict(kernel_size=0), ValueError, 'kernel_size must be an int >= 1'),
        (dict(kernel_size=(3, 3, 3)), ValueError, 'kernel_size must be an int or a pair'),
        (dict(stride=(1, 0)), ValueError, r'stride\[1\] must be an int >= 1'),
        (dict(padding=-1), ValueError, 'padding must be an int >= 0'),
        (dict(dilation='1'), TypeError, 'dilation must be an int'),
        (dict(normalization='layer'), ValueError, "normalization must be one of 'tanh'"),
        (dict(normalization='min-max', basis=dict(type='RBF')), ValueError, "normalization must be 'tanh'"),
        (
            dict(normalization='standardization', kernel_size=1),
            ValueError,
            "'tanh' with kernel_size 1, but got 'standardization'",
        ),
        (dict(backend='cuda'), ValueError, "backend must be one of 'auto'"),
        (dict(basis=dict(type='Chebyshev', degree=(3, 2))), TypeError, 'degree must be an int'),
    ],
)
def test_bad_arguments_are_named(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        KANConv2d(**dict(dict(in_channels=4), **options))


def test_bad_tensors_are_named() -> None:
    x, b, w, basis = torch.randn(1, 2, 5, 5), torch.randn(1, 9), torch.randn(1, 9, 4), dict(type='Chebyshev', degree=3)
    for args, options, message in [
        ((x[0], b, w), {}, r'x must be of shape \(N, C, H, W\), C at least 1, but got \(2, 5, 5\)'),
        ((x[:, :0], b, w), {}, r'C at least 1, but got \(1, 0, 5, 5\)'),
        ((x, b[:0], w[:0]), {}, r'linear_weight must be of shape \(K, 9\), K at least 1'),
        ((x, b[:, :4], w), {}, r'linear_weight must be of shape \(K, 9\)'),
        ((x, b, w[..., :3]), {}, r'basis_weight must be of shape \(1, 9, 4\)'),
        ((x, b), {}, 'basis_weight must be given'),
        ((x, b, w, b[:, 1:]), {}, r'basis_scale must be of shape \(1, 9\)'),
        ((x, b, w), dict(padding=0, dilation=3), r'3 \* \(3 - 1\) \+ 1 > 5 \+ 2 \* 0'),
        ((x, b, w), dict(normalization='arctan'), 'arctan_scale must be given'),
    ]:
        with pytest.raises(ValueError, match=message):
            kan_conv2d(*args, basis=basis, **options)
    with pytest.raises(ValueError, match='basis_scale must be None with basis Linear'):
        kan_conv2d(x, b, None, b, basis=dict(type='Linear'))
    with pytest.raises(TypeError, match='x must be a floating point tensor'):
        kan_conv2d(x.long(), b, w, basis=basis)
    with pytest.raises(ValueError, match=r'x must be of shape \(N, 3, H, W\), but got \(1, 2, 5, 5\)'):
        KANConv2d(3)(x)


@pytest.mark.parametrize('basis', BASES)
def test_functions_are_what_the_convolution_sums(basis: dict) -> None:
    conv = KANConv2d(1, num_kernels=2, kernel_size=(1, 3), padding=0, basis=basis).double()
    x = 2 * torch.randn(1, 1, 1, 40, dtype=torch.double)
    functions = conv.functions(x.flatten())
    assert functions.shape == (2, 3, 40)
    expected = sum(functions[:, t, t : 38 + t] for t in range(3))
    if conv.linear_bias is not None:
        expected = expected + conv.linear_bias[:, None]
    torch.testing.assert_close(conv(x)[0, :, 0], expected)


@pytest.mark.parametrize('normalization', ['tanh', 'min-max', 'arctan'])
def test_no_images_give_no_outputs(normalization: str) -> None:
    y = KANConv2d(3, num_kernels=2, stride=2, normalization=normalization)(torch.randn(0, 3, 6, 5))
    assert y.shape == (0, 6, 3, 3)


@pytest.mark.parametrize('normalization', ['min-max', 'arctan', 'standardization'])
def test_functions_of_windows_leave_the_linear_term_out(normalization: str) -> None:
    conv = KANConv2d(1, normalization=normalization)
    u = torch.linspace(-1, 1, 5)
    plain = KANConv2d(1)
    plain.load_state_dict(conv.state_dict(), strict=False)
    torch.nn.init.zeros_(plain.linear_weight)
    torch.testing.assert_close(conv.functions(u)[..., 1:-1], plain.functions(torch.atanh(u[1:-1])))
