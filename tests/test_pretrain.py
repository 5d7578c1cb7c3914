"""Pre-training on ImageNet-1k: the recipe, whom it serves, and one run of it on a small set where MMPretrain is."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / 'configs' / 'pretrain').glob('*.py'))
DETECTORS = sorted((ROOT / 'configs' / 'rkan').glob('*_authors-1x_*.py'))
MILLIONS = {'r50': 25.56, 'rkan-r50': 27.14, 'rkan-r50-2xl': 31.86, 'rkan-r50-4xl': 38.15, 'rkan-r50-6xl': 44.45}


def test_learning_rate_is_the_authors() -> None:
    cfg = Config.fromfile(CONFIGS[0])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = [PARAM_SCHEDULERS.build(dict(s, optimizer=optimizer)) for s in cfg.param_scheduler]
    rates = []
    for _ in range(cfg.train_cfg.max_epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert rates[:10] == pytest.approx([0.05 * (e + 1) / 10 for e in range(10)])
    cosine = [1e-5 + (0.05 - 1e-5) * (1 + np.cos(np.pi * e / 90)) / 2 for e in range(90)]
    assert rates[10:] == pytest.approx(cosine)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_parses_and_builds_without_mmpretrain(path: Path) -> None:
    init_default_scope('mmdet')
    backbone = MODELS.build(Config.fromfile(path).model.backbone)
    assert not backbone.norm_eval
    name = path.stem.split('_')[0]
    if name in MILLIONS:
        total = sum(p.numel() for p in backbone.parameters()) + 2048 * 1000 + 1000
        assert round(total / 1e6, 2) == MILLIONS[name]


@pytest.mark.parametrize('path', DETECTORS, ids=lambda p: p.stem)
def test_detectors_start_from_the_same_backbone(path: Path) -> None:
    backbone = Config.fromfile(path).model.backbone
    folder, file = Path(backbone.init_cfg.checkpoint).parts[1:]
    pretrain = Config.fromfile(ROOT / 'configs' / 'pretrain' / f'{folder}.py')
    assert file == f'epoch_{pretrain.train_cfg.max_epochs}.pth'
    init_default_scope('mmdet')
    backbone.init_cfg = None
    shapes = [
        {key: value.shape for key, value in MODELS.build(cfg).state_dict().items()}
        for cfg in (backbone, pretrain.model.backbone)
    ]
    assert shapes[0] == shapes[1]


def write_images(root: Path) -> None:
    """Three classes of one colour each under noise."""
    generator = np.random.default_rng(0)
    for split, count in (('train', 24), ('val', 8)):
        for label in range(3):
            folder = root / split / f'n{label}'
            folder.mkdir(parents=True)
            for i in range(count):
                image = generator.integers(0, 120, (80, 96, 3))
                image[..., label] += 120
                cv2.imwrite(str(folder / f'{i}.png'), image.astype(np.uint8))


SMALL = """
_base_ = ['{base}']
model = dict(backbone=dict(depth=18), head=dict(num_classes=3, in_channels=512, topk=(1,)))
data_preprocessor = dict(num_classes=3)
train_pipeline = _base_.train_pipeline
train_pipeline[1]['scale'] = 64
data = dict(type='CustomDataset', data_root='{data}')
train_dataloader = dict(batch_size=12, num_workers=0, persistent_workers=False,
                        dataset=dict(_delete_=True, data_prefix='train', pipeline=train_pipeline, **data))
val_dataloader = dict(batch_size=12, num_workers=0, persistent_workers=False,
                      dataset=dict(_delete_=True, data_prefix='val', pipeline=_base_.test_pipeline, **data))
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
optim_wrapper = dict(_delete_=True, type='OptimWrapper', optimizer=_base_.optim_wrapper.optimizer)
train_cfg = dict(max_epochs=4)
randomness = dict(seed=0)
"""


@pytest.mark.slow
def test_pretrained_weights_reach_the_detector(tmp_path: Path) -> None:
    pytest.importorskip(
        'mmpretrain',
        reason='MMPretrain does not import here: `make test STACK=pretrain ARGS=tests/test_pretrain.py` runs this',
        exc_type=ImportError,
    )
    write_images(tmp_path / 'data')
    config = tmp_path / 'small.py'
    config.write_text(
        SMALL.format(base=ROOT / 'configs/pretrain/rkan-r50_authors-100e_in1k.py', data=tmp_path / 'data')
    )
    work_dir = tmp_path / 'small_in1k'
    command = [sys.executable, str(ROOT / 'tools' / 'train.py'), str(config), '--work-dir', str(work_dir)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ, OMP_NUM_THREADS='2')
    )
    assert done.returncode == 0, done.stderr[-3000:]
    scores = [
        float(line.split('accuracy/top1: ')[1].split()[0]) for line in done.stdout.splitlines() if 'top1: ' in line
    ]
    assert scores[-1] >= 80, scores

    import rkan_mmdet  # noqa: F401

    init_default_scope('mmdet')
    cfg = Config.fromfile(ROOT / 'configs/rkan/mask-rcnn_rkan-r50_fpn_authors-1x_coco.py')
    cfg.model.backbone.depth = 18
    cfg.model.neck.in_channels = [64, 128, 256, 512]
    cfg.model.backbone.init_cfg.checkpoint = str(work_dir / 'epoch_4.pth')
    model = MODELS.build(cfg.model)
    model.init_weights()
    trained = torch.load(work_dir / 'epoch_4.pth', weights_only=True)['state_dict']
    state = {f'backbone.{key}': value for key, value in model.backbone.state_dict().items()}
    assert any('.rkan.' in key for key in state)
    for key, value in state.items():
        assert torch.equal(value, trained[key]), key
