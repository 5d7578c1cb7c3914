"""Make ``.venv`` with the whole stack, mmcv's compiled ops included; does nothing when that is done.

Needs only the standard library. Safe to interrupt (the next call goes on where this one stopped) and to start twice
(the second waits). Environment variables:

* ``TORCH_INDEX_URL``: the index torch comes from, e.g. the CPU-only one. Everything else follows pip's own settings.
* ``RKAN_WHEEL_CACHE``: where the mmcv wheel is kept (default ``~/.cache/rkan_mmdet/wheels``).
* ``RKAN_STACK``: another of the stacks below, in an environment of its own (``.venv-NAME``). Where it names a Python
  that is not the one at work, ``pythonX.Y`` is looked for on the PATH and among pyenv's versions.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections import deque
from pathlib import Path
from typing import Iterator, List, NamedTuple, Optional, Sequence

ROOT = Path(__file__).resolve().parent.parent
# Above: mmcv's setup.py and mmengine import pkg_resources, which setuptools 82 removed. Below: torch asks for 77.0.3,
# and would bring the newest over an older one.
SETUPTOOLS = 'setuptools>=77.0.3,<81'


class Stack(NamedTuple):
    torch: Sequence[str]
    rest: Sequence[str] = ('-r', 'requirements.txt')
    extra: str = 'test'
    mmcv: str = 'mmcv==2.1.0'
    setuptools: str = SETUPTOOLS
    python: Optional[str] = None  # None: the one that runs this file


# the maintained fork of all three, which needs no pkg_resources, and the only one that builds on Python 3.13
FORK = ('onedl-mmengine==0.10.12', 'onedl-mmdetection==3.5.1', 'pycocotools>=2.0.7', 'matplotlib', 'rich')
STACKS = {
    'default': Stack(['torch==2.13.0']),
    # MMPretrain imports torchvision, which does not import beside the CPU-only build of torch 2.13
    'pretrain': Stack(['torch==2.14.1', 'torchvision==0.29.1'], ['-r', 'requirements.txt', 'mmpretrain==1.2.0']),
    # test-core: torch pins a Triton that is older than the kernels need, and exports with another exporter
    'oldest': Stack(['torch==2.1.2'], ['-r', 'requirements.txt', 'numpy<2'], 'test-core', python='3.9'),
    'torch24': Stack(['torch==2.4.1'], extra='test-core', python='3.10'),
    'onedl': Stack(['torch==2.13.0'], FORK, mmcv='onedl-mmcv==2.3.6', setuptools='setuptools>=82', python='3.12'),
    'newest': Stack(['torch==2.14.1'], FORK, mmcv='onedl-mmcv==2.3.6', setuptools='setuptools>=82', python='3.13'),
}
STACK = os.environ.get('RKAN_STACK') or 'default'
VENV = ROOT / ('.venv' if STACK == 'default' else f'.venv-{STACK}')
PYTHON = VENV / 'bin' / 'python'
STAMP = VENV / '.rkan_setup.json'
CACHE = Path(
    os.environ.get('RKAN_WHEEL_CACHE')
    or Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'rkan_mmdet' / 'wheels'
)


def say(text: str) -> None:
    print(f'[setup] {text}', flush=True)


def stop(text: str) -> None:
    sys.exit(f'[setup] stopped: {text}')


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f'another set-up holds {path.name}; waiting for it ...')
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def use_python(version: Optional[str]) -> None:
    """Start this file again under the Python that the stack names, where that is another."""
    if version in (None, '{}.{}'.format(*sys.version_info)):
        return
    found = [shutil.which(f'python{version}'), *Path.home().glob(f'.pyenv/versions/{version}.*/bin/python')]
    for python in filter(None, found):
        ask_version = [str(python), '-c', 'import sys; print("{}.{}".format(*sys.version_info))']
        answer = subprocess.run(ask_version, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if answer.stdout.strip() == version:
            os.execv(str(python), [str(python), __file__])
    stop(f'stack {STACK} needs Python {version}, and no python{version} was found (make PYTHON=/path/to/it ...)')


def fingerprint() -> str:
    """What the environment is made from; another value means set-up has to run again."""
    parts = [STACKS[STACK].python or sys.version, platform.machine(), STACK]
    parts.append(str(ROOT))  # the environment imports the checkout by its path
    parts += [(ROOT / name).read_text() for name in ('requirements.txt', 'pyproject.toml')]
    parts.append(Path(__file__).read_text())
    return hashlib.sha256('\0'.join(parts).encode()).hexdigest()


def is_done() -> bool:
    try:
        return PYTHON.exists() and json.loads(STAMP.read_text())['fingerprint'] == fingerprint()
    except (OSError, ValueError, KeyError):
        return False


def check_system() -> None:
    least = (3, 9) if STACKS[STACK].python else (3, 10)  # torch 2.13 needs it
    if sys.version_info < least:
        needed = '.'.join(map(str, least))
        stop(f'Python {platform.python_version()} is too old; {needed} or newer is needed (make PYTHON=python3.11 ...)')
    if sys.version_info >= (3, 13) and STACKS[STACK].mmcv.startswith('mmcv'):
        stop(
            f'MMCV 2.1.0 does not build on Python {platform.python_version()}: take 3.12 or older (make '
            'PYTHON=python3.12 ...), or the maintained fork (make STACK=newest ...)'
        )
    missing = []
    if not (shutil.which('c++') or shutil.which('g++')):
        missing.append('g++')
    if not Path(sysconfig.get_paths()['include'], 'Python.h').exists():
        missing.append('python3-dev')
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        missing.append('python3-venv')
    if missing:
        stop(f'system packages are missing. Install them with\n    apt-get install -y {" ".join(missing)}')
    free, needed = shutil.disk_usage(ROOT).free / 2**30, 4 if STACK == 'default' else 10
    there = STAMP.exists() or (PYTHON.exists() and ask('import torch; print(1)'))  # needs no room again
    if free < needed and not there:
        stop(f'{free:.1f} GiB are free under {ROOT}; {needed} GiB are needed')


def run(command: List[str], what: str, mend: str, env: Optional[dict] = None, total_hint: str = '') -> None:
    """Run a command; show ninja's ``[n/m]`` as progress, and its last lines only if it fails."""
    say(f'{what} {total_hint}'.rstrip())
    tail, started, shown = deque(maxlen=30), time.monotonic(), 0.0
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, errors='replace', stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        for line in process.stdout:
            tail.append(line.rstrip()[:300])
            step = re.match(r'\s*\[(\d+)/(\d+)\] ', line)
            elapsed = time.monotonic() - started
            if step and (elapsed - shown > 15 or step[1] == step[2]):
                shown, done, total = elapsed, int(step[1]), int(step[2])
                left = elapsed / done * (total - done)
                say(f'  {done}/{total} files compiled, {elapsed / 60:.1f} min so far, about {left / 60:.1f} min left')
    except BaseException:
        process.terminate()
        raise
    if process.wait() != 0:
        print('\n'.join(tail), file=sys.stderr)
        stop(f'{what} failed (exit code {process.returncode}; its last lines are above).\n{mend}')


def pip(
    arguments: List[str],
    what: str,
    mend: str = 'Check the network and `pip config list`, then run the same command again: it goes on from here.',
    **options,
) -> None:
    run([str(PYTHON), '-m', 'pip', *arguments], what, mend, **options)


def ask(code: str) -> str:
    """What a line of Python prints in the new environment, or '' when it fails."""
    return subprocess.run(
        [str(PYTHON), '-c', code], text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ).stdout.strip()


def check_old_python() -> None:
    old, new = ask('import platform; print(platform.python_version())') if PYTHON.exists() else '', sys.version_info
    if old and old.split('.')[:2] != [str(new.major), str(new.minor)]:
        stop(f'{VENV.name} is of Python {old}, not {platform.python_version()}: remove it, and run the same again')


def install_torch() -> None:
    wanted = STACKS[STACK].torch
    if all(
        ask(f'import {name}; print({name}.__version__)').split('+')[0] == version
        for name, version in (package.split('==') for package in wanted)
    ):
        return
    index = os.environ.get('TORCH_INDEX_URL')
    pip(['install', *wanted, *(['--index-url', index] if index else [])], f'installing {" ".join(wanted)}')


def install_mmcv() -> None:
    mmcv = STACKS[STACK].mmcv
    if ask('import mmcv, mmcv._ext; print(mmcv.__version__)') == mmcv.split('==')[1]:
        return
    facts = ask(
        'import sys, torch; gpu = torch.cuda.is_available(); print(torch.__version__, "cu%s-sm%d%d" % '
        '(torch.version.cuda, *torch.cuda.get_device_capability()) if gpu else "cpu", sys.implementation.cache_tag)'
    ).replace(' ', '-')
    if not facts:
        stop(f'torch does not import in {VENV.name}; remove it and run the same command again')
    folder = CACHE / f'{mmcv.replace("==", "-")}-torch{facts}-{platform.system().lower()}-{platform.machine()}'
    with locked(CACHE / f'{folder.name}.lock'):
        wheels = sorted(folder.glob('*.whl'))
        if not wheels:
            build_mmcv(mmcv, folder)
            wheels = sorted(folder.glob('*.whl'))
    pip(['install', '--no-deps', '--force-reinstall', str(wheels[0])], f'installing {wheels[0].name} from the cache')
    if not ask('import cv2; print(1)'):
        return  # the requirements, installed next, bring it; the last check of all imports everything
    if not ask('import mmcv._ext; print(1)'):
        stop(f'the cached wheel does not import here; remove {folder} and run the same command again')


def build_mmcv(mmcv: str, folder: Path) -> None:
    """Compile mmcv in the cache, where the object files of an interrupted build are found again."""
    cuda = ask('import torch; print(torch.version.cuda if torch.cuda.is_available() else "")')
    if cuda and not ask('from torch.utils.cpp_extension import CUDA_HOME; print(CUDA_HOME or "")'):
        stop(
            f'there is a GPU but no nvcc to compile for it: install the CUDA {cuda} toolkit, or set CUDA_HOME to it '
            f'(or hide the GPU, now and from all that you run later: `export CUDA_VISIBLE_DEVICES=` builds for the CPU)'
        )
    sources = folder / 'build'
    sources.mkdir(parents=True, exist_ok=True)
    tree = sources / mmcv.replace('-', '_').replace('==', '-')
    if not (sources / 'unpacked').exists():
        # --no-build-isolation: even reading the metadata of this source needs the torch that is installed.
        pip(
            ['download', '--no-deps', '--no-binary', ':all:', '--no-build-isolation', '-d', str(sources), mmcv],
            f'fetching the source of {mmcv}',
        )
        with tarfile.open(next(sources.glob('*.tar.gz'))) as archive:
            archive.extractall(sources, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))
        if (
            ask('import torch; print(tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14))') == 'True'
        ):  # its headers are C++20
            setup = tree / 'setup.py'
            setup.write_text(setup.read_text().replace('-std=c++17', '-std=c++20'))
        (sources / 'unpacked').touch()
    out = sources / 'wheel'
    jobs = os.environ.get('MAX_JOBS') or str(os.cpu_count() or 1)
    pip(
        ['wheel', '-v', '--no-deps', '--no-build-isolation', '-w', str(out), str(tree)],
        f'compiling {mmcv} with {jobs} jobs, once for this torch and Python',
        'Where it was killed, memory was short: MAX_JOBS=1'
        + f'; nvcc must be of CUDA {cuda}' * bool(cuda)
        + '. The same command goes on from the files that are compiled.',
        env=dict(os.environ, MMCV_WITH_OPS='1', MAX_JOBS=jobs, PATH=f'{PYTHON.parent}{os.pathsep}{os.environ["PATH"]}'),
        total_hint='(about 9 minutes on 2 cores)',
    )
    wheel = next(out.glob('*.whl'))
    os.replace(wheel, folder / wheel.name)
    shutil.rmtree(sources)


def explain(error: OSError) -> str:
    of_cache = str(error.filename).startswith(str(CACHE))
    return f'{error}' + f' (RKAN_WHEEL_CACHE=FOLDER keeps the wheel elsewhere than in {CACHE})' * of_cache


def main() -> None:
    if STACK not in STACKS:
        stop(f'RKAN_STACK must be one of {", ".join(STACKS)}, but got {STACK!r}')
    if is_done():
        return
    use_python(STACKS[STACK].python)
    check_system()
    with locked(ROOT / f'{VENV.name}.lock'):
        if is_done():
            return
        check_old_python()
        say(f'making {VENV.name} with Python {platform.python_version()}')
        if not ask('import pip; print(1)') if PYTHON.exists() else True:
            run(
                [sys.executable, '-m', 'venv', str(VENV)],
                'creating the virtual environment',
                'Install the venv module (Debian: apt-get install -y python3-venv) and run the same command again.',
            )
        stack = STACKS[STACK]
        newer = ['pip>=24'] if stack.python else []  # that of an old Python looks for versions that fit for an hour
        pip(['install', SETUPTOOLS, 'wheel', 'ninja', 'packaging', *newer], 'installing build tools')
        install_torch()
        install_mmcv()
        rest = [*stack.rest, stack.setuptools, '-e', f'.[{stack.extra}]']
        pip(['install', *rest], 'installing the rest')
        check = 'import cv2, torch, mmcv.ops, mmengine, mmdet, pycocotools.mask, rkan_mmdet; print("ok")'
        run(
            [str(PYTHON), '-c', check],
            'checking that it all imports',
            'If libGL or libglib is named above: apt-get install -y libgl1 libglib2.0-0',
        )
        partial = STAMP.with_suffix('.tmp')
        partial.write_text(json.dumps(dict(fingerprint=fingerprint())))
        os.replace(partial, STAMP)
        say(f'done; `. {VENV.name}/bin/activate` makes it the `python` of this shell')


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        stop('interrupted; the same command goes on from here')
    except OSError as error:
        stop(explain(error))
