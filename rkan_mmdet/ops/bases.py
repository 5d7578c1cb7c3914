"""The univariate functions of a KAN convolution: one small class a basis, one registry.

A basis of your own is one class: derive from :class:`Basis`, set ``num_functions`` and write ``values``; decorate it
with ``@BASES.register`` and name it in a config as ``basis=dict(type='YourClass', ...)``.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rkan_mmdet.checks import check_float, check_int


class Basis:
    """A set of functions of one variable, and how their coefficients start.

    Subclasses set ``num_functions`` in ``__init__`` and write :meth:`values`.

    Attributes:
        num_functions (int): How many functions there are; 0 means that the convolution keeps its linear term alone.
        on_domain (bool): Whether the functions are evaluated on the normalized input (``tanh(x)`` in [-1, 1]) or on
            the input itself.
        has_scale (bool): Whether each tap's sum of functions is multiplied by a learned ``basis_scale``.
        has_bias (bool): Whether the linear term has a ``linear_bias``.
    """

    num_functions: int
    on_domain: ClassVar[bool] = True
    has_scale: ClassVar[bool] = True
    has_bias: ClassVar[bool] = False

    def values(self, u: Tensor) -> list[Tensor]:
        """The functions at ``u``: ``num_functions`` tensors of the shape of ``u``."""
        raise NotImplementedError(f'{type(self).__name__} must define values(u)')

    def derivatives(self, u: Tensor) -> list[Tensor]:
        """Their first derivatives at ``u``; by forward-mode differentiation of :meth:`values` unless overridden."""
        return list(torch.func.jvp(lambda t: tuple(self.values(t)), (u,), (torch.ones_like(u),))[1])

    def reset_parameters(
        self, linear_weight: Tensor, basis_weight: Tensor, basis_scale: Tensor | None, linear_bias: Tensor | None
    ) -> None:
        """Fill the parameters of one KAN convolution in place.

        Args:
            linear_weight (Tensor[K, k*k]): Kaiming normal (fan-in, ReLU gain).
            basis_weight (Tensor[K, k*k, n]): Normal with variance 1 / (k*k*n).
            basis_scale (Tensor[K, k*k] or None): 1.
            linear_bias (Tensor[K] or None): 0.
        """
        taps = linear_weight.shape[1]
        nn.init.normal_(linear_weight, std=math.sqrt(2 / taps))
        if self.num_functions:
            nn.init.normal_(basis_weight, std=1 / math.sqrt(taps * self.num_functions))
        if basis_scale is not None:
            nn.init.ones_(basis_scale)
        if linear_bias is not None:
            nn.init.zeros_(linear_bias)

    def __repr__(self) -> str:
        options = ', '.join(f'{name}={value}' for name, value in vars(self).items() if name in self._options())
        return f'{type(self).__name__}({options})'

    @classmethod
    def _options(cls) -> tuple[str, ...]:
        parameters = inspect.signature(cls).parameters.values()
        return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


class _Registry(dict):
    """Basis classes by name."""

    def register(self, cls: type[Basis]) -> type[Basis]:
        """Class decorator: makes ``cls`` known by its name. Refuses a name that is taken by another class."""
        if not (isinstance(cls, type) and issubclass(cls, Basis)):
            raise TypeError(f'a basis must be a subclass of rkan_mmdet.ops.bases.Basis, but got {cls!r}')
        if self.get(cls.__name__, cls) is not cls:
            raise KeyError(f'a basis named {cls.__name__!r} is already registered: {self[cls.__name__]!r}')
        self[cls.__name__] = cls
        return cls


BASES = _Registry()


def build_basis(cfg: dict[str, Any] | Basis) -> Basis:
    """Build a basis from ``dict(type=name, **options)``; an instance is returned as it is.

    Raises:
        TypeError: ``cfg`` is not such a dict, or an option is unknown or of the wrong type.
        ValueError: The type is not registered or an option's value is not allowed.

    Examples:
        >>> build_basis(dict(type='Chebyshev', degree=3))
        Chebyshev(degree=3)
    """
    if isinstance(cfg, Basis):
        return cfg
    if not isinstance(cfg, dict) or not isinstance(cfg.get('type'), str):
        raise TypeError(f"basis must be a dict such as dict(type='Chebyshev', degree=3), but got {cfg!r}")
    options = dict(cfg)
    name = options.pop('type')
    if name not in BASES:
        raise ValueError(f"basis['type'] must be one of {', '.join(map(repr, BASES))}, but got {name!r}")
    unknown = [option for option in options if option not in BASES[name]._options()]
    if unknown:
        raise TypeError(
            f'basis {name!r} has no option {unknown[0]!r}; it takes {", ".join(BASES[name]._options()) or "none"}'
        )
    try:
        return BASES[name](**options)
    except TypeError as error:
        raise TypeError(f'basis {name!r}: {error}') from None


class Polynomial(Basis):
    """Orthogonal polynomials of degree 0 to ``degree`` by a three-term recurrence.

    ``P_0 = 1`` and ``P_{j+1} = (a_j u + b_j) P_j - c_j P_{j-1}`` with ``P_{-1} = 0``; subclasses give
    :meth:`recurrence`.

    Args:
        degree (int): The highest degree, at least 1. Defaults to 3.
    """

    def __init_subclass__(cls) -> None:
        if cls.values is not Polynomial.values:  # the fast paths know them by the recurrence alone
            raise TypeError(f'{cls.__name__} must give recurrence(j), or derive from Basis to write its own values(u)')

    def __init__(self, degree: int = 3) -> None:
        self.degree = check_int('degree', degree, 1)
        self.num_functions = degree + 1
        self._steps = [self.recurrence(j) for j in range(degree)]
        self.flat_monomials = [value for row in self.monomials() for value in row]

    def recurrence(self, j: int) -> tuple[float, float, float]:
        """``(a_j, b_j, c_j)`` of the step from degree ``j`` to ``j + 1``."""
        raise NotImplementedError(f'{type(self).__name__} must define recurrence(j)')

    def values(self, u: Tensor) -> list[Tensor]:
        out = [torch.ones_like(u)]
        for j, (a, b, c) in enumerate(self._steps):
            out.append((a * u + b) * out[j] - (c * out[j - 1] if j else 0))
        return out

    def derivatives(self, u: Tensor) -> list[Tensor]:
        values, out = self.values(u), [torch.zeros_like(u)]
        for j, (a, b, c) in enumerate(self._steps):
            out.append(a * values[j] + (a * u + b) * out[j] - (c * out[j - 1] if j else 0))
        return out

    def monomials(self) -> list[list[float]]:
        """Row ``j`` holds the ``degree + 1`` coefficients of ``P_j``, lowest power first."""
        rows = [[1.0] + [0.0] * self.degree]
        for j, (a, b, c) in enumerate(self._steps):
            before = rows[j - 1] if j else [0.0] * self.num_functions
            shifted = [0.0, *rows[j][:-1]]
            rows.append([a * s + b * p - c * q for s, p, q in zip(shifted, rows[j], before)])
        return rows


@BASES.register
class Chebyshev(Polynomial):
    """Chebyshev polynomials of the first kind: 1, u, 2u P_j - P_{j-1}."""

    def recurrence(self, j: int) -> tuple[float, float, float]:
        return (2.0 if j else 1.0), 0.0, 1.0


@BASES.register
class Legendre(Polynomial):
    """Legendre polynomials: (j + 1) P_{j+1} = (2j + 1) u P_j - j P_{j-1}."""

    def recurrence(self, j: int) -> tuple[float, float, float]:
        return (2 * j + 1) / (j + 1), 0.0, j / (j + 1)


@BASES.register
class Hermite(Polynomial):
    """Physicists' Hermite polynomials: 1, 2u, 2u P_j - 2j P_{j-1}."""

    def recurrence(self, j: int) -> tuple[float, float, float]:
        return 2.0, 0.0, 2.0 * j


@BASES.register
class Jacobi(Polynomial):
    """Jacobi polynomials in the classical scaling, P_j(1) = C(j + alpha, j).

    Args:
        degree (int): The highest degree, at least 1. Defaults to 3.
        alpha (float): Exponent of 1 - u in the weight, above -1. Defaults to 0.5, as in the authors' code.
        beta (float): Exponent of 1 + u in the weight, above -1. Defaults to 0.5, as in the authors' code.
    """

    def __init__(self, degree: int = 3, alpha: float = 0.5, beta: float = 0.5) -> None:
        self.alpha = check_float('alpha', alpha, -1)
        self.beta = check_float('beta', beta, -1)
        super().__init__(degree)

    def recurrence(self, j: int) -> tuple[float, float, float]:
        p, q = self.alpha, self.beta
        if j == 0:  # the general formula is 0/0 for alpha + beta = 0 or -1
            return (p + q + 2) / 2, (p - q) / 2, 0.0
        n, t = j + 1, 2 * (j + 1) + p + q
        scale = 2 * n * (n + p + q) * (t - 2)
        return (
            (t - 1) * t * (t - 2) / scale,
            (t - 1) * (p * p - q * q) / scale,
            2 * (n + p - 1) * (n + q - 1) * t / scale,
        )


@BASES.register
class RBF(Basis):
    """Gaussian radial functions ("FastKAN"): exp(-((x - g_j) / h)^2) on ``grid_size`` points from -1 to 1.

    Evaluated on the input itself. The linear term has a bias and there is no scale.

    Args:
        grid_size (int): The number of grid points, at least 2; ``h = 2 / (grid_size - 1)``. Defaults to 3.
    """

    on_domain = False
    has_scale = False
    has_bias = True

    def __init__(self, grid_size: int = 3) -> None:
        self.grid_size = self.num_functions = check_int('grid_size', grid_size, 2)

    def values(self, u: Tensor) -> list[Tensor]:
        width = 2 / (self.grid_size - 1)
        return [torch.exp(-(((u - (j * width - 1)) / width) ** 2)) for j in range(self.grid_size)]

    def reset_parameters(
        self, linear_weight: Tensor, basis_weight: Tensor, basis_scale: Tensor | None, linear_bias: Tensor | None
    ) -> None:
        """Normal of std 1 cut off at 2 for the functions; PyTorch's default of a linear layer for the linear term."""
        bound = 1 / math.sqrt(linear_weight.shape[1])
        nn.init.trunc_normal_(basis_weight)
        nn.init.uniform_(linear_weight, -bound, bound)
        nn.init.uniform_(linear_bias, -bound, bound)


@BASES.register
class BSpline(Basis):
    """B-splines of uniform knots on [-1, 1], extended by ``order`` intervals on both sides; zero outside.

    Evaluated on the input itself.

    Args:
        grid_size (int): The number of intervals in [-1, 1], at least 1. Defaults to 3.
        order (int): The polynomial order of the pieces, at least 1. Defaults to 3.
    """

    on_domain = False

    def __init__(self, grid_size: int = 3, order: int = 3) -> None:
        self.grid_size = check_int('grid_size', grid_size, 1)
        self.order = check_int('order', order, 1)
        self.num_functions = grid_size + order

    @property
    def knots(self) -> list[float]:
        """The ``grid_size + 2 * order + 1`` knots."""
        return [2 * i / self.grid_size - 1 for i in range(-self.order, self.grid_size + self.order + 1)]

    def values(self, u: Tensor) -> list[Tensor]:
        t = self.knots
        out = [((u >= a) & (u < b)).to(u.dtype) for a, b in zip(t, t[1:])]
        for k in range(1, self.order + 1):  # Cox-de Boor
            out = [
                (u - t[i]) / (t[i + k] - t[i]) * out[i] + (t[i + k + 1] - u) / (t[i + k + 1] - t[i + 1]) * out[i + 1]
                for i in range(len(out) - 1)
            ]
        return out

    def reset_parameters(
        self, linear_weight: Tensor, basis_weight: Tensor, basis_scale: Tensor | None, linear_bias: Tensor | None
    ) -> None:
        """The least-squares spline through uniform noise of +-0.05 / grid_size at the inner knots; the rest uniform."""
        bound = 1 / math.sqrt(linear_weight.shape[1])
        nn.init.uniform_(linear_weight, -bound, bound)
        nn.init.uniform_(basis_scale, -bound, bound)
        inner = torch.linspace(-1, 1, self.grid_size + 1, dtype=torch.float64)
        fit = torch.linalg.pinv(torch.stack(self.values(inner), dim=-1))  # (n, grid_size + 1)
        noise = (torch.rand(*linear_weight.shape, self.grid_size + 1, dtype=torch.float64) - 0.5) * 0.1 / self.grid_size
        with torch.no_grad():
            basis_weight.copy_(noise @ fit.T)


@BASES.register
class Linear(Basis):
    """No function at all: the linear term alone, a depthwise convolution shared by all channels (a control arm)."""

    on_domain = False
    has_scale = False

    def __init__(self) -> None:
        self.num_functions = 0

    def values(self, u: Tensor) -> list[Tensor]:
        return []
