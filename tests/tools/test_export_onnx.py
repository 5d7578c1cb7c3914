"""The export tool: what it writes is run, compared and scored; what it refuses is one line."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from pycocotools import mask as mask_utils

from rkan_mmdet import exported
from rkan_mmdet.exported import load_test_set, open_session
from rkan_mmdet.launch import UserError, read_config
from rkan_mmdet.speed import build_detector

ROOT = Path(__file__).parents[2]
WEIGHTS = object()
CONFIG = ROOT / 'configs' / 'demo' / 'mask-rcnn_rkan-r18_fpn_shapes.py'
spec = importlib.util.spec_from_file_location('export_onnx', ROOT / 'tools' / 'export_onnx.py')
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, 'argv', ['export_onnx.py', *map(str, arguments)])
    tool.main()


@pytest.fixture(scope='module')
def setting(tmp_path_factory: pytest.TempPathFactory, shapes_root: str) -> Config:
    """A small detector whose own detections are the ground truth: it scores high, and any other would score low."""
    folder = tmp_path_factory.mktemp('export')
    (folder / 'config.py').write_text(
        f"""_base_ = ['{CONFIG}']
model = dict(
    backbone=dict(base_channels=16, stem_channels=16),
    neck=dict(in_channels=[16, 32, 64, 128]),
    test_cfg=dict(rcnn=dict(score_thr=0.2)))
test_dataloader = dict(dataset=dict(ann_file='{folder}/truth.json'))
test_evaluator = dict(ann_file='{folder}/truth.json')
"""
    )
    (folder / 'truth.json').write_text((Path(shapes_root) / 'annotations' / 'instances_val.json').read_text())
    cfg = read_config(str(folder / 'config.py'), dict(data_root=shapes_root))
    torch.manual_seed(3)
    model = build_detector(cfg)
    torch.nn.init.normal_(model.roi_head.bbox_head.fc_cls.weight, 0, 0.1)
    torch.nn.init.normal_(model.roi_head.mask_head.conv_logits.weight, 0, 0.5)
    torch.save(dict(state_dict=model.state_dict()), folder / 'weights.pth')
    truth, annotations = json.loads((folder / 'truth.json').read_text()), []
    for batch in load_test_set(cfg):
        with torch.no_grad():
            sample = model.test_step(batch)[0]
        found = sample.pred_instances
        for box, label, mask in zip(found.bboxes.tolist(), found.labels.tolist(), found.masks.numpy()):
            rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
            rle['counts'] = rle['counts'].decode('ascii')
            box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            entry = dict(image_id=sample.img_id, category_id=label + 1, bbox=box, area=box[2] * box[3], iscrowd=0)
            annotations.append(dict(entry, id=len(annotations) + 1, segmentation=rle))
    assert len(annotations) > 20
    (folder / 'truth.json').write_text(json.dumps(dict(truth, annotations=annotations)))
    return Config(dict(folder=str(folder), config=str(folder / 'config.py'), weights=str(folder / 'weights.pth'),
                       options=['--cfg-options', f'data_root={shapes_root}']))  # fmt: skip


@pytest.mark.slow
def test_detector_is_scored(
    setting: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / 'detector.onnx'
    arguments = (setting.config, setting.weights, out, '--evaluate', *setting.options)
    run(monkeypatch, *arguments)
    text = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ['detector.onnx']
    assert open_session(out).get_inputs()[0].shape == [1, 3, 192, 192]
    lines = [line for line in text.splitlines() if line.startswith('coco/')]
    values = {line.split(':')[0]: [float(part.split()[-1]) for part in line.split(', ')] for line in lines}
    for name in ('coco/bbox_mAP', 'coco/segm_mAP'):
        ours, theirs = values[name]
        assert abs(ours - theirs) <= 0.002
        assert theirs > 0.8
    assert 'all 4 of the test set' in text
    assert 'opset 18' in text
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments)
    assert f'{out} exists' in capsys.readouterr().err

    with pytest.raises(UserError, match='is 192x192 after the test pipeline and does not fit a file of 160x192'):
        run(monkeypatch, *arguments[:2], tmp_path / 'small.onnx', '--evaluate', '--size', 160, 192, *setting.options)

    # a file that differs is not named as if it did not
    monkeypatch.setitem(tool.TOLERANCE, 'box', -1)
    out = tmp_path / 'other.onnx'
    with pytest.raises(UserError, match='differs from PyTorch by more than rounding'):
        run(monkeypatch, setting.config, setting.weights, out, '--size', 96, 96, '--score-thr', 0, *setting.options)
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['detector.onnx', 'other.onnx.failed']

    # nothing found is nothing compared, and few are not excused for being few
    monkeypatch.undo()
    capsys.readouterr()
    out, size = tmp_path / 'none.onnx', ('--size', 64, 64)
    run(monkeypatch, setting.config, setting.weights, out, *size, '--score-thr', 0.999, *setting.options)
    assert 'NOT checked: nothing was detected' in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(exported, 'compare', lambda *_: exported.Difference(detections=1, missing=1))
    with pytest.raises(UserError, match='differs from PyTorch by more than rounding'):
        run(monkeypatch, setting.config, setting.weights, tmp_path / 'few.onnx', *size, *setting.options)


@pytest.mark.slow
def test_backbone_int8(
    setting: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run(monkeypatch, setting.config, setting.weights, tmp_path / 'float.onnx', '--what', 'backbone', '--dynamic')
    assert 'floating point: feature0' in capsys.readouterr().out
    options = ('--what', 'backbone', '--int8', 8, *setting.options)
    run(monkeypatch, setting.config, setting.weights, tmp_path / 'int8.onnx', *options)
    text = capsys.readouterr().out
    assert 'INT8, calibrated by 2 images, on 2 others:' in text
    assert text.count('relative error') == 4
    assert (tmp_path / 'int8.onnx').stat().st_size < 0.5 * (tmp_path / 'float.onnx').stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ['float.onnx', 'int8.onnx']


@pytest.mark.slow
def test_backbone_of_an_odd_size_and_an_opset_that_is_not(
    setting: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    what = ('--what', 'backbone', '--size', 100, 70)
    run(monkeypatch, setting.config, setting.weights, tmp_path / 'odd.onnx', *what)
    assert 'checked by ONNX Runtime' in capsys.readouterr().out
    with pytest.raises(UserError, match='opset 99 can not be written: this exporter gives'):
        run(monkeypatch, setting.config, setting.weights, tmp_path / 'new.onnx', *what, '--opset', 99)
    assert [path.name for path in tmp_path.iterdir()] == ['odd.onnx']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('none.py', 'x.pth', 'out.onnx'), 'config none.py does not exist'),
        ((CONFIG, 'none.pth', 'out.onnx'), 'checkpoint none.pth does not exist'),
        ((CONFIG, __file__, 'none/out.onnx'), 'folder none does not exist'),
        ((CONFIG, __file__, 'out.onnx'), 'can not be read safely'),
        ((CONFIG, WEIGHTS, 'out.onnx', '--evaluate', '--cfg-options', 'data_root=none'), 'none/annotations'),
        ((CONFIG, 'x.pth', 'out.pt'), 'OUT must end in .onnx, but got out.pt'),
        ((CONFIG, 'x.pth', 'out.onnx', '--size', 16, 64), '--size must be at least 32 32, but got 16 64'),
        ((CONFIG, 'x.pth', 'out.onnx', '--opset', 11), '--opset must be at least 18, but got 11'),
        ((CONFIG, 'x.pth', 'out.onnx', '--score-thr', 1), '--score-thr must be at least 0 and below 1, but got 1.0'),
        ((CONFIG, 'x.pth', 'out.onnx', '--int8'), '--int8 is for --what backbone'),
        ((CONFIG, 'x.pth', 'out.onnx', '--what', 'backbone', '--evaluate'), 'are for --what detector'),
        ((CONFIG, 'x.pth', 'out.onnx', '--what', 'backbone', '--int8', 0), '--int8 must be at least 1, but got 0'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_refusals(
    arguments: tuple, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('MMDET_DATASETS', raising=False)
    weights = tmp_path / 'weights.pth'
    torch.save(dict(state_dict=dict(weight=torch.ones(1))), weights)
    with pytest.raises((UserError, RuntimeError, SystemExit)) as error:
        run(monkeypatch, *(weights if argument is WEIGHTS else argument for argument in arguments))
    assert message in f'{error.value} {capsys.readouterr().err}'
    assert list(tmp_path.iterdir()) == [weights]


def test_a_missing_runtime_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'onnxscript' else find(name))
    with pytest.raises(UserError, match='onnxscript is not installed: `pip install onnx onnxscript onnxruntime`'):
        run(monkeypatch, CONFIG, __file__, tmp_path / 'out.onnx')
