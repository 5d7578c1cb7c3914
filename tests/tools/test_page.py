"""The page, driven in a headless browser; and what its tool refuses."""

from __future__ import annotations

import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from PIL import Image

from rkan_mmdet.detector import Detector
from rkan_mmdet.launch import UserError, read_config
from rkan_mmdet.page import check_address, import_gradio

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / 'tools' / 'page.py')
CONFIG = str(ROOT / 'configs' / 'demo' / 'mask-rcnn_rkan-r18_fpn_shapes.py')


@pytest.fixture(scope='module')
def pairs(tmp_path_factory: pytest.TempPathFactory, shapes_root: str) -> list[tuple[str, str]]:
    """Config and checkpoint of an RKAN detector and of its baseline, with random weights."""
    folder = tmp_path_factory.mktemp('detectors')
    init_default_scope('mmdet')
    found = []
    for name, stages in dict(ours=[False, False, False, True], baseline=[False] * 4).items():
        config, checkpoint = folder / f'{name}.py', folder / f'{name}.pth'
        config.write_text(
            f"_base_ = ['{CONFIG}']\ndata_root = '{shapes_root}/'\n"
            f'model = dict(backbone=dict(stage_with_rkan={stages}))\n'
            'test_dataloader = dict(dataset=dict(data_root=data_root))\nval_dataloader = test_dataloader\n'
        )
        torch.manual_seed(len(found))
        torch.save(MODELS.build(read_config(str(config)).model).state_dict(), checkpoint)
        found.append((str(config), str(checkpoint)))
    return found


@pytest.fixture
def url(pairs: list[tuple[str, str]]) -> Iterator[str]:
    """Where the tool shows both detectors."""
    pytest.importorskip('gradio', reason='gradio is not installed')
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = str(free.getsockname()[1])
    # a proxy that nothing listens on: whatever asked for the network would fail
    env = dict(os.environ, http_proxy='http://127.0.0.1:9', https_proxy='http://127.0.0.1:9', no_proxy='127.0.0.1')
    command = [sys.executable, TOOL, *pairs[0], '--against', *pairs[1], '--port', port, '--device', 'cpu']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        line = process.stdout.readline()
        while process.poll() is None and not line.startswith('the page is at '):
            line = process.stdout.readline()
        try:
            assert process.poll() is None, line
            yield line.split()[4]
        finally:
            process.send_signal(signal.SIGTERM)


def wait(condition: Callable, seconds: float = 60) -> object:
    """The first true value of the condition, which may fail while the page changes."""
    last = None
    for _ in range(int(seconds * 5)):
        try:
            last = condition()
        except Exception as error:  # an element has just been replaced
            last = error
        if last and not isinstance(last, Exception):
            return last
        time.sleep(0.2)
    raise AssertionError(f'waited in vain; the last was {last!r}')


@pytest.mark.slow
def test_page(url: str, browser: object, pairs: list[tuple[str, str]], shapes_root: str, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    def one(selector: str) -> object:
        return browser.find_element('css selector', selector)

    def counts() -> list[int]:
        return [int(re.match(r'(\d+) detections', one(f'#count-{i}').text)[1]) for i in (0, 1)]

    def pictures() -> list[str]:
        return [one(f'#picture-{i} img').get_attribute('src') for i in (0, 1)]

    def sizes() -> list[list[int]]:
        shown = [one(f'#picture-{i} img') for i in (0, 1)]
        return [[p.get_property('naturalWidth'), p.get_property('naturalHeight')] for p in shown]

    def upload(path: Path) -> None:
        wait(lambda: one('#image input[type=file]')).send_keys(str(path))

    # on its side, and upright by its EXIF data
    upright = Image.open(f'{shapes_root}/val/000000.jpg').crop((0, 0, 192, 128))
    exif = upright.getexif()
    exif[274] = 6
    file = tmp_path / 'upright.png'
    upright.transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    expected = []
    for config, checkpoint in pairs:
        detector = Detector(read_config(config), checkpoint)
        expected.append(detector([detector.prepare(detector.read(file))])[0].scores)

    browser.get(url)
    upload(file)
    wait(lambda: sizes() == [[192, 128]] * 2)  # both pictures are there, and upright
    wait(lambda: counts() == [int((scores >= 0.3).sum()) for scores in expected])
    before = pictures()
    for i, name in enumerate(('ours', 'baseline')):
        assert name in one(f'#picture-{i}').text

    slider = one('#threshold input[type=range]')
    slider.send_keys(Keys.HOME)  # to 0
    wait(lambda: counts() == [len(scores) for scores in expected])
    assert all(len(scores) for scores in expected)
    wait(lambda: all(after != old for after, old in zip(pictures(), before)))
    slider.send_keys(Keys.END)  # to 1
    wait(lambda: counts() == [0, 0])

    one('#image button[aria-label="Remove Image"]').click()
    wait(lambda: not browser.find_elements('css selector', '#picture-0 img'))
    cut = tmp_path / 'cut.png'
    cut.write_bytes(file.read_bytes()[:5000])
    upload(cut)
    wait(lambda: 'can not be read' in one('body').text)

    wait(lambda: one('.gallery-item img')).click()  # an image of the test set
    wait(lambda: sizes() == [[192, 192]] * 2)
    severe = [entry for entry in browser.get_log('browser') if entry['level'] == 'SEVERE']
    assert severe == []


@pytest.mark.slow
def test_nothing_but_the_examples_is_served(url: str, shapes_root: str) -> None:
    def status(path: str, host: str = '') -> int:
        request = urllib.request.Request(url.rstrip('/') + path, headers=dict(Host=host) if host else {})
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    beside = Path(shapes_root, 'val', 'beside.txt')
    beside.write_text('no image')
    assert status(f'/gradio_api/file={shapes_root}/val/000000.jpg') == 200
    assert status(f'/gradio_api/file={beside}') == 403
    beside.unlink()
    assert status('/config') == 200
    assert status('/config', host='evil.example:7999') == 400


def test_addresses() -> None:
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf'--port {port} can not be listened on'):
            check_address('127.0.0.1', port)
    check_address('127.0.0.1', port)
    with pytest.raises(UserError, match='--port must be from 1 to 65535, but got 0'):
        check_address('127.0.0.1', 0)


def test_without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(UserError, match=r'pip install "rkan-mmdet\[page\]"'):
        import_gradio()


def test_refusals(pairs: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('gradio', reason='gradio is not installed')
    (config, checkpoint), (other, _) = pairs
    left_over = r'weights in it are not of the detector \(backbone\.layer4\.rkan'
    for arguments, message in (
        ((config, 'none.pth'), r'^error: checkpoint none\.pth does not exist$'),
        ((config, checkpoint, '--against', other, checkpoint), left_over),
    ):
        monkeypatch.setattr(sys, 'argv', ['page.py', *arguments, '--port', '7999', '--device', 'cpu'])
        with pytest.raises(SystemExit, match=message):
            runpy.run_path(TOOL, run_name='__main__')
