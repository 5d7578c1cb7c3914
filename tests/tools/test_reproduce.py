"""tools/reproduce.sh from nothing to its table on tiny data: what fails goes on, what is done is skipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def reproduce(tmp_path: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    env = dict(os.environ, PYTHON=sys.executable, WORK_DIRS=str(tmp_path / 'runs'), PYTHONWARNINGS='ignore', **env)
    return subprocess.run([str(ROOT / 'tools/reproduce.sh'), *arguments], env=env, capture_output=True, text=True)


def test_fail_go_on_skip(coco_root: Path, tmp_path: Path) -> None:
    only = dict(ONLY='*_coco-1pct-s1.py')
    small = [
        '--cfg-options', f'data_root={coco_root}/', 'model.backbone.init_cfg=None', 'train_cfg.max_epochs=1',
        'train_dataloader.dataset.times=1', 'train_dataloader.dataset.dataset.pipeline.2.scale=(96,96)',
        'test_dataloader.dataset.pipeline.1.scale=(96,96)', 'val_dataloader.dataset.pipeline.1.scale=(96,96)',
        'model.test_cfg.rcnn.score_thr=0',
        'train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False',
    ]  # fmt: skip
    wrong = reproduce(
        tmp_path, 'lowdata', '--cfg-options', 'data_root=nowhere/', 'model.backbone.init_cfg=None', **only
    )
    assert wrong.returncode == 1
    assert wrong.stderr.count('go on when this is called again: configs/lowdata/mask-rcnn_') == 2
    assert '| r50 |' in wrong.stdout

    done = reproduce(tmp_path, 'lowdata', *small, **only)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    names = ['mask-rcnn_r50_fpn_coco-1pct-s1', 'mask-rcnn_rkan-r50_fpn_coco-1pct-s1']
    assert all((tmp_path / 'runs' / name / 'epoch_1.pth').is_file() for name in names)
    rows = [line for line in done.stdout.splitlines() if line.startswith(('| r50', '| rkan-r50'))]
    assert len(rows) == 2
    assert rows[1].split('|')[2].strip().endswith(')'), 'the AP and its difference to the plain model'
    assert '35.92' not in rows[1], "the authors' figures are of all of COCO"

    again = reproduce(tmp_path, 'lowdata', *small, **only)
    assert again.returncode == 0
    assert again.stdout.count(' is done\n') == 2
    assert 'training' not in again.stdout
    other = reproduce(tmp_path, 'lowdata', **only)
    assert other.returncode == 2
    assert 'is done, but with other options (--cfg-options data_root=' in other.stderr
    assert reproduce(tmp_path, 'lowdata', *small, **only, GPUS='2').returncode == 2, 'another batch'


def test_bad_calls(tmp_path: Path) -> None:
    assert reproduce(tmp_path).returncode == 2
    assert 'usage' in reproduce(tmp_path, 'imagenet').stderr
    assert 'matches none of' in reproduce(tmp_path, 'coco', ONLY='nothing').stderr
