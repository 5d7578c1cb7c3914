"""One path: its size, its options, its aggregations."""

import pytest
import torch

from rkan_mmdet.backbones import ResidualPath


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ('arguments', 'parameters'),
    [
        (dict(in_channels=1024, out_channels=2048, stride=2, is_last=True), 1_578_083),
        (dict(in_channels=1024, out_channels=2048, stride=2, is_last=True, expand_factor=2), 6_299_747),
        (dict(in_channels=1024, out_channels=2048, stride=2, is_last=True, expand_factor=4), 12_595_299),
        (dict(in_channels=1024, out_channels=2048, stride=2, is_last=True, expand_factor=6), 18_890_851),
        (dict(in_channels=512, out_channels=1024, stride=2), 395_830),
        (dict(in_channels=256, out_channels=512, stride=2, is_last=True), 99_683),
    ],
)
def test_parameters_of_the_paper(arguments: dict, parameters: int) -> None:
    assert count(ResidualPath(**arguments)) == parameters


OPTIONS = [
    dict(),
    dict(is_last=True),
    dict(shortcut=True),
    dict(aggregation='gating'),
    dict(aggregation='se'),
    dict(aggregation=dict(type='se', bias=True, ratio=4)),
    dict(num_kernels=3, is_last=True),
    dict(expand_factor=2),
    dict(reduce_factor=4),
    dict(norm_cfg=dict(type='GN', num_groups=4)),
    dict(with_cp=True),
    dict(basis=dict(type='RBF', grid_size=(3, 2)), is_last=True),
    dict(basis=dict(type='BSpline', grid_size=(3, 2), order=(3, 2)), is_last=True),
    dict(basis=dict(type='Linear'), is_last=True),
    dict(conv_cfg=dict(type='Conv2d'), is_last=True),
    dict(normalization='arctan', is_last=True),
    dict(normalization='min-max'),
    dict(basis=dict(type='Jacobi', degree=(4, 1), alpha=(0.0, 1.0)), is_last=True),
]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
@pytest.mark.parametrize('stride', [1, 2])
def test_every_option_has_the_right_shape_and_trains_every_parameter(options: dict, stride: int) -> None:
    # in training a batch norm takes away whatever a bias before it adds: its gradient is 0 but for rounding
    path = ResidualPath(16, 32, stride, **options).eval()
    x = torch.randn(2, 16, 9, 7, requires_grad=True)
    r = path(x)
    assert r.shape == (2, 32, -(-9 // stride), -(-7 // stride))
    out = path.aggregate(torch.randn_like(r), r)
    assert out.shape == r.shape
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in path.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert x.grad.abs().max() > 0


def test_the_control_arms_have_about_the_same_size() -> None:
    arguments = dict(in_channels=1024, out_channels=2048, stride=2, is_last=True)
    kan = count(ResidualPath(**arguments))
    assert kan - count(ResidualPath(**arguments, basis=dict(type='Linear'))) == 54 + 45 - 18
    assert count(ResidualPath(**arguments, conv_cfg=dict(type='Conv2d'))) == pytest.approx(kan, rel=0.02)


def test_it_is_the_sequence_of_the_paper() -> None:
    path = ResidualPath(8, 16, 2, is_last=True, shortcut=True).double().eval()
    for module in path.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight)
            module.running_mean.uniform_(-1, 1)
    x, silu = torch.randn(1, 8, 6, 6, dtype=torch.double), torch.nn.functional.silu
    r = path.norm1(path.kan_conv1(silu(path.conv_reduce(x))))
    r = path.norm2(path.kan_conv2(silu(path.conv_expand(r))))
    r = r + path.shortcut[1](path.shortcut[0](x))
    torch.testing.assert_close(path(x), r)
    assert path.kan_conv1.basis.degree == 3
    assert path.kan_conv2.basis.degree == 2
    assert path.kan_conv1.stride == (2, 2)
    assert all(module.eps == 1e-5 and module.momentum == 0.1 for module in (path.norm1, path.norm2))


def test_aggregations_are_the_formulas_of_the_paper() -> None:
    f, r = torch.randn(2, 32, 4, 4).double(), torch.randn(2, 32, 4, 4).double()
    assert torch.equal(ResidualPath(8, 32).aggregate(f, r), f + r)
    gating = ResidualPath(8, 32, aggregation='gating').double()
    g = gating.aggregation.conv(r).sigmoid()
    torch.testing.assert_close(gating.aggregate(f, r), g * f + (1 - g) * r)
    assert gating.aggregation.conv.bias is not None
    se = ResidualPath(8, 32, aggregation='se').double()
    w = r.mean((2, 3))
    w = (
        torch.relu(w @ se.aggregation.conv1.weight[:, :, 0, 0].T) @ se.aggregation.conv2.weight[:, :, 0, 0].T
    ).sigmoid()
    torch.testing.assert_close(se.aggregate(f, r), f + r * w[:, :, None, None])
    assert se.aggregation.conv1.weight.shape == (2, 32, 1, 1)


def test_with_cp_changes_no_number() -> None:
    plain, checkpointed = ResidualPath(8, 16), ResidualPath(8, 16, with_cp=True)
    checkpointed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 8, 5, 5)
    results = []
    for path in (plain, checkpointed):
        path.zero_grad()
        y = path(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in path.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_norm_eval_is_the_paths_own() -> None:
    assert ResidualPath(8, 16).train().norm1.training
    path = ResidualPath(8, 16, norm_eval=True).train()
    assert path.training
    assert not path.norm1.training
    assert not path.norm2.training


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(reduce_factor=0), ValueError, 'reduce_factor must be an int >= 1, but got 0'),
        (dict(reduce_factor=17), ValueError, 'reduce_factor must be at most the 16 channels'),
        (dict(expand_factor=1.5), TypeError, 'expand_factor must be an int'),
        (dict(num_kernels=0), ValueError, 'num_kernels must be an int >= 1'),
        (dict(shortcut=1), TypeError, 'shortcut must be True or False'),
        (dict(aggregation='sum'), ValueError, "aggregation must be one of 'addition', 'gating', 'se', but got 'sum'"),
        (dict(aggregation=None), TypeError, 'aggregation must be a name or a dict'),
        (dict(aggregation=dict(type='gating', bias=True)), TypeError, "'gating' has no option 'bias'"),
        (dict(aggregation=dict(type='se', ratio=64)), ValueError, 'at most the 32 channels'),
        (dict(zero_init=True, aggregation='gating'), ValueError, 'zero_init must be False'),
        (dict(zero_init=True, norm_cfg=dict(type='BN', affine=False)), ValueError, 'zero_init needs norms'),
        (dict(norm_cfg='BN'), TypeError, 'norm_cfg must be a dict'),
        (dict(norm_cfg=dict(type='Norm')), ValueError, 'norm_cfg='),
        (dict(norm_cfg=dict(type='GN', num_groups=5)), ValueError, 'norm_cfg='),
        (
            dict(basis=dict(type='Chebyshev', degree=(3, 2, 1))),
            ValueError,
            r"basis\['degree'\] must be one value or a pair",
        ),
        (dict(basis=dict(type='Chebyshev', degree=(3, 0)), is_last=True), ValueError, 'degree must be an int >= 1'),
        (dict(norm_cfg=dict(type='BN3d')), ValueError, r"norm_cfg={'type': 'BN3d'} takes no feature map"),
        (dict(norm_cfg=dict(type='LN')), ValueError, r"norm_cfg={'type': 'LN'} takes no feature map"),
        (dict(conv_cfg=dict(type='Conv1d')), ValueError, r"conv_cfg={'type': 'Conv1d'} takes no feature map"),
        (dict(conv_cfg=dict(type='deconv'), stride=2), ValueError, r'makes \(1, 8, 5, 5\).* where \(1, 8, 2, 2\)'),
        (dict(conv_cfg=dict(type='Conv2d', bias=True)), ValueError, 'gives no depthwise convolution.*bias'),
        (dict(conv_cfg='Conv2d'), TypeError, 'conv_cfg must be None or a dict'),
        (dict(backend='gpu'), ValueError, 'backend must be one of'),
    ],
)
def test_bad_arguments_are_named(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ResidualPath(16, 32, **options)


@pytest.mark.parametrize('conv', ['DCN', 'DCNv2'])
def test_offsets_of_deformable_convolutions_start_at_zero(conv: str) -> None:
    path = ResidualPath(16, 32, conv_cfg=dict(type=conv), is_last=True)
    for module in (path.kan_conv1, path.kan_conv2):
        torch.nn.init.normal_(module.conv_offset.weight)  # as a backbone's init_cfg does
    path.init_weights()
    for module in (path.kan_conv1, path.kan_conv2):
        assert not module.conv_offset.weight.any()
        assert module.weight.any()
