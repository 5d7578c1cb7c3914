"""The hook leaves pictures, and the training as it was."""

from pathlib import Path

import cv2
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, init_default_scope
from mmengine.runner import Runner

from rkan_mmdet.report import kan_convs

ROOT = Path(__file__).parents[1]

CONFIG = ROOT / 'configs/demo/mask-rcnn_rkan-r18_fpn_shapes.py'
PLAIN = ROOT / 'configs/study/mask-rcnn_r18_fpn_shapes.py'
FUNCTIONS = {f'functions_of_backbone.layer4.rkan.kan_conv{i}' for i in (1, 2)}
ALL = FUNCTIONS | {'share_of_the_path', 'feature_maps_of_backbone.layer4', 'predictions'}


def train(shapes_root: str, work_dir: Path, hooks: list, loop: dict, validates: bool = True) -> Runner:
    from rkan_mmdet.launch import read_config

    cfg = read_config(str(CONFIG), dict(data_root=f'{shapes_root}/'))
    still = dict(batch_size=4, num_workers=0, persistent_workers=False)
    cfg.merge_from_dict(
        dict(
            work_dir=str(work_dir), custom_hooks=hooks, randomness=dict(seed=1),
            train_dataloader=still, val_dataloader=dict(still, batch_size=1),
        )
    )  # fmt: skip
    if not validates:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.train_cfg = loop
    cfg.param_scheduler = []
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=9, by_epoch='max_epochs' in loop)
    cfg.visualizer.vis_backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
    cfg.experiment_name = cfg.visualizer.name = work_dir.name  # both are known by name in the whole process
    runner = Runner.from_cfg(Config(cfg._cfg_dict.to_dict()))
    runner.train()
    return runner


def pictures(work_dir: Path) -> set:
    return {path.stem for path in work_dir.rglob('vis_image/*.png')}


@pytest.mark.slow
def test_the_whole_report_each_interval_and_the_same_weights(shapes_root: str, tmp_path: Path) -> None:
    plain = tmp_path / 'plain.pth'
    init_default_scope('mmdet')
    torch.save(dict(state_dict=MODELS.build(Config.fromfile(str(PLAIN)).model).state_dict()), plain)
    epochs = dict(type='EpochBasedTrainLoop', max_epochs=3, val_interval=9)
    hook = dict(type='RKANVisualizationHook', interval=2, images=2, against=(str(PLAIN), str(plain)))
    unwatched = train(shapes_root, tmp_path / 'unwatched', [], epochs)
    watched = train(shapes_root, tmp_path / 'watched', [hook], epochs)
    for name, value in unwatched.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name
    assert pictures(tmp_path / 'unwatched') == set()
    assert pictures(tmp_path / 'watched') == {f'{name}_2' for name in ALL}
    for path in (tmp_path / 'watched').rglob('vis_image/*.png'):
        assert cv2.imread(str(path)).std() > 5, f'{path.name} is blank'
    predictions = cv2.imread(str(next((tmp_path / 'watched').rglob('predictions_2.png'))))
    height, width = predictions.shape[:2]
    assert width / 3 == height / 2, 'a row is a square image three times: ground truth, baseline, RKAN'
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in watched.model.modules())
    (hook,) = (hook for hook in watched.hooks if isinstance(hook, HOOKS.get('RKANVisualizationHook')))
    for name, conv in kan_convs(watched.model).items():  # which the dashed lines are of
        assert not torch.equal(hook._initial[name].basis_weight, conv.basis_weight)

    event = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    (file,) = (tmp_path / 'watched').rglob('events.out.tfevents.*')
    assert set(event.EventAccumulator(str(file.parent)).Reload().Tags()['images']) == ALL


@pytest.mark.slow
def test_iterations_are_counted_where_training_counts_them(shapes_root: str, tmp_path: Path) -> None:
    loop = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=9)
    hook = dict(type='RKANVisualizationHook', interval=2, by_epoch=False, images=1)
    train(shapes_root, tmp_path / 'iterations', [hook], loop)
    assert pictures(tmp_path / 'iterations') == {f'{name}_2' for name in ALL}
    with pytest.raises(ValueError, match='by_epoch of RKANVisualizationHook must be False'):
        train(shapes_root, tmp_path / 'wrong', [dict(type='RKANVisualizationHook')], loop)


@pytest.mark.slow
@pytest.mark.parametrize('case', ['no validation', 'no images'])
def test_the_functions_alone(case: str, shapes_root: str, tmp_path: Path) -> None:
    hook = dict(type='RKANVisualizationHook', images=0 if case == 'no images' else 4)
    loop = dict(type='EpochBasedTrainLoop', max_epochs=1, val_interval=9)
    train(shapes_root, tmp_path / case, [hook], loop, validates=case == 'no images')
    assert pictures(tmp_path / case) == {f'{name}_1' for name in FUNCTIONS}


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(interval=0), ValueError, 'interval must be an int >= 1, but got 0'),
        (dict(by_epoch=1), TypeError, 'by_epoch must be True or False'),
        (dict(images=-1), ValueError, 'images must be an int >= 0, but got -1'),
        (dict(score_thr=1.5), ValueError, r'score_thr must be a number in \[0, 1\], but got 1.5'),
        (dict(score_thr='0.3'), TypeError, 'score_thr must be a number'),
        (dict(against='config.py'), TypeError, r'against must be \(config, checkpoint\) or None'),
    ],
)
def test_bad_arguments(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        HOOKS.build(dict(type='RKANVisualizationHook', **options))


@pytest.mark.slow
@pytest.mark.parametrize('what', ['rkan_mmdet.report.look', 'mmdet.visualization.DetLocalVisualizer.add_image'])
def test_what_fails_does_not_end_the_training(
    what: str, shapes_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ValueError('a picture that can not be')

    monkeypatch.setattr(what, fail)
    loop = dict(type='EpochBasedTrainLoop', max_epochs=1, val_interval=9)
    train(shapes_root, tmp_path / what, [dict(type='RKANVisualizationHook')], loop)
    assert pictures(tmp_path / what) == set()
    (log,) = (tmp_path / what).glob('*/*.log')
    assert 'no pictures of this step: ValueError: a picture that can not be' in log.read_text()
