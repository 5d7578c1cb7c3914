"""mim finds, trains and runs what a wheel carries; in an environment of its own, since mim pins an old setuptools."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = 'demo/mask-rcnn_rkan-r18_fpn_shapes.py'


@pytest.fixture(scope='module')
def mim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command ``mim`` of an environment with the wheel and, by a path file, the stack of the tests."""
    folder = tmp_path_factory.mktemp('mim')
    env, source = folder / 'env', folder / 'source'
    python = env / 'bin' / 'python'

    def run(*command: object) -> subprocess.CompletedProcess:
        return subprocess.run([str(word) for word in command], capture_output=True, text=True)

    assert run(sys.executable, '-m', 'venv', env).returncode == 0
    installed = run(python, '-m', 'pip', 'install', '-q', 'openmim==0.3.9')
    if installed.returncode:
        pytest.skip(f'openmim can not be installed: {installed.stderr.strip().splitlines()[-1]}')
    site = Path(run(python, '-c', 'import sysconfig; print(sysconfig.get_paths()["purelib"])').stdout.strip())
    (site / 'zz_stack.pth').write_text(sysconfig.get_paths()['purelib'] + '\n')
    # from a copy: a build leaves files beside its sources
    ignore = shutil.ignore_patterns('.*', 'work_dirs', 'build')
    shutil.copytree(
        ROOT, source, ignore=lambda path, names: {*ignore(path, names), *({'data'} if path == str(ROOT) else ())}
    )
    pip = (sys.executable, '-m', 'pip')
    assert run(*pip, 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', folder, source).returncode == 0
    (wheel,) = folder.glob('*.whl')
    install = ('install', '-q', '--no-deps', '--no-index', '--force-reinstall')
    assert run(python, '-m', 'pip', *install, wheel).returncode == 0
    return env / 'bin' / 'mim'


def call(mim: Path, folder: Path, *arguments: str) -> str:
    done = subprocess.run([str(mim), *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 12), reason='openmim pins setuptools 60, which fails on Python 3.12')
def test_mim(mim: Path, shapes_root: str, tmp_path: Path) -> None:
    assert 'mask-rcnn_rkan-r50_fpn_1x_coco' in call(mim, tmp_path, 'search', 'rkan_mmdet')
    call(
        mim, tmp_path, 'train', 'rkan_mmdet', CONFIG, '--gpus', '0', '--work-dir', 'run', '--cfg-options',
        f'data_root={shapes_root}/', 'train_cfg.max_epochs=1', 'default_hooks.logger.interval=1',
    )  # fmt: skip
    assert (tmp_path / 'run' / 'epoch_1.pth').is_file()
    mine = tmp_path / 'mine.py'
    mine.write_text(f"_base_ = 'rkan_mmdet::{CONFIG}'\n")
    text = call(
        mim, tmp_path, 'run', 'rkan_mmdet', 'benchmark', 'mine.py', 'run/epoch_1.pth', '--rounds', '1', '--warmup', '0',
        '--size', '96', '96',
    )  # fmt: skip
    assert 'parameters' in text
