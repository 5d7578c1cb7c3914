"""Is this installation sound? ``python -m rkan_mmdet.doctor`` says what is there, what is broken, and what mends it.

Every import is tried for itself, so that it works where torch, MMCV or MMDetection do not. Exit code 0: sound; 1: not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

from .version import __version__

# Import name: its distributions, upstream's first.
_DISTRIBUTIONS = {
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'onedl-mmcv', 'mmcv-lite', 'mmcv-full'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
}


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        name (str): What was looked at.
        ok (bool): Whether it is as it must be.
        text (str): What was found.
        mend (str): The command that mends it; empty when nothing is to be done.
    """

    name: str
    ok: bool
    text: str
    mend: str = ''


def _installed(*names: str) -> str:
    """Name and version of the first of these distributions that is installed."""
    for name in names:
        try:
            return f'{name} {metadata.version(name)}'
        except metadata.PackageNotFoundError:
            continue
    return ''


def _try(name: str, function: Callable[[], str], mend: str) -> Finding:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return Finding(name, True, function())
    except BaseException as error:  # a broken build fails in many ways; what is interesting is its first line
        if isinstance(error, KeyboardInterrupt):
            raise
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        return Finding(name, False, f'{type(error).__name__}: {reason}', mend)


def _python() -> str:
    if sys.version_info < (3, 9):  # noqa: UP036 (the doctor is for environments that no installer has checked)
        raise RuntimeError(f'Python {platform.python_version()} is older than 3.9')
    return f'{platform.python_version()} on {platform.system()} {platform.machine()}'


def _torch() -> str:
    import torch

    if tuple(map(int, torch.__version__.split('.')[:2])) < (2, 1):
        raise RuntimeError(f'torch {torch.__version__} is older than 2.1')
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'
    return f'{torch.__version__}, {gpu}'


def _setuptools() -> str:
    if _installed('onedl-mmengine') and not _installed('mmengine'):
        return f'{_installed("setuptools") or "none"} (this MMEngine needs none)'
    importlib.import_module('pkg_resources')
    return _installed('setuptools')


def _package(module: str) -> str:
    version = importlib.import_module(module).__version__
    installed = _installed(*_DISTRIBUTIONS[module]) or f'{module} (no distribution)'
    fork = ', a fork' if installed.startswith('onedl-') else ''
    return f'{version} ({installed}{fork})'


def _twice() -> list[str]:
    """Distributions that lie over each other, since they share an import name."""
    there = [[name for name in names if _installed(name)] for names in _DISTRIBUTIONS.values()]
    return [name for names in there if len(names) > 1 for name in names]


def _one_of_each() -> str:
    if _twice():
        raise RuntimeError(f'{", ".join(_twice())} are installed, one over the other')
    return 'MMEngine, MMCV and MMDetection are of one distribution each'


def _mmcv_ops() -> str:
    import torch

    operators = importlib.import_module('mmcv._ext')
    if torch.cuda.is_available() and operators.get_compiling_cuda_version() == 'not available':
        raise RuntimeError('compiled without CUDA, though there is a GPU')
    return 'compiled operators load'


def _registry() -> str:
    import mmdet.models  # noqa: F401
    from mmdet.registry import MODELS

    import rkan_mmdet.backbones  # noqa: F401

    if MODELS.get('RKANResNet') is None:
        raise RuntimeError("MMDetection's registry does not know RKANResNet")
    return 'RKANResNet is known to MMDetection'


def _backend(name: str) -> Finding:
    """A KAN convolution by this backend against the reference, gradients too."""

    def run() -> str:
        import torch

        from rkan_mmdet.ops import KANConv2d, can_run

        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        conv = KANConv2d(20, stride=2).to(device)
        x = torch.randn(2, 20, 9, 11, device=device)
        reason = can_run(name, x=x)
        if 'could not be built' in reason and 'none was found' not in reason:
            raise RuntimeError(reason)
        if reason:
            return f'not used here: {reason}'
        results = []
        for backend in ('reference', name):
            conv.backend = backend
            conv.zero_grad()
            leaf = x.clone().requires_grad_()
            y = conv(leaf)
            y.square().sum().backward()
            results.append([y.detach(), leaf.grad, *(p.grad for p in conv.parameters())])
        error = max(float((a - b).abs().max() / (1 + a.abs().max())) for a, b in zip(*results))
        if not error < 1e-5:
            raise RuntimeError(f'differs from the reference by {error:.1e}')
        return f'agrees with the reference on {device} to {error:.0e}'

    return _try(f'backend {name}', run, 'name another: rkan=dict(backend="eager"), and report this')


def examine() -> list[Finding]:
    """Look at everything, in the order in which one thing needs another.

    Returns:
        list[Finding]: One line each.
    """
    fork = bool(_installed('onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection'))
    mmcv = 'onedl-mmcv' if fork else 'mmcv'
    which = f'"{mmcv}=={"2.3.6" if fork else "2.1.0"}"'
    again = '--force-reinstall --no-deps --no-cache-dir --no-build-isolation'
    build = f'pip install {again} --no-binary {mmcv} {which}  (after torch; or a new `make env` in a checkout)'
    engine = 'onedl-mmengine' if fork else 'mmengine==0.10.7'
    detection = 'pip install onedl-mmdetection' if fork else 'pip install "mmdet==3.3.0"'
    if _installed('mmcv').startswith('mmcv 2.2') and _installed('mmdet'):  # which refuses it
        detection = build
    coco = 'pip install "pycocotools>=2.0.7"'
    return [
        _try('python', _python, 'use Python 3.9 or newer'),
        _try('torch', _torch, 'pip install "torch>=2.1"  (and then MMCV for it, see below)'),
        _try('numpy', lambda: importlib.import_module('numpy').__version__, 'pip install numpy'),
        _try('setuptools', _setuptools, 'pip install "setuptools<81"  (MMEngine imports pkg_resources, gone in 82)'),
        _try('one of each', _one_of_each, f'pip uninstall -y {" ".join(_twice())}  (then install one of them again)'),
        _try('mmengine', lambda: _package('mmengine'), f'pip install "{engine}"'),
        _try('mmcv', lambda: _package('mmcv'), build),
        _try('mmcv operators', _mmcv_ops, build),
        _try('mmdet', lambda: _package('mmdet'), detection),
        _try('pycocotools', lambda: (importlib.import_module('pycocotools.mask'), _installed('pycocotools'))[1], coco),
        _try('registry', _registry, 'mend what is broken above; then `import rkan_mmdet` registers the backbones'),
        *(_backend(name) for name in ('eager', 'cpp', 'triton')),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog='python -m rkan_mmdet.doctor', description=__doc__.splitlines()[0])
    parser.add_argument('--json', action='store_true', help='print the findings as JSON')
    args = parser.parse_args()
    findings = examine()
    if args.json:
        report = dict(
            rkan_mmdet=__version__, sound=all(f.ok for f in findings), findings=[f._asdict() for f in findings]
        )
        print(json.dumps(report, indent=1))
    else:
        print(f'rkan_mmdet {__version__}')
        for finding in findings:
            print(f'{"ok  " if finding.ok else "FAIL"} {finding.name:<15} {finding.text}')
            if not finding.ok:
                print(f'     {"":<15} mend: {finding.mend}')
        print('sound' if all(f.ok for f in findings) else 'not sound: see FAIL above')
    return int(not all(f.ok for f in findings))


if __name__ == '__main__':
    sys.exit(main())
