"""What docs/recipes.md says is the authors' own, in every config that is said to follow it."""

from pathlib import Path

import pytest

from rkan_mmdet.launch import read_config

ROOT = Path(__file__).parents[1]
AUTHORS = sorted(ROOT.glob('configs/rkan/*_authors-1x_*.py'))


def test_there_are_configs() -> None:
    assert len(AUTHORS) >= 28


@pytest.mark.parametrize('path', AUTHORS, ids=lambda path: path.stem)
def test_the_authors_recipe(path: Path) -> None:
    cfg = read_config(str(path))
    optimizer, model = cfg.optim_wrapper.optimizer, cfg.model
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert optimizer == dict(type='SGD', lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
    assert not cfg.optim_wrapper.get('paramwise_cfg')
    (schedule,) = cfg.param_scheduler  # no warm-up
    assert (schedule.milestones, schedule.gamma, cfg.train_cfg.max_epochs) == ([8, 11], 0.1, 12)
    assert cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 8
    assert (model.backbone.frozen_stages, model.backbone.norm_eval) == (-1, False)
    assert model.backbone.init_cfg.prefix == 'backbone.'
    anchors = model.rpn_head.anchor_generator
    assert [base * scale for base in anchors.base_sizes[:1] for scale in anchors.scales] == [32, 64, 128, 256, 512]
    assert (len(anchors.ratios), anchors.strides) == (3, [4, 8, 16, 32, 64])
    rpn, rcnn = model.train_cfg.rpn, model.train_cfg.rcnn
    assert (rpn.assigner.pos_iou_thr, rpn.assigner.neg_iou_thr, rpn.assigner.match_low_quality) == (0.7, 0.3, True)
    assert (rcnn.assigner.pos_iou_thr, rcnn.assigner.match_low_quality) == (0.5, False)
    assert (rcnn.sampler.num, rcnn.sampler.pos_fraction, rcnn.sampler.add_gt_as_proposals) == (512, 0.25, True)
    assert (model.test_cfg.rcnn.score_thr, model.test_cfg.rcnn.nms.iou_threshold) == (0.05, 0.5)
    resizes = [step.scale for step in cfg.test_dataloader.dataset.pipeline if step.type == 'Resize']
    assert resizes == [(1066, 640)]
