"""The backbones: shapes, freezing, norms, warm start, initialisation, over the registry."""

import copy
import logging
import pickle

import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from mmdet.models.backbones import ResNet, ResNeXt
from mmdet.registry import MODELS
from mmengine.logging import MMLogger
from torch import nn

from rkan_mmdet.backbones import RKANBackbone, RKANResNet, RKANResNeXt, attach_paths

SMALL = {
    'RKANResNet': dict(depth=18),
    'RKANResNetV1d': dict(depth=50),
    'RKANResNeXt': dict(depth=50, groups=32, base_width=4),
    'RKANRes2Net': dict(depth=50, scales=4, base_width=26),
    'RKANResNeSt': dict(depth=50),
    'RKANRegNet': dict(arch='regnetx_400mf'),
}
ALL = (True,) * 4
BN = nn.modules.batchnorm._BatchNorm


def build(name: str, **options: object) -> nn.Module:
    return MODELS.build(dict(type=name, **dict(SMALL[name], **options)))


def classifier_parameters(backbone: nn.Module, classes: int) -> int:
    """As the ImageNet classifier of the paper: the backbone and a linear layer on its 2048 channels."""
    return sum(p.numel() for p in backbone.parameters()) + 2048 * classes + classes


@pytest.mark.parametrize('name', SMALL)
def test_every_backbone_of_the_registry(name: str) -> None:
    model = build(name, stage_with_rkan=ALL)
    plain = MODELS.build(dict(type=name[4:], **SMALL[name]))
    keys = [key for key in model.state_dict() if '.rkan.' not in key]
    assert keys == list(plain.state_dict())
    x = torch.randn(2, 3, 65, 97)  # odd sizes
    outs, expected = model(x), plain(x)
    assert [o.shape for o in outs] == [e.shape for e in expected]
    sum(o.square().mean() for o in outs).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize(
    ('factory', 'classes', 'printed'),
    [
        (lambda: ResNet(50), 1000, '25.56'),
        (lambda: RKANResNet(50), 1000, '27.14'),
        (lambda: RKANResNet(50, rkan=dict(expand_factor=2)), 1000, '31.86'),
        (lambda: RKANResNet(50, rkan=dict(expand_factor=4)), 1000, '38.15'),
        (lambda: RKANResNet(50, rkan=dict(expand_factor=6)), 1000, '44.45'),
        (lambda: ResNet(101), 100, '42.71'),
        (lambda: RKANResNet(101), 100, '44.28'),
        (lambda: RKANResNet(101, stage_with_rkan=(False, False, True, True)), 100, '44.68'),
        (lambda: RKANResNet(101, rkan=dict(expand_factor=2)), 100, '49.00'),
        (lambda: RKANResNet(101, rkan=dict(expand_factor=4)), 100, '55.30'),
        (lambda: RKANResNet(101, rkan=dict(expand_factor=6)), 100, '61.60'),
        (lambda: ResNeXt(depth=101, groups=32, base_width=8), 100, '86.95'),
        (lambda: RKANResNeXt(depth=101, groups=32, base_width=8), 100, '88.53'),
    ],
)
def test_parameters_of_the_paper(factory: object, classes: int, printed: str) -> None:
    assert f'{classifier_parameters(factory(), classes) / 1e6:.2f}' == printed


@pytest.mark.parametrize('depth', [18, 34, 50, 101, 152])
def test_every_depth_adds_exactly_the_path(depth: int) -> None:
    added = sum(p.numel() for p in RKANResNet(depth).parameters()) - sum(p.numel() for p in ResNet(depth).parameters())
    assert added == (99_683 if depth < 50 else 1_578_083)


def test_a_stage_with_a_path_is_the_stage_plus_the_path() -> None:
    model = RKANResNet(18, stage_with_rkan=(False, True, False, True)).eval()
    x = torch.randn(1, 64, 16, 16)
    stage = model.layer2
    blocks = [stage[0], stage[1]]
    torch.testing.assert_close(stage(x), blocks[1](blocks[0](x)) + stage.rkan(x))
    assert not hasattr(model.layer1, 'rkan')
    assert stage.rkan.kan_conv2 is None
    assert model.layer4.rkan.kan_conv2 is not None


def test_settings_can_differ_by_stage() -> None:
    rkan = [None, None, dict(expand_factor=2, aggregation='gating'), dict(basis=dict(type='RBF', grid_size=(4, 2)))]
    model = RKANResNet(18, stage_with_rkan=(True, False, True, True), rkan=rkan)
    assert model.layer1.rkan.conv_reduce.out_channels == 32
    assert model.layer3.rkan.conv_reduce.out_channels == 256
    assert model.layer4.rkan.kan_conv1.basis.grid_size == 4
    assert model.layer4.rkan.kan_conv2.basis.grid_size == 2


def test_the_plain_arguments_keep_their_meaning() -> None:
    model = RKANResNet(
        18, in_channels=4, base_channels=16, stem_channels=24, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 2),
        out_indices=(3,), stage_with_rkan=ALL,
    )  # fmt: skip
    assert model.layer1.rkan.conv_reduce.in_channels == 24
    assert [tuple(o.shape) for o in model(torch.randn(1, 4, 64, 64))] == [(1, 128, 8, 8)]
    model = RKANResNet(18, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(0, 1, 2),
                       stage_with_rkan=(False, False, True))  # fmt: skip
    assert len(model(torch.randn(1, 3, 64, 64))) == 3


def test_se_has_biases_in_resnext_alone() -> None:
    for rkan in (dict(aggregation='se'), dict(aggregation=dict(type='se'))):
        assert RKANResNet(18, rkan=rkan).layer4.rkan.aggregation.conv1.bias is None
        assert RKANResNeXt(depth=50, rkan=rkan).layer4.rkan.aggregation.conv1.bias is not None
    model = RKANResNeXt(depth=50, rkan=dict(aggregation=dict(type='se', bias=False)))
    assert model.layer4.rkan.aggregation.conv1.bias is None


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('frozen', [-1, 0, 1, 3, 4])
def test_frozen_stages_freeze_the_paths_from_construction(name: str, frozen: int) -> None:
    model = build(name, stage_with_rkan=ALL, frozen_stages=frozen)
    for state in ('built', 'train'):
        if state == 'train':
            assert model.train() is model
        for i, stage in enumerate(model.res_layers, 1):
            path = getattr(model, stage).rkan
            assert all(p.requires_grad == (i > frozen) for p in path.parameters()), (state, stage)
            assert path.norm1.training == (i > frozen), (state, stage)


def test_an_adapter_keeps_nothing_of_the_frozen_part() -> None:
    model = RKANResNet(18, frozen_stages=4, rkan=dict(adapter=True, zero_init=True)).train()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f'layer4.rkan.{name}' for name, _ in model.layer4.rkan.named_parameters()]
    assert model.layer4.rkan.norm1.training
    assert not model.layer4[0].bn1.training
    x, saved = torch.randn(2, 3, 128, 128), {}

    def note(t: torch.Tensor) -> torch.Tensor:
        saved[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        outs = model(x)
        kept = sum(saved.values())
        saved.clear()
        RKANResNet(18, frozen_stages=3).train()(x)
        unfrozen = sum(saved.values())
    assert [o.requires_grad for o in outs] == [False, False, False, True]
    # the path's input is a feature of stage 3; all else that is kept is the path's own
    assert kept < 0.5 * unfrozen
    outs[3].sum().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if '.rkan.' not in name)
    assert all(p.grad is not None for p in model.layer4.rkan.parameters())
    fixed = dict(adapter=True, norm_cfg=dict(type='BN', requires_grad=False))
    model = RKANResNet(18, frozen_stages=4, rkan=fixed).train()
    assert not model.layer4.rkan.norm1.weight.requires_grad
    assert model.layer4.rkan.conv_reduce.weight.requires_grad


def test_norm_eval_of_the_backbone_does_not_reach_a_path() -> None:
    model = RKANResNet(18, norm_eval=True, stage_with_rkan=ALL, rkan=[None, None, dict(norm_eval=True), None])
    model.train()
    assert not model.layer4[0].bn1.training
    assert model.layer4.rkan.norm1.training
    assert not model.layer3.rkan.norm1.training
    before = model.layer4.rkan.norm1.running_mean.clone()
    model(torch.randn(2, 3, 64, 64))
    assert not torch.equal(before, model.layer4.rkan.norm1.running_mean)
    assert model.eval() is model
    assert not any(m.training for m in model.modules())


def test_group_norm_and_sync_bn_can_be_chosen() -> None:
    model = RKANResNet(18, rkan=dict(norm_cfg=dict(type='GN', num_groups=8)))
    assert isinstance(model.layer4.rkan.norm1, nn.GroupNorm)
    assert isinstance(model.layer4[0].bn1, nn.BatchNorm2d)
    model = RKANResNet(18, rkan=dict(norm_cfg=dict(type='SyncBN')))
    assert isinstance(model.layer4.rkan.norm2, nn.SyncBatchNorm)


@pytest.mark.parametrize(
    'options',
    [
        dict(norm_cfg=dict(type='SyncBN')),
        dict(norm_cfg=dict(type='GN', num_groups=8)),
        dict(dcn=dict(type='DCNv2', deform_groups=1), stage_with_dcn=(False, True, True, True)),
        dict(style='caffe'),
        dict(with_cp=True),
    ],
    ids=str,
)
def test_options_of_the_plain_blocks(options: dict) -> None:
    model = RKANResNet(50, **options).eval()
    assert [o.shape[1] for o in model(torch.randn(1, 3, 64, 64))] == [256, 512, 1024, 2048]


def test_initialisation_after_init_weights() -> None:
    model = RKANResNet(50, stage_with_rkan=ALL, rkan=dict(aggregation='gating', shortcut=True))
    model.init_weights()
    for name in model.res_layers:
        stage = getattr(model, name)
        assert all((block.bn3.weight == 0).all() for block in list(stage)[:-1])  # zero_init_residual of the plain class
        for module in stage.rkan.modules():
            if isinstance(module, nn.Conv2d):  # PyTorch's default: uniform within 1 / sqrt(fan_in)
                bound = module.in_channels**-0.5
                assert module.weight.abs().max() <= bound
                assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
                if module.bias is not None:
                    assert module.bias.abs().max() > 0
            if isinstance(module, BN):
                assert (module.weight == 1).all()
                assert (module.bias == 0).all()
        assert (stage.rkan.kan_conv1.basis_scale == 1).all()
    conv = model.layer3[0].conv1  # and the blocks are Kaiming normal, as the plain class makes them
    assert conv.weight.std().item() == pytest.approx((2 / conv.out_channels) ** 0.5, rel=0.1)


@pytest.mark.parametrize('shortcut', [False, True])
def test_zero_init_holds_after_init_weights_and_is_the_plain_network(shortcut: bool) -> None:
    plain = ResNet(18)
    plain.init_weights()
    for module in plain.modules():
        if isinstance(module, BN):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    model = RKANResNet(18, stage_with_rkan=ALL, rkan=dict(zero_init=True, shortcut=shortcut))
    model.init_weights()
    assert model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []
    x = torch.randn(2, 3, 64, 64)
    for mode in (True, False):
        for a, b in zip(model.train(mode)(x), (plain.train(mode), plain(x))[1]):
            assert (a - b).abs().max() <= 1e-6 * b.abs().max()


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def log() -> Records:
    logger = MMLogger.get_current_instance()
    handler = Records()
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def test_plain_weights_load_key_for_key_and_say_so_in_one_line(tmp_path: object, log: Records) -> None:
    plain = ResNet(18)
    path = str(tmp_path / 'plain.pth')
    torch.save(plain.state_dict(), path)
    model = RKANResNet(18, stage_with_rkan=ALL, init_cfg=dict(type='Pretrained', checkpoint=path))
    fresh = model.layer4.rkan.conv_reduce.weight.clone()
    model.init_weights()
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert model.layer4.rkan.conv_reduce.weight.abs().max() <= fresh.shape[1] ** -0.5
    assert len([line for line in log.lines if 'start from their own initialisation' in line]) == 1
    assert not any('missing keys' in line for line in log.lines)


def test_the_weights_of_an_rkan_backbone_load_with_their_paths(tmp_path: object, log: Records) -> None:
    trained = RKANResNet(18)
    path = str(tmp_path / 'rkan.pth')
    torch.save(trained.state_dict(), path)
    model = RKANResNet(18, init_cfg=dict(type='Pretrained', checkpoint=path))
    model.init_weights()
    assert torch.equal(model.layer4.rkan.conv_reduce.weight, trained.layer4.rkan.conv_reduce.weight)
    assert not any('their own initialisation' in line for line in log.lines)
    state = trained.state_dict()
    del state['layer4.rkan.norm1.weight']  # half a path is an accident, and is listed
    torch.save(state, path)
    RKANResNet(18, init_cfg=dict(type='Pretrained', checkpoint=path)).init_weights()
    assert any('missing keys' in line and 'layer4.rkan.norm1.weight' in line for line in log.lines)


def test_weights_of_which_none_fits_are_refused(tmp_path: object) -> None:
    path = str(tmp_path / 'detector.pth')
    torch.save({f'backbone.{key}': value for key, value in ResNet(18).state_dict().items()}, path)
    init_cfg = dict(type='Pretrained', checkpoint=path)
    message = r"detector\.pth.* weights are like 'conv1\.weight' of shape \(64, 3, 7, 7\); \"prefix\" takes"
    for options in ({}, dict(stage_with_rkan=(False,) * 4)):
        with pytest.raises(ValueError, match=message):
            RKANResNet(18, init_cfg=init_cfg, **options).init_weights()
        RKANResNet(18, init_cfg=dict(init_cfg, prefix='backbone.'), **options).init_weights()
    with pytest.raises(ValueError, match=r'of shape \(16, 3, 7, 7\)'):  # names alone do not make it fit
        RKANResNet(18, base_channels=16, init_cfg=dict(init_cfg, prefix='backbone.')).init_weights()


def test_strict_loading_of_plain_weights_still_fails() -> None:
    with pytest.raises(RuntimeError, match=r'layer4\.rkan'):
        RKANResNet(18).load_state_dict(ResNet(18).state_dict())


def test_copies_and_pickles() -> None:
    model = RKANResNet(18).eval()
    x = torch.randn(1, 3, 64, 64)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.layer4.rkan.norm2.bias.add_(1)
        assert not torch.equal(other(x)[3], model(x)[3])


def test_memory_format_and_autocast() -> None:
    model = RKANResNet(18).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        assert last[3].is_contiguous(memory_format=torch.channels_last)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            low = model(x)
    for a, b, c in zip(expected, last, low):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert c.isfinite().all()
        assert (a - c.float()).abs().max() < 0.05 * a.abs().max()


class Wide(nn.Module):
    def forward(self, x: torch.Tensor) -> list:
        return [x, x]


@pytest.mark.parametrize(
    ('stage', 'message'),
    [
        (nn.Sequential(nn.ReLU()), "stage 'a' .* has no 2D convolution"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), Wide()), "stage 'a' .* must give one tensor"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(5, 5)), "stage 'a' .* does not take one tensor of 4 channels"),
        (nn.Sequential(nn.Conv2d(4, 4, 2, stride=2)), 'makes 16x16 of 33x33'),
        (nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)), "stage 'a' .* changes its input in place"),
    ],
)
def test_stages_that_no_path_fits_are_refused_by_name(stage: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach_paths(nn.ModuleDict(dict(a=stage)), ['a'], [True])


def test_a_stage_of_any_module() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    net = nn.ModuleDict(dict(a=Block(), b=nn.Sequential(nn.Conv2d(6, 6, 1))))
    attach_paths(net, ['a', 'b'], [True, True])
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(net['a'].eval()(x), net['a'].conv(x) + net['a'].rkan(x))
    assert net['b'](net['a'](x)).shape == (2, 6, 5, 5)
    assert 'conv.weight' in net['a'].state_dict()


class OwnForward(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.mean(1, keepdim=True)


class Listed(nn.ModuleList):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self:
            x = block(x)
        return x


class Children(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first, self.second = blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.children():
            x = block(x)
        return x


@pytest.mark.parametrize('kind', [nn.Sequential, OwnForward, lambda *blocks: Listed(blocks), Children])
@pytest.mark.parametrize('out_channels', [4, 6])  # where a path could follow the last block, and where it could not
def test_a_path_is_no_block_of_its_stage(kind: object, out_channels: int) -> None:
    stage = kind(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, out_channels, 3, padding=1))
    x = torch.randn(2, 4, 9, 9)
    plain, keys = stage(x), list(stage.state_dict())
    net = nn.ModuleDict(dict(a=stage))
    attach_paths(net, ['a'], [True])
    assert not net['a'].rkan.norm1.running_mean.any(), 'a trial of the stage has trained the path'
    net.eval()
    for other in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))) if kind is OwnForward else (net,):
        torch.testing.assert_close(other['a'](x), plain + other['a'].rkan(x))
        assert list(other['a'].state_dict())[: len(keys)] == keys
    if hasattr(torch.compiler, 'is_compiling'):  # since torch 2.3, see test_compile
        compiled = torch.compile(net['a'], backend='eager', fullgraph=True)
        torch.testing.assert_close(compiled(x), plain + net['a'].rkan(x))
    with pytest.raises(ValueError, match=r"stage 'a' .* has a path"):
        attach_paths(net, ['a'], [True])


class Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self:
            x = x + block(x)
        return x


def test_a_path_of_zeros_is_no_block_either() -> None:
    net, x = nn.ModuleDict(dict(a=Residual(nn.Conv2d(4, 4, 3, padding=1)))), torch.randn(2, 4, 9, 9)
    plain = net['a'](x)
    attach_paths(net, ['a'], [True], dict(zero_init=True))
    nn.init.ones_(net['a'].rkan.norm2.weight)  # as training does
    torch.testing.assert_close(net.eval()['a'](x), plain + net['a'].rkan(x))


def test_a_path_is_of_the_mode_and_dtype_of_its_backbone() -> None:
    net, x = nn.ModuleDict(dict(a=nn.Sequential(nn.Conv2d(4, 6, 1)))).double().eval(), torch.randn(1, 4, 9, 9).double()
    attach_paths(net, ['a'], [True])
    assert not any(module.training for module in net.modules())
    assert net['a'](x).dtype == torch.double


def test_a_path_that_can_never_add_anything(log: Records) -> None:
    with pytest.raises(ValueError, match='zero_init needs norms that are trained'):
        RKANResNet(18, rkan=dict(zero_init=True, norm_cfg=dict(type='BN', requires_grad=False)))
    for frozen, adapter, said in ((4, False, True), (4, True, False), (3, False, False)):
        log.lines.clear()
        RKANResNet(18, base_channels=8, frozen_stages=frozen, rkan=dict(zero_init=True, adapter=adapter)).init_weights()
        assert any('layer4.rkan is frozen with its stage, and starts at zero' in line for line in log.lines) is said


class Stages(nn.Module):
    """A backbone of torch alone: no `init_weights`, no list of its stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outs = [self.stem(x)]
        for stage in self.stages:
            outs.append(stage(outs[-1]))
        return outs[1:]


class GoesOverAll(Stages):
    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                nn.init.constant_(module.weight, 1)


class Unpacks(Stages):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outs = [self.stem(x)]
        for stage in self.stages:
            for block in stage:
                x = block(outs[-1])
            outs.append(x)
        return outs[1:]


@pytest.mark.parametrize('kind', [Stages, GoesOverAll])
def test_a_path_starts_as_itself_in_any_backbone(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(stages=('stages.0', 'stages.1'), stage_with_rkan=(False, True), rkan=dict(zero_init=True))
    model = RKANBackbone(dict(type=kind), **options)
    model.init_weights()
    path = model.stages[1].rkan
    assert path.is_zero()
    assert path.conv_reduce.weight.std() > 0.01
    assert (model.stages[0][0].weight == 1).all() == (kind is GoesOverAll)
    drawn = copy.deepcopy(path.state_dict())
    with torch.no_grad():
        path.norm2.bias.add_(1)  # as training and loading do
    if kind is Stages:  # whose weights are nobody's to start again
        model.init_weights()
        assert not path.is_zero()
    held = dict(model.state_dict(), **{'stages.1.rkan.norm2.bias': torch.ones(8)})
    monkeypatch.setattr(kind, 'init_weights', lambda self: self.load_state_dict(held), raising=False)
    model.init_weights()  # of weights that hold the path: they stay
    assert (path.norm2.bias == 1).all()
    assert torch.equal(path.conv_reduce.weight, drawn['conv_reduce.weight'])


class CallsForward(Stages):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outs = [self.stem(x)]
        for stage in self.stages:
            outs.append(stage.forward(outs[-1]))
        return outs[1:]


def test_stages_that_the_backbone_does_not_call() -> None:
    backbone, x = CallsForward().eval(), torch.randn(1, 3, 16, 16)
    plain = backbone(x)[1]
    attach_paths(backbone, ['stages.0', 'stages.1'], [False, True])
    assert 'forward' not in vars(backbone.stages[1])
    assert not torch.equal(backbone(x)[1], plain)
    with pytest.raises(ValueError, match=r"Unpacks does not call stage 'stages\.1' \(Sequential\) but what is in it"):
        attach_paths(Unpacks(), ['stages.0', 'stages.1'], [False, True])


def test_attached_paths_are_heeded() -> None:
    frozen, adapter = ResNet(18, base_channels=8, frozen_stages=4, norm_eval=True), dict(adapter=True)
    attach_paths(frozen, frozen.res_layers, (False, True, True, True), [None, None, adapter, adapter])
    for _ in range(2):
        assert not any(p.requires_grad for p in frozen.layer2.parameters())
        assert all(p.requires_grad for layer in (frozen.layer3, frozen.layer4) for p in layer.rkan.parameters())
        assert not frozen.layer4[0].bn1.training
        frozen.train()
    assert frozen.layer4.rkan.norm1.training


CSPNEXT = dict(type='mmdet.CSPNeXt', deepen_factor=0.17, widen_factor=0.25)
STAGES = ('stage1', 'stage2', 'stage3', 'stage4')


def test_any_backbone_built_of_stages() -> None:
    cfg = dict(CSPNEXT, frozen_stages=2, norm_eval=True)
    options = dict(backbone=cfg, stages=STAGES, stage_with_rkan=(False, True, False, True))
    model = MODELS.build(dict(type='RKANBackbone', **options, rkan=dict(zero_init=True)))
    plain = MODELS.build(cfg)
    assert isinstance(model, type(plain))
    assert [key for key in model.state_dict() if '.rkan.' not in key] == list(plain.state_dict())
    model.init_weights()
    assert (model.stage4.rkan.norm2.weight == 0).all()
    assert model.stage4.rkan.conv_reduce.weight.abs().max() <= model.stage4.rkan.conv_reduce.in_channels**-0.5
    plain.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 96)
    for a, b in zip(model.eval()(x), (plain.eval(), plain(x))[1]):
        torch.testing.assert_close(a, b)
    assert model.train() is model
    assert model.stage4.rkan.norm1.training
    assert not model.stage2.rkan.norm1.training
    assert not any(p.requires_grad for p in model.stage2.rkan.parameters())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert all(torch.equal(a, b) for a, b in zip(other.eval()(x), model.eval()(x)))


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(backbone='CSPNeXt'), TypeError, 'backbone must be a config'),
        (dict(stages='stage4'), TypeError, 'stages must be a sequence of names'),
        (dict(stages=('stage7',), stage_with_rkan=(True,)), ValueError, "CSPNeXt has no stage 'stage7'"),
        (
            dict(
                backbone=dict(type='mmdet.SwinTransformer', embed_dims=24, depths=(1, 1, 1, 1)),
                stages=tuple(f'stages.{i}' for i in range(4)),
            ),
            ValueError,
            "stage 'stages.3' .SwinBlockSequence. ",
        ),
    ],
)
def test_backbones_that_do_not_fit_are_named(options: dict, error: type, message: str) -> None:
    default = dict(backbone=CSPNEXT, stages=STAGES, stage_with_rkan=(False, False, False, True))
    with pytest.raises(error, match=message):
        RKANBackbone(**dict(default, **options))


def test_senet_and_gcnet_by_plugins() -> None:
    se = [dict(cfg=dict(type='SEPlugin', ratio=16), position='after_conv3')]
    model = RKANResNet(50, plugins=se)
    added = sum(p.numel() for n, p in model.named_parameters() if '.se' in n)
    widths, blocks = (256, 512, 1024, 2048), (3, 4, 6, 3)
    assert added == sum(2 * w * w // 16 * n for w, n in zip(widths, blocks))
    block, x = model.layer1[1], torch.randn(1, 256, 8, 8)
    plugin = getattr(block, block.after_conv3_plugin_names[0])
    pooled = x.mean((2, 3))
    hidden = torch.relu(pooled @ plugin.conv1.weight[:, :, 0, 0].T)
    expected = x * torch.sigmoid(hidden @ plugin.conv2.weight[:, :, 0, 0].T)[:, :, None, None]
    torch.testing.assert_close(plugin(x), expected)
    context = dict(cfg=dict(type='ContextBlock', ratio=1 / 4), stages=(False, True, True, True), position='after_conv3')
    model = RKANResNet(50, plugins=[context]).eval()
    assert [tuple(o.shape[1:]) for o in model(torch.randn(1, 3, 32, 32))][-1] == (2048, 1, 1)


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(stage_with_rkan=(True,)), ValueError, 'stage_with_rkan must have 4 entries'),
        (dict(stage_with_rkan=True), TypeError, 'stage_with_rkan must be a sequence of bools'),
        (dict(stage_with_rkan=(0, 0, 0, 1)), TypeError, r'stage_with_rkan\[0\] must be True or False, but got 0'),
        (dict(rkan='L'), TypeError, 'rkan must be a dict, or a list'),
        (dict(rkan=[None]), ValueError, 'rkan as a list must have 4 entries'),
        (dict(rkan=[1, None, None, None]), TypeError, r'rkan\[0\] must be a dict or None'),
        (dict(rkan=dict(degree=3)), TypeError, "rkan has no option 'degree'; it takes reduce_factor"),
        (dict(rkan=dict(stride=2)), TypeError, "rkan has no option 'stride'"),
        (dict(rkan=dict(reduce_factor=-2)), ValueError, 'reduce_factor must be an int >= 1, but got -2'),
    ],
)
def test_bad_arguments_are_named(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        RKANResNet(18, **options)


def test_folding_batch_norms_keeps_the_function() -> None:
    """MMCV folds a norm into the convolution that is listed before it, which is not always the one that runs before."""
    model = RKANResNet(18, stage_with_rkan=(False, True, True, True), rkan=dict(shortcut=True), norm_eval=False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_var, 0.5, 2),
            ):
                torch.nn.init.uniform_(tensor, low, high)
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
    model.eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        for a, b in zip(fuse_conv_bn(model)(x), expected):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()
