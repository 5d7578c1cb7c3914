"""The deployed form of the path is the same function."""

import copy

import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.model import BaseModule
from torch import nn

from rkan_mmdet.backbones import RKANResNet, RKANResNeXt, fuse_paths
from rkan_mmdet.backbones.fused_path import FusedKANConv2d, FusedResidualPath
from rkan_mmdet.ops import KANConv2d, eager

OPTIONS = [
    dict(),
    dict(shortcut=True),
    dict(aggregation='gating'),
    dict(aggregation='se'),
    dict(num_kernels=3),
    dict(expand_factor=2),
    dict(basis=dict(type='RBF', grid_size=(3, 2))),
    dict(basis=dict(type='BSpline')),
    dict(basis=dict(type='Chebyshev', degree=(7, 3))),
    dict(basis=dict(type='Hermite', degree=2)),
    dict(basis=dict(type='Linear')),
    *(dict(conv_cfg=dict(type=name)) for name in ('Conv2d', 'ConvWS', 'Conv2dAdaptivePadding')),
    dict(conv_cfg=dict(type='Conv2d', padding_mode='reflect')),
    dict(normalization='min-max'),
    dict(normalization='arctan'),
    dict(norm_cfg=dict(type='BN', affine=False)),
]


def make(seed: int = 0, **options: object) -> RKANResNet:
    torch.manual_seed(seed)
    model = RKANResNet(18, base_channels=8, stage_with_rkan=(False, True, False, True), rkan=options).double()
    for module in model.modules():  # statistics as after training
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    model.eval()
    return model


def assert_same(model: nn.Module, expected: list, x: torch.Tensor, tolerance: float = 1e-10) -> None:
    with torch.no_grad():
        for out, want in zip(model(x), expected):
            assert out.dtype == want.dtype
            assert (out - want).abs().max() <= tolerance * (1 + want.abs().max())


@pytest.mark.parametrize('options', OPTIONS, ids=str)
@pytest.mark.parametrize('order', ['alone', 'before', 'after'])
def test_same_function(options: dict, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, 'PART_BYTES', 4000)  # several parts
    model = make(**options)
    x = torch.randn(2, 3, 65, 48, dtype=torch.double)
    with torch.no_grad():
        expected = model(x)
    if order == 'after':
        model = fuse_conv_bn(model)
    assert fuse_paths(model) is model
    if order == 'before':
        model = fuse_conv_bn(model)
    assert isinstance(model.layer2.rkan, FusedResidualPath)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.layer4.rkan.modules())
    assert_same(model, expected, x)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert_same(model, expected, channels_last)


def test_single_precision_and_its_state_dict() -> None:
    model = make().float()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    fused = fuse_paths(copy.deepcopy(model))
    assert_same(fused, expected, x, 1e-5)
    other = fuse_paths(make(seed=1).float())
    other.load_state_dict(fused.state_dict())
    assert_same(other, expected, x, 1e-5)
    assert sum(p.numel() for p in fused.parameters()) == sum(v.numel() for v in fused.state_dict().values()) - sum(
        v.numel() for k, v in fused.state_dict().items() if 'running' in k or 'tracked' in k
    )


@pytest.mark.parametrize('norm_cfg', [dict(type='GN', num_groups=4), dict(type='BN', track_running_stats=False)])
def test_other_norms_stay(norm_cfg: dict) -> None:
    torch.manual_seed(0)
    model = RKANResNet(18, base_channels=8, rkan=dict(norm_cfg=norm_cfg))
    model.eval()
    fuse_paths(model)
    assert not any(isinstance(m, FusedResidualPath) for m in model.modules())


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match='model must be in eval mode'):
        fuse_paths(make().train())
    model = make()
    model.layer4.rkan.train()
    with pytest.raises(ValueError, match='model must be in eval mode'):
        fuse_paths(model)


def test_gradients_of_the_input_still_flow() -> None:
    model = make()
    x = torch.randn(1, 3, 64, 64, dtype=torch.double, requires_grad=True)
    (expected,) = torch.autograd.grad(sum(f.square().sum() for f in model(x)), x)
    (actual,) = torch.autograd.grad(sum(f.square().sum() for f in fuse_paths(model)(x)), x)
    torch.testing.assert_close(actual, expected)


def test_deformable_convolutions_stay() -> None:
    model = make(conv_cfg=dict(type='DCNv2')).float()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    assert_same(fuse_paths(model), expected, x, 1e-5)


@pytest.mark.parametrize('aggregation', ['addition', 'gating', dict(type='se', ratio=4)], ids=str)
def test_autocast_gives_what_it_gave_before(aggregation: object) -> None:
    model = make(aggregation=aggregation).float()
    x = torch.randn(1, 3, 64, 64)
    with torch.autocast('cpu', torch.bfloat16):
        with torch.no_grad():
            expected = model(x)
        assert expected[1].dtype == torch.bfloat16
        assert_same(fuse_paths(model), expected, x, 0.05)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    conv = KANConv2d(8)
    fused = FusedKANConv2d(conv)
    x = (3 * torch.randn(1, 8, 9, 9)).to(dtype)
    assert torch.equal(fused(x), conv(x))


@pytest.mark.slow
def test_compile_and_export() -> None:
    model = fuse_paths(make().float())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        for out, want in zip(torch.compile(model, fullgraph=True)(x), expected):
            torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
        for out, want in zip(torch.export.export(model, (x,)).module()(x), expected):
            torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)


def test_other_hosts() -> None:
    torch.manual_seed(0)
    model = RKANResNeXt(groups=4, base_width=4, depth=50, rkan=dict(aggregation='se')).double()
    assert isinstance(model, BaseModule)
    model.eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.double)
    with torch.no_grad():
        expected = model(x)
    assert_same(fuse_conv_bn(fuse_paths(model)), expected, x)
