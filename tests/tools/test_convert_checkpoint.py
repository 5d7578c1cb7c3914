"""The conversion tool: safe, never overwriting, and from-plain keeps every COCO figure."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS

from rkan_mmdet.convert import from_authors
from rkan_mmdet.launch import _check_weights, read_config

sys.path.insert(0, str(Path(__file__).parents[1]))
from golden_case import Case

ROOT = Path(__file__).parents[2]
DEMO = 'configs/demo/mask-rcnn_rkan-r18_fpn_shapes.py'

pytestmark = pytest.mark.slow


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, f'tools/{name}', *arguments], cwd=ROOT, capture_output=True, text=True
    )  # fmt: skip


def write_config(path: Path, backbone: str) -> str:
    path.write_text(f"_base_ = ['{ROOT / DEMO}']\nmodel = dict(backbone=dict({backbone}))\n")
    return str(path)


def figures(log: str) -> list:
    return re.findall(r'Average (?:Precision|Recall).*', log)


def test_from_plain_keeps_every_coco_figure(shapes_root: str, tmp_path: Path) -> None:
    small = "_delete_=True, type='ResNet', depth=18, base_channels=32, stem_channels=32, norm_eval=False"
    plain = write_config(tmp_path / 'plain.py', small)
    rkan = write_config(tmp_path / 'rkan.py', 'rkan=dict(zero_init=True)')
    options = ['--cfg-options', f'data_root={shapes_root}']
    result = tool('train.py', plain, '--work-dir', str(tmp_path / 'work'), *options, 'train_cfg.max_epochs=3',
                  'train_dataloader.batch_size=2', 'model.test_cfg.rcnn.score_thr=0.0')  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    source, target = str(tmp_path / 'work/epoch_3.pth'), str(tmp_path / 'rkan.pth')
    arguments = ['from-plain', source, target, '--config', rkan]
    dry = tool('convert_checkpoint.py', *arguments, '--dry-run')
    assert dry.returncode == 0, dry.stderr
    assert not Path(target).exists()
    assert tool('convert_checkpoint.py', *arguments).returncode == 0
    again = tool('convert_checkpoint.py', *arguments)
    assert again.returncode == 1
    assert 'exists; name another file, or say --overwrite' in again.stderr
    logs = [
        tool('test.py', config, checkpoint, '--work-dir', str(tmp_path / 'test'), *options,
             'model.test_cfg.rcnn.score_thr=0.0')
        for config, checkpoint in ((plain, source), (rkan, target))
    ]  # fmt: skip
    before, after = (figures(log.stdout + log.stderr) for log in logs)
    assert len(before) == 24
    assert before == after


def test_from_authors_gives_what_the_config_starts_from(tmp_path: Path) -> None:
    case = Case(ROOT / 'tests/data/golden/r50_s4.json')
    torch.save(case.state_dict(), tmp_path / 'theirs.pth')
    for recipe in ('authors-1x', '1x'):  # the one takes the backbone out of a classifier, the other a backbone
        config, out = f'configs/rkan/mask-rcnn_rkan-r50_fpn_{recipe}_coco.py', tmp_path / f'{recipe}.pth'
        result = tool(
            'convert_checkpoint.py', 'from-authors', str(tmp_path / 'theirs.pth'), str(out), '--config', config
        )
        assert result.returncode == 0, result.stderr
        cfg = read_config(str(ROOT / config), {'model.backbone.init_cfg.checkpoint': str(out)})
        _check_weights(str(out), cfg.model.backbone.init_cfg.get('prefix') or '')
        backbone = MODELS.build(cfg.model.backbone)
        backbone.init_weights()
        expected = from_authors(case.state_dict(), backbone)
        assert all(torch.equal(value, expected[key]) for key, value in backbone.state_dict().items())


def test_a_hostile_file_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / 'touched',)

    torch.save(dict(state_dict=dict(a=Payload())), tmp_path / 'bad.pth')
    result = tool('convert_checkpoint.py', 'from-plain', str(tmp_path / 'bad.pth'), str(tmp_path / 'out.pth'),
                  '--config', DEMO)  # fmt: skip
    assert result.returncode == 1
    assert 'can not be read safely' in result.stderr
    assert not (tmp_path / 'touched').exists()
    assert not (tmp_path / 'out.pth').exists()


def test_a_config_without_a_model(tmp_path: Path) -> None:
    (tmp_path / 'data.py').write_text("data_root = 'data/'\n")
    torch.save(dict(state_dict=dict(a=torch.ones(1))), tmp_path / 'a.pth')
    result = tool('convert_checkpoint.py', 'from-plain', str(tmp_path / 'a.pth'), str(tmp_path / 'out.pth'),
                  '--config', str(tmp_path / 'data.py'))  # fmt: skip
    assert result.stderr.endswith('data.py has no model.backbone: name the config of the detector within\n')
    assert result.returncode == 1
