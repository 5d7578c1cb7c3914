"""The main job through the tools: train, evaluate, resume; two processes; real COCO images where they are at hand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
DEMO = 'configs/demo/mask-rcnn_rkan-r18_fpn_shapes.py'
OVERFIT = 'configs/demo/mask-rcnn_rkan-r18_fpn_overfit-coco.py'
COCO_TINY = Path(os.environ.get('RKAN_COCO_TINY', ROOT.parent / 'shared/data/coco_tiny'))

pytestmark = pytest.mark.slow


def python(*arguments: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=dict(os.environ, **env), capture_output=True, text=True
    )
    text = result.stdout + result.stderr
    assert result.returncode == 0, text[-4000:]
    return text


def options(root: object, epochs: int) -> list:
    return [
        '--cfg-options', f'data_root={root}', f'train_cfg.max_epochs={epochs}', 'train_cfg.val_interval=1',
        'train_dataloader.batch_size=4', 'default_hooks.checkpoint.interval=1', 'default_hooks.logger.interval=1',
    ]  # fmt: skip


def test_train_evaluate_resume(shapes_root: str, tmp_path: Path) -> None:
    work = str(tmp_path / 'work')
    log = python('tools/train.py', DEMO, '--work-dir', work, *options(shapes_root, 2))
    assert re.search(r'Epoch\(train\) +\[2\]\[2/2\]', log)
    assert 'coco/bbox_mAP' in log
    assert 'coco/segm_mAP' in log
    assert (tmp_path / 'work/epoch_2.pth').exists()

    log = python('tools/train.py', DEMO, '--work-dir', work, '--resume', *options(shapes_root, 3))
    assert 'resumed epoch: 2' in log
    assert not re.search(r'Epoch\(train\) +\[1\]', log)
    assert re.search(r'Epoch\(train\) +\[3\]\[2/2\]', log)
    checkpoint = torch.load(tmp_path / 'work/epoch_3.pth', weights_only=True)
    assert checkpoint['meta']['epoch'] == 3
    assert any(key.startswith('backbone.layer4.rkan.') for key in checkpoint['state_dict'])

    out = tmp_path / 'predictions.pkl'
    config = f'{work}/{Path(DEMO).name}'  # as the resumed training left it; what it trained on may be gone
    log = python(
        'tools/test.py', config, f'{work}/epoch_3.pth', '--work-dir', work, '--out', str(out), '--show-dir', 'shown',
        '--cfg-options', 'train_dataloader.dataset.ann_file=nowhere.json',
    )  # fmt: skip
    assert len(re.findall(r'Average (?:Precision|Recall)', log)) == 24
    assert out.stat().st_size > 0
    assert len(list(Path(work).glob('*/shown/**/*.jpg'))) == 4

    from rkan_mmdet.plot import plot_curves, read_scalars

    curves = read_scalars(work)
    assert len(curves['loss']) == 6
    assert [epoch for epoch, _ in curves['coco/bbox_mAP']] == [1, 2, 3]
    assert plot_curves([work], tmp_path / 'curves.png').stat().st_size > 10_000


def test_random_weights_score_nothing(tmp_path: Path) -> None:
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    from rkan_mmdet.data.shapes import make_shapes

    root = make_shapes(tmp_path / 'set', num_train=1, num_val=20, quiet=True)
    init_default_scope('mmdet')
    model = MODELS.build(Config.fromfile(str(ROOT / DEMO)).model)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'random.pth')
    log = python(
        'tools/test.py', DEMO, str(tmp_path / 'random.pth'), '--work-dir', str(tmp_path / 'work'),
        '--cfg-options', f'data_root={root}',
    )  # fmt: skip
    scores = {kind: float(score) for kind, score in re.findall(r'coco/(bbox|segm)_mAP: (-?[\d.]+)', log)}
    assert scores.keys() == {'bbox', 'segm'}
    assert max(scores.values()) < 0.01


@pytest.mark.skipif(not COCO_TINY.exists(), reason=f'needs COCO images in COCO layout at RKAN_COCO_TINY ({COCO_TINY})')
@pytest.mark.parametrize('by_environment', [False, True])
def test_real_coco_images(by_environment: bool, tmp_path: Path) -> None:
    env = dict(MMDET_DATASETS=str(COCO_TINY)) if by_environment else {}
    root = [] if by_environment else [f'data_root={COCO_TINY}']
    log = python(
        'tools/train.py', OVERFIT, '--work-dir', str(tmp_path / 'work'), '--cfg-options', *root,
        'train_cfg.max_epochs=1', 'train_dataloader.dataset.times=1', 'default_hooks.logger.interval=1', **env,
    )  # fmt: skip
    losses = [float(loss) for loss in re.findall(r'Epoch\(train\).*? loss: ([\d.]+)', log)]
    assert len(losses) == 13
    assert losses[-1] < losses[0]
    assert (tmp_path / 'work/epoch_1.pth').exists()
