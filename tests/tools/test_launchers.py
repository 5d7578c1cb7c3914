"""The launch scripts: several processes, several machines (on one), slurm's arguments, gradient accumulation."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO = 'configs/demo/mask-rcnn_rkan-r18_fpn_shapes.py'
pytestmark = pytest.mark.slow


def free_port() -> str:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


def options(root: str, work_dir: Path, epochs: int = 1) -> list:
    return [
        '--work-dir', str(work_dir), '--cfg-options', f'data_root={root}/', f'train_cfg.max_epochs={epochs}',
        'train_cfg.val_interval=1', 'train_dataloader.batch_size=2', 'default_hooks.logger.interval=1',
        'train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False',
    ]  # fmt: skip


def start(script: str, *arguments: str, **env: str) -> subprocess.Popen:
    env = dict(os.environ, PYTHON=sys.executable, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore', **env)
    return subprocess.Popen(
        [f'tools/{script}', *arguments], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_two_processes_train_and_test(shapes_root: str, tmp_path: Path) -> None:
    """DDP refuses the second step when a parameter got no gradient in the first."""
    train = start('dist_train.sh', DEMO, '2', *options(shapes_root, tmp_path / 'work', 2), PORT=free_port())
    log = train.communicate()[0]
    assert train.returncode == 0, log[-3000:]
    assert 'GPU number: 2' in log
    assert re.search(r'Epoch\(train\) +\[2\]\[2/2\]', log)
    trained = re.findall(r'coco/bbox_mAP: ([-\d.]+)', log)[-1]
    test = start(
        'dist_test.sh', DEMO, str(tmp_path / 'work/epoch_2.pth'), '2', '--work-dir', str(tmp_path / 'test'),
        '--cfg-options', f'data_root={shapes_root}/', PORT=free_port(),
    )  # fmt: skip
    log = test.communicate()[0]
    assert test.returncode == 0, log[-3000:]
    assert re.findall(r'coco/bbox_mAP: ([-\d.]+)', log)[-1] == trained


def test_two_machines(shapes_root: str, tmp_path: Path) -> None:
    port = free_port()
    arguments = (DEMO, '1', *options(shapes_root, tmp_path / 'work'))
    nodes = [start('dist_train.sh', *arguments, NNODES='2', NODE_RANK=str(rank), PORT=port) for rank in (0, 1)]
    logs = [node.communicate()[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], logs[0][-3000:]
    assert 'GPU number: 2' in logs[0]
    assert (tmp_path / 'work/epoch_1.pth').is_file()


def test_accumulated_gradients_take_fewer_steps(shapes_root: str, tmp_path: Path) -> None:
    train = subprocess.run(
        [
            sys.executable, '-W', 'ignore', 'tools/train.py', DEMO, *options(shapes_root, tmp_path / 'work'),
            'optim_wrapper.accumulative_counts=2',
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    log = train.stdout + train.stderr
    assert train.returncode == 0, log[-3000:]
    norms = re.findall(r'\[1\]\[(\d)/4\].*?(grad_norm|loss)', log)
    assert [number for number, _ in norms] == ['1', '2', '3', '4']
    assert len(set(re.findall(r'grad_norm: ([\d.]+)', log))) == 2, 'one norm for each step of two batches'


def test_slurm_gets_what_was_said(tmp_path: Path) -> None:
    srun = tmp_path / 'srun'
    srun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    script = start(
        'slurm_train.sh', 'gpu', 'my job', DEMO, str(tmp_path), '--resume', '--cfg-options', 'a=b c',
        PATH=f'{tmp_path}:{os.environ["PATH"]}', GPUS='16', SRUN_ARGS='--time=2-0 --qos=low',
    )  # fmt: skip
    words = script.communicate()[0].splitlines()
    assert script.returncode == 0
    assert {
        '--job-name=my job',
        '--gres=gpu:8',
        '--ntasks=16',
        '--time=2-0',
        '--qos=low',
        '--launcher',
        'slurm',
    } <= set(words)
    assert words[-2:] == ['--cfg-options', 'a=b c']


@pytest.mark.parametrize(('script', 'count'), [('dist_train.sh', 1), ('dist_test.sh', 2), ('slurm_train.sh', 3)])
def test_too_few_arguments(script: str, count: int) -> None:
    process = start(script, *['x'] * count)
    assert f'usage: tools/{script}' in process.communicate()[0]
    assert process.returncode == 2
