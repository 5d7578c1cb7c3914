"""Every config builds, trains a step, predicts, and survives being written and read again."""

import re
import subprocess
import sys
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.fileio import dump, load
from mmengine.registry import init_default_scope

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    path.relative_to(ROOT).as_posix()
    for f in ('demo', 'lowdata', 'rkan', 'study')
    for path in (ROOT / 'configs' / f).glob('*.py')
)
PARAMETERS = {
    model['Config']: model['Metadata']['Parameters']
    for path in (ROOT / 'configs').glob('*/metafile.yml')
    for model in load(path)['Models']
}


def reload(cfg: Config, tmp_path: Path) -> Config:
    cfg.dump(str(tmp_path / 'again.py'))
    return Config.fromfile(str(tmp_path / 'again.py'))


@pytest.mark.slow
@pytest.mark.parametrize('path', [path for path in CONFIGS if '/lowdata/' not in path])
def test_config(path: str, tmp_path: Path) -> None:
    cfg = Config.fromfile(str(ROOT / path))
    assert reload(cfg, tmp_path).to_dict() == cfg.to_dict()

    init_default_scope('mmdet')
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[path]
    model.init_weights()
    masks = cfg.model.roi_head.get('mask_head') is not None
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

    if torch.cuda.is_available():
        with torch.autocast('cuda', torch.float16):
            losses = model.cuda()(**model.data_preprocessor(batch, training=True), mode='loss')
        assert model.parse_losses(losses)[0].isfinite()
    else:  # MMCV's nms takes no bf16, the backbone does
        model.backbone.zero_grad()
        with torch.autocast('cpu', torch.bfloat16):
            features = model.backbone(data['inputs'][:1, :, :64, :64])
        sum(f.float().square().mean() for f in features).backward()
        assert all(p.grad.isfinite().all() for p in model.backbone.parameters() if p.requires_grad)

    model.eval()
    with torch.no_grad():
        for sample in model(**model.data_preprocessor(batch, training=False), mode='predict'):
            assert sample.pred_instances.scores.isfinite().all()
            assert ('masks' in sample.pred_instances) == masks


def test_low_data(tmp_path: Path) -> None:
    """The same model as the full schedule, on the very files that MMDetection's split tool writes."""
    images = [dict(id=i, file_name=f'{i}.jpg', width=8, height=8) for i in range(200)]
    annotations = [dict(id=i, image_id=i, category_id=1, bbox=[0, 0, 4, 4], area=16, iscrowd=0) for i in range(200)]
    whole = dict(images=images, annotations=annotations, categories=[dict(id=1, name='person')], licenses=[], info={})
    (tmp_path / 'annotations').mkdir()
    dump(whole, tmp_path / 'annotations' / 'instances_train2017.json')
    tool = Path(mmdet.__file__).parent / '.mim' / 'tools' / 'misc' / 'split_coco.py'
    options = ['--data-root', str(tmp_path), '--out-dir', str(tmp_path / 'semi_anns'), '--fold', '3']
    subprocess.run([sys.executable, '-W', 'ignore', str(tool), *options], check=True, capture_output=True)

    low = [path for path in CONFIGS if '/lowdata/' in path]
    draws = set()
    for path in low:
        cfg = Config.fromfile(str(ROOT / path))
        assert reload(cfg, tmp_path).to_dict() == cfg.to_dict()
        full = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
        if '_rkan-' in path:
            full = str(ROOT / 'configs/rkan/mask-rcnn_rkan-r50_fpn_1x_coco.py')
        (tmp_path / 'full.py').write_text(f"_base_ = ['{full}']")
        assert cfg.model == Config.fromfile(str(tmp_path / 'full.py')).model
        percent, seed = (int(part) for part in re.search(r'(\d+)pct-s(\d)', path).groups())
        dataset = cfg.train_dataloader.dataset.dataset
        draws.add(dataset.ann_file)
        assert len(load(tmp_path / dataset.ann_file)['images']) <= 2 * percent  # drawn with replacement
        assert cfg.randomness.seed == seed
    assert len(low) == 18
    assert len(draws) == 9
