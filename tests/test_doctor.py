"""The doctor on a sound stack, and on stacks that are broken one import at a time."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from rkan_mmdet import doctor
from rkan_mmdet.ops import cpp_kan_conv

ROOT = Path(__file__).parents[1]
FORK = bool(doctor._installed('onedl-mmengine'))


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
    assert found['mmcv'].startswith(('2.1.0 (mmcv 2.1.0)', '2.3.6 (onedl-mmcv 2.3.6, a fork)'))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('broken', 'name', 'mend'),
    [
        ('torch', 'torch', 'pip install "torch>=2.1"'),
        pytest.param(
            'pkg_resources',
            'setuptools',
            'setuptools<81',
            marks=pytest.mark.skipif(FORK, reason="MMEngine's fork does not import pkg_resources"),
        ),
        ('mmengine', 'mmengine', 'onedl-mmengine' if FORK else 'mmengine==0.10.7'),
        ('mmcv._ext', 'mmcv operators', '--no-build-isolation'),
        ('mmdet', 'mmdet', 'onedl-mmdetection' if FORK else 'mmdet==3.3.0'),
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


def test_kernels_that_do_not_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    monkeypatch.setattr(cpp_kan_conv, 'SOURCE', tmp_path / 'kan_conv.cpp')
    monkeypatch.setattr(cpp_kan_conv, 'why_not', lambda: cpp_kan_conv._load.__wrapped__()[1])
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    cpp_kan_conv.SOURCE.write_text('an error')
    finding = doctor._backend('cpp')
    assert not finding.ok
    assert 'could not be built' in finding.text
    monkeypatch.setenv('PATH', str(tmp_path))
    finding = doctor._backend('cpp')
    assert finding.ok
    assert finding.text.endswith('a C++ compiler (g++) is needed, and none was found')


@pytest.mark.parametrize(('gpu', 'compiled', 'ok'), [(1, 'not available', 0), (1, '13.0', 1), (0, 'not available', 1)])
def test_mmcv_without_cuda_beside_a_gpu(monkeypatch: pytest.MonkeyPatch, gpu: int, compiled: str, ok: int) -> None:
    monkeypatch.setattr('torch.cuda.is_available', lambda: bool(gpu))
    monkeypatch.setitem(sys.modules, 'mmcv._ext', SimpleNamespace(get_compiling_cuda_version=lambda: compiled))
    finding = doctor._try('mmcv operators', doctor._mmcv_ops, 'build it')
    assert finding.ok == bool(ok)
    assert ('compiled without CUDA' in finding.text) != finding.ok


def versions(monkeypatch: pytest.MonkeyPatch, **installed: str) -> dict:
    """What the doctor finds where these distributions are installed."""

    def version(name: str) -> str:
        if name.replace('-', '_') in installed:
            return installed[name.replace('-', '_')]
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, 'version', version)
    return {finding.name: finding for finding in doctor.examine()}


def test_a_fork_and_its_mends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'pkg_resources', None)
    monkeypatch.setitem(sys.modules, 'mmcv._ext', None)
    found = versions(monkeypatch, onedl_mmengine='0.10.12', onedl_mmcv='2.3.6', onedl_mmdetection='3.5.1')
    assert found['setuptools'] == ('setuptools', True, 'none (this MMEngine needs none)', '')
    assert found['one of each'].ok
    assert found['mmdet'].text.endswith('(onedl-mmdetection 3.5.1, a fork)')
    assert 'onedl-mmcv==2.3.6' in found['mmcv operators'].mend


def test_two_distributions_of_one_package(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = versions(monkeypatch, mmengine='0.10.7', mmcv='2.1.0', mmdet='3.3.0', onedl_mmdetection='3.5.1')[
        'one of each'
    ]
    assert not finding.ok
    assert 'mmdet, onedl-mmdetection are installed' in finding.text
    assert finding.mend.startswith('pip uninstall -y mmdet onedl-mmdetection')
