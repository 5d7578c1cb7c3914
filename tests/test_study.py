"""The study: its plan, the runs' configs, and tables and a plot from the JSON alone."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location('study', ROOT / 'benchmarks' / 'study.py')
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)


def write(folder: Path, data: str, arm: str, seed: int, box: float, mask: float) -> None:
    path = folder / data / arm / f'{seed}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    row = dict(
        data=data, arm=arm, seed=seed, coco=dict(bbox_mAP=box, segm_mAP=mask), seconds=100.0,
        seconds_an_iteration=0.5, peak_memory_mib=None if arm == 'rkan' else 1000, parameters=10,
    )  # fmt: skip
    path.write_text(json.dumps(row))


def test_plan_covers_the_matrix_once() -> None:
    runs = list(study.plan())
    assert len(set(runs)) == len(runs) == 9 * 5 + 3 * 3 * 3 + 12 * 2 + 5 * 5 + 3 * 2
    for run in runs[:9]:  # an arm that starts from the plain run comes after it
        assert run.seed == 1
    assert [run.arm for run in runs[:9]] == list(study.ARMS)


def test_report_pairs_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, 'RESULTS', tmp_path)
    for seed, plain, rkan in ((1, 0.30, 0.31), (2, 0.20, 0.23), (3, 0.25, 0.27)):
        write(tmp_path, 'shapes', 'plain', seed, plain, 0.1)
        write(tmp_path, 'shapes', 'rkan', seed, rkan, 0.1)
    write(tmp_path, 'shapes', 'linear', 1, 0.2, 0.1)
    table = study.report().split('### bccd')[0]
    rows = {line.split(' | ')[0].strip('| '): line[2:-2].split(' | ') for line in table.splitlines()}
    assert rows['plain'][1:4] == ['3', '25.00 (5.00)', '']
    # differences 1, 3, 2: mean 2, t(2) 4.303 times 1 / sqrt(3)
    assert rows['rkan (to plain)'][1:4] == ['3', '27.00 (4.00)', '+2.00 [-0.48, +4.48]']
    assert rows['rkan (to plain)'][5:7] == ['+0.00 [+0.00, +0.00]', '0.5']
    assert rows['linear (to plain)'][1:4] == ['1', '20.00', '-10.00']
    assert '`rkan` to `linear`: box AP +11.00, mask AP +0.00.' in table
    assert rows['adapter (to plain-tuned)'][1].strip() == ''
    assert study.estimate([study.Run('bccd', 'plain', 1)]) == 100
    study.plot(tmp_path / 'study.png')
    assert (tmp_path / 'study.png').read_bytes()[:4] == b'\x89PNG'


def test_arms_differ_in_the_backbone_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, 'make_shapes', lambda *a, **k: None)
    configs = {
        arm: study.make_config(study.Run('shapes', arm, 2), tmp_path / 'work', tmp_path).to_dict() for arm in study.ARMS
    }
    backbones = [cfg['model'].pop('backbone') for cfg in configs.values()]
    assert all(cfg == configs['plain'] for cfg in configs.values())
    assert len({repr(backbone) for backbone in backbones}) == 7  # of plain and plain-tuned, zero-init and rkan-tuned
    quarter = study.make_config(study.Run('shapes-quarter', 'plain', 2), tmp_path / 'work', tmp_path)
    dataset = quarter.train_dataloader.dataset
    assert (dataset['times'], dataset['dataset']['indices']) == (4, 300)


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(study, 'RESULTS', study.RESULTS)  # main may set another
    monkeypatch.setattr('sys.argv', ['study.py', *arguments])
    study.main()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--only', 'bccd', '--results', '{tmp}', '--data-root', '{tmp}'], 'bccd does not exist; docs/study'),
        (['--seeds', '77'], 'no run of the plan'),
        (['--only', 'shapes', '--arms', 'degree-1'], 'no run of the plan'),
        (['--only', 'coco'], '--only must be of bccd, .* but got coco'),
        (['--report', '--seeds', '1'], 'leave out --only'),
    ],
)
def test_bad_calls(arguments: list, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(study.UserError, match=message):
        main(monkeypatch, *(argument.format(tmp=tmp_path) for argument in arguments))


def test_results_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    main(monkeypatch, '--plan', '--only', 'shapes', '--seeds', '1', '--results', str(tmp_path))
    assert capsys.readouterr().out.splitlines()[1:] == [f'shapes/{arm}/1' for arm in study.ARMS]
    write(tmp_path, 'shapes', 'plain', 1, 0.3, 0.1)
    write(tmp_path, 'shapes', 'rkan', 1, 0.3, 0.1)
    path = tmp_path / 'shapes' / 'rkan' / '1.json'
    path.write_text(json.dumps(dict(json.loads(path.read_text()), device='a GPU')))
    with pytest.raises(study.UserError, match='the results of shapes are of a GPU and cpu'):
        main(monkeypatch, '--report', '--results', str(tmp_path))


def test_the_page_is_made_of_the_committed_results() -> None:
    assert study.report().strip() in (ROOT / 'docs' / 'study.md').read_text()


def test_committed_results_are_whole() -> None:
    assert study.read_results()
    for row in study.read_results():
        assert (ROOT / row['config']).is_file()
        assert len(row['coco']) == 12 * (1 if row['data'].startswith('bccd') else 2)
        assert row['seconds'] > 0


def test_bccd_is_converted(tmp_path: Path) -> None:
    import cv2
    import numpy as np
    from pycocotools.coco import COCO

    source = tmp_path / 'checkout' / 'BCCD'
    for folder in ('ImageSets/Main', 'Annotations', 'JPEGImages'):
        (source / folder).mkdir(parents=True)
    box = (
        '<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>'
    )
    for name in ('a', 'b', 'c'):
        cv2.imwrite(str(source / f'JPEGImages/{name}.jpg'), np.zeros((48, 64, 3), np.uint8))
        objects = box.format('WBC', 1, 2, 11, 22) + box.format('RBC', 5, 5, 6, 9) + box.format('Platelets', 0, 0, 4, 4)
        (source / f'Annotations/{name}.xml').write_text(
            f'<annotation><size><width>64</width><height>48</height></size>{objects}</annotation>'
        )
    (source / 'ImageSets/Main/trainval.txt').write_text('b\na\n')
    (source / 'ImageSets/Main/test.txt').write_text('c\n')
    command = [sys.executable, str(ROOT / 'benchmarks/convert_bccd.py'), str(source.parent), str(tmp_path / 'bccd')]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines() == [
        'train: 2 images, 4 boxes', 'val: 1 images, 2 boxes'
    ]  # fmt: skip
    coco = COCO(str(tmp_path / 'bccd/annotations/instances_train.json'))
    assert [image['file_name'] for image in coco.loadImgs([1, 2])] == ['a.jpg', 'b.jpg']
    assert all((tmp_path / 'bccd/train' / image['file_name']).exists() for image in coco.imgs.values())
    assert [(a['bbox'], a['category_id'], a['area']) for a in coco.imgToAnns[1]] == [
        ([1, 2, 10, 20], 2, 200), ([0, 0, 4, 4], 3, 16)
    ]  # fmt: skip
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert 'exists already' in again.stderr
