"""Each basis against an independent source, in float64."""

import numpy as np
import pytest
import scipy.interpolate
import scipy.special
import torch
from numpy.polynomial import chebyshev, hermite, legendre

from rkan_mmdet.ops import BASES, Basis, KANConv2d, Polynomial, build_basis, can_run

U = np.linspace(-1.3, 1.31, 41)  # hits no knot of a B-spline, where a derivative may jump


def _unit(j: int) -> np.ndarray:
    return np.eye(j + 1)[j]


def _numpy(module, evaluate, derive):
    return lambda j, u: (evaluate(u, _unit(j)), evaluate(u, derive(_unit(j))))


INDEPENDENT = {
    'Chebyshev': _numpy(chebyshev, chebyshev.chebval, chebyshev.chebder),
    'Legendre': _numpy(legendre, legendre.legval, legendre.legder),
    'Hermite': _numpy(hermite, hermite.hermval, hermite.hermder),
}


def _jacobi(j: int, u: np.ndarray, alpha: float, beta: float) -> tuple:
    polynomial = scipy.special.jacobi(j, alpha, beta)
    return polynomial(u), polynomial.deriv()(u)


def _compare(basis: Basis, j: int, value: np.ndarray, slope: np.ndarray) -> None:
    u = torch.from_numpy(U)
    scale = 1 + np.abs(value).max() + np.abs(slope).max()
    assert np.abs(basis.values(u)[j].numpy() - value).max() <= 1e-10 * scale
    assert np.abs(basis.derivatives(u)[j].numpy() - slope).max() <= 1e-10 * scale


@pytest.mark.parametrize('name', INDEPENDENT)
@pytest.mark.parametrize('degree', [1, 2, 3, 6, 10])
def test_polynomials_match_numpy(name: str, degree: int) -> None:
    basis = build_basis(dict(type=name, degree=degree))
    assert basis.num_functions == degree + 1
    for j in range(degree + 1):
        _compare(basis, j, *INDEPENDENT[name](j, U))


@pytest.mark.parametrize(('alpha', 'beta'), [(0.5, 0.5), (0.0, 0.0), (-0.5, -0.5), (1.0, 2.5), (-0.3, 0.7)])
def test_jacobi_matches_scipy(alpha: float, beta: float) -> None:
    basis = build_basis(dict(type='Jacobi', degree=6, alpha=alpha, beta=beta))
    for j in range(7):
        _compare(basis, j, *_jacobi(j, U, alpha, beta))


@pytest.mark.parametrize('grid_size', [2, 3, 5])
def test_rbf_is_gaussian(grid_size: int) -> None:
    basis, h = build_basis(dict(type='RBF', grid_size=grid_size)), 2 / (grid_size - 1)
    for j, centre in enumerate(np.linspace(-1, 1, grid_size)):
        value = np.exp(-(((U - centre) / h) ** 2))
        _compare(basis, j, value, -2 * (U - centre) / h**2 * value)


@pytest.mark.parametrize(('grid_size', 'order'), [(3, 3), (2, 2), (1, 1), (5, 3), (4, 1)])
def test_bspline_matches_scipy(grid_size: int, order: int) -> None:
    basis = build_basis(dict(type='BSpline', grid_size=grid_size, order=order))
    assert basis.num_functions == grid_size + order
    for j in range(basis.num_functions):
        knots = basis.knots[j : j + order + 2]
        spline = scipy.interpolate.BSpline.basis_element(knots, extrapolate=False)
        _compare(basis, j, np.nan_to_num(spline(U)), np.nan_to_num(spline.derivative()(U)))


@pytest.mark.parametrize('name', ['Chebyshev', 'Legendre', 'Hermite', 'Jacobi'])
def test_monomials_are_the_same_polynomials(name: str) -> None:
    basis, u = build_basis(dict(type=name, degree=5)), torch.from_numpy(U)
    powers = torch.stack([u**m for m in range(6)])
    for row, value in zip(basis.monomials(), basis.values(u)):
        torch.testing.assert_close(torch.tensor(row, dtype=u.dtype) @ powers, value, rtol=1e-12, atol=1e-12)


def test_a_basis_of_the_user_is_one_class() -> None:
    @BASES.register
    class Sines(Basis):
        def __init__(self, *, count: int = 2) -> None:
            self.count = self.num_functions = count

        def values(self, u: torch.Tensor) -> list:
            return [torch.sin((j + 1) * u) for j in range(self.count)]

    try:
        conv = KANConv2d(2, basis=dict(type='Sines', count=3)).double()
        assert conv.basis_weight.shape == (1, 9, 3)
        assert torch.autograd.gradcheck(conv, torch.randn(1, 2, 4, 4, dtype=torch.double, requires_grad=True))
        with pytest.raises(KeyError, match='already registered'):
            BASES.register(type('Sines', (Basis,), {}))
    finally:
        del BASES['Sines']


def test_a_basis_without_options() -> None:
    @BASES.register
    class Square(Basis):
        num_functions = 1

        def values(self, u: torch.Tensor) -> list:
            return [u**2]

    try:
        assert repr(build_basis(dict(type='Square'))) == 'Square()'
        with pytest.raises(TypeError, match="basis 'Square' has no option 'count'; it takes none"):
            build_basis(dict(type='Square', count=3))
    finally:
        del BASES['Square']


def test_polynomials_of_the_user_are_their_recurrence() -> None:
    class Powers(Polynomial):
        on_domain = False

        def recurrence(self, j: int) -> tuple:
            return 1.0, 0.0, 0.0

    assert 'evaluated at x' in can_run('triton', basis=Powers(2))
    conv = KANConv2d(2, basis=Powers(2), backend='eager').double()
    x = torch.randn(1, 2, 4, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(conv, x)
    expected = KANConv2d(2, basis=Powers(2), backend='reference').double()
    expected.load_state_dict(conv.state_dict())
    torch.testing.assert_close(conv(x), expected(x))
    with pytest.raises(TypeError, match=r'Other must give recurrence\(j\), or derive from Basis'):
        type('Other', (Polynomial,), dict(values=lambda self, u: [u]))


@pytest.mark.parametrize(
    ('cfg', 'error', 'message'),
    [
        (dict(type='Chebychev'), ValueError, "'Chebychev'"),
        (dict(type='Chebyshev', degree=0), ValueError, 'degree must be an int >= 1, but got 0'),
        (dict(type='Chebyshev', degree=2.5), TypeError, 'degree must be an int'),
        (dict(type='Chebyshev', degree=True), TypeError, 'degree must be an int'),
        (dict(type='Chebyshev', order=3), TypeError, "no option 'order'; it takes degree"),
        (dict(type='Jacobi', alpha=-1), ValueError, 'alpha must be a finite number > -1'),
        (dict(type='RBF', grid_size=1), ValueError, 'grid_size must be an int >= 2'),
        (dict(type='Linear', degree=3), TypeError, 'it takes none'),
        ('Chebyshev', TypeError, 'basis must be a dict'),
        (dict(degree=3), TypeError, 'basis must be a dict'),
    ],
)
def test_bad_settings_are_named(cfg: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        build_basis(cfg)
