"""What only a GPU can run: loss scales that overflow, and sharded training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rkan_mmdet.checkpoint import read_checkpoint

ROOT = Path(__file__).parents[1]
DEMO = ROOT / 'configs/demo/mask-rcnn_rkan-r18_fpn_shapes.py'
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU: MMEngine scales losses there alone'),
]


def train(tmp_path: Path, shapes_root: str, settings: str, *launch: str) -> dict:
    """The checkpoint after two epochs of the demo's detector with these settings in its config."""
    config = tmp_path / 'config.py'
    config.write_text(
        f"_base_ = ['{DEMO}']\n{settings}\ntrain_cfg = dict(max_epochs=2)\ntrain_dataloader = dict(batch_size=2)\n"
    )
    arguments = ['--work-dir', str(tmp_path / 'work'), '--launcher', 'pytorch' if launch else 'none']
    arguments += ['--cfg-options', f'data_root={shapes_root}/']
    done = subprocess.run(
        [sys.executable, *launch, 'tools/train.py', str(config), *arguments], cwd=ROOT, capture_output=True, text=True,
        env=dict(os.environ, PYTHONWARNINGS='ignore'),
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    checkpoint = read_checkpoint(tmp_path / 'work/epoch_2.pth')
    weights = checkpoint['state_dict']
    assert any(name.startswith('backbone.layer4.rkan.') for name in weights)
    assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())
    return checkpoint


def test_a_loss_scale_that_overflows(shapes_root: str, tmp_path: Path) -> None:
    scale = 2.0**40
    settings = (
        f"optim_wrapper = dict(type='AmpOptimWrapper', loss_scale=dict(init_scale={scale}, backoff_factor=2**-12))"
    )
    checkpoint = train(tmp_path, shapes_root, settings)
    assert checkpoint['optimizer']['loss_scaler']['scale'] < scale, 'nothing overflowed'
    assert checkpoint['optimizer']['state'], 'no step was taken'


def test_sharded_training(shapes_root: str, tmp_path: Path) -> None:
    settings = (
        "runner_type = 'FlexibleRunner'\nstrategy = dict(type='FSDPStrategy', model_wrapper=dict(use_orig_params=True))"
    )
    launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={min(torch.cuda.device_count(), 2)}']
    train(tmp_path, shapes_root, settings, *launch)
