"""Every option of every tool with a value that can not be: one line that names the culprit, and nothing written."""

import argparse
import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from rkan_mmdet.launch import read_config

ROOT = Path(__file__).parents[2]
DEMO = 'configs/demo/mask-rcnn_rkan-r18_fpn_shapes.py'
SHAPES = '--cfg-options data_root={data}'

WEIGHTS = dict(config=DEMO, checkpoint='{checkpoint}')

# command: (positional arguments and options that would do,
#           {option or argument: [(what is wrong, what the message must name)]})
CASES = {
    'train.py': (dict(config=DEMO), f'--work-dir {{out}} {SHAPES}', {
        'config': [('none.py', 'config none.py does not exist'), ('{text}', 'can not be read')],
        '--work-dir': [('--work-dir {text}', '{text}'), ('--work-dir {text}/sub', '{text}')],
        '--resume': [('--resume none.pth', 'none.pth does not exist'), ('--resume {text}', 'can not be read safely')],
        '--cfg-options': [('--cfg-options a', '--cfg-options'), ('--cfg-options model.backbone.depth.x=1', 'depth'),
                          ('--cfg-options data_root=none', 'none')],
        '--launcher': [('--launcher x', "invalid choice: 'x'")],
        '--local_rank': [('--local_rank x', 'invalid int value')],
    }),
    'test.py': (WEIGHTS, f'--work-dir {{out}} {SHAPES}', {
        'config': [('none.py', 'config none.py does not exist')],
        'checkpoint': [('none.pth', 'none.pth does not exist'), ('{text}', 'can not be read safely')],
        '--work-dir': [('--work-dir {text}', '{text}')],
        '--out': [('--out a.json', '--out must end in .pkl or .pickle'), ('--out {text}/a.pkl', '{text}')],
        '--show-dir': [('--show-dir {text}/x', '{text}'), ('--show-dir {data}/train', 'is not empty')],
        '--wait-time': [('--wait-time x', 'invalid float value'), ('--wait-time -1', '--wait-time must be at least 0')],
        '--cfg-options': [('--cfg-options data_root=none', 'none')],
        '--launcher': [('--launcher x', "invalid choice: 'x'")],
        '--local_rank': [('--local_rank x', 'invalid int value')],
    }),
    'benchmark.py': (dict(config=DEMO), '--size 64 64 --rounds 1 --warmup 0 --json {out}', {
        'config': [('none.py', 'config none.py does not exist')],
        'checkpoint': [('none.pth', 'none.pth does not exist'), ('{text}', 'can not be read safely')],
        '--against': [('--against none.py', 'config none.py does not exist')],
        '--against-checkpoint': [('--against-checkpoint {checkpoint}', '--against-checkpoint needs --against'),
                                 (f'--against {DEMO} --against-checkpoint none.pth', 'none.pth does not exist')],
        '--size': [('--size 64', 'expected 2 arguments'), ('--size 0 64', 'got 0 64'), ('--size x 64', "'x'")],
        '--batch-size': [('--batch-size 0', '--batch-size must be at least 1'), ('--batch-size x', "'x'")],
        '--rounds': [('--rounds 0', '--rounds must be at least 1'), ('--rounds 1.5', "'1.5'")],
        '--warmup': [('--warmup -1', '--warmup must be at least 0'), ('--warmup x', "'x'")],
        '--device': [('--device x', '--device x'), ('--device cuda:77', '--device cuda:77')],
        '--json': [('--json {text}', '{text} exists'), ('--json {text}/a.json', '{text}')],
        '--cfg-options': [('--cfg-options model.backbone.depth=19', 'depth')],
    }),
    'convert_checkpoint.py': (dict(direction='to-authors', src='{checkpoint}', dst='{out}'), f'--config {DEMO}', {
        'direction': [('sideways', "invalid choice: 'sideways'")],
        'src': [('none.pth', 'none.pth does not exist'), ('{text}', 'can not be read safely')],
        'dst': [('{text}', '{text} exists'), ('{text}/a.pth', '{text}')],
        '--config': [('--config none.py', 'config none.py does not exist'), ('--config {text}', 'can not be read')],
    }),
    'download_coco.py': ({}, '--root {out} --parts annotations --url http://127.0.0.1:9', {
        '--root': [('--root {text}', '{text}')],
        '--parts': [('--parts x', "invalid choice: 'x'")],
        '--url': [('--url 127.0.0.1', '127.0.0.1'), ('--url http://127.0.0.1:9', 'http://127.0.0.1:9')],
    }),
    'export_onnx.py': (dict(WEIGHTS, out='{out}.onnx'), '--what backbone --size 64 64', {
        'config': [('none.py', 'config none.py does not exist')],
        'checkpoint': [('none.pth', 'none.pth does not exist')],
        'out': [('{text}', '{text}'), ('a.txt', 'a.txt')],
        '--what': [('--what neck', "invalid choice: 'neck'")],
        '--size': [('--size 0 64', '--size must be at least 32 32'), ('--size 64', 'expected 2 arguments')],
        '--score-thr': [('--what detector --score-thr 2', '--score-thr'), ('--score-thr x', "'x'")],
        '--int8': [('--int8 0', '--int8 must be at least 1'), ('--int8 x', "'x'")],
        '--opset': [('--opset 5', '--opset'), ('--opset x', "'x'")],
        '--cfg-options': [('--cfg-options model.backbone.depth=19', 'depth')],
    }),
    'make_table.py': ({}, '--json {out}', {
        'configs': [('none_a_b.py', 'config none_a_b.py does not exist'), ('none.py', 'none.py')],
        '--work-dirs': [('--work-dirs none', 'none')],
        '--fps': [('--fps x', "'x'"), ('--fps 0', '--fps must be at least 1')],
        '--json': [('--json {text}', '{text} exists'), ('--json {text}/a.json', '{text}')],
    }),
    'new_project.py': (
        dict(out='{out}.py'), f'--base {DEMO} --train {{data}}/annotations/instances_train.json {{data}}/train '
        '--val {data}/annotations/instances_val.json {data}/val', {
            'out': [('{text}', '{text}'), ('a.txt', 'a.txt')],
            '--base': [('--base none.py', 'none.py'), ('--base mmdet::none.py', 'mmdet::none.py')],
            '--train': [('--train none.json {data}/train', 'none.json'), ('--train a', 'expected 2 arguments'),
                        ('--train {data}/annotations/instances_train.json none', 'none'),
                        ('--train {text} {data}/train', '{text}')],
            '--val': [('--val none.json {data}/val', 'none.json')],
            '--test': [('--test none.json {data}/val', 'none.json')],
            '--batch-size': [('--batch-size 0', '--batch-size must be at least 1'), ('--batch-size x', "'x'")],
            '--gpus': [('--gpus 0', '--gpus must be at least 1'), ('--gpus x', "'x'")],
            '--epochs': [('--epochs 0', '--epochs must be at least 1'), ('--epochs x', "'x'")],
            '--scale': [('--scale 0 64', '--scale must be at least 32 32'), ('--scale 64', 'expected 2 arguments')],
        }),
    'page.py': (WEIGHTS, SHAPES, {
        'config': [('none.py', 'config none.py does not exist')],
        'checkpoint': [('none.pth', 'none.pth does not exist')],
        '--against': [('--against none.py {checkpoint}', 'config none.py does not exist'),
                      (f'--against {DEMO} none.pth', 'none.pth does not exist')],
        '--device': [('--device x', '--device x')],
        '--host': [('--host 203.0.113.1', '203.0.113.1')],
        '--port': [('--port x', "'x'"), ('--port 99999', '99999')],
        '--cfg-options': [('--cfg-options model.backbone.depth=19', 'depth')],
    }),
    'plot_curves.py': (dict(work_dirs='{log}'), '--out {out}.png', {
        'work_dirs': [('none', 'none holds no'), ('{text}', '{text} holds no')],
        '--out': [('--out {text}', '{text} exists'), ('--out a.doc', 'a.doc'), ('--out {text}/a.png', '{text}')],
        '--labels': [('--labels a b', '--labels must name 1 runs, but got 2')],
        '--metrics': [('--metrics coco/none', '--metrics coco/none is in no log')],
    }),
    'plot_kan.py': (WEIGHTS, f'--out {{out}} --images 1 {SHAPES}', {
        'config': [('none.py', 'config none.py does not exist')],
        'checkpoint': [('none.pth', 'none.pth does not exist'), ('{text}', 'can not be read safely')],
        '--out': [('--out {text}', '{text} exists'), ('--out {text}/a', '{text}')],
        '--images': [('--images -1', '--images must be at least 0'), ('--images x', "'x'")],
        '--initial': [('--initial none.pth', 'none.pth does not exist')],
        '--against': [('--against none.py {checkpoint}', 'config none.py does not exist'),
                      (f'--against {DEMO} none.pth', 'none.pth does not exist')],
        '--score-thr': [('--score-thr 2', '--score-thr must be in [0, 1]'), ('--score-thr x', "'x'")],
        '--cfg-options': [('--cfg-options data_root=none', 'none')],
    }),
    'predict.py': (dict(WEIGHTS, input='{data}/val'), f'--out {{out}} {SHAPES}', {
        'config': [('none.py', 'config none.py does not exist')],
        'checkpoint': [('none.pth', 'none.pth does not exist')],
        'input': [('none.jpg', 'none.jpg'), ('{text}', '{text}')],
        '--out': [('--out {text}', '{text}'), ('--out {text}/a', '{text}')],
        '--score-thr': [('--score-thr 2', '--score-thr must be from 0 to 1'), ('--score-thr x', "'x'")],
        '--batch-size': [('--batch-size 0', '--batch-size must be at least 1'), ('--batch-size x', "'x'")],
        '--device': [('--device x', '--device x')],
        '--cfg-options': [('--cfg-options model.backbone.depth=19', 'depth')],
    }),
    'demo.py': ({}, '--work-dir {out}', {
        '--work-dir': [('--work-dir {text}', '{text}'), ('--work-dir {text}/a', '{text}')],
        '--epochs': [('--epochs 0', '--epochs must be at least 1'), ('--epochs x', "'x'")],
    }),
    'rkan_mmdet.data.check': (dict(annotations='{data}/annotations/instances_train.json'), '', {
        'annotations': [('none.json', 'none.json does not exist'), ('{text}', 'is not JSON')],
        '--images': [('--images none', '--images none is not a folder'), ('--images {text}', 'is not a folder')],
        '--config': [('--config none.py', 'config none.py does not exist')],
        '--cfg-options': [('--cfg-options a=1', '--config')],
    }),
    'rkan_mmdet.data.shapes': ({}, '--out {out}', {
        '--out': [('--out {text}', '{text}'), ('--out {text}/a', '{text}')],
        '--num-train': [('--num-train 0', 'num_train'), ('--num-train x', "'x'")],
        '--num-val': [('--num-val 0', 'num_val'), ('--num-val x', "'x'")],
        '--train-seed': [('--train-seed -1', 'train_seed'), ('--train-seed x', "'x'")],
        '--val-seed': [('--val-seed -1', 'val_seed'), ('--val-seed x', "'x'")],
        '--size': [('--size 3', 'size'), ('--size x', "'x'")],
    }),
}  # fmt: skip
SINGLE = [
    (tool, name, i) for tool, (*_, options) in CASES.items() for name in options for i in range(len(options[name]))
]


def words(tool: str, name: str, wrong: str) -> list:
    """The arguments that would do, with one of them replaced by what is wrong."""
    positional, options, _ = CASES[tool]
    if not name.startswith('-'):
        return [*dict(positional, **{name: wrong}).values(), *options.split()]
    return [*positional.values(), *options.split(), *wrong.split()]  # the later of two counts


def run(tool: str, arguments: list, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(sys, 'argv', [tool, *arguments])
    if tool.endswith('.py'):
        return runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')
    sys.modules.pop(tool, None)
    return runpy.run_module(tool, run_name='__main__')


@pytest.fixture(scope='module')
def values(tmp_path_factory: pytest.TempPathFactory, shapes_root: str) -> dict:
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope

    folder = tmp_path_factory.mktemp('files')
    init_default_scope('mmdet')
    model = MODELS.build(read_config(str(ROOT / DEMO)).model)
    torch.save(dict(meta={}, state_dict=model.state_dict()), folder / 'weights.pth')
    (folder / 'text').write_text('a text (')
    log = folder / 'run/20260101_000000/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text(json.dumps(dict(loss=1.0, epoch=1, iter=1, step=1)) + '\n')
    return dict(
        data=shapes_root, checkpoint=str(folder / 'weights.pth'), text=str(folder / 'text'), log=str(folder / 'run')
    )


@pytest.mark.slow
@pytest.mark.parametrize(('tool', 'name', 'i'), SINGLE)
def test_a_value_that_can_not_be(
    tool: str, name: str, i: int, values: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    (tmp_path / 'tools').symlink_to(ROOT / 'tools')
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/shapes').symlink_to(values['data'])
    wrong, culprit = CASES[tool][2][name][i]
    values = dict(values, out=str(tmp_path / 'out'))
    text = Path(values['text']).read_text()
    with pytest.raises(SystemExit) as stop:
        run(tool, [word.format(**values) for word in words(tool, name, wrong)], monkeypatch)
    said = capsys.readouterr()
    assert stop.value.code not in (0, None)
    message = str(stop.value.code) if isinstance(stop.value.code, str) else said.err + said.out
    assert culprit.format(**values) in message
    assert 'Traceback' not in said.err
    if isinstance(stop.value.code, str):
        assert message.startswith('error: ')
        assert '\n' not in message
    left = {path.name for path in tmp_path.iterdir()} - {'configs', 'tools', 'data'}
    allowed = {'out'} if tool in ('download_coco.py', 'test.py', 'train.py') else set()  # a folder, made before
    assert left <= allowed
    assert not [path for path in tmp_path.rglob('out/**/*') if path.is_file() and path.suffix in ('.pth', '.json')]
    assert Path(values['text']).read_text() == text


class _FoundError(Exception):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


@pytest.mark.parametrize('tool', [*(path.name for path in (ROOT / 'tools').glob('*.py')), 'rkan_mmdet.data.check',
                                  'rkan_mmdet.data.shapes', 'rkan_mmdet.doctor'])  # fmt: skip
def test_no_option_is_left_out(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(self: argparse.ArgumentParser, *rest: object) -> None:
        raise _FoundError(self)

    if tool == 'setup_env.py':  # takes environment variables, see test_setup_env
        return
    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', found)
    if tool.endswith('.py'):
        spec = importlib.util.spec_from_file_location(f'options_of_{tool[:-3]}', ROOT / 'tools' / tool)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(tool)
    with pytest.raises(_FoundError) as stop:
        module.main()
    options = {action.option_strings[0] if action.option_strings else action.dest
               for action in stop.value.parser._actions if action.nargs != 0}  # fmt: skip
    assert options == set(CASES.get(tool, ({}, '', {}))[2])
