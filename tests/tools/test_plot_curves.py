"""tools/plot_curves.py: several runs in one picture, from logs alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rkan_mmdet.plot import plot_curves, read_scalars

ROOT = Path(__file__).parents[2]


@pytest.fixture
def runs(tmp_path: Path) -> list:
    for name in ('plain', 'rkan'):
        folder = tmp_path / name / '20260101_000000' / 'vis_data'
        folder.mkdir(parents=True)
        rows = []
        for epoch in (1, 2):
            rows += [dict(loss=1 / (5 * epoch + i), epoch=epoch, step=5 * (epoch - 1) + i) for i in range(1, 6)]
            rows.append({'coco/bbox_mAP': 0.1 * epoch, 'step': epoch})
        text = '\n'.join(map(json.dumps, rows)) + '\n{"loss": 0.1, "epo'  # killed while it wrote
        (folder / 'scalars.json').write_text(text)
    return [str(tmp_path / 'plain'), str(tmp_path / 'rkan')]


def call(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, '-W', 'ignore', str(ROOT / 'tools/plot_curves.py'), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_two_runs(runs: list, tmp_path: Path) -> None:
    out = tmp_path / 'new' / 'curves.svg'
    result = call(*runs, '--out', str(out), '--labels', 'ResNet', 'RKANet')
    assert result.returncode == 0, result.stderr
    text = out.read_text()
    assert all(f'<!-- {word} -->' in text for word in ('ResNet', 'RKANet', 'loss', 'coco/bbox_mAP', 'epoch'))
    assert text.count('<!-- ResNet -->') == 2  # the legend of the loss and of the AP


def test_iterations_and_the_metric_of_voc(tmp_path: Path) -> None:
    folder = tmp_path / 'run' / '1' / 'vis_data'
    folder.mkdir(parents=True)
    rows = []
    for i in range(1, 7):
        rows.append(dict(loss=1 / i, iter=i, step=i))
        if i % 3 == 0:  # the step of an epoch, of which there is none
            rows.append({'pascal_voc/mAP': i / 10, 'step': 0})
    (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, rows)))
    text = plot_curves([tmp_path / 'run'], tmp_path / 'curves.svg').read_text()
    assert '<!-- iteration -->' in text
    assert '<!-- epoch -->' not in text
    assert '<!-- pascal_voc/mAP -->' in text
    assert dict(read_scalars(tmp_path / 'run')['pascal_voc/mAP']) == {3: 0.3, 6: 0.6}


def log(work_dir: Path, name: str, rows: list, text: str = '') -> None:
    folder = work_dir / name / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, rows)))
    if text:
        (work_dir / name / f'{name}.log').write_text(text)


def test_iterations_in_rows_that_name_an_epoch(tmp_path: Path) -> None:
    rows = []
    for i in range(1, 7):  # an iteration-based loop under MMDetection's default log processor
        rows.append(dict(loss=1 / i, epoch=1, iter=i, step=i))
        if i % 2 == 0:
            rows.append({'coco/bbox_mAP': i / 10, 'step': 0})
    log(tmp_path / 'run', '1', rows)
    assert read_scalars(tmp_path / 'run')['coco/bbox_mAP'] == [(2, 0.2), (4, 0.4), (6, 0.6)]
    assert '<!-- iteration -->' in plot_curves([tmp_path / 'run'], tmp_path / 'curves.svg').read_text()


def test_fractions_of_an_epoch_are_those_of_the_text_log(tmp_path: Path) -> None:
    line = '2026/01/01 00:00:00 - mmengine - INFO - Epoch(train) [{}][{:3}/{}]  lr: 1.0e-02  loss: 1.0\n'
    rows, text = [], 'Config:\n'
    for epoch in (1, 2):
        for i in (10, 20):  # of 25: the last five are logged nowhere
            rows.append(dict(loss=1.0, epoch=epoch, step=25 * (epoch - 1) + i))
            text += line.format(epoch, i, 25)
        rows.append({'coco/bbox_mAP': 0.1 * epoch, 'step': epoch})
    log(tmp_path, '20260101_000000', rows, text)
    assert [epoch for epoch, _ in read_scalars(tmp_path)['loss']] == pytest.approx([0.4, 0.8, 1.4, 1.8])

    rows, text = [], ''
    for epoch in (3, 4):  # went on with half the batch, so that an epoch has 50 iterations
        for i in (25, 50):
            rows.append(dict(loss=2.0, epoch=epoch, step=50 + 50 * (epoch - 3) + i))
            text += line.format(epoch, i, 50)
        rows.append({'coco/bbox_mAP': 0.1 * epoch, 'step': epoch})
    log(tmp_path, '20260102_000000', rows, text)
    curves = read_scalars(tmp_path)
    assert [epoch for epoch, _ in curves['loss']] == pytest.approx([0.4, 0.8, 1.4, 1.8, 2.5, 3, 3.5, 4])
    assert [epoch for epoch, _ in curves['coco/bbox_mAP']] == [1, 2, 3, 4]
    for file in tmp_path.glob('*/*.log'):  # without them no loss leaves its epoch
        file.unlink()
    epochs = [epoch for epoch, _ in read_scalars(tmp_path)['loss']]
    assert all(i // 2 <= epoch <= i // 2 + 1 for i, epoch in enumerate(epochs)), epochs
    assert len(epochs) > 4
    assert [epoch for epoch, _ in read_scalars(tmp_path)['coco/bbox_mAP']] == [1, 2, 3, 4]


def test_names_that_matplotlib_would_take_for_its_own(tmp_path: Path) -> None:
    for name in ('_base', 'a$_$b'):
        log(tmp_path / name, '1', [dict(loss=1.0, epoch=1, step=1), dict(loss=0.5, epoch=1, step=2)])
    text = plot_curves([tmp_path / '_base', tmp_path / 'a$_$b'], tmp_path / 'curves.svg').read_text()
    assert '_base -->' in text
    assert 'a$_$b -->' in text.replace('\\', '')


@pytest.mark.slow
@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere'], 'nowhere holds no */vis_data/scalars.json'),
        (['RUNS', '--metrics', 'coco/segm_mAP'], '--metrics coco/segm_mAP is in no log; there are coco/bbox_mAP, loss'),
        (['RUNS', '--labels', 'one'], '--labels must name 2 runs, but got 1'),
        (['RUNS', '--out', 'curves.txt'], '--out must end in .png, .pdf or .svg'),
        (['RUNS', '--out', __file__], 'exists already'),
    ],
)
def test_refusals(arguments: list, message: str, runs: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [part for argument in arguments for part in (runs if argument == 'RUNS' else [argument])]
    result = call(*arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert 'Traceback' not in result.stderr


@pytest.mark.parametrize(('line', 'message'), [
    ('nonsense}', 'line 1 of .*scalars.json is not of a log of MMEngine'), ('{"loss": 1}', 'line 1 of .* has no step'),
    ('{"loss": 1, "step": 1, "epoch": "x"}', 'is not of a log'), ('', 'holds no line of a log'),
])  # fmt: skip
def test_damaged_logs(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / '1' / 'vis_data').mkdir(parents=True)
    (tmp_path / '1' / 'vis_data' / 'scalars.json').write_text(f'{line}\n')
    with pytest.raises(ValueError, match=message):
        read_scalars(tmp_path)


def test_a_new_run_replaces_the_one_before_it_and_a_resumed_one_joins(tmp_path: Path) -> None:
    def train(name: str, epochs: range, value: float) -> None:
        rows = []
        for epoch in epochs:
            rows += [dict(loss=value, epoch=epoch, step=5 * (epoch - 1) + i) for i in (2, 4)]
            rows.append({'coco/bbox_mAP': value, 'step': epoch})
        log(tmp_path, name, rows)

    train('20260101_000000', range(1, 6), 0.1)
    train('20260102_000000', range(4, 7), 0.2)  # went on from epoch 3
    assert [value for _, value in read_scalars(tmp_path)['coco/bbox_mAP']] == [0.1, 0.1, 0.1, 0.2, 0.2, 0.2]
    train('20260103_000000', range(1, 3), 0.3)  # anew
    assert read_scalars(tmp_path)['coco/bbox_mAP'] == [(1, 0.3), (2, 0.3)]
    assert {value for _, value in read_scalars(tmp_path)['loss']} == {0.3}


def test_a_log_whose_first_step_is_zero(tmp_path: Path) -> None:
    (tmp_path / '1' / 'vis_data').mkdir(parents=True)
    (tmp_path / '1' / 'vis_data' / 'scalars.json').write_text('{"loss": 1, "step": 0, "epoch": 1}\n')
    assert read_scalars(tmp_path) == dict(loss=[(0, 1)])
