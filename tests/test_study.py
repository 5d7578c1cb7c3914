"""The study: its plan, the runs' configs, and tables and a plot from the JSON alone."""

import importlib.util
import json
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
    assert len(set(runs)) == len(runs) == 8 * 5 + 3 * 3 * 3
    for run in runs[:8]:  # an arm that starts from the plain run comes after it
        assert run.seed == 1
    assert [run.arm for run in runs[:8]] == list(study.ARMS)


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
    assert rows['adapter (to plain-tuned)'][1].strip() == ''
    assert study.estimate([study.Run('bccd', 'plain', 1)]) == 100
    study.plot(tmp_path / 'study.png')
    assert (tmp_path / 'study.png').read_bytes()[:4] == b'\x89PNG'


def test_arms_differ_in_the_backbone_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, 'make_shapes', lambda *a, **k: None)
    configs = {
        arm: study.make_config(study.Run('shapes-quarter', arm, 2), tmp_path / 'work', None).to_dict()
        for arm in study.ARMS
    }
    backbones = [cfg['model'].pop('backbone') for cfg in configs.values()]
    assert all(cfg == configs['plain'] for cfg in configs.values())
    assert len({repr(backbone) for backbone in backbones}) == 7  # plain and plain-tuned have the same
    dataset = configs['plain']['train_dataloader']['dataset']
    assert (dataset['times'], dataset['dataset']['indices']) == (4, 300)
    with pytest.raises(study.UserError, match='docs/study'):
        study.make_config(study.Run('bccd', 'plain', 1), tmp_path, tmp_path)


def test_committed_results_are_whole() -> None:
    for row in study.read_results():
        assert (ROOT / row['config']).is_file()
        assert len(row['coco']) == 12 * (2 if row['data'].startswith('shapes') else 1)
        assert row['seconds'] > 0
