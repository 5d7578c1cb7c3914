"""Every config builds, trains a step, predicts, and survives being written and read again."""

from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.registry import init_default_scope

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / 'configs').glob('**/*.py') if '_base_' not in p.parts)


def test_there_are_configs() -> None:
    assert len(CONFIGS) >= 4


@pytest.mark.slow
@pytest.mark.parametrize('path', CONFIGS)
def test_config(path: str, tmp_path: Path) -> None:
    cfg = Config.fromfile(str(ROOT / path))
    cfg.dump(str(tmp_path / 'again.py'))
    assert Config.fromfile(str(tmp_path / 'again.py')).to_dict() == cfg.to_dict()

    init_default_scope('mmdet')
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    model.init_weights()
    masks = 'mask_head' in cfg.model.roi_head
    classes = cfg.model.roi_head.bbox_head.num_classes
    batch = demo_mm_inputs(2, [[3, 96, 128]] * 2, num_items=[2, 3], num_classes=classes, with_mask=masks)
    data = model.data_preprocessor(batch, training=True)
    losses = model(**data, mode='loss')
    total, _ = model.parse_losses(losses)
    assert total.isfinite()
    total.backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, idle
    assert any('.rkan.' in name for name, _ in model.named_parameters()) == ('_rkan-' in path)

    model.eval()
    with torch.no_grad():
        for sample in model(**model.data_preprocessor(batch, training=False), mode='predict'):
            assert sample.pred_instances.scores.isfinite().all()
            assert ('masks' in sample.pred_instances) == masks
