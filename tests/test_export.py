"""Exported detectors and backbones: the graph equals MMDetection, the file equals the graph, at every size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.models.roi_heads import FCNMaskHead, SingleRoIExtractor
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import nn

from rkan_mmdet.backbones import ResidualPath, RKANResNet
from rkan_mmdet.deploy import DeployedDetector, _batched_nms, _pool
from rkan_mmdet.export import export_program, write_onnx
from rkan_mmdet.exported import (
    Difference,
    ExportedDetector,
    PaddedDetector,
    check_fits,
    compare,
    feature_errors,
    open_session,
    pipeline_size,
    postprocess,
    quantize,
)
from rkan_mmdet.launch import UserError, read_config
from rkan_mmdet.ops import KANConv2d
from rkan_mmdet.speed import build_detector, random_batch

LINES = """
custom_imports = dict(imports=['rkan_mmdet'])
model = dict(
    backbone=dict(
        _delete_=True, type='RKANResNet', depth=18, base_channels=16, stem_channels=16, frozen_stages=-1),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32))
"""
DENSE = {f'model.bbox_head.{name}': value for name, value in dict(
    in_channels=32, feat_channels=32, stacked_convs=1, num_classes=7).items()}  # fmt: skip
TWO_STAGES = {
    'model.rpn_head.in_channels': 32,
    'model.rpn_head.feat_channels': 32,
    'model.roi_head.bbox_roi_extractor.out_channels': 32,
    'model.roi_head.bbox_head.in_channels': 32,
    'model.roi_head.bbox_head.fc_out_channels': 64,
    'model.roi_head.bbox_head.num_classes': 7,
    'model.test_cfg.rcnn.score_thr': 0.15,
}
MASK = {
    **TWO_STAGES,
    'model.roi_head.mask_roi_extractor.out_channels': 32,
    'model.roi_head.mask_head.in_channels': 32,
    'model.roi_head.mask_head.conv_out_channels': 16,
    'model.roi_head.mask_head.num_classes': 7,
}
AGNOSTIC = {
    **MASK,
    'model.roi_head.bbox_head.reg_class_agnostic': True,
    'model.roi_head.mask_head.class_agnostic': True,
    'model.test_cfg.rcnn.nms': dict(type='nms', iou_threshold=0.7, class_agnostic=True),
}
RTMDET = """
custom_imports = dict(imports=['rkan_mmdet'])
model = dict(
    bbox_head=dict(num_classes=7),
    backbone=dict(
        _delete_=True, type='RKANBackbone', backbone=dict(_base_.model.backbone, init_cfg=None),
        stages=('stage1', 'stage2', 'stage3', 'stage4'), stage_with_rkan=(False, False, False, True)))
"""
DETECTORS = dict(
    faster=('mmdet::_base_/models/faster-rcnn_r50_fpn.py', LINES, TWO_STAGES),
    mask=('mmdet::_base_/models/mask-rcnn_r50_fpn.py', LINES, MASK),
    agnostic=('mmdet::_base_/models/mask-rcnn_r50_fpn.py', LINES, AGNOSTIC),
    retinanet=('mmdet::_base_/models/retinanet_r50_fpn.py', LINES, DENSE),
    fcos=('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', LINES, DENSE),
    atss=('mmdet::atss/atss_r50_fpn_1x_coco.py', LINES, DENSE),
    rtmdet=('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py', RTMDET, {}),
)


def detector(name: str, tmp_path: Path, options: dict | None = None) -> nn.Module:
    """A small detector whose random weights give many detections, of scores that are far enough from each other."""
    base, lines, small = DETECTORS[name]
    path = tmp_path / f'{name}.py'
    path.write_text(f"_base_ = ['{base}']\n{lines}")
    model = build_detector(read_config(str(path), {**small, **(options or {})}))
    torch.manual_seed(0)
    for key, parameter in model.named_parameters():
        if ('cls' in key or 'reg' in key or 'fc' in key) and 'convs' not in key:
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0, 0.05)
            elif 'cls' in key:
                nn.init.normal_(parameter, -2, 0.5)
    return model


def predict(model: nn.Module, size: tuple[int, int]) -> InstanceData:
    with torch.no_grad():
        return model.test_step(random_batch(size, 1))[0].pred_instances.clone()


def assert_alike(expected: InstanceData, actual: InstanceData, at_least: int = 30) -> None:
    difference = compare(expected, actual)
    assert difference.detections >= at_least
    assert difference.missing <= 0.04 * difference.detections  # of near ties one or the other wins
    assert difference.box < 0.01
    assert difference.score < 1e-4
    assert difference.mask < 0.05


@pytest.mark.parametrize('name', DETECTORS)
def test_the_graph_is_the_detector(name: str, tmp_path: Path) -> None:
    """In PyTorch the deployed form gives the very numbers of MMDetection, at sizes that are padded too."""
    model = detector(name, tmp_path)
    deployed = DeployedDetector(model)
    for size in ((128, 160), (97, 133)) if name != 'rtmdet' else ((128, 160),):
        image = random_batch(size, 1)['inputs'][0]
        with torch.no_grad():
            outputs = deployed(image[None].float())
        expected = predict(model, size)
        actual = postprocess([output.numpy() for output in outputs], size)
        assert len(expected) > 30
        for key in ('bboxes', 'scores', 'labels', *(['masks'] if deployed.with_mask else [])):
            torch.testing.assert_close(actual[key], expected[key], rtol=1e-6, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'dynamic'), [('mask', True), ('faster', False), ('retinanet', False)], ids=str)
def test_the_file_is_the_detector(name: str, dynamic: bool, tmp_path: Path) -> None:
    import onnx

    model = detector(name, tmp_path)
    file = write_onnx(DeployedDetector(model), tmp_path / 'out.onnx', (128, 160), dynamic)
    exported = ExportedDetector(file)
    for size in ((128, 160), (97, 133), (32, 64), (224, 50)) if dynamic else ((128, 160),):
        assert_alike(predict(model, size), predict(exported, size))
    if not dynamic:  # an image in the upper left, as MMDetection pads it in a batch with a larger one
        assert_alike(predict(PaddedDetector(model, (128, 160)), (97, 133)), predict(exported, (97, 133)))
        image = torch.full((1, 3, 128, 160), 77.0)  # what lies beside it does not matter
        image[:, :, :97, :133] = random_batch((97, 133), 1)['inputs'][0]
        outputs = exported.session.run(None, dict(images=image.numpy(), image_size=np.array([97, 133])))
        assert compare(predict(exported, (97, 133)), postprocess(outputs, (97, 133)))[1:4] == (0, 0, 0)
        whole = exported.session.run(None, dict(images=image.numpy()))  # image_size need not be given
        assert whole[0][:, 2].max() > 133
        with pytest.raises(UserError, match='does not fit'):
            predict(exported, (129, 160))

    proto = onnx.load(file)
    onnx.checker.check_model(proto, full_check=True)
    kinds = {node.op_type for node in proto.graph.node}
    assert {node.domain for node in proto.graph.node} == {''}
    assert not proto.functions
    assert 'NonMaxSuppression' in kinds
    assert ('RoiAlign' in kinds) == (name in ('faster', 'mask'))
    assert str(Path.cwd()).encode() not in file.read_bytes()  # no path of the machine
    names = [output.name for output in proto.graph.output]
    assert names == ['boxes', 'scores', 'labels', 'masks'][: 3 + (name == 'mask')]
    assert [value.name for value in proto.graph.input] == ['images', 'image_size'][: 1 + (not dynamic)]
    shape = [d.dim_param or d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    assert shape == [1, 3, *(['height', 'width'] if dynamic else [128, 160])]
    assert list(tmp_path.iterdir()) != []
    assert not list(tmp_path.glob('.*'))  # nothing half-written
    with pytest.raises(FileExistsError):
        write_onnx(DeployedDetector(model), file, (128, 160))


@pytest.mark.slow
def test_nothing_found(tmp_path: Path) -> None:
    model = detector('mask', tmp_path, {'model.test_cfg.rcnn.score_thr': 0.99})
    file = write_onnx(DeployedDetector(model), tmp_path / 'out.onnx', (64, 96))
    outputs = open_session(file).run(None, {'images': np.full((1, 3, 64, 96), 99, np.float32)})
    assert [output.shape for output in outputs] == [(0, 4), (0,), (0,), (0, 28, 28)]
    found = predict(ExportedDetector(file), (64, 96))
    assert len(found) == 0
    assert found.masks.shape == (0, 64, 96)


@pytest.mark.parametrize('options', [dict(sampling_ratio=0), dict(sampling_ratio=2), dict(aligned=False)], ids=str)
def test_pool_is_the_extractor(options: dict) -> None:
    layer = dict(type='RoIAlign', output_size=7, sampling_ratio=0)
    extractor = SingleRoIExtractor(dict(layer, **options), out_channels=8, featmap_strides=[4, 8, 16])
    features = [torch.randn(1, 8, 128 // s, 160 // s) for s in (4, 8, 16)]
    boxes = torch.rand(40, 4) * torch.tensor([80.0, 60, 80, 60])
    boxes[:, 2:] += boxes[:, :2]
    boxes[0] = 0
    rois = torch.cat([torch.zeros(40, 1), boxes], 1)
    for chosen in (rois, rois[extractor.map_roi_levels(rois, 3) == 0], rois[:1]):  # levels without boxes too
        torch.testing.assert_close(_pool(extractor, features, chosen[:, 1:]), extractor(features, chosen))


def test_nms_keeps_groups_apart() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8], [50, 50, 60, 60]]).float()
    scores, groups = torch.tensor([0.6, 0.9, 0.8, -1.0]), torch.tensor([0, 0, 1, 0])
    cfg = ConfigDict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=10)
    assert _batched_nms(boxes, scores, groups, cfg).tolist() == [1, 2]
    cfg.nms.class_agnostic = True
    assert _batched_nms(boxes, scores, groups, cfg).tolist() == [1]
    cfg.update(max_per_img=1, nms=dict(iou_threshold=0.5))
    assert _batched_nms(boxes, scores, groups, cfg).tolist() == [1]
    assert _batched_nms(boxes, -scores.abs(), groups, cfg).tolist() == []


@pytest.mark.parametrize(
    ('base', 'options', 'named'),
    [
        ('mmdet::_base_/models/cascade-rcnn_r50_fpn.py', {}, 'CascadeRoIHead can not be exported; supported are'),
        ('mmdet::detr/detr_r50_8xb2-150e_coco.py', {}, 'DETR can not be exported; supported are'),
        ('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py', {}, 'YOLOXHead can not be exported'),
        ('mmdet::gfl/gfl_r50_fpn_1x_coco.py', {}, 'GFLHead can not be exported'),
        (
            'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
            {'model.test_cfg.rcnn.nms': dict(type='soft_nms', iou_threshold=0.5)},
            "nms={'type': 'soft_nms', 'iou_threshold': 0.5} can not be exported",
        ),
        (
            'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
            {'model.roi_head.bbox_roi_extractor.roi_layer': dict(_delete_=True, type='RoIPool', output_size=7)},
            'RoIPool can not be exported',
        ),
        (
            'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
            {'model.roi_head.bbox_roi_extractor.type': 'GenericRoIExtractor'},
            'GenericRoIExtractor can not be exported',
        ),
        (
            'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
            {'model.test_cfg.rcnn.max_per_img': -1},
            'max_per_img must be at least 1 for an export, but got -1',
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_refusals(base: str, options: dict, named: str, tmp_path: Path) -> None:
    path = tmp_path / 'c.py'
    path.write_text(f"_base_ = ['{base}']\n")
    cfg = read_config(str(path), dict(options, **{'model.backbone.init_cfg': None}))
    with pytest.raises(ValueError, match=named.replace('{', r'\{').replace('(', r'\(')):
        DeployedDetector(build_detector(cfg))


@pytest.mark.parametrize(
    'options',
    [
        dict(num_kernels=2, basis=dict(type='Legendre', degree=7)),
        dict(basis=dict(type='RBF')),
        dict(basis=dict(type='BSpline'), shortcut=True),
        dict(basis=dict(type='Linear')),
        dict(normalization='min-max'),
    ],
    ids=str,
)
@pytest.mark.slow
def test_every_basis(options: dict, tmp_path: Path) -> None:
    path = ResidualPath(8, 16, stride=2, is_last=True, **options)
    file = write_onnx(path, tmp_path / 'out.onnx', (32, 48))
    (error,) = feature_errors(path, file, [torch.randn(1, 8, 32, 48)])
    assert error.relative < 1e-4  # windows of next to equal values are divided by their width
    assert error.cosine > 1 - 1e-6


@pytest.mark.parametrize('normalization', ['min-max', 'standardization'])
@pytest.mark.slow
def test_windows_of_zeros(normalization: str, tmp_path: Path) -> None:
    convs = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), KANConv2d(8, normalization=normalization)).eval()
    x = torch.randn(1, 8, 32, 48)
    x[..., 32:] = 0  # as padding is
    (error,) = feature_errors(convs, write_onnx(convs, tmp_path / 'out.onnx', (32, 48)), [x])
    assert error.relative < 1e-4


@pytest.mark.slow
def test_backbone(tmp_path: Path) -> None:
    """At sizes and batches that the export has not seen, with every aggregation."""
    rkan = [dict(), dict(aggregation='gating'), None, dict(aggregation='se', shortcut=True)]
    options = dict(stage_with_rkan=(True, True, False, True), rkan=rkan)
    backbone = RKANResNet(18, base_channels=16, stem_channels=16, frozen_stages=-1, in_channels=4, **options)
    file = write_onnx(backbone, tmp_path / 'out.onnx', (64, 96), dynamic=True)
    for size in (2, 4, 64, 96), (3, 4, 65, 97), (1, 4, 33, 40):
        for error in feature_errors(backbone, file, [torch.randn(size)]):
            assert error.relative < 1e-5
            assert error.cosine > 1 - 1e-6
    assert [output.name for output in open_session(file).get_outputs()] == [f'feature{i}' for i in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize('dynamic', [False, True])
def test_program(dynamic: bool, tmp_path: Path) -> None:
    """torch.export: the program equals eager, is saved and loaded."""
    backbone = RKANResNet(18, base_channels=16, stem_channels=16, stage_with_rkan=(True, False, True, True)).eval()
    torch.export.save(export_program(backbone, (64, 96), dynamic), tmp_path / 'backbone.pt2')
    program = torch.export.load(tmp_path / 'backbone.pt2').module()
    for size in ((1, 64, 96), (2, 97, 65), (3, 128, 128)) if dynamic else ((1, 64, 96),):
        x = torch.randn(size[0], 3, *size[1:])
        with torch.no_grad():
            for a, b in zip(program(x), backbone(x)):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = RKANResNet(18, base_channels=32, stem_channels=32, frozen_stages=-1).eval()
    for module in backbone.modules():  # statistics of data, as after training
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.train()
    images = [torch.randn(1, 3, 64, 64) for _ in range(12)]
    with torch.no_grad():
        backbone(torch.cat(images))
    backbone.eval()
    file = write_onnx(backbone, tmp_path / 'float.onnx', (64, 64))
    errors = {}
    for exclude in (True, False):
        out = quantize(file, tmp_path / f'{exclude}.onnx', images[:8], exclude_paths=exclude)
        errors[exclude] = feature_errors(backbone, out, images[8:])
        assert all(1e-4 < error.relative < 0.2 and error.cosine > 0.98 for error in errors[exclude])
    assert errors[True][-1].relative <= errors[False][-1].relative
    assert (tmp_path / 'True.onnx').stat().st_size < 0.5 * file.stat().st_size


def test_postprocess_is_the_mask_head() -> None:
    boxes = torch.tensor([[3.0, 4, 40, 30], [-5, 2, 12, 60], [10, 10, 10.5, 10.2]])
    masks, labels = torch.randn(3, 1, 28, 28), torch.zeros(3, dtype=torch.long)
    head = FCNMaskHead(num_convs=0, in_channels=4, num_classes=1, class_agnostic=True)
    meta, cfg = dict(ori_shape=(25, 33), scale_factor=(2.0, 1.5)), ConfigDict(mask_thr_binary=0.4)
    expected = head._predict_by_feat_single(masks, boxes.clone(), labels, meta, cfg, rescale=True)
    outputs = [boxes.numpy(), np.ones(3, np.float32), labels.numpy(), masks[:, 0].sigmoid().numpy()]
    found = postprocess(outputs, (25, 33), (2.0, 1.5), 0.4)
    assert torch.equal(found.masks, expected)
    torch.testing.assert_close(found.bboxes, boxes / torch.tensor([2, 1.5, 2, 1.5]))


def test_compare_sees_what_differs() -> None:
    def found(boxes: list, scores: list, labels: list) -> InstanceData:
        return InstanceData(
            bboxes=torch.tensor(boxes).reshape(-1, 4).float(), scores=torch.tensor(scores), labels=torch.tensor(labels)
        )

    a = found([[0, 0, 5, 5], [10, 10, 20, 20]], [0.9, 0.8], [0, 1])
    assert compare(a, a) == (2, 0, 0, 0, 0)
    assert compare(a, a[[1, 0]]).missing == 0  # the order of equal ones is free
    assert compare(a, a[:1]).missing == 1
    assert compare(a[:1], a).missing == 1
    assert compare(a, found([], [], [])).missing == 2
    assert compare(a, found([[0, 0, 5, 5], [10, 10, 20, 20]], [0.9, 0.8], [0, 2])).missing == 2
    assert compare(a, found([[0, 0, 5, 5], [10, 10, 20, 20]], [0.9, 0.7], [0, 1])).missing == 2
    moved = compare(a, found([[0, 0, 5, 5.25], [10, 10, 20, 20]], [0.9, 0.795], [0, 1]))
    assert moved.missing == 0
    assert moved.box == 0.25
    assert moved.score == pytest.approx(0.005, abs=1e-6)


def test_sizes() -> None:
    cfg = read_config(str(Path(__file__).parents[1] / 'configs/rkan/mask-rcnn_rkan-r50_fpn_1x_coco.py'))
    assert pipeline_size(cfg) == (800, 1344)
    cfg.test_dataloader.dataset.pipeline = [dict(type='LoadImageFromFile'), dict(type='PackDetInputs')]
    with pytest.raises(UserError, match='--size'):
        pipeline_size(cfg)
    with pytest.raises(UserError, match='is 64x64 after the test pipeline and does not fit a file of 32x64'):
        check_fits(random_batch((64, 64), 1)['data_samples'][0], (32, 64))
    check_fits(random_batch((64, 64), 1)['data_samples'][0], (64, 96))


@pytest.mark.parametrize(
    ('detections', 'missing', 'few'),
    [(0, 0, 1), (0, 1, 0), (1, 0, 1), (1, 1, 0), (3, 1, 1), (3, 2, 0), (5, 4, 0), (40, 6, 1), (40, 7, 0), (700, 39, 1)],
)
def test_most_detections_are_found_again(detections: int, missing: int, few: int) -> None:
    assert Difference(detections, missing).few_missing == bool(few)
