"""Any arguments of the public classes either build a module that runs forward and backward, or are refused by name."""

import inspect
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rkan_mmdet.backbones import ResidualPath, RKANBackbone, RKANResNet, SEPlugin
from rkan_mmdet.backbones.residual_path import SqueezeExcitation
from rkan_mmdet.ops import BASES, KANConv2d

pytestmark = pytest.mark.slow

# About half of what is drawn is sound; the rest is of a wrong type, out of range or does not go together.
ODD = st.sampled_from([None, -1, 0, 1.5, True, 'x', '3', (), (1,), (2, 2, 2), [], {}, math.nan, math.inf, b'3', 1j])


def mostly(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.integers(0, 24).flatmap(lambda i: ODD if i == 0 else strategy)


def pairs(low: int, high: int) -> st.SearchStrategy:
    number = st.integers(low, high)
    return st.one_of(number, st.tuples(number, number), st.lists(number, min_size=2, max_size=2))


def bases(paired: bool) -> st.SearchStrategy:
    def option(low: int, high: int) -> st.SearchStrategy:
        number = mostly(st.integers(low, high))
        return st.one_of(number, st.tuples(number, number)) if paired else number

    degree = dict(degree=option(1, 11))
    weight = st.floats(-1.5, 3)
    fixed: Any = [
        st.fixed_dictionaries(dict(type=st.just(name)), optional=degree)
        for name in ('Chebyshev', 'Legendre', 'Hermite')
    ]
    return mostly(
        st.one_of(
            *fixed,
            st.fixed_dictionaries(dict(type=st.just('Jacobi')), optional=dict(degree, alpha=weight, beta=weight)),
            st.fixed_dictionaries(dict(type=st.just('RBF')), optional=dict(grid_size=option(1, 6))),
            st.fixed_dictionaries(
                dict(type=st.just('BSpline')), optional=dict(grid_size=option(1, 6), order=option(1, 4))
            ),
            st.just(dict(type='Linear')),
            st.sampled_from(
                [dict(), dict(type='Bessel'), dict(type=3), dict(degree=3), dict(type='Chebyshev', grid_size=3)]
            ),
        )
    )


COMMON = dict(
    normalization=mostly(st.sampled_from(['tanh', 'tanh', 'tanh', 'min-max', 'arctan', 'standardization', 'TANH'])),
    backend=mostly(st.sampled_from(['auto', 'auto', 'eager', 'reference', 'cuda'])),
)
CONV = st.fixed_dictionaries(
    dict(in_channels=mostly(st.integers(1, 5))),
    optional=dict(
        COMMON, num_kernels=mostly(st.integers(1, 3)), kernel_size=mostly(pairs(1, 4)), stride=mostly(pairs(1, 3)),
        padding=mostly(pairs(0, 3)), dilation=mostly(pairs(1, 3)), basis=bases(False),
    ),
)  # fmt: skip
PATH = dict(
    COMMON, reduce_factor=mostly(st.integers(1, 5)), expand_factor=mostly(st.one_of(st.none(), st.integers(1, 3))),
    num_kernels=mostly(st.integers(1, 3)), basis=bases(True), shortcut=mostly(st.booleans()),
    aggregation=mostly(st.one_of(
        st.sampled_from(['addition', 'gating', 'se', 'sum']),
        st.fixed_dictionaries(dict(type=st.sampled_from(['se', 'addition', 'gating'])),
                              optional=dict(ratio=mostly(st.integers(1, 9)), bias=st.booleans())),
    )),
    norm_cfg=mostly(st.sampled_from([dict(type='BN'), dict(type='GN', num_groups=1), dict(type='IN'), dict(type='GN'),
                                     dict(type='BN', affine=False), dict(type='XN'), dict(type='LN2d'),
                                     dict(type='GN', num_groups=7), dict(type='BN', eps='x'), dict(BN=1),
                                     dict(type='GN', num_groups=0), dict(type='GN', num_groups='x'),
                                     dict(type='BN', foo=1)])),
    norm_eval=mostly(st.booleans()), zero_init=mostly(st.booleans()), with_cp=mostly(st.booleans()),
    conv_cfg=mostly(st.one_of(st.none(), st.sampled_from([dict(type='Conv2d'), dict(type='Nonsense'), dict()]))),
    adapter=mostly(st.booleans()),
)  # fmt: skip
RESIDUAL = st.fixed_dictionaries(
    dict(in_channels=mostly(st.integers(1, 8)), out_channels=mostly(st.integers(1, 8))),
    optional=dict(PATH, stride=mostly(st.integers(1, 3)), is_last=mostly(st.booleans())),
)
RESNET = st.fixed_dictionaries(
    dict(stage_with_rkan=mostly(st.lists(st.booleans(), min_size=4, max_size=4))),
    optional=dict(
        rkan=mostly(st.one_of(st.fixed_dictionaries({}, optional=PATH),
                              st.lists(st.one_of(st.none(), st.fixed_dictionaries({}, optional=PATH)),
                                       min_size=4, max_size=4))),
        frozen_stages=st.integers(-1, 4), norm_eval=st.booleans(), in_channels=st.integers(1, 5),
    ),
)  # fmt: skip
COUNT = dict(built=0, refused=0)
NAMES = {
    name
    for cls in (KANConv2d, ResidualPath, RKANResNet, RKANBackbone, SEPlugin, SqueezeExcitation, *BASES.values())
    for name in inspect.signature(cls).parameters
}


def build(cls: Any, arguments: dict) -> Any:
    """The module, or None when it is refused as it should be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            module = cls(**arguments)
    except (TypeError, ValueError) as error:
        COUNT['refused'] += 1
        reason = str(error)
    else:
        COUNT['built'] += 1
        return module
    assert any(re.search(rf'\b{name}\b', reason) for name in NAMES), reason
    return None


def run(module: torch.nn.Module, x: torch.Tensor) -> Any:
    """Forward and backward; every gradient is there and finite."""
    x.requires_grad_()
    y = module(x)
    outputs = y if isinstance(y, tuple) else (y,)
    assert all(out.isfinite().all() for out in outputs)
    loss = sum(out.square().mean() for out in outputs)
    if not loss.requires_grad:
        return y
    loss.backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    return y


def extent(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def both_kinds(test: Callable) -> Callable:
    """Run a test on all of its examples, of which many are to be built and many refused."""

    def run_all() -> None:
        COUNT.update(built=0, refused=0)
        test()
        assert min(COUNT.values()) > 0.1 * sum(COUNT.values()), COUNT

    return run_all


OPTIONS = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@both_kinds
@settings(max_examples=1200, **OPTIONS)
@given(CONV)
def test_kan_conv2d(arguments: dict) -> None:
    conv = build(KANConv2d, arguments)
    if conv is None:
        return
    y = run(conv, torch.randn(2, conv.in_channels, 11, 13))
    sizes = zip((11, 13), conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    assert y.shape == (2, conv.in_channels * conv.num_kernels, *(extent(*size) for size in sizes))
    assert 'degree' not in arguments.get('basis', {}) or str(arguments['basis']['degree']) in repr(conv)


@both_kinds
@settings(max_examples=1200, **OPTIONS)
@given(RESIDUAL)
def test_residual_path(arguments: dict) -> None:
    path = build(ResidualPath, arguments)
    if path is None:
        return
    stride = arguments.get('stride', 1)
    shape = (2, arguments['out_channels'], *(extent(size, 3, stride, 1, 1) for size in (9, 10)))
    stage = torch.nn.Module()  # the aggregation is a part of the path, and has weights
    stage.path, stage.forward = path, lambda x: path.aggregate(torch.ones(shape), path(x))
    assert run(stage, torch.randn(2, arguments['in_channels'], 9, 10)).shape == shape
    if arguments.get('zero_init') is True:
        path.zero_grad()
        assert not path(torch.randn(2, arguments['in_channels'], 9, 10)).any()


@both_kinds
@settings(max_examples=150, **OPTIONS)
@given(RESNET)
def test_rkan_resnet(arguments: dict) -> None:
    model = build(lambda **kwargs: RKANResNet(18, base_channels=4, stem_channels=4, **kwargs), arguments)
    if model is None:
        return
    model.train()
    outputs = run(model, torch.randn(2, arguments.get('in_channels', 3), 40, 33))
    assert [tuple(out.shape[1:]) for out in outputs] == [(4, 10, 9), (8, 5, 5), (16, 3, 3), (32, 2, 2)]


@both_kinds
@settings(max_examples=100, **OPTIONS)
@given(in_channels=mostly(st.integers(1, 9)), ratio=mostly(st.integers(1, 9)))
def test_se_plugin(in_channels: Any, ratio: Any) -> None:
    plugin = build(SEPlugin, dict(in_channels=in_channels, ratio=ratio))
    if plugin is not None:
        run(plugin, torch.randn(2, in_channels, 3, 4))


@both_kinds
@settings(max_examples=60, **OPTIONS)
@given(
    backbone=mostly(st.sampled_from([dict(type='mmdet.CSPNeXt', deepen_factor=0.17, widen_factor=0.125)])),
    stages=mostly(
        st.sampled_from([('stage1', 'stage2', 'stage3', 'stage4'), ('stage3', 'stage4'), ('stage9',), ('stem',)])
    ),
    stage_with_rkan=mostly(st.lists(st.booleans(), min_size=1, max_size=4)),
    rkan=st.one_of(st.none(), st.fixed_dictionaries({}, optional=PATH)),
)
def test_rkan_backbone(**arguments: Any) -> None:
    model = build(RKANBackbone, arguments)
    if model is not None:
        model.train()
        run(model, torch.randn(2, 3, 64, 64))
