"""What the tools refuse up front, and how they move a data root."""

import argparse
import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from rkan_mmdet.checkpoint import CheckpointError, TornCheckpointError
from rkan_mmdet.data.config_findings import check_heads
from rkan_mmdet.launch import (
    UserError,
    _check_fit,
    _check_scaled_lr,
    _check_weights,
    _spare_config,
    add_cfg_options,
    backbone_of,
    build_dataset,
    check_config,
    check_names,
    load_config,
    load_exactly,
    prepare_training,
    read_config,
    reading_config,
    start_training,
)

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / 'configs/demo/mask-rcnn_rkan-r18_fpn_shapes.py')
COCO = str(ROOT / 'configs/rkan/mask-rcnn_rkan-r50_fpn_1x_coco.py')


def load(config: str, work_dir: object = None, **options: object) -> Config:
    arguments = dict(config=config, cfg_options=options, launcher='none', local_rank=0, work_dir=work_dir)
    return load_config(argparse.Namespace(**arguments))


def tool(name: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / 'tools' / name), *arguments],
        cwd=ROOT, env=dict(os.environ, **env), capture_output=True, text=True,
    )  # fmt: skip


def test_a_data_root_moves_every_path_under_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for cfg in (load(COCO, data_root='/elsewhere'), load(COCO, data_root='/elsewhere/')):
        assert cfg.train_dataloader.dataset.data_root == '/elsewhere/'
        assert cfg.test_evaluator.ann_file == '/elsewhere/annotations/instances_val2017.json'
        assert 'data/coco' not in cfg.pretty_text
    monkeypatch.setenv('MMDET_DATASETS', '/env')
    assert load(COCO).val_dataloader.dataset.data_root == '/env/'
    assert load(COCO, data_root='/option').val_dataloader.dataset.data_root == '/option/'


@pytest.mark.parametrize('root', ['', './'])
def test_a_data_root_below_which_all_lies(root: str, tmp_path: Path) -> None:
    data = f"dict(dataset=dict(data_root={root!r}, ann_file='a/val.json', data_prefix=dict(img='val/')))"
    (tmp_path / 'c.py').write_text(
        f'data_root = {root!r}\nval_dataloader = {data}\nval_evaluator = dict(ann_file={root + "a/val.json"!r})\n'
        "load_from = './w.pth'\nwork_dir = ''\n"
    )
    cfg = read_config(str(tmp_path / 'c.py'), dict(data_root='/new'))
    assert cfg.val_dataloader.dataset == dict(data_root='/new/', ann_file='a/val.json', data_prefix=dict(img='val/'))
    assert (cfg.data_root, cfg.val_evaluator.ann_file) == ('/new/', '/new/a/val.json')
    assert (cfg.load_from, cfg.work_dir) == ('./w.pth', '')


def test_a_lazy_config_moves_too(tmp_path: Path) -> None:
    (tmp_path / 'base.py').write_text(
        "from mmdet.datasets import CocoDataset\nfrom mmdet.evaluation import CocoMetric\ndata_root = 'data/coco/'\n"
        'train_dataloader = dict(dataset=dict(type=CocoDataset, data_root=data_root))\n'
        "val_evaluator = dict(type=CocoMetric, ann_file=data_root + 'annotations/instances_val2017.json')\n"
    )
    (tmp_path / 'lazy.py').write_text(
        'from mmengine.config import read_base\nwith read_base():\n    from .base import *\n'
    )
    cfg = read_config(str(tmp_path / 'lazy.py'), dict(data_root='/new'))
    assert cfg.train_dataloader.dataset.data_root == '/new/'
    assert cfg.val_evaluator.ann_file == '/new/annotations/instances_val2017.json'
    (tmp_path / 'dumped.py').write_text(cfg.pretty_text)  # as a runner writes it into the work directory
    assert read_config(str(tmp_path / 'dumped.py')).train_dataloader.dataset.data_root == '/new/'


def test_panoptic_annotations_are_not_of_boxes(shapes_root: str, tmp_path: Path) -> None:
    cfg = load(DEMO)
    entry = dict(image_id=1, file_name='a.png', segments_info=[])
    (tmp_path / 'pan.json').write_text(json.dumps(dict(images=[], annotations=[entry], categories=[])))
    dataset = dict(type='CocoPanopticDataset', ann_file=str(tmp_path / 'pan.json'), data_prefix=dict(img=shapes_root))
    cfg.val_dataloader.dataset = dataset
    cfg.val_evaluator = dict(type='CocoPanopticMetric')
    check_config(cfg, ('val_dataloader',), loads_weights=False)
    cfg.val_dataloader.dataset.type = 'CocoDataset'
    with pytest.raises(UserError, match="has no 'id'"):
        check_config(cfg, ('val_dataloader',), loads_weights=False)


def test_tta_of_boxes_alone() -> None:
    spec = importlib.util.spec_from_file_location('test_tool', ROOT / 'tools' / 'test.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    cfg = load(DEMO, **{'model.roi_head.mask_head': None})
    tool.use_tta(cfg)
    assert cfg.model.type == 'DetTTAModel'
    with pytest.raises(UserError, match='--tta can not merge masks'):
        tool.use_tta(load(DEMO))


def test_work_dir_is_the_command_lines_or_the_configs_name() -> None:
    assert load(COCO).work_dir == './work_dirs/mask-rcnn_rkan-r50_fpn_1x_coco'
    assert load(COCO, 'here').work_dir == 'here'


def test_missing_data_is_named(shapes_root: str) -> None:
    with pytest.raises(
        UserError, match=r'instances_train2017\.json of train_dataloader does not exist; name the folder'
    ):
        check_config(load(COCO, data_root='/nowhere'), ('train_dataloader',), loads_weights=False)
    draw = str(ROOT / 'configs/lowdata/mask-rcnn_rkan-r50_fpn_coco-1pct-s1.py')
    with pytest.raises(UserError, match=r'train2017\.1@1\.json of .* does not exist; .*, or draw these annotations'):
        check_config(load(draw, data_root='/nowhere'), ('train_dataloader',), loads_weights=False)
    cfg = load(DEMO, data_root=shapes_root)
    check_config(cfg, ('train_dataloader', 'val_dataloader'), loads_weights=True)
    cfg.val_evaluator.ann_file = '/nowhere.json'
    with pytest.raises(UserError, match=r'annotation file /nowhere\.json of the evaluator'):
        check_config(cfg, ('val_dataloader',), loads_weights=True)


@pytest.mark.parametrize('source', ['torchvision://resnet51', '/nowhere/resnet50.pth'])
def test_missing_weights_are_named(source: str, shapes_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None if name == 'torchvision' else find_spec(name))
    cfg = load(DEMO, data_root=shapes_root)
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=source)
    with pytest.raises(UserError, match=f'pretrained weights {source} .*init_cfg=None'):
        check_config(cfg, ('train_dataloader',), loads_weights=True)
    check_config(cfg, ('test_dataloader',), loads_weights=False)


def test_weights_of_a_pretraining_name_its_command(shapes_root: str) -> None:
    cfg = load(DEMO, data_root=shapes_root)
    cfg.model.backbone.init_cfg = load('configs/rkan/mask-rcnn_rkan-r50_fpn_authors-1x_coco.py').model.backbone.init_cfg
    command = r'`python tools/train\.py configs/pretrain/rkan-r50_authors-100e_in1k\.py`'
    with pytest.raises(UserError, match=f'make them with {command}'):
        check_config(cfg, ('train_dataloader',), loads_weights=True)


def test_a_scope_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None if name == 'mmpretrain' else find_spec(name))
    cfg = load('configs/pretrain/r50_authors-100e_in1k.py')
    with pytest.raises(UserError, match=r'needs mmpretrain, which is not installed: .*make env STACK=pretrain'):
        check_config(cfg, ('train_dataloader',), loads_weights=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        ('train.py', ['nowhere.py'], 'config nowhere.py does not exist'),
        ('train.py', [DEMO, '--resume', 'nowhere.pth'], 'checkpoint nowhere.pth does not exist'),
        ('train.py', [DEMO, '--cfg-options', 'data_root=/nowhere'], '/nowhere/annotations/instances_train.json'),
        (
            'train.py',
            ['configs/lowdata/mask-rcnn_r50_fpn_coco-1pct-s1.py', '--cfg-options', 'model.backbone.init_cfg=None',
             'data_root=/nowhere/'],
            r'/nowhere/.* does not exist; .*or draw these annotations with .* split_coco\.py',
        ),
        ('test.py', [DEMO, 'nowhere.pth'], 'checkpoint nowhere.pth does not exist'),
        ('test.py', [DEMO, DEMO, '--out', 'a.json'], '--out must end in .pkl or .pickle, but got a.json'),
        ('test.py', [DEMO, DEMO, '--tta'], '--tta can not merge masks'),
        pytest.param(
            'train.py', [DEMO, '--amp'], 'mixed precision .* needs a GPU',
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU'),
        ),
    ],
)  # fmt: skip
def test_a_slip_is_one_line_and_an_exit_code(name: str, arguments: list, message: str) -> None:
    result = tool(name, *arguments)
    assert result.returncode == 1
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith('error: ')
    import re

    assert re.search(message, lines[0])


@pytest.mark.parametrize('classes', ['disc', 5, ('disc', 3), [['disc']]])
def test_class_names_of_the_wrong_kind(classes: object, shapes_root: str) -> None:
    cfg = load(DEMO, data_root=shapes_root)
    cfg.train_dataloader.dataset.metainfo = dict(classes=classes)
    with pytest.raises(UserError, match=r'metainfo\.classes of train_dataloader must be a tuple of names'):
        check_config(cfg, ('train_dataloader',), loads_weights=False)


def test_what_an_evaluation_needs_is_asked_for_before_the_training(shapes_root: str, tmp_path: Path) -> None:
    content = json.loads(Path(shapes_root, 'annotations/instances_val.json').read_text())
    cfg = load(DEMO, data_root=shapes_root)
    for key in ('segmentation', 'iscrowd'):
        for annotation in content['annotations']:
            del annotation[key]
        (tmp_path / 'val.json').write_text(json.dumps(content))
        cfg.val_dataloader.dataset.ann_file = str(tmp_path / 'val.json')
        with pytest.raises(UserError, match=rf"annotations\[0\] has no '{key}'"):
            check_config(cfg, ('val_dataloader',), loads_weights=False)
    cfg.val_evaluator.ann_file = None  # then the metric makes the file from the data set, which has read it
    check_config(cfg, ('val_dataloader',), loads_weights=False)


def test_a_class_that_is_not_evaluated_is_named_before_the_training(shapes_root: str, tmp_path: Path) -> None:
    content = json.loads(Path(shapes_root, 'annotations/instances_val.json').read_text())
    gone = content['categories'].pop()['id']
    content['annotations'] = [a for a in content['annotations'] if a['category_id'] != gone]
    (tmp_path / 'val.json').write_text(json.dumps(content))
    cfg = load(DEMO, data_root=shapes_root)
    for part in (cfg.train_dataloader.dataset, cfg.val_dataloader.dataset, cfg.val_evaluator):
        part.ann_file = str(tmp_path / 'val.json')
    check_config(cfg, ('train_dataloader',), loads_weights=False)
    with pytest.raises(UserError, match=r'val\.json has no category ring, a prediction of which would stop'):
        check_config(cfg, ('val_dataloader',), loads_weights=False)
    cfg.val_evaluator.metric = 'proposal_fast'  # of one class
    check_config(cfg, ('val_dataloader',), loads_weights=False)


def test_a_new_training_replaces_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / 'start.pth').write_bytes(b'')  # not of a training
    prepare_training(load(DEMO, tmp_path))
    (tmp_path / 'epoch_3.pth').write_bytes(b'')
    for resume in (None, str(Path(__file__))):
        with pytest.raises(UserError, match=r'holds checkpoints of a training \(epoch_3\.pth\).*--resume'):
            prepare_training(load(DEMO, tmp_path), resume)


@pytest.mark.parametrize('saving', [dict(out_dir='OUT'), dict(filename_tmpl='ckpt_{:03d}.pth'), {}], ids=str)
def test_a_new_training_replaces_no_checkpoint_wherever_it_is(saving: dict, tmp_path: Path) -> None:
    cfg = load(DEMO, tmp_path / 'run')
    cfg.default_hooks.checkpoint.update({k: str(tmp_path / v) if v == 'OUT' else v for k, v in saving.items()})
    folder = tmp_path / 'OUT' / 'run' if 'out_dir' in saving else tmp_path / 'run'
    folder.mkdir(parents=True)
    torch.save(dict(state_dict=dict(a=torch.ones(1))), folder / 'model.pth')
    prepare_training(copy.deepcopy(cfg))
    torch.save(dict(state_dict=dict(a=torch.ones(1))), folder / saving.get('filename_tmpl', 'epoch_{}.pth').format(7))
    for resume in (None, 'auto'):  # weights alone are no training to go on with, and are kept all the same
        with pytest.raises(UserError, match=r'holds checkpoints of a training \((ckpt_00|epoch_)7\.pth\)'):
            prepare_training(copy.deepcopy(cfg), resume)


def test_hooks_are_set_in_any_config(tmp_path: Path) -> None:
    for hooks in ({}, None, dict(checkpoint=dict(type='CheckpointHook', interval=3))):
        cfg = load(DEMO, tmp_path)
        cfg.default_hooks = hooks
        prepare_training(cfg)
        interval = 3 if hooks else 1
        assert cfg.default_hooks.checkpoint == dict(type='AtomicCheckpointHook', interval=interval)
        assert [hook.type for hook in cfg.custom_hooks][-2:] == ['ReseedHook', 'FiniteHook']
    cfg.default_hooks = dict(checkpoint=None)
    prepare_training(cfg)
    assert cfg.default_hooks.checkpoint is None
    cfg.load_from = 5
    with pytest.raises(UserError, match='load_from must be a file or an address, but is 5'):
        prepare_training(cfg)


def test_what_no_checkpoint_holds_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = dict(meta=dict(epoch=1, iter=2), state_dict={}, message_hub={}, optimizer={})
    torch.save(state, tmp_path / 'epoch_1.pth')
    cfg = load(DEMO, tmp_path)
    assert prepare_training(cfg, 'auto')['meta'] == state['meta']
    assert 'warning' not in capsys.readouterr().out
    cfg.custom_hooks = [dict(type='EarlyStoppingHook', monitor='coco/bbox_mAP')]
    prepare_training(cfg, 'auto')
    assert 'warning: EarlyStoppingHook remembers what no checkpoint holds' in capsys.readouterr().out
    for counts, said in ((2, False), (4, True)):
        cfg.optim_wrapper.accumulative_counts = counts
        prepare_training(cfg, 'auto')
        assert ('between two steps of the optimizer' in capsys.readouterr().out) is said


def test_what_a_training_starts_from_is_not_resumed(tmp_path: Path) -> None:
    state = dict(meta=dict(epoch=9, iter=90), state_dict=dict(a=torch.ones(1)), message_hub={}, optimizer={})
    torch.save(state, tmp_path / 'init.pth')
    cfg = load(DEMO, tmp_path, load_from=str(tmp_path / 'init.pth'))
    assert prepare_training(cfg, 'auto') is None
    assert (cfg.resume, cfg.load_from) == (False, str(tmp_path / 'init.pth'))
    cfg.default_hooks.checkpoint.filename_tmpl = 'ckpt_{:02d}.pth'
    torch.save(dict(state, meta=dict(epoch=1, iter=10)), tmp_path / 'ckpt_01.pth')
    assert prepare_training(cfg, 'auto')['meta']['iter'] == 10


def test_a_torn_checkpoint_is_no_fault_of_the_config() -> None:
    with pytest.raises(TornCheckpointError), reading_config():
        raise TornCheckpointError('a.pth is torn')


def test_a_data_set_that_no_registry_knows() -> None:
    with pytest.raises(UserError, match=r'a data set of the config can not be built: .*Unknown'):
        build_dataset(dict(type='Unknown'))


def test_a_scaled_rate_of_other_gpus_is_refused() -> None:
    cfg = Config(
        dict(
            auto_scale_lr=dict(enable=True, base_batch_size=16),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.02)),
            train_dataloader=dict(batch_size=2),
        )
    )
    state = dict(optimizer=dict(param_groups=[dict(lr=0.002, initial_lr=0.02), dict(lr=2e-4, initial_lr=0.002)]))
    _check_scaled_lr(SimpleNamespace(cfg=cfg, world_size=8), state, 'epoch_3.pth')
    with pytest.raises(UserError, match=r'epoch_3\.pth has a learning rate of 0\.02 .* 4 x 2 images ask for 0\.01'):
        _check_scaled_lr(SimpleNamespace(cfg=cfg, world_size=4), state, 'epoch_3.pth')
    faster = dict(optimizer=dict(param_groups=[dict(initial_lr=0.2), dict(initial_lr=0.02)]))  # lr_mult=10
    _check_scaled_lr(SimpleNamespace(cfg=cfg, world_size=8), faster, 'epoch_3.pth')
    cfg.auto_scale_lr.enable = False
    _check_scaled_lr(SimpleNamespace(cfg=cfg, world_size=4), state, 'epoch_3.pth')


def test_buffers_that_older_versions_saved(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1))
    model.register_buffer(
        'mean', torch.zeros(3), persistent=False
    )  # as the data preprocessor's, in the files of the zoo
    state = model.state_dict()
    load_exactly(model, dict(state, mean=torch.ones(3)), 'a.pth')
    assert not model.mean.any()
    with pytest.raises(UserError, match=r'1 weights in it are not of the detector \(other\)'):
        load_exactly(model, dict(state, mean=torch.ones(3), other=torch.ones(3)), 'a.pth')
    state['0.weight'][0] = torch.nan
    with pytest.raises(UserError, match=r'1 weights in it are NaN or infinite \(0\.weight\)'):
        load_exactly(model, state, 'a.pth')


def test_what_a_semi_supervised_detector_starts_from(tmp_path: Path) -> None:
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1))
    torch.save(dict(state_dict=plain.state_dict()), tmp_path / 'plain.pth')
    runner = SimpleNamespace(_load_from=str(tmp_path / 'plain.pth'))
    runner.model = torch.nn.ModuleDict(dict(student=plain, teacher=copy.deepcopy(plain)))
    _check_fit(runner, None)
    runner.model = torch.nn.ModuleDict(dict(other=plain))
    with pytest.raises(UserError, match='none of its weights is of the detector'):
        _check_fit(runner, None)


def test_weights_of_the_form_of_swin(tmp_path: Path) -> None:
    torch.save(dict(model=torch.nn.Conv2d(3, 4, 1).state_dict()), tmp_path / 'swin.pth')
    _check_weights(str(tmp_path / 'swin.pth'), '')
    torch.save(dict(model={}), tmp_path / 'none.pth')
    with pytest.raises(CheckpointError, match='holds no weights'):
        _check_weights(str(tmp_path / 'none.pth'), '')


def test_weights_of_a_backbone_alone_where_those_of_a_model_are_wanted(tmp_path: Path) -> None:
    torch.save(torch.nn.Conv2d(3, 4, 1).state_dict(), tmp_path / 'backbone.pth')
    with pytest.raises(UserError, match=r"begin with 'backbone\.'; .*model\.backbone\.init_cfg\.prefix=None"):
        _check_weights(str(tmp_path / 'backbone.pth'), 'backbone.')


@pytest.mark.parametrize('value', ['a=(x,y', 'a=dict(x,y)'])
def test_brackets_that_do_not_match(value: str, capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    add_cfg_options(parser)
    assert parser.parse_args(['--cfg-options', 'a=1', 'b=[2,3]']).cfg_options == dict(a=1, b=[2, 3])
    with pytest.raises(SystemExit):
        parser.parse_args(['--cfg-options', 'b=1', value])
    assert f'--cfg-options {value} can not be read: ' in capsys.readouterr().err


@pytest.mark.parametrize('last', ['before_train', 'before_train_epoch'])
def test_what_fails_before_the_first_epoch_is_one_line(last: str) -> None:
    class Runner:
        train_loop = SimpleNamespace(val_interval=1)

        def call_hook(self, name: str, **options: object) -> None:
            if name == last:
                raise ValueError('a hook of yours')

        def train(self) -> None:
            for name in ('before_train', 'before_train_epoch'):
                self.call_hook(name)

    with pytest.raises(UserError if last == 'before_train' else ValueError, match='a hook of yours'):
        start_training(Runner())


def test_configs_are_not_replaced(tmp_path: Path) -> None:
    text = f'# mine\n_base_ = {DEMO!r}\n'
    (tmp_path / 'mine.py').write_text(text)
    cfg = load(str(tmp_path / 'mine.py'), work_dir=str(tmp_path))
    _spare_config(cfg, 'train')
    assert Path(cfg.filename).name == 'mine_train.py'
    (tmp_path / 'run').mkdir()
    for loop, name in (('train', 'mine.py'), ('test', 'mine_test.py')):
        (tmp_path / 'run/mine.py').write_text('of the training')
        cfg = load(str(tmp_path / 'mine.py'), work_dir=str(tmp_path / 'run'))
        _spare_config(cfg, loop)
        assert Path(copy.deepcopy(cfg).filename).name == name
    (tmp_path / 'run/mine_test.py').write_text(text)  # of the user, too
    cfg = load(str(tmp_path / 'mine.py'), work_dir=str(tmp_path / 'run'))
    _spare_config(cfg, 'test')
    assert Path(cfg.filename).name == 'mine_test_.py'
    cfg.dump(tmp_path / 'run/mine_test.py')
    _spare_config(cfg, 'test')
    assert Path(cfg.filename).name == 'mine_test_.py'


def test_classes_of_the_checkpoint(capsys: pytest.CaptureFixture) -> None:
    dataset = SimpleNamespace(metainfo=dict(classes=('cat', 'dog')))
    for classes in (('cat', 'dog'), None):
        check_names(dict(dataset_meta=dict(classes=classes)), dataset, 'a.pth')
    assert not capsys.readouterr().out
    check_names(dict(dataset_meta=dict(classes=['cat', 'cow'])), dataset, 'a.pth')
    assert (
        'warning: checkpoint a.pth has other classes (cat, cow) than the config (cat, dog)' in capsys.readouterr().out
    )
    check_names(dict(dataset_meta=dict(classes=['dog', 'cat'])), dataset, 'a.pth')
    assert 'a.pth has its classes in another order (dog, cat) than the config (cat, dog)' in capsys.readouterr().out
    for other in (SimpleNamespace(), SimpleNamespace(metainfo=[dict(classes=('cat',)), dict(classes=('dog',))])):
        check_names(dict(dataset_meta=dict(classes=('cat',))), other, 'a.pth')  # a set of torch, and one that is joined
    assert not capsys.readouterr().out


def test_the_file_that_is_scored_against(shapes_root: str, tmp_path: Path) -> None:
    cfg = load(DEMO, data_root=shapes_root)
    read = Path(cfg.val_dataloader.dataset.data_root, cfg.val_dataloader.dataset.ann_file)
    content = json.loads(read.read_text())
    other = tmp_path / 'other.json'
    cfg.val_evaluator.ann_file = str(other)
    for part in (dict(), dict(images=content['images'][:-1]), dict(categories=content['categories'][::-1])):
        other.write_text(json.dumps(dict(content, **part)))
        if part:
            with pytest.raises(UserError, match=f'other.json of the evaluator has other {next(iter(part))} than'):
                check_config(cfg, ('val_dataloader',), loads_weights=True)
        else:
            check_config(cfg, ('val_dataloader',), loads_weights=True)
    unused = [*content['categories'], dict(id=99, name='cube')]
    other.write_text(json.dumps(dict(content, categories=unused)))  # which no class of the config is
    check_config(cfg, ('val_dataloader',), loads_weights=True)
    other.write_text('{}')
    with pytest.raises(UserError, match=r"other\.json is not of the COCO form: KeyError\('images'\)"):
        check_config(cfg, ('val_dataloader',), loads_weights=True)
    cfg.val_evaluator.format_only = True
    check_config(cfg, ('val_dataloader',), loads_weights=True)


def test_heads_of_fewer_classes_than_the_data(shapes_root: str) -> None:
    cfg = load(DEMO, data_root=shapes_root)
    check_heads(cfg)
    cfg.model.roi_head.bbox_head.num_classes = 4
    with pytest.raises(UserError, match=r'has 5 classes, the heads fewer: .*bbox_head=dict\(num_classes=5\)'):
        check_heads(cfg)


def test_the_backbone_of_a_detector() -> None:
    with pytest.raises(UserError, match='Linear has no backbone of its own'):
        backbone_of(torch.nn.Linear(1, 1))
