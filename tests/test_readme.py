"""The commands of the README and of the docs, run one after the other on tiny data."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEMO = 'configs/demo/mask-rcnn_rkan-r18_fpn_shapes.py'
pytestmark = pytest.mark.slow


def block_of(page: str, start: str) -> str:
    """The bash block of a page that holds ``start``."""
    found = [b for b in re.findall(r'```bash\n(.*?)```', (ROOT / page).read_text(), re.DOTALL) if start in b]
    assert len(found) == 1, f'{page} has {len(found)} blocks with {start}'
    return found[0]


def bash(script: str, folder: Path) -> str:
    env = dict(os.environ, PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}', PYTHONWARNINGS='ignore')
    command = ['bash', '-euxo', 'pipefail', '-c', script]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ('configs', 'tools', 'rkan_mmdet'):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / '.venv/bin').mkdir(parents=True)
    (tmp_path / '.venv/bin/activate').touch()  # bash() has the environment on its PATH
    return tmp_path


def test_from_a_clone_to_functions(folder: Path, shapes_root: str) -> None:
    for split in ('train', 'val'):
        shutil.copy(Path(shapes_root) / f'annotations/instances_{split}.json', folder / f'{split}.json')
        (folder / f'{split}_images').symlink_to(Path(shapes_root) / split)
    script = block_of('README.md', 'tools/new_project.py')
    # a smaller base and one epoch of it; all else as it stands there
    script = script.replace('configs/rkan/mask-rcnn_rkan-r50_fpn_1x_coco.py', f'{DEMO} --epochs 1').replace(
        '_12.pth', '_1.pth'
    )
    bash(script, folder)
    assert (folder / 'work_dirs/mine/kan/report.html').stat().st_size > 100_000
    for start in ('--config mine.py', 'cells.py', 'tools/plot_curves.py'):
        bash(block_of('docs/own_data.md', start), folder)
    assert 'max_epochs=60' in (folder / 'cells.py').read_text().replace(' ', '')
    assert (folder / 'curves.png').exists()


def test_see_and_deploy(folder: Path, shapes_root: str) -> None:
    (folder / 'data').mkdir()
    (folder / 'data/shapes').symlink_to(shapes_root)
    bash(
        f'python tools/train.py {DEMO} --work-dir work_dirs/demo --cfg-options train_cfg.max_epochs=1 '
        'train_dataloader.batch_size=4 && mv work_dirs/demo/epoch_1.pth work_dirs/demo/epoch_8.pth',
        folder,
    )
    variables = block_of('docs/see.md', 'CONFIG=')
    for start in ('tools/plot_kan.py', 'tools/plot_curves.py', 'tools/predict.py'):
        bash(variables + block_of('docs/see.md', start), folder)
    assert (folder / 'work_dirs/demo/kan/report.html').exists()
    assert (folder / 'work_dirs/demo/curves.pdf').stat().st_size > 5_000
    (score,) = (
        b for b in re.findall(r'```python\n(.*?)```', (ROOT / 'docs/see.md').read_text(), re.DOTALL) if 'COCO(' in b
    )
    (folder / 'score.py').write_text(score)
    assert 'Average Precision' in bash('python score.py', folder)
    pytest.importorskip('onnxruntime')
    deploy = block_of('docs/deploy.md', 'tools/export_onnx.py').replace('pip install "rkan-mmdet[export]"\n', '')
    bash(deploy, folder)
    assert (folder / 'detector.onnx').stat().st_size > 10**6


# What makes a config of COCO small enough for here; all else of its commands is run as it stands in the docs.
TINY = (
    'model.backbone.init_cfg=None train_cfg.max_epochs=1 train_dataloader.num_workers=0 '
    'train_dataloader.persistent_workers=False test_dataloader.dataset.pipeline.1.scale="(96,96)" '
    'val_dataloader.dataset.pipeline.1.scale="(96,96)" model.test_cfg.rcnn.score_thr=0 '
)


def commands_of(page: str, start: str, pipeline: str) -> list:
    """The commands of a block, those of tools with the options above."""
    lines = block_of(page, start).replace('\\\n', ' ').splitlines()
    options = f'--cfg-options {TINY} {pipeline}.scale="(96,96)"'
    return [f'{line} {options}' if 'configs/' in line else line for line in lines]


@pytest.fixture
def coco_folder(folder: Path, coco_root: Path) -> Path:
    (folder / 'data').mkdir()
    (folder / 'data/coco').symlink_to(coco_root)
    return folder


def test_one_config(coco_folder: Path) -> None:
    train, test = commands_of('docs/reproduce.md', 'python tools/train.py', 'train_dataloader.dataset.pipeline.2')
    assert 'Average Precision' in bash('\n'.join([train, test.replace('_12', '_1')]), coco_folder)


def test_low_data(coco_folder: Path) -> None:
    split, train = commands_of(
        'configs/lowdata/README.md', 'split_coco.py', 'train_dataloader.dataset.dataset.pipeline.2'
    )
    bash(split, coco_folder)
    drawn = coco_folder / 'data/coco/semi_anns/instances_train2017.1@1.json'
    assert drawn.stat().st_mtime > time.time() - 60
    # 1 % of eight images is none
    shutil.copy(coco_folder / 'data/coco/annotations/instances_train2017.json', drawn)
    bash(f'{train} train_dataloader.dataset.times=1', coco_folder)


def test_speed(folder: Path) -> None:
    script = block_of('docs/speed.md', '--backbone --fuse')
    for option in ('rounds', 'warmup'):
        script = re.sub(rf'--{option} \d+', f'--{option} 1', script)
    assert bash(script, folder).count('of the speed of') == 4
