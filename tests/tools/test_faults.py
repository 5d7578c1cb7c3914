"""Hostile and torn checkpoints, a full disk, bad data and kills, through the tools themselves."""

import json
import os
import resource
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from mmengine.registry import init_default_scope

from rkan_mmdet.checkpoint import read_checkpoint
from rkan_mmdet.launch import read_config

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / 'configs/demo/mask-rcnn_rkan-r18_fpn_shapes.py')

pytestmark = pytest.mark.slow


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Runs a tool in this process, where the imports are made; gives its exit message, which must be one line."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')
        assert stop.value.code not in (0, None)
        message = str(stop.value.code)
        if message == '2':  # argparse, which has printed it
            return capsys.readouterr().err
        assert message.startswith('error: ')
        assert '\n' not in message
        return message

    return run


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f'touch {self.path}',)


def weights() -> dict:
    from mmdet.registry import MODELS

    init_default_scope('mmdet')
    return MODELS.build(read_config(DEMO).model).state_dict()


def uses(file: Path, root: str, out: Path) -> dict:
    """How each tool is made to read ``file``."""
    data = ['--cfg-options', f'data_root={root}']
    work = ['--work-dir', out / 'work']
    image = Path(root, 'val', '000000.jpg')
    every = {
        'resume': ['train.py', DEMO, *work, '--resume', file, *data],
        'load_from': ['train.py', DEMO, *work, *data, f'load_from={file}'],
        'init_cfg': ['train.py', DEMO, *work, *data, f'model.backbone.init_cfg.checkpoint={file}',
                     'model.backbone.init_cfg.type=Pretrained'],
        'test': ['test.py', DEMO, file, *work, *data],
        'convert': ['convert_checkpoint.py', 'from-plain', file, out / 'out.pth', '--config', DEMO],
        'benchmark': ['benchmark.py', DEMO, file, '--size', 64, 64, '--rounds', 1, '--json', out / 'out.json'],
        'plot': ['plot_kan.py', DEMO, file, '--out', out / 'plots', *data],
        'predict': ['predict.py', DEMO, file, image, '--out', out / 'predictions', *data],
        'export': ['export_onnx.py', DEMO, file, out.with_name('out.onnx')],
        'page': ['page.py', DEMO, file],
    }  # fmt: skip
    return {name: call for name, call in every.items() if (ROOT / 'tools' / call[0]).exists()}


USES = ['resume', 'load_from', 'init_cfg', 'test', 'convert', 'benchmark', 'plot', 'predict', 'export', 'page']


@pytest.mark.parametrize('zip_format', [True, False])
@pytest.mark.parametrize('use', USES)
def test_a_hostile_checkpoint(use: str, zip_format: bool, tool: Callable, shapes_root: str, tmp_path: Path) -> None:
    touched, file, out = tmp_path / 'touched', tmp_path / 'bad.pth', tmp_path / 'out'
    calls = uses(file, shapes_root, out)
    if use not in calls:
        pytest.skip('there is no such tool')
    state = dict(meta=dict(epoch=1, iter=1), state_dict=weights(), message_hub={}, optimizer={})
    places: dict[str, Any] = dict(
        plain=Payload(touched), meta=dict(state, meta=dict(a=[Payload(touched)])),
        optimizer=dict(state, optimizer=dict(state={0: Payload(touched)})),
        state_dict=dict(state, state_dict=dict(state['state_dict'], a=((Payload(touched),),))),
    )  # fmt: skip
    for content in places.values():
        torch.save(content, file, _use_new_zipfile_serialization=zip_format)
        message = tool(*calls[use])
        assert 'bad.pth can not be read safely' in message
        assert f'{os.name}.system' in message
        assert not touched.exists()
        assert not list(tmp_path.glob('out*'))


@pytest.mark.parametrize('use', USES)
def test_torn_empty_and_other_files(use: str, tool: Callable, shapes_root: str, tmp_path: Path) -> None:
    file, out = tmp_path / 'bad.pth', tmp_path / 'out'
    calls = uses(file, shapes_root, out)
    if use not in calls:
        pytest.skip('there is no such tool')
    torch.save(dict(state_dict=weights()), file)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b'', b'a text'):
        file.write_bytes(content)
        assert 'bad.pth can not be read safely' in tool(*calls[use])
    file.unlink()
    assert 'bad.pth do' in tool(*calls[use])  # does not exist
    torch.save([1, 2], file)
    message = tool(*calls[use])
    assert 'bad.pth holds no weights' in message or 'bad.pth can not be resumed, since it lacks' in message
    assert not list(tmp_path.glob('out*'))


def test_auto_resume_of_a_hostile_directory(tool: Callable, shapes_root: str, tmp_path: Path) -> None:
    torch.save(dict(meta=Payload(tmp_path / 'touched')), tmp_path / 'epoch_1.pth')
    data = ['--cfg-options', f'data_root={shapes_root}']
    assert f'{os.name}.system' in tool('train.py', DEMO, '--work-dir', tmp_path, '--resume', *data)
    assert not (tmp_path / 'touched').exists()


def test_a_config_in_a_checkpoint_is_not_run(tool: Callable, shapes_root: str, tmp_path: Path) -> None:
    """On resuming, MMEngine would run this text as Python."""
    meta = dict(epoch=1, iter=1, config=f'open({str(tmp_path / "touched")!r}, "w")\n')
    state = dict(meta=meta, state_dict=weights(), message_hub=dict(), optimizer=dict(a=1))
    torch.save(state, tmp_path / 'epoch_1.pth')
    data = ['--cfg-options', f'data_root={shapes_root}']
    for resume in ([], [tmp_path / 'epoch_1.pth']):
        message = tool('train.py', DEMO, '--work-dir', tmp_path, '--resume', *resume, *data)
        assert 'the training can not begin' in message  # the optimizer's state is none
        assert not (tmp_path / 'touched').exists()


@pytest.mark.parametrize(('option', 'culprit'), [
    ('default_hooks.checkpoint.interval=x', 'interval'), ('optim_wrapper=None', 'optim_wrapper'),
    ('optim_wrapper.optimizer.lr=-1', 'learning rate'),
    ('train_cfg.val_interval=0', 'val_interval'), ('custom_hooks=5', 'custom_hooks'), ('load_from=5', 'load_from'),
    ('default_hooks=5', 'default_hooks'), ('default_scope=5', 'default_scope'), ('load_from=ftp://host/a.pth', 'ftp'),
    ('train_dataloader.dataset.metainfo.classes=disc', 'classes'), ('param_scheduler.0.type=Nope', 'Nope'),
])  # fmt: skip
def test_settings_that_can_not_be(option: str, culprit: str, tool: Callable, shapes_root: str, tmp_path: Path) -> None:
    message = tool(
        'train.py', DEMO, '--work-dir', tmp_path, '--cfg-options', f'data_root={shapes_root}', *option.split()
    )
    assert culprit.lower() in message.lower()
    assert not list(tmp_path.glob('*.pth'))


def test_weights_of_another_model_are_not_resumed(tool: Callable, shapes_root: str, tmp_path: Path) -> None:
    state = dict(meta=dict(epoch=1, iter=1), state_dict=weights(), message_hub={}, optimizer={})
    data = ['--cfg-options', f'data_root={shapes_root}']
    plain = {key: value for key, value in weights().items() if '.rkan.' not in key}
    broken = {key: value * float('nan') if value.is_floating_point() else value for key, value in weights().items()}
    statistics = {key: value * float('nan') if 'running_var' in key else value for key, value in weights().items()}
    for content, what in (
        (plain, 'weights of the detector are not in it'), (broken, 'are NaN or infinite'),
        (statistics, 'are NaN or infinite (backbone.bn1.running_var, '),
    ):  # fmt: skip
        torch.save(dict(state, state_dict=content), tmp_path / 'epoch_1.pth')
        message = tool('train.py', DEMO, '--work-dir', tmp_path, '--resume', *data)
        assert 'does not fit the config' in message
        assert what in message
    torch.save(dict(state_dict=dict(a=torch.ones(1))), tmp_path / 'other.pth')
    message = tool('train.py', DEMO, '--work-dir', tmp_path / 'new', *data, f'load_from={tmp_path / "other.pth"}')
    assert 'other.pth does not fit the config: none of its weights is of the detector' in message


def test_what_is_there_is_not_replaced(tool: Callable, shapes_root: str, tmp_path: Path) -> None:
    data = ['--cfg-options', f'data_root={shapes_root}']
    torch.save(dict(state_dict=weights()), tmp_path / 'epoch_1.pth')
    (tmp_path / 'a.pkl').write_bytes(b'mine')
    work = ['--work-dir', tmp_path]
    assert 'a.pkl exists' in tool('test.py', DEMO, tmp_path / 'epoch_1.pth', *work, '--out', tmp_path / 'a.pkl', *data)
    assert (tmp_path / 'a.pkl').read_bytes() == b'mine'
    assert 'holds checkpoints of a training (epoch_1.pth)' in tool('train.py', DEMO, *work, *data)
    (tmp_path / 'folder').mkdir()
    convert = ['convert_checkpoint.py', 'from-plain', tmp_path / 'epoch_1.pth', tmp_path / 'folder', '--config', DEMO]
    assert 'folder is a folder; name a file' in tool(*convert, '--overwrite')


def test_weights_of_another_model_are_not_tested(tool: Callable, shapes_root: str, tmp_path: Path) -> None:
    state = weights()
    plain = {key: value for key, value in state.items() if '.rkan.' not in key}
    wrong = dict(state, **{'roi_head.bbox_head.fc_cls.bias': torch.zeros(81)})
    for content, name in ((plain, 'backbone.layer4.rkan'), (wrong, r'roi_head.bbox_head.fc_cls.bias')):
        torch.save(dict(state_dict=content), tmp_path / 'a.pth')
        message = tool('test.py', DEMO, tmp_path / 'a.pth', '--work-dir', tmp_path / 'work',
                       '--cfg-options', f'data_root={shapes_root}')  # fmt: skip
        assert 'a.pth does not fit the config' in message
        assert name in message


def annotations(root: str, change: Callable[[dict], Any], path: Path) -> Path:
    content = json.loads(Path(root, 'annotations/instances_train.json').read_text())
    path.write_text(json.dumps(change(content)))
    return path


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda c: [1], 'is not of the COCO form'),
        (lambda c: dict(images=c['images']), "it has no list 'categories'"),
        (
            lambda c: dict(c, categories=[dict(id=i, name=f'x{i}') for i in range(1, 6)]),
            'none is a class of the config',
        ),
        (lambda c: dict(c, categories=c['categories'][::-1]), 'numbers classes by the order in the file'),
    ],
)
def test_annotations_that_are_none(
    change: Callable, message: str, tool: Callable, shapes_root: str, tmp_path: Path
) -> None:
    path = annotations(shapes_root, change, tmp_path / 'a.json')
    for name, part in (('train.py', 'train_dataloader'), ('test.py', 'test_dataloader')):
        torch.save(dict(state_dict={'a': torch.ones(1)}), tmp_path / 'a.pth')
        arguments = [DEMO, *([tmp_path / 'a.pth'] if name == 'test.py' else []), '--work-dir', tmp_path / 'work',
                     '--cfg-options', f'data_root={shapes_root}', f'{part}.dataset.ann_file={path}']  # fmt: skip
        said = tool(name, *arguments)
        assert f'annotation file {path}' in said
        assert message in said
    assert not (tmp_path / 'work').exists()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['train.py'], 'the following arguments are required: config'),
        (['train.py', DEMO, '--launcher', 'x'], "invalid choice: 'x'"),
        (['train.py', DEMO, '--local_rank', 'x'], "invalid int value: 'x'"),
        (['train.py', __file__.replace('.py', '.json')], 'does not exist'),
        (['train.py', str(ROOT / 'README.md')], 'README.md can not be read'),
        (['train.py', str(ROOT / 'tools')], 'tools does not exist'),
        (['train.py', DEMO, '--resume', 'nowhere.pth'], 'checkpoint nowhere.pth does not exist'),
        (['train.py', DEMO, '--cfg-options', 'model.backbone=1'], 'can not be built: TypeError: cfg should be a dict'),
        (['train.py', DEMO, '--cfg-options', 'model.backbone.depth=19'], 'depth'),
        (['train.py', DEMO, '--cfg-options', 'model.backbone.type=RKANResNett'], 'RKANResNett'),
        (['train.py', DEMO, '--cfg-options', 'model.backbone.rkan.degree=3'], "no option 'degree'"),
        (['train.py', DEMO, '--cfg-options', 'model.backbone.nonsense=3'], 'nonsense'),
        (['test.py', DEMO], 'the following arguments are required: checkpoint'),
        (['test.py', DEMO, 'nowhere.pth'], 'checkpoint nowhere.pth does not exist'),
        (['test.py', DEMO, DEMO, '--out', 'a.json'], '--out must end in .pkl or .pickle'),
        (['test.py', DEMO, DEMO, '--wait-time', 'x'], "invalid float value: 'x'"),
    ],
)
def test_slips(arguments: list, message: str, tool: Callable, shapes_root: str, tmp_path: Path) -> None:
    options = ['--work-dir', tmp_path / 'work']
    if '--cfg-options' in arguments:
        arguments = [*arguments, f'data_root={shapes_root}']
    assert message in tool(arguments[0], *arguments[1:2], *(options if len(arguments) > 1 else []), *arguments[2:])


def small(root: str, *options: str) -> list:
    return ['--cfg-options', f'data_root={root}', 'model.backbone.base_channels=8', 'model.backbone.stem_channels=8',
            'model.neck.in_channels=[8,16,32,64]', 'train_dataloader.batch_size=4', 'train_cfg.val_interval=9',
            *options]  # fmt: skip


def process(*arguments: str, limit: int = 0) -> subprocess.CompletedProcess:
    def before() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, preexec_fn=before if limit else None
    )


def test_a_full_disk_and_a_torn_checkpoint(shapes_root: str, tmp_path: Path) -> None:
    work = tmp_path / 'work'

    def train(epochs: int, limit: int = 0) -> subprocess.CompletedProcess:
        options = small(shapes_root, f'train_cfg.max_epochs={epochs}', 'default_hooks.checkpoint.max_keep_ckpts=1')
        return process('tools/train.py', DEMO, '--work-dir', str(work), '--resume', *options, limit=limit)

    done = train(1)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = (work / 'epoch_1.pth').read_bytes()
    full = train(2, limit=len(whole) // 2)
    assert full.returncode == 1
    last = full.stderr.strip().splitlines()[-1]
    assert last.startswith(f'error: {work}/epoch_2.pth can not be written (')
    assert '--resume goes on from the last' in last
    assert 'Traceback' not in full.stderr
    assert sorted(path.name for path in work.iterdir() if path.suffix in ('.pth', '.tmp')) == ['epoch_1.pth']
    assert (work / 'epoch_1.pth').read_bytes() == whole
    assert train(2).returncode == 0

    (work / 'epoch_1.pth').write_bytes(whole)
    torn = work / 'epoch_2.pth'
    torn.write_bytes(torn.read_bytes()[:-1000])
    again = train(2)
    assert again.returncode == 0, again.stderr[-3000:]
    assert 'epoch_2.pth can not be read safely: it is torn' in again.stderr
    assert 'resumed epoch: 1' in again.stdout + again.stderr
    assert read_checkpoint(torn)['meta']['epoch'] == 2


def test_kills() -> None:
    """Ten SIGKILLs at random moments; the full figures are made by the same script."""
    done = process('benchmarks/kill_and_resume.py', '--kills', '10', '--epochs', '4', '--seed', '7')
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert 'bit for bit' in done.stdout
