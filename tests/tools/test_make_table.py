"""The paper's table from work directories: runs that were made and that were not, differences to the plain model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rkan_mmdet.checkpoint import list_checkpoints

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / 'tools' / 'make_table.py'), *map(str, arguments)], capture_output=True, text=True
    )


def log(work_dir: Path, box: list, mask: list) -> None:
    folder = work_dir / '20250101_000000' / 'vis_data'
    folder.mkdir(parents=True)
    rows = [
        {
            'coco/bbox_mAP': b,
            'coco/bbox_mAP_50': b + 0.1,
            'coco/segm_mAP': m,
            'coco/segm_mAP_50': m + 0.1,
            'step': i + 1,
        }
        for i, (b, m) in enumerate(zip(box, mask))
    ]
    (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, rows)))


def test_the_last_checkpoint_of_a_run_that_was_moved(tmp_path: Path) -> None:
    old, new = tmp_path / 'old', tmp_path / 'new'
    for folder in (old, new):
        folder.mkdir()
        (folder / 'epoch_2.pth').touch()
        (folder / 'best_epoch_2.pth').touch()
        (folder / 'last_checkpoint').write_text(str(old / 'epoch_2.pth'))
    assert list_checkpoints(new) == [new / 'epoch_2.pth']
    (new / 'epoch_2.pth').unlink()
    assert list_checkpoints(new) == []
    (old / 'last_checkpoint').unlink()  # no run, then, but what a hook's out_dir is
    assert list_checkpoints(new) == [old / 'epoch_2.pth']
    assert list_checkpoints(tmp_path) == []


def test_draws_are_joined(tmp_path: Path) -> None:
    shape = 'mask-rcnn_{}_fpn_coco-5pct-s{}'
    for model, draw, box in (('r50', 1, 0.10), ('r50', 2, 0.13), ('rkan-r50', 1, 0.11), ('rkan-r50', 2, 0.18)):
        log(tmp_path / shape.format(model, draw), [box] * 12, [box / 2] * 12)
    configs = [ROOT / 'configs/lowdata' / f'{shape.format(m, d)}.py' for m in ('r50', 'rkan-r50') for d in (1, 2, 3)]
    done = run(*configs, '--work-dirs', tmp_path, '--json', tmp_path / 'table.json')
    plain, rkan = (line for line in done.stdout.splitlines() if line.startswith('| r'))
    assert plain.startswith('| r50, mean of 2 draws | 11.5 | 21.5 | 5.8 | 15.8 |')
    assert rkan.startswith('| rkan-r50, mean of 2 draws | 14.5 (+3.0) | 24.5 (+3.0) | 7.2 (+1.5) |')
    assert [len(row['runs']) for row in json.loads((tmp_path / 'table.json').read_text())] == [2, 2]

    log(tmp_path / shape.format('rkan-r50', 3), [0.9] * 11, [0.9] * 11)  # no difference between unlike draws
    assert '| rkan-r50, mean of 3 draws (epoch 11 of 12) | 39.7 | ' in run(*configs, '--work-dirs', tmp_path).stdout
    (tmp_path / 'none').mkdir()
    nothing = run(*configs, '--work-dirs', tmp_path / 'none').stdout
    assert '| r50 |  |' in nothing
    log(tmp_path / 'none' / shape.format('r50', 2), [0.1] * 2, [0.1] * 2)  # whose first draw has not run
    assert '| r50, mean of 1 draws (epoch 2 of 12) | 10.0 |' in run(*configs, '--work-dirs', tmp_path / 'none').stdout


def test_an_unfinished_run_that_counts_iterations(tmp_path: Path) -> None:
    config = tmp_path / 'mask-rcnn_r18_iterations.py'
    config.write_text(
        f'_base_ = {str(ROOT / "configs/demo/mask-rcnn_rkan-r18_fpn_shapes.py")!r}\n'
        "train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=900, val_interval=300)\n"
    )
    folder = tmp_path / config.stem / '1' / 'vis_data'
    folder.mkdir(parents=True)
    rows = [dict(loss=1.0, step=300, iter=300), {'coco/bbox_mAP_50': 0.4, 'step': 0}]
    (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, rows)))
    for options in ((), ('--best',)):  # with AP50 alone in the log
        assert ' (iteration 300 of 900) |  | 40.0 |' in run(config, '--work-dirs', tmp_path, *options).stdout


def test_a_damaged_log_is_one_line(tmp_path: Path) -> None:
    config = ROOT / 'configs/demo/mask-rcnn_rkan-r18_fpn_shapes.py'
    log(tmp_path / config.stem, [], [])
    result = run(config, '--work-dirs', tmp_path)
    assert result.returncode == 1
    assert 'holds no line of a log' in result.stderr
    assert 'Traceback' not in result.stderr


def test_table(tmp_path: Path) -> None:
    names = [f'mask-rcnn_{model}_fpn_authors-1x_coco' for model in ('r50', 'rkan-r50', 'rkan-r50-2xl')]
    log(tmp_path / names[0], [0.2] * 11 + [0.352], [0.2] * 11 + [0.32])
    log(tmp_path / names[1], [0.4, 0.356], [0.33, 0.31])
    configs = [ROOT / 'configs' / 'rkan' / f'{name}.py' for name in names]
    done = run(*configs, '--work-dirs', tmp_path, '--json', tmp_path / 'table.json')
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith('| r')]
    assert lines[0].startswith(
        '| r50 | 35.2 | 45.2 | 32.0 | 42.0 |  | 44.41 M | 35.59 | 53.58 | 31.94 | 50.79 | 118.2 |'
    )
    assert lines[1].startswith('| rkan-r50 (epoch 2 of 12) | 35.6 (+0.4) | 45.6 (+0.4) | 31.0 (-1.0) |')
    assert lines[2].startswith('| rkan-r50-2xl |  |  |  |  |  | 50.71 M | 36.13')
    rows = json.loads((tmp_path / 'table.json').read_text())
    assert rows[1]['difference'] == {'box AP': 0.4, 'box AP50': 0.4, 'mask AP': -1.0, 'mask AP50': -1.0}
    assert 'box AP' not in rows[2]

    others = [
        configs[0],
        *(ROOT / f'configs/rkan/mask-rcnn_{name}_coco.py' for name in ('rkan-r50_fpn_1x', 'rkan-r50_fpn_adapter-1x')),
    ]
    rows = [line.split(' | ') for line in run(*others, '--work-dirs', tmp_path).stdout.splitlines() if 'r50' in line]
    assert [row[0] for row in rows] == ['| r50', *(f'| {config.stem}' for config in others[1:])]
    assert [row[7] for row in rows] == ['35.59', '', ''], "the authors' figures are of their recipe"

    again = run(*configs, '--work-dirs', tmp_path, '--json', tmp_path / 'table.json')
    assert again.returncode == 1
    assert 'exists' in again.stderr
    best = run(configs[1], '--work-dirs', tmp_path, '--best')
    assert '40.0 | 50.0 | 33.0 | 43.0' in best.stdout
