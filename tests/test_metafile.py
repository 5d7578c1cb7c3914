"""The model zoo's index: what mim reads, and what a wheel carries for `rkan_mmdet::` bases."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from mmengine.fileio import load

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path for path in (ROOT / 'configs').iterdir() if path.is_dir())


def test_index_names_every_folder() -> None:
    assert load(ROOT / 'model-index.yml') == {'Import': [f'configs/{path.name}/metafile.yml' for path in FOLDERS]}


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda p: p.name)
def test_metafile_lists_every_config(folder: Path) -> None:
    meta = load(folder / 'metafile.yml')
    configs = sorted(path.relative_to(ROOT).as_posix() for path in folder.glob('*.py'))
    assert [model['Config'] for model in meta['Models']] == configs
    assert [model['Name'] for model in meta['Models']] == [Path(path).stem for path in configs]
    for collection in meta['Collections']:
        assert (ROOT / collection['README']).is_file()


def test_index_is_valid() -> None:
    load_index = pytest.importorskip('modelindex.load_model_index', reason='model-index is not installed').load
    index = load_index(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    assert len(index.models) == len(list((ROOT / 'configs').glob('*/*.py')))


@pytest.mark.slow
def test_wheel_serves_bases(tmp_path: Path) -> None:
    def run(*command: str, **env: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, text=True, capture_output=True, env=dict(os.environ, **env)
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    # from a copy: a build leaves files beside its sources
    run('-c', f'import shutil; shutil.copytree({str(ROOT)!r}, "src", ignore=shutil.ignore_patterns(".*", "work_dirs"))')
    pip = ('-m', 'pip', '--disable-pip-version-check')
    for folder in ('dist', 'again'):
        build = ('wheel', '-q', '--no-deps', '--no-build-isolation', '-w', folder, './src')
        run(*pip, *build, SOURCE_DATE_EPOCH='1700000000')
    (wheel,) = (tmp_path / 'dist').glob('rkan_mmdet-*.whl')
    assert wheel.read_bytes() == (tmp_path / 'again' / wheel.name).read_bytes(), 'two builds differ'
    added = tmp_path / 'src' / 'rkan_mmdet' / 'added.py'
    for change in (added.touch, added.unlink):  # what was built once and is removed since is in no wheel
        change()
        run(*pip, *build[:-2], change.__name__, './src')
        (built,) = (tmp_path / change.__name__).glob('*.whl')
        assert ('rkan_mmdet/added.py' in zipfile.ZipFile(built).namelist()) is added.exists()
    run(*pip, 'install', '-q', '--no-deps', '--no-index', '--target', 'site', str(wheel))
    config = tmp_path / 'mine.py'
    config.write_text(
        "_base_ = ['rkan_mmdet::rkan/mask-rcnn_rkan-r50_fpn_1x_coco.py']\nmodel = dict(backbone=dict(depth=18))\n"
    )
    out = run(
        '-W', 'ignore', '-c',
        'import rkan_mmdet; from mmengine.config import Config; cfg = Config.fromfile("mine.py");'
        'print(rkan_mmdet.__file__, cfg.model.backbone.type, cfg.model.backbone.depth, cfg.default_scope)',
        PYTHONPATH='site',
    )  # fmt: skip
    assert out.split() == [str(tmp_path / 'site' / 'rkan_mmdet' / '__init__.py'), 'RKANResNet', '18', 'mmdet']
    mim = tmp_path / 'site' / 'rkan_mmdet' / '.mim'
    assert (mim.parent / 'ops' / 'cpp_kan_conv.cpp').exists(), 'the CPU kernels are built from it'
    assert (mim / 'tools' / 'train.py').is_file()
    for path in load(mim / 'model-index.yml')['Import']:
        for model in load(mim / path)['Models']:
            assert (mim / model['Config']).is_file()
