"""The hook leaves pictures, and the training as it was."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS
from mmengine.runner import Runner

ROOT = Path(__file__).parents[1]


def train(shapes_root: str, work_dir: Path, hooks: list, loop: dict, **changes: object) -> Runner:
    from rkan_mmdet.launch import read_config

    cfg = read_config(str(ROOT / 'configs/demo/mask-rcnn_rkan-r18_fpn_shapes.py'), dict(data_root=f'{shapes_root}/'))
    cfg.merge_from_dict(
        dict(
            work_dir=str(work_dir), custom_hooks=hooks, randomness=dict(seed=1), val_cfg=None, val_dataloader=None,
            val_evaluator=None, train_dataloader=dict(batch_size=4, num_workers=0, persistent_workers=False),
            **changes,
        )
    )  # fmt: skip
    cfg.train_cfg = loop
    cfg.experiment_name = cfg.visualizer.name = work_dir.name  # both are known by name in the whole process
    runner = Runner.from_cfg(Config(cfg._cfg_dict.to_dict()))
    runner.train()
    return runner


@pytest.mark.slow
def test_pictures_each_interval_and_the_same_weights(shapes_root: str, tmp_path: Path) -> None:
    epochs = dict(loop=dict(type='EpochBasedTrainLoop', max_epochs=3), param_scheduler=[])
    plain = train(shapes_root, tmp_path / 'plain', [], **epochs)
    watched = train(shapes_root, tmp_path / 'watched', [dict(type='KANFunctionsHook', interval=2)], **epochs)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name
    pictures = sorted(path.name for path in (tmp_path / 'watched').rglob('vis_image/*.png'))
    assert pictures == [f'backbone.layer4.rkan.kan_conv{i}_2.png' for i in (1, 2)]
    assert not any(module._forward_pre_hooks for module in watched.model.modules())


@pytest.mark.slow
def test_iterations_are_counted_where_training_counts_them(shapes_root: str, tmp_path: Path) -> None:
    loop = dict(
        loop=dict(type='IterBasedTrainLoop', max_iters=2, val_interval=9), param_scheduler=[],
        default_hooks=dict(checkpoint=dict(by_epoch=False, interval=9)),
    )  # fmt: skip
    train(shapes_root, tmp_path / 'iterations', [dict(type='KANFunctionsHook', interval=2, by_epoch=False)], **loop)
    assert len(list((tmp_path / 'iterations').rglob('vis_image/*_2.png'))) == 2
    with pytest.raises(ValueError, match='by_epoch of KANFunctionsHook must be False'):
        train(shapes_root, tmp_path / 'wrong', [dict(type='KANFunctionsHook')], **loop)


@pytest.mark.slow
def test_tensorboard_gets_them(shapes_root: str, tmp_path: Path) -> None:
    event = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    loop = dict(loop=dict(type='EpochBasedTrainLoop', max_epochs=1), param_scheduler=[])
    backends = dict(visualizer=dict(vis_backends=[dict(type='TensorboardVisBackend')]))
    train(shapes_root, tmp_path / 'board', [dict(type='KANFunctionsHook')], **loop, **backends)
    (file,) = (tmp_path / 'board').rglob('events.out.tfevents.*')
    events = event.EventAccumulator(str(file.parent)).Reload()
    assert {f'backbone.layer4.rkan.kan_conv{i}' for i in (1, 2)} == set(events.Tags()['images'])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match='interval must be an int >= 1, but got 0'):
        HOOKS.build(dict(type='KANFunctionsHook', interval=0))
    with pytest.raises(TypeError, match='by_epoch must be True or False'):
        HOOKS.build(dict(type='KANFunctionsHook', by_epoch=1))
