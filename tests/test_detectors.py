"""Other detectors, and a segmentor, take an RKAN backbone by a few lines of config."""

from pathlib import Path

import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from rkan_mmdet.backbones import ResidualPath
from rkan_mmdet.launch import read_config

LINES = """
custom_imports = dict(imports=['rkan_mmdet'])
model = dict(backbone=dict(type='RKANResNet', rkan=dict(zero_init=True)))
"""
RTMDET_LINES = """
custom_imports = dict(imports=['rkan_mmdet'])
model = dict(
    backbone=dict(
        _delete_=True,
        type='RKANBackbone',
        backbone=_base_.model.backbone,
        stages=('stage1', 'stage2', 'stage3', 'stage4'),
        stage_with_rkan=(False, False, False, True),
        rkan=dict(zero_init=True)))
"""
DETECTORS = {
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py': LINES,
    'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py': LINES,
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py': LINES,
    'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py': LINES,
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py': LINES,
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py': RTMDET_LINES,
}


def drop_weights(node: object) -> None:
    """No weights are fetched in a test."""
    if isinstance(node, dict):
        if isinstance(node.get('init_cfg'), dict) and node['init_cfg'].get('type') == 'Pretrained':
            node['init_cfg'] = None
        for value in node.values():
            drop_weights(value)


def build(tmp_path: Path, base: str, lines: str) -> tuple[Config, torch.nn.Module]:
    path = tmp_path / 'mine.py'
    path.write_text(f"_base_ = ['{base}']\n{lines}")
    cfg = read_config(str(path))
    drop_weights(cfg.model)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return cfg, model


@pytest.mark.slow
@pytest.mark.parametrize(('base', 'lines'), DETECTORS.items(), ids=[name.split('/')[1] for name in DETECTORS])
def test_detector(base: str, lines: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, model = build(tmp_path, base, lines)
    masks = 'mask' in base
    batch = demo_mm_inputs(2, [[3, 256, 256]] * 2, num_items=[2, 3], num_classes=80, with_mask=masks)
    losses = model(**model.data_preprocessor(batch, training=True), mode='loss')
    total, _ = model.parse_losses(losses)
    total.backward()
    path = next(m for m in model.backbone.modules() if isinstance(m, ResidualPath))
    assert path.norm2.weight.grad.abs().sum() > 0  # it starts at zero: so far only its last norm is reached
    model.eval()
    batch = demo_mm_inputs(1, [[3, 256, 256]], num_items=[2], num_classes=80, with_mask=masks)
    results = model(**model.data_preprocessor(batch, training=False), mode='predict')
    assert results[0].pred_instances.scores.isfinite().all()


@pytest.mark.slow
def test_segmentor(tmp_path: Path) -> None:
    pytest.importorskip('mmseg', reason='MMSegmentation is not installed')
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    lines = """
custom_imports = dict(imports=['rkan_mmdet'])
default_scope = 'mmseg'
model = dict(
    pretrained=None,
    data_preprocessor=None,
    backbone=dict(
        _delete_=True,
        type='RKANResNetV1d',
        depth=50,
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        norm_eval=False))
"""
    _, model = build(tmp_path, 'mmseg::_base_/models/fcn_r50-d8.py', lines)
    labels = PixelData(data=torch.randint(0, 19, (1, 64, 64)))
    samples = [
        SegDataSample(gt_sem_seg=labels, metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64))) for _ in range(2)
    ]
    losses = model(torch.randn(2, 3, 64, 64), samples, mode='loss')
    sum(value for name, value in losses.items() if 'loss' in name).backward()
    path = next(m for m in model.backbone.modules() if isinstance(m, ResidualPath))
    assert path.kan_conv1.basis_weight.grad.abs().sum() > 0
    model.eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64), mode='tensor').shape == (1, 19, 8, 8)
