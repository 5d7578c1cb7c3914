"""The doctor on a sound stack, and on stacks that are broken one import at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str, broken: str = '') -> subprocess.CompletedProcess:
    code = 'import runpy, sys; '
    if broken:
        code += f'sys.modules[{broken!r}] = None; '  # an import of it then fails
    code += f"sys.argv = ['doctor', *{list(arguments)!r}]; runpy.run_module('rkan_mmdet.doctor', run_name='__main__')"
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_sound() -> None:
    done = run('--json')
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert report['sound']
    found = {finding['name']: finding['text'] for finding in report['findings']}
    assert 'agrees with the reference' in found['backend eager']
    assert found['mmcv'].startswith('2.1.0 (mmcv 2.1.0)') or 'onedl' in found['mmcv']


@pytest.mark.slow
@pytest.mark.parametrize(
    ('broken', 'name', 'mend'),
    [
        ('torch', 'torch', 'pip install torch'),
        ('pkg_resources', 'setuptools', 'setuptools<81'),
        ('mmengine', 'mmengine', 'mmengine==0.10.7'),
        ('mmcv._ext', 'mmcv operators', '--no-build-isolation'),
        ('mmdet', 'mmdet', 'mmdet==3.3.0'),
        ('pycocotools.mask', 'pycocotools', 'pycocotools>=2.0.7'),
        ('numpy', 'numpy', 'pip install numpy'),
    ],
)
def test_broken(broken: str, name: str, mend: str) -> None:
    done = run(broken=broken)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f'FAIL {name} '))
    assert mend in lines[at + 1]
    assert lines[-1].startswith('not sound')
    assert 'Traceback' not in done.stderr


@pytest.mark.slow
def test_a_backend_that_differs_is_found() -> None:
    code = (
        'import rkan_mmdet.ops.kan_conv as k, rkan_mmdet.doctor as d; f = k.kan_conv2d_eager\n'
        'k.kan_conv2d_eager = lambda *a, **o: f(*a, **o) * 1.001\n'
        'print(d._backend("eager"))'
    )
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT).stdout
    assert 'ok=False' in out
    assert 'differs from the reference' in out
