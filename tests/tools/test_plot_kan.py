"""tools/plot_kan.py from a config and a checkpoint to a report that a browser shows."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

ROOT = Path(__file__).parents[2]
CONFIG = 'configs/demo/mask-rcnn_rkan-r18_fpn_shapes.py'
PLAIN = 'configs/study/mask-rcnn_r18_fpn_shapes.py'


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict:
    init_default_scope('mmdet')
    paths = {}
    for config in (CONFIG, PLAIN):
        paths[config] = str(tmp_path_factory.mktemp('weights') / 'detector.pth')
        model = MODELS.build(Config.fromfile(str(ROOT / config)).model)
        torch.save(dict(meta={}, state_dict=model.state_dict()), paths[config])
    return paths


def plot_kan(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, '-W', 'ignore', 'tools/plot_kan.py', *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope='module')
def report(checkpoints: dict, shapes_root: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('whole') / 'report'
    result = plot_kan(
        CONFIG, checkpoints[CONFIG], '--out', out, '--images', 3, '--initial', checkpoints[CONFIG], '--against', PLAIN,
        checkpoints[PLAIN], '--cfg-options', f'data_root={shapes_root}/',
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return out


@pytest.mark.slow
def test_a_report(report: Path, checkpoints: dict) -> None:
    names = {path.name for path in report.iterdir()}
    assert {'report.html', 'predictions.png', 'share_of_the_path.png', 'feature_maps_of_backbone.layer4.png'} <= names
    assert {f'functions_of_backbone.layer4.rkan.kan_conv{i}.png' for i in (1, 2)} <= names

    again = plot_kan(CONFIG, checkpoints[CONFIG], '--out', report, '--images', 0)
    assert again.returncode == 1
    assert 'exists already' in again.stderr


@pytest.mark.slow
def test_a_report_in_a_browser(report: Path, browser) -> None:
    browser.get(f'file://{report}/report.html')
    assert browser.title == f'What {CONFIG} learned'
    sizes = browser.execute_script('return [...document.images].map(i => [i.naturalWidth, i.clientWidth])')
    assert len(sizes) == len(list(report.glob('*.png')))
    assert all(natural > 100 and shown > 100 for natural, shown in sizes)
    width = browser.execute_script('return [document.documentElement.scrollWidth, window.innerWidth]')
    assert width[0] <= width[1], 'the page is wider than the window'
    assert [entry for entry in browser.get_log('browser') if entry['level'] == 'SEVERE'] == []
    cells = browser.execute_script('return [...document.querySelectorAll("td")].map(c => c.innerText)')
    assert cells[0] == 'backbone.layer4'
    assert 0 < float(cells[1]) <= 1


@pytest.mark.slow
def test_without_data_the_functions_alone(checkpoints: dict, tmp_path: Path) -> None:
    result = plot_kan(CONFIG, checkpoints[CONFIG], '--out', tmp_path / 'report', '--images', 0)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {path.suffix for path in (tmp_path / 'report').iterdir()} == {'.html', '.png'}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((PLAIN, PLAIN, '--images', '0'), 'has no residual KAN path'),
        ((CONFIG, CONFIG, '--images', '-1'), '--images must be at least 0, but got -1'),
        ((CONFIG, CONFIG, '--score-thr', '1.5'), '--score-thr must be in [0, 1], but got 1.5'),
        ((CONFIG, PLAIN, '--images', '0'), 'does not fit'),
        ((CONFIG, CONFIG, '--images', '2', '--cfg-options', 'data_root=nowhere/'), 'does not exist'),
    ],
)
def test_refusals(arguments: tuple, message: str, checkpoints: dict, tmp_path: Path) -> None:
    config, weights, *rest = arguments
    result = plot_kan(config, checkpoints[weights], '--out', tmp_path / 'report', *rest)
    assert result.returncode == 1
    assert message in result.stderr
    assert 'Traceback' not in result.stderr
    assert not (tmp_path / 'report').exists()
