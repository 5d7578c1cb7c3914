"""The set-up's choices of stack and Python; what it installs is tested by everything else."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location('setup_env', ROOT / 'tools' / 'setup_env.py')
setup_env = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_env)


def test_a_stack_that_there_is_none_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_env, 'STACK', 'torch99')
    with pytest.raises(SystemExit, match=r"must be one of default, pretrain, .*, but got 'torch99'"):
        setup_env.main()


def test_the_python_that_a_stack_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = []
    monkeypatch.setattr(os, 'execv', lambda *arguments: started.append(arguments) or sys.exit(0))
    monkeypatch.setattr(Path, 'home', lambda: tmp_path)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    setup_env.use_python(None)
    setup_env.use_python('{}.{}'.format(*sys.version_info))
    assert started == []

    wrong = tmp_path / 'python3.77'
    wrong.write_text('#!/bin/sh\necho 3.76\n')
    wrong.chmod(0o755)
    with pytest.raises(SystemExit, match=r'needs Python 3\.77, and no python3\.77 was found'):
        setup_env.use_python('3.77')

    right = tmp_path / '.pyenv/versions/3.77.1/bin/python'
    right.parent.mkdir(parents=True)
    right.write_text('#!/bin/sh\necho 3.77\n')
    right.chmod(0o755)
    with pytest.raises(SystemExit):
        setup_env.use_python('3.77')
    assert started == [(str(right), [str(right), setup_env.__file__])]


@pytest.mark.parametrize(('version', 'message'), [((3, 9), r'3\.10 or newer'), ((3, 13), r'take 3\.12 or older')])
def test_a_python_that_the_default_stack_can_not_have(
    monkeypatch: pytest.MonkeyPatch, version: tuple, message: str
) -> None:
    monkeypatch.setattr(setup_env, 'STACK', 'default')
    monkeypatch.setattr(sys, 'version_info', version)
    with pytest.raises(SystemExit, match=message):
        setup_env.check_system()


@pytest.mark.parametrize('finished', ['', 'stamp', 'torch'])
def test_room_is_asked_for_before_the_first_set_up_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, finished: str
) -> None:
    monkeypatch.setattr(setup_env.shutil, 'disk_usage', lambda path: SimpleNamespace(free=2**30))
    monkeypatch.setattr(setup_env, 'STAMP', tmp_path / 'stamp')
    monkeypatch.setattr(setup_env, 'STACK', 'onedl')  # of any Python
    monkeypatch.setattr(setup_env, 'PYTHON', tmp_path / 'python')
    if finished:
        (tmp_path / 'python').write_text('#!/bin/sh\necho 1\n')  # torch is there, what comes after it is not
        (tmp_path / 'python').chmod(0o755)
        (tmp_path / finished).touch()
        setup_env.check_system()
    else:
        with pytest.raises(SystemExit, match=r'1\.0 GiB are free under .*; 10 GiB are needed'):
            setup_env.check_system()


@pytest.mark.parametrize('version', ['3.77.1', platform.python_version()])
def test_an_environment_of_another_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str) -> None:
    monkeypatch.setattr(setup_env, 'PYTHON', tmp_path / 'python')
    setup_env.check_old_python()  # there is none
    setup_env.PYTHON.write_text(f'#!/bin/sh\necho {version}\n')
    setup_env.PYTHON.chmod(0o755)
    if version == platform.python_version():
        setup_env.check_old_python()
    else:
        with pytest.raises(SystemExit, match=r'is of Python 3\.77\.1, not .*: remove it'):
            setup_env.check_old_python()


@pytest.mark.skipif(not (3, 10) <= sys.version_info < (3, 13), reason='the default stack is refused here')
def test_a_checkout_that_can_not_be_written(tmp_path: Path) -> None:
    checkout = tmp_path / 'checkout'
    (checkout / 'tools').mkdir(parents=True)
    for name in ('tools/setup_env.py', 'requirements.txt', 'pyproject.toml'):
        shutil.copy(ROOT / name, checkout / name)
    (checkout / '.venv.lock').mkdir()  # a folder, so that root is refused too
    command = [sys.executable, str(checkout / 'tools/setup_env.py')]
    done = subprocess.run(command, text=True, stderr=subprocess.PIPE, env=dict(os.environ, RKAN_STACK=''))
    assert done.returncode == 1
    assert done.stderr.startswith('[setup] stopped: ')
    assert 'RKAN_WHEEL_CACHE' not in done.stderr
    assert 'Traceback' not in done.stderr


def test_a_cache_that_can_not_be_written() -> None:
    error = PermissionError(13, 'Permission denied', str(setup_env.CACHE / 'mmcv.lock'))
    assert 'RKAN_WHEEL_CACHE=FOLDER keeps the wheel elsewhere' in setup_env.explain(error)


@pytest.mark.parametrize('stack', setup_env.STACKS)
def test_stacks_are_pinned_and_named_in_the_docs(stack: str) -> None:
    chosen = setup_env.STACKS[stack]
    assert all('==' in package for package in (*chosen.torch, chosen.mmcv))
    assert stack in (ROOT / 'docs/install.md').read_text() + (ROOT / 'docs/trust.md').read_text()
