"""A config for one's own data: what is written, that it builds and trains, and what is refused."""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Callable

import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, METRICS, MODELS
from mmengine.config import Config
from mmengine.optim import LinearLR
from mmengine.registry import init_default_scope

from rkan_mmdet.data.project import Split, make_project
from rkan_mmdet.data.schedule import plan_schedule
from rkan_mmdet.launch import UserError, read_config

ROOT = Path(__file__).parents[2]
DEMO = ROOT / 'configs' / 'demo' / 'mask-rcnn_rkan-r18_fpn_shapes.py'
NAMES = ('disc', 'box', 'triangle', 'star', 'ring')
FASTER = 'configs/rkan/faster-rcnn_rkan-r50_fpn_1x_coco.py'


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Runs a tool in this process, where the imports are made; gives its output and the message that it ends with."""

    def run(tool: str, *arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, 'argv', [tool, *map(str, arguments)])
        capsys.readouterr()
        message = ''
        try:
            runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')
        except SystemExit as stop:
            message = str(stop.code or '')
        return capsys.readouterr().out, message

    return run


def split(root: str, name: str) -> list[str]:
    return [f'{root}/annotations/instances_{name}.json', f'{root}/{name}']


def both(root: str) -> list[str]:
    return ['--train', *split(root, 'train'), '--val', *split(root, 'val')]


def project(base: str, root: str, **options: object) -> Config:
    """What the written text says."""
    text = make_project(base, Split(*split(root, 'train')), Split(*split(root, 'val')), **options).text()
    return Config.fromstring(text, '.py')


def change(root: str, tmp_path: Path, function: Callable[[dict], object]) -> list[str]:
    """The options for a copy of the training file with a change."""
    annotations, images = split(root, 'train')
    content = json.loads(Path(annotations).read_text())
    function(content)
    path = tmp_path / 'changed.json'
    path.write_text(json.dumps(content))
    return ['--train', str(path), images, '--val', *split(root, 'val')]


@pytest.mark.slow
def test_it_trains_and_is_scored(run: Callable, shapes_root: str, tmp_path: Path) -> None:
    out = tmp_path / 'deep' / 'mine.py'
    options = ('--batch-size', 2, '--epochs', 1, '--scale', 64, 64)
    said, message = run('new_project.py', out, '--base', os.path.relpath(DEMO), *both(shapes_root), *options)
    assert message == ''
    assert f'Next: python tools/train.py {out}' in said
    assert [path.name for path in out.parent.iterdir()] == ['mine.py']
    assert "\n_base_ = ['../" in out.read_text()

    cfg = Config.fromfile(out)
    init_default_scope('mmdet')
    assert len(DATASETS.build(cfg.train_dataloader.dataset)) == 8
    assert [t.scale for t in cfg.train_dataloader.dataset.pipeline if t.type == 'Resize'] == [(64, 64)]
    assert cfg.optim_wrapper.accumulative_counts == 4
    _, message = run('train.py', out, '--work-dir', tmp_path / 'work')
    assert message == ''
    checkpoint = torch.load(tmp_path / 'work' / 'epoch_1.pth', weights_only=True)
    assert checkpoint['meta']['dataset_meta']['classes'] == NAMES
    assert checkpoint['meta']['iter'] == 4
    said, message = run('test.py', out, tmp_path / 'work' / 'epoch_1.pth', '--work-dir', tmp_path / 'work')
    assert message == ''


@pytest.mark.parametrize(
    'base',
    [
        'configs/rkan/mask-rcnn_rkan-r50_fpn_1x_coco.py',
        'configs/rkan/mask-rcnn_rkan-r50_fpn_authors-1x_coco.py',
        'configs/rkan/faster-rcnn_rkan-x101-32x4d_fpn_authors-1x_coco.py',
        'configs/rkan/faster-rcnn_rkan-r50_fpn_authors-1x_voc0712.py',  # another format, joined of two sets
        'configs/lowdata/mask-rcnn_rkan-r50_fpn_coco-1pct-s1.py',  # a set in a wrapper
        'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',  # heads in a list
        'mmdet::yolox/yolox_s_8xb8-300e_coco.py',  # a wrapper with a pipeline of its own
        'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
        'mmdet::lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py',  # another evaluator
    ],
)
def test_bases(base: str, shapes_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cfg = project(base, shapes_root)
    assert cfg.custom_imports.imports == ['rkan_mmdet']
    init_default_scope('mmdet')
    for loader, count in ((cfg.train_dataloader, 8), (cfg.val_dataloader, 4), (cfg.test_dataloader, 4)):
        dataset = DATASETS.build(loader.dataset)
        assert len(dataset) in (count, 10 * count)
        assert dataset.metainfo['classes'] == NAMES
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert isinstance(METRICS.build(evaluator), CocoMetric)
        assert evaluator.ann_file == split(shapes_root, 'val')[0]
        assert ('segm' in evaluator.metric) == ('mask-rcnn' in base)
    heads = cfg.model.get('roi_head', cfg.model)
    heads = [head for k in ('bbox_head', 'mask_head') for head in _as_list(heads.get(k))]
    assert heads
    assert {head.num_classes for head in heads} == {5}


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


@pytest.mark.slow
def test_the_model_builds(shapes_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cfg = project('configs/rkan/mask-rcnn_rkan-r50_fpn_1x_coco.py', shapes_root)
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model)
    assert model.roi_head.bbox_head.fc_cls.out_features == 6
    assert model.roi_head.mask_head.conv_logits.out_channels == 5


@pytest.mark.parametrize(
    ('batch_size', 'gpus', 'accumulate', 'lr'),
    [(2, 1, 8, 0.02), (2, 8, 1, 0.02), (16, 1, 1, 0.02), (3, 1, 1, 0.00375), (4, 8, 1, 0.04), (1, 2, 8, 0.02)],
)
def test_learning_rate(batch_size: int, gpus: int, accumulate: int, lr: float, shapes_root: str) -> None:
    cfg = project(str(ROOT / FASTER), shapes_root, batch_size=batch_size, gpus=gpus)
    assert cfg.optim_wrapper.get('accumulative_counts', 1) == accumulate
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(lr)
    assert cfg.optim_wrapper.optimizer.momentum == 0.9
    assert cfg.train_dataloader.batch_size == batch_size
    # tools/train.py --auto-scale-lr has nothing left to do
    assert cfg.auto_scale_lr.base_batch_size == batch_size * gpus


def test_the_batch_of_a_base() -> None:
    cfg = Config(dict(optim_wrapper=dict(optimizer=dict(lr=0.004)), auto_scale_lr=dict(base_batch_size=16)))
    assert plan_schedule(cfg, 32, name='rtmdet_s_8xb32-300e_coco.py').accumulate == 8  # its auto_scale_lr is inherited
    assert plan_schedule(cfg, 32, name='x101-32x4d_fpn_1x_coco.py').lr == 0.008
    cfg.optim_wrapper.accumulative_counts = 4
    assert plan_schedule(cfg, 16).accumulate == 4
    assert plan_schedule(cfg, 2).accumulate == 32
    cfg.auto_scale_lr = None
    unknown = plan_schedule(cfg, 5)
    assert (unknown.accumulate, unknown.lr) == (4, 0.004)
    assert 'left as it is' in unknown.why


def test_epochs(shapes_root: str) -> None:
    cfg = project(str(ROOT / FASTER), shapes_root, epochs=120)
    warmup, steps = cfg.param_scheduler
    assert (cfg.train_cfg.max_epochs, cfg.train_cfg.type) == (120, 'EpochBasedTrainLoop')
    assert (steps.milestones, steps.end) == ([80, 110], 120)
    assert warmup.end == 48  # a tenth of 120 epochs of 4 iterations, where 500 iterations of 16 images are 4000 of 2
    many = project(str(ROOT / FASTER), shapes_root, epochs=12000)
    assert many.param_scheduler[0].end == 4000


@pytest.mark.parametrize('scheduler', ["dict(type='StepLR', step_size=8)", "dict(type='ExponentialLR', gamma=0.9)"])
def test_epochs_of_other_schedulers(scheduler: str, shapes_root: str, tmp_path: Path) -> None:
    base = tmp_path / 'base.py'
    base.write_text(f'_base_ = {str(ROOT / FASTER)!r}\nparam_scheduler = [{scheduler}]\n')
    if 'Step' in scheduler:
        assert project(str(base), shapes_root, epochs=120).param_scheduler[0].step_size == 80
    else:
        with pytest.raises(UserError, match='ExponentialLR of the base has no length to stretch'):
            project(str(base), shapes_root, epochs=120)
        project(str(base), shapes_root, epochs=12)


def test_a_place_behind_a_link_with_a_space_in_it(run: Callable, shapes_root: str, tmp_path: Path) -> None:
    (tmp_path / 'real/deep/deeper').mkdir(parents=True)
    (tmp_path / 'link').symlink_to(tmp_path / 'real/deep/deeper')
    out = tmp_path / 'link' / 'my own.py'
    said, message = run('new_project.py', out, '--base', DEMO, *both(shapes_root))
    assert message == ''
    assert f"Next: python tools/train.py '{out}'" in said
    assert Config.fromfile(str(out)).model.type == 'MaskRCNN'


def test_epochs_in_hooks(shapes_root: str) -> None:
    cfg = project('mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py', shapes_root, epochs=30, batch_size=6)
    assert [hook.switch_epoch for hook in cfg.custom_hooks if 'switch_epoch' in hook] == [28]
    assert cfg.train_cfg.dynamic_intervals == [(28, 1)]
    cosine = cfg.param_scheduler[1]
    assert (cosine.begin, cosine.end, cosine.T_max) == (15, 30, 15)
    assert cosine.eta_min == pytest.approx(cfg.optim_wrapper.optimizer.lr * 0.05)


def test_one_epoch_still_reaches_the_full_learning_rate(shapes_root: str) -> None:
    cfg = project(str(ROOT / FASTER), shapes_root, epochs=1)
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    warmup = {k: v for k, v in cfg.param_scheduler[0].items() if k not in ('type', '_scope_')}
    scheduler = LinearLR(optimiser, **warmup)
    for _ in range(4):
        optimiser.step()
        scheduler.step()
    assert optimiser.param_groups[0]['lr'] == pytest.approx(0.02)


def test_paths(shapes_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths stay so, and ``data_root`` moves them all."""
    monkeypatch.chdir(Path(shapes_root).parent)
    name = Path(shapes_root).name
    cfg = project(str(DEMO), name)
    assert cfg.data_root == f'{name}/'
    path = tmp_path / 'mine.py'
    path.write_text(make_project(str(DEMO), Split(*split(name, 'train')), Split(*split(name, 'val'))).text(str(path)))
    moved = read_config(str(path), dict(data_root='/elsewhere'))
    assert moved.train_dataloader.dataset.data_root == '/elsewhere/'
    assert moved.val_evaluator.ann_file == '/elsewhere/annotations/instances_val.json'
    mixed = make_project(str(DEMO), Split(*split(name, 'train')), Split(*split(shapes_root, 'val'))).text()
    assert f"data_root = '{os.path.realpath(shapes_root)}/'" in mixed.replace(
        shapes_root, os.path.realpath(shapes_root)
    )


def test_paths_without_a_folder(
    run: Callable, shapes_root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ('train', 'val'):
        annotations, images = split(shapes_root, name)
        (tmp_path / f'{name} set.json').write_bytes(Path(annotations).read_bytes())
        (tmp_path / f'{name} images').symlink_to(images)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MMDET_DATASETS', '/elsewhere')
    data = ('--train', 'train set.json', 'train images/', '--val', 'val set.json', './val images')
    said, message = run('new_project.py', 'mine.py', '--base', DEMO, *data)
    assert message == ''
    assert '8 epochs of 1 iteration: 8 steps of the optimiser; that is few' in said
    assert '--epochs 1000 makes it 1000' in said
    assert 'MMDET_DATASETS is set' in said
    cfg = Config.fromfile('mine.py')
    assert cfg.train_dataloader.dataset.data_prefix.img == 'train images/'
    init_default_scope('mmdet')
    assert len(DATASETS.build(cfg.val_dataloader.dataset)[0]['inputs']) == 3


def test_the_length_of_an_epoch(shapes_root: str, tmp_path: Path) -> None:
    def thin(content: dict) -> None:
        content['annotations'] = [a for a in content['annotations'] if a['image_id'] > 3]

    data = change(shapes_root, tmp_path, thin)
    train, val = Split(*data[1:3]), Split(*data[4:6])
    # images without boxes are dropped by this base, and its epoch goes 10 times over the 5 others
    base = ROOT / 'configs' / 'lowdata' / 'mask-rcnn_rkan-r50_fpn_coco-1pct-s1.py'
    assert make_project(str(base), train, val).length.startswith('12 epochs of 25 iterations: 38 steps')
    assert make_project(str(base), train, val, gpus=2).length.startswith('12 epochs of 13 iterations: 39 steps')
    assert make_project(str(DEMO), train, val, batch_size=4).length.startswith('8 epochs of 2 iterations: 8 steps')


def test_a_test_set(shapes_root: str) -> None:
    cfg = project(str(DEMO), shapes_root, test=Split(*split(shapes_root, 'train')))
    assert cfg.test_dataloader.dataset.ann_file == 'annotations/instances_train.json'
    assert cfg.test_evaluator.ann_file.endswith('instances_train.json')
    assert cfg.val_evaluator.ann_file.endswith('instances_val.json')


def test_evaluators_in_a_list(shapes_root: str, tmp_path: Path) -> None:
    base = tmp_path / 'base.py'
    base.write_text(
        f"_base_ = ['{DEMO}']\n"
        "val_evaluator = [dict(type='CocoMetric', ann_file='x.json', metric='bbox', classwise=True), "
        "dict(type='DumpDetResults', out_file_path='a.pkl')]\ntest_evaluator = val_evaluator\n"
    )
    for evaluators in (lambda cfg: cfg.val_evaluator, lambda cfg: cfg.test_evaluator):
        coco, dump = evaluators(project(str(base), shapes_root))
        assert coco == dict(type='CocoMetric', ann_file=split(shapes_root, 'val')[0], metric='bbox', classwise=True)
        assert dump.type == 'DumpDetResults'


def test_classes_in_the_order_of_the_file(run: Callable, shapes_root: str, tmp_path: Path) -> None:
    """MMDetection numbers labels by the file's order, whatever the ids are."""
    train = change(shapes_root, tmp_path, lambda c: c['categories'].reverse())
    out = tmp_path / 'mine.py'
    said, message = run('new_project.py', out, '--base', DEMO, *train)
    assert 'classes-differ' in said  # the validation set has another order
    assert message == f'error: the data has errors, listed above: {out} is not written'
    assert not out.exists()
    reversed_val = ['--val', train[1], split(shapes_root, 'train')[1]]
    _, message = run('new_project.py', out, '--base', DEMO, *train[:3], *reversed_val)
    assert message == ''
    assert Config.fromfile(out).metainfo.classes == NAMES[::-1]


def test_more_classes_than_colours(shapes_root: str, tmp_path: Path) -> None:
    more = [dict(id=i, name=f'kind {i}') for i in range(100, 180)]
    train = change(shapes_root, tmp_path, lambda c: c['categories'].extend(more))
    text = make_project(str(ROOT / FASTER), Split(*train[1:3]), Split(*train[1:3])).text()
    cfg = Config.fromstring(text, '.py')
    assert cfg.model.roi_head.bbox_head.num_classes == 85
    assert cfg.train_dataloader.dataset.metainfo.palette == 'random'


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--base', 'none.py'], '--base none.py does not exist'),
        (['--base', 'mmdet::none/none.py'], '--base mmdet::none/none.py can not be read'),
        (['--base', 'mmdet::rpn/rpn_r50_fpn_1x_coco.py'], 'has no head with num_classes'),
        (['--base', 'mmdet::htc/htc_r50_fpn_1x_coco.py'], 'learns from semantic maps too'),
        (['--base', 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'], 'does not train by epochs'),
        (['--batch-size', 0], '--batch-size must be at least 1, but got 0'),
        (['--gpus', -1], '--gpus must be at least 1, but got -1'),
        (['--epochs', 0], '--epochs must be at least 1, but got 0'),
        (['--scale', 0, 300], '--scale must be at least 32 32, but got 0 300'),
        (
            ['--scale', 640, 640, '--base', 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_ms-poly-3x_coco.py'],
            '--scale is for pipelines with one Resize; the train pipeline of the base has its sizes in RandomResize',
        ),
        (['--train', 'none.json', '.'], '--train: annotation file none.json does not exist'),
        (['--val', str(DEMO), 'none'], '--val: none is not a folder'),
        (['--train', str(DEMO), '.'], f'annotation file {DEMO} is not JSON'),
    ],
)
def test_refusals(options: list, message: str, run: Callable, shapes_root: str, tmp_path: Path) -> None:
    out = tmp_path / 'new' / 'mine.py'
    _, said = run('new_project.py', out, '--base', DEMO, *both(shapes_root), *options)
    assert said.startswith('error: ')
    assert message in said
    assert '\n' not in said
    assert not out.parent.exists()


def test_nothing_is_overwritten(run: Callable, shapes_root: str, tmp_path: Path) -> None:
    out = tmp_path / 'mine.py'
    out.write_text('mine')
    _, said = run('new_project.py', out, '--base', DEMO, *both(shapes_root))
    assert said == f'error: {out} exists: name another file, or remove it'
    assert out.read_text() == 'mine'
    _, said = run('new_project.py', tmp_path / 'mine.json', '--base', DEMO, *both(shapes_root))
    assert 'must end in .py' in said


def test_boxes_alone(run: Callable, shapes_root: str, tmp_path: Path) -> None:
    def strip(content: dict) -> None:
        for annotation in content['annotations']:
            del annotation['segmentation']

    data = change(shapes_root, tmp_path, strip)
    base = ROOT / 'configs' / 'rkan' / 'mask-rcnn_rkan-r101_fpn_1x_coco.py'
    _, said = run('new_project.py', tmp_path / 'mine.py', '--base', base, *data)
    assert f'learns masks and {data[1]} has none: choose a base of boxes alone, such as' in said
    assert said.endswith('faster-rcnn_rkan-r101_fpn_1x_coco.py')
    _, said = run('new_project.py', tmp_path / 'mine.py', '--base', DEMO, *data)
    assert said.endswith(FASTER)
    _, said = run('new_project.py', tmp_path / 'mine.py', '--base', ROOT / FASTER, *data)
    assert said == ''
    assert (tmp_path / 'mine.py').exists()


def test_errors_in_the_data_are_shown(run: Callable, shapes_root: str, tmp_path: Path) -> None:
    def shrink(content: dict) -> None:
        for annotation in content['annotations']:
            annotation['bbox'][2] = 0

    out = tmp_path / 'mine.py'
    text, said = run('new_project.py', out, '--base', DEMO, *change(shapes_root, tmp_path, shrink))
    assert 'box-empty' in text
    assert said == f'error: the data has errors, listed above: {out} is not written'
    assert [path.name for path in tmp_path.iterdir()] == ['changed.json']
