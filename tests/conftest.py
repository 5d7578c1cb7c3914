"""Shared by all tests: quiet third parties, and one generated data set."""

import inspect
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

if os.environ.get('PYTEST_XDIST_WORKER_COUNT', '1') != '1':
    # read when torch is imported, here and in the tools that tests start: processes side by side share the cores
    threads = (os.cpu_count() or 1) // int(os.environ['PYTEST_XDIST_WORKER_COUNT'])
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, threads)))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')  # read when triton is imported: its kernels then run in Python

import rkan_mmdet  # noqa: F401  (registers the backbones)

# an older torch.export is refused with its reason
EXPORTS = 'prefer_deferred_runtime_asserts_over_guards' in inspect.signature(torch.export.export).parameters
collect_ignore = [] if EXPORTS else ['test_export.py', 'tools/test_export_onnx.py']


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, so that what a kernel leaves unwritten shows."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, 'empty', lambda *a, **k: empty(*a, **k).fill_(float('nan')))
    monkeypatch.setattr(torch, 'empty_like', lambda *a, **k: empty_like(*a, **k).fill_(float('nan')))
    monkeypatch.setattr(torch.Tensor, 'new_empty', lambda *a, **k: new_empty(*a, **k).fill_(float('nan')))


@pytest.fixture(scope='session')
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A shapes set of 8 + 4 images."""
    from rkan_mmdet.data.shapes import make_shapes

    return str(make_shapes(tmp_path_factory.mktemp('data') / 'shapes', num_train=8, num_val=4, quiet=True))


@pytest.fixture
def coco_root(shapes_root: str, tmp_path: Path) -> Path:
    """The shapes under COCO's names and paths."""
    from mmdet.datasets import CocoDataset

    root = tmp_path / 'coco'
    for folder, old in (('train2017', 'train'), ('val2017', 'val')):
        root.mkdir(exist_ok=True)
        (root / folder).symlink_to(Path(shapes_root) / old)
        content = json.loads((Path(shapes_root) / f'annotations/instances_{old}.json').read_text())
        assert {category['id'] for category in content['categories']} <= set(range(1, 81))
        content['categories'] = [dict(id=i + 1, name=name) for i, name in enumerate(CocoDataset.METAINFO['classes'])]
        for name in (f'annotations/instances_{folder}.json', f'semi_anns/instances_{folder}.1@1.json'):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_text(json.dumps(content))
    return root


@pytest.fixture
def browser() -> Iterator:
    """A headless Chromium, driven by Selenium."""
    webdriver = pytest.importorskip('selenium.webdriver', reason='selenium is not installed')
    binary, driver = shutil.which('chromium') or shutil.which('google-chrome'), shutil.which('chromedriver')
    if not binary or not driver:
        pytest.skip('there is no chromium and chromedriver (apt-get install chromium chromium-driver)')
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--window-size=1200,900'):
        options.add_argument(argument)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()
