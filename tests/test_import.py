"""Importing never dies of somebody else's fault."""

import subprocess
import sys
from pathlib import Path

import pytest


def python(code: str, path: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', f'import sys; sys.path.insert(0, {str(path)!r}); {code}'],
                          capture_output=True, text=True)  # fmt: skip


@pytest.mark.parametrize('name', ['mmengine', 'mmcv', 'mmdet'])
@pytest.mark.parametrize('error', ['ImportError', 'AssertionError', 'OSError'])
def test_a_broken_stack_is_a_warning_and_the_op_still_works(name: str, error: str, tmp_path: Path) -> None:
    (tmp_path / f'{name}.py').write_text(f"raise {error}('broken on purpose')")
    result = python(
        'import torch; from rkan_mmdet.ops import KANConv2d; print(KANConv2d(2)(torch.ones(1, 2, 4, 4)).shape)',
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert 'registers no backbone' in result.stderr
    assert 'broken on purpose' in result.stderr
    assert 'torch.Size([1, 2, 4, 4])' in result.stdout


def test_the_op_imports_nothing_of_the_stack_by_itself() -> None:
    for file in (Path(__file__).parents[1] / 'rkan_mmdet/ops').glob('*.py'):
        text = file.read_text()
        assert not any(f'import {name}' in text or f'from {name}' in text for name in ('mmengine', 'mmcv', 'mmdet')), (
            file
        )


def test_custom_imports_is_all_a_config_needs(tmp_path: Path) -> None:
    (tmp_path / 'config.py').write_text("custom_imports = dict(imports=['rkan_mmdet'])\n")
    result = python(
        f'from mmengine.config import Config; Config.fromfile({str(tmp_path / "config.py")!r}); '
        "from mmdet.registry import MODELS; print(MODELS.get('RKANResNet').__name__); "
        "from mmengine.registry import MODELS; print(MODELS.get('RKANResNeXt').__name__)",
        tmp_path,
    )
    assert result.stdout.split() == ['RKANResNet', 'RKANResNeXt'], result.stderr


def test_nothing_asks_the_network(tmp_path: Path) -> None:
    """With sockets closed the package imports, and a detector of ours is built from its config."""
    config = Path(__file__).parents[1] / 'configs/demo/mask-rcnn_rkan-r18_fpn_shapes.py'
    result = python(
        'import socket\n'
        'def closed(*arguments, **options): raise OSError("no network here")\n'
        'socket.socket.connect = socket.create_connection = socket.getaddrinfo = closed\n'
        'import rkan_mmdet\n'
        'from mmengine.config import Config\n'
        'from mmengine.registry import init_default_scope\n'
        'from mmdet.registry import MODELS\n'
        'init_default_scope("mmdet")\n'
        f'MODELS.build(Config.fromfile({str(config)!r}).model)\n'
        'print("built")\n',
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == 'built'
