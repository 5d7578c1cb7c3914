"""The authors' weights there and back; plain detectors to RKAN detectors."""

import sys
from pathlib import Path

import pytest
import torch
from mmdet.models.backbones import ResNet

sys.path.insert(0, str(Path(__file__).parent))
from golden_case import Case

from rkan_mmdet.backbones import RKANBackbone, RKANResNet
from rkan_mmdet.convert import from_authors, from_plain, to_authors

CASES = sorted((Path(__file__).parent / 'data/golden').glob('*.json'))


@pytest.mark.parametrize('path', CASES, ids=lambda path: path.stem)
def test_there_and_back(path: Path) -> None:
    case = Case(path)
    theirs, model = case.state_dict(), case.backbone()
    ours = from_authors(theirs, model)
    back = to_authors(ours, model)
    expected = {key: value.shape for key, value in theirs.items() if '.fc.' not in key}
    assert {key: value.shape for key, value in back.items()} == expected
    active = [key for key in back if torch.equal(back[key], theirs[key].to(back[key].dtype))]
    assert len(active) >= len(ours)
    again = from_authors(back, model)
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[key], again[key]) for key in ours)


def test_several_kernels() -> None:
    model = RKANResNet(18, rkan=dict(num_kernels=2))
    one = RKANResNet(18)
    theirs = to_authors(one.state_dict(), one)
    for leaf in ('base_linear.weight', 'polynomial_weight', 'scaler'):
        theirs[f'kan_conv1.3.convs.1.conv.{leaf}'] = theirs[f'kan_conv1.3.convs.0.conv.{leaf}'] + 1
    for key in list(theirs):
        if key.startswith(('kan_bn.3.', 'conv_expand.3.')) and theirs[key].dim():
            theirs[key] = torch.cat([theirs[key]] * 2, dim=1 if key.startswith('conv') else 0)
    ours = from_authors(theirs, model)
    weight = ours['layer4.rkan.kan_conv1.basis_weight']
    assert weight.shape == (2, 9, 4)
    torch.testing.assert_close(weight[1], weight[0] + 1)
    with pytest.raises(ValueError, match='has 2 kernels'):
        to_authors(ours, model)


def test_squeeze_and_excitation_in_the_blocks() -> None:
    plugins = [dict(cfg=dict(type='SEPlugin'), position='after_conv3')]
    model = RKANResNet(50, plugins=plugins)
    theirs = to_authors(model.state_dict(), model)
    assert theirs['resnet.layer1.2.se.fc1.weight'].shape == (16, 256, 1, 1)  # the names of their RKAN_SENet
    assert theirs['resnet.layer4.0.se.fc2.weight'].shape == (2048, 128, 1, 1)
    again = from_authors(theirs, model)
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r'no resnet\.layer1\.0\.se\.fc1\.weight'):
        from_authors({key: value for key, value in theirs.items() if '.se.' not in key}, model)


def test_what_does_not_fit_is_named() -> None:
    model = RKANResNet(18)
    theirs = to_authors(model.state_dict(), model)
    with pytest.raises(ValueError, match=r'the state dict has no kan_bn\.3\.weight'):
        from_authors({k: v for k, v in theirs.items() if k != 'kan_bn.3.weight'}, model)
    with pytest.raises(ValueError, match=r'no place in the backbone for extra\.weight'):
        from_authors(dict(theirs, **{'extra.weight': torch.zeros(1)}), model)
    with pytest.raises(ValueError, match=r'does not make layer4\.rkan\.conv_reduce\.weight'):
        from_authors(theirs, RKANResNet(18, rkan=dict(expand_factor=2)))
    turned = dict(theirs, **{'conv_reduce.3.weight': theirs['conv_reduce.3.weight'].transpose(0, 1)})
    with pytest.raises(ValueError, match=r'does not make layer4\.rkan\.conv_reduce\.weight'):
        from_authors(turned, model)
    control = RKANResNet(18, rkan=dict(conv_cfg=dict(type='Conv2d')))
    narrow = RKANResNet(18, base_channels=8)
    csp = RKANBackbone(
        dict(type='mmdet.CSPNeXt', deepen_factor=0.17, widen_factor=0.25),
        stages=('stage1', 'stage2', 'stage3', 'stage4'),
        stage_with_rkan=(False, False, False, True),
    )
    for other, message in (
        (control, r'layer4\.rkan\.kan_conv1 is a Conv2d'),
        (narrow, 'for 16 channels or more, but layer1 has 8'),
        (csp, 'but no RKANCSPNeXt'),
    ):
        with pytest.raises(ValueError, match=message):
            to_authors(other.state_dict(), other)
    rbf = RKANResNet(18, rkan=dict(basis=dict(type='RBF', grid_size=(3, 2))))
    state = to_authors(rbf.state_dict(), rbf)
    state['kan_conv1.3.convs.0.conv.rbf.grid'] = torch.tensor([-2.0, 0.0, 2.0])
    with pytest.raises(ValueError, match='is not the grid of RBF'):
        from_authors(state, rbf)
    with pytest.raises(ValueError, match='no residual path'):
        to_authors(ResNet(18).state_dict(), RKANResNet(18, stage_with_rkan=(False,) * 4))


def test_from_plain() -> None:
    plain, model = ResNet(18), RKANResNet(18, rkan=dict(zero_init=True))
    model.load_state_dict(from_plain(plain.state_dict(), model))
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(model.eval()(x), (plain.eval(), plain(x))[1]):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r'layer4\.rkan does not start at zero'):
        from_plain(plain.state_dict(), RKANResNet(18))
    trained = RKANResNet(18, rkan=dict(zero_init=True))
    torch.nn.init.ones_(trained.layer4.rkan.norm2.bias)
    with pytest.raises(ValueError, match=r'layer4\.rkan does not start at zero'):
        from_plain(plain.state_dict(), trained)
    with pytest.raises(ValueError, match=r'missing layer1\.2'):
        from_plain(plain.state_dict(), RKANResNet(34, rkan=dict(zero_init=True)))
    with pytest.raises(ValueError, match=r'left over layer1\.2'):
        from_plain(ResNet(34).state_dict(), model)
    with pytest.raises(ValueError, match=r'has residual paths already: layer4\.rkan'):
        from_plain(model.state_dict(), model)
    with pytest.raises(ValueError, match=r'conv1\.weight is \(64, 4, 7, 7\) in the checkpoint'):
        from_plain(ResNet(18, in_channels=4).state_dict(), model)
