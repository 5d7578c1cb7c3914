"""Odd images, boxes and batches through a detector with paths: training goes on, or a sentence names what is wrong."""

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any, Callable, Optional

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.dataset import pseudo_collate
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope

from rkan_mmdet.backbones import RKANResNet
from rkan_mmdet.data.guard import DataError, GuardedPipeline, guard
from rkan_mmdet.hooks import FiniteHook
from rkan_mmdet.launch import UserError, check_config, make_runner, read_config

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / 'configs/demo/mask-rcnn_rkan-r18_fpn_shapes.py')
CLASSES = ('disc', 'box', 'triangle', 'star', 'ring')
SMALL = {
    'model.backbone.base_channels': 8,
    'model.backbone.stem_channels': 8,
    'model.neck.in_channels': [8, 16, 32, 64],
}


def write_set(folder: Path, images: dict, boxes: list, crowd: bool = False) -> str:
    """A COCO set of image arrays by file name, each with the same boxes (x, y, w, h)."""
    content: dict = dict(images=[], annotations=[], categories=[dict(id=i + 1, name=c) for i, c in enumerate(CLASSES)])
    (folder / 'train').mkdir(parents=True)
    (folder / 'annotations').mkdir()
    for i, (name, image) in enumerate(images.items()):
        cv2.imwrite(str(folder / 'train' / name), image)
        height, width = image.shape[:2]
        content['images'].append(dict(id=i, file_name=name, height=height, width=width))
        for x, y, w, h in boxes:
            content['annotations'].append(
                dict(id=len(content['annotations']) + 1, image_id=i, category_id=2, bbox=[x, y, w, h], area=w * h,
                     iscrowd=int(crowd), segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]])
            )  # fmt: skip
    (folder / 'annotations/instances_train.json').write_text(json.dumps(content))
    return str(folder)


@pytest.fixture(scope='module')
def model_of() -> Callable:
    def build(**options: Any) -> torch.nn.Module:
        init_default_scope('mmdet')
        torch.manual_seed(0)
        return MODELS.build(read_config(DEMO, {**SMALL, **options}).model)

    return build


def batch_of(root: str, pipeline: Optional[list] = None) -> tuple:
    init_default_scope('mmdet')
    cfg = read_config(DEMO, dict(data_root=root))
    check_config_of_train(cfg)
    if pipeline is not None:
        cfg.train_dataloader.dataset.pipeline = pipeline
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    dataset.full_init()
    guard(dataset)
    return pseudo_collate([dataset[i] for i in range(len(dataset))]), dataset


def check_config_of_train(cfg: Any) -> None:
    check_config(cfg, ('train_dataloader',), loads_weights=True)


def train_and_predict(model: torch.nn.Module, batch: dict) -> dict:
    """One step, whose losses, gradients and new weights are finite; then predictions that are."""
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = model(**model.data_preprocessor(copy.deepcopy(batch), True), mode='loss')
    total, losses = model.parse_losses(losses)
    assert all(torch.as_tensor(value).isfinite().all() for value in losses.values()), losses
    total.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, 'DDP would hang'
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10, error_if_nonfinite=True)
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.eval()
    with torch.no_grad():
        for sample in model.test_step(copy.deepcopy(batch)):
            assert sample.pred_instances.bboxes.isfinite().all()
            assert sample.pred_instances.masks.shape[1:] == tuple(sample.ori_shape)
    return losses


def noise(height: int, width: int, channels: int = 3, dtype: Any = np.uint8) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype=dtype, endpoint=True)


PLAIN = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True, poly2mask=True),
    dict(type='Resize', scale_factor=1.0, keep_ratio=True),
    dict(type='PackDetInputs'),
]

CASES: dict[str, tuple] = {
    'no object at all': (dict(a=noise(64, 64), b=noise(64, 48)), []),
    'one pixel': (dict(a=noise(64, 64)), [(3, 4, 1, 1), (63, 63, 1, 1)]),
    'the whole image': (dict(a=noise(64, 64)), [(0, 0, 64, 64)]),
    'outside of the image': (dict(a=noise(64, 64)), [(100, 100, 5, 5), (-20, -20, 10, 10), (2, 2, 30, 30)]),
    'a line': (dict(a=noise(64, 64)), [(0, 5, 64, 1), (5, 0, 1, 64)]),
    '1x1': (dict(a=noise(1, 1), b=noise(1, 1)), [(0, 0, 1, 1)]),
    'odd sizes': (dict(a=noise(37, 53), b=noise(61, 35), c=noise(2, 3)), [(0, 0, 2, 2)]),
    'flat and tall': (dict(a=noise(3, 300), b=noise(300, 3)), [(0, 0, 3, 3)]),
    'many objects': (dict(a=noise(64, 64)), [(i % 50, i // 50 * 6, 6, 6) for i in range(500)]),
    'grey': (dict(a=noise(64, 64, 1)), [(5, 5, 30, 30)]),
    '16 bits': (dict(a=noise(64, 64, 3, np.uint16)), [(5, 5, 30, 30)]),
    '16 bits, grey': (dict(a=noise(64, 64, 1, np.uint16)), [(5, 5, 30, 30)]),
    'transparent': (dict(a=noise(64, 64, 4)), [(5, 5, 30, 30)]),
    'black': (dict(a=np.zeros((64, 64, 3), np.uint8)), [(5, 5, 30, 30)]),
}


@pytest.mark.slow
@pytest.mark.parametrize('resized', [True, False])
@pytest.mark.parametrize('name', CASES)
def test_training_goes_on(name: str, resized: bool, model_of: Callable, tmp_path: Path) -> None:
    images, boxes = CASES[name]
    root = write_set(tmp_path / 'set', {f'{key}.png': image for key, image in images.items()}, boxes)
    batch, _ = batch_of(root, None if resized else PLAIN)
    assert len(batch['inputs']) == len(images)
    assert all(tuple(image.shape[:1]) == (3,) and image.dtype == torch.uint8 for image in batch['inputs'])
    losses = train_and_predict(model_of(), batch)
    if name == 'no object at all':
        assert losses['loss_mask'] == losses['loss_rpn_bbox'] == 0


@pytest.mark.slow
def test_crowd_only(model_of: Callable, tmp_path: Path) -> None:
    root = write_set(tmp_path / 'set', {'a.png': noise(64, 64)}, [(5, 5, 30, 30)], crowd=True)
    batch, _ = batch_of(root, PLAIN)
    assert batch['data_samples'][0].ignored_instances.bboxes.shape[0] == 1
    assert batch['data_samples'][0].gt_instances.bboxes.shape[0] == 0
    train_and_predict(model_of(), batch)


def test_sixteen_bits_keep_their_brightness(tmp_path: Path) -> None:
    image = np.full((64, 64, 3), 40 * 257, np.uint16)
    batch, _ = batch_of(write_set(tmp_path / 'set', {'a.png': image}, [(5, 5, 30, 30)]), PLAIN)
    assert (batch['inputs'][0] == 40).all()


@pytest.mark.parametrize('shape', [(1, 900), (900, 1)])
def test_a_huge_aspect_ratio_is_named(shape: tuple, tmp_path: Path) -> None:
    """Scaled to the config's size nothing is left of the short side; without scaling it is trained on."""
    root = write_set(tmp_path / 'set', {'thin.png': noise(*shape)}, [(0, 0, 1, 1)])
    with pytest.raises(DataError, match=r'image .*thin\.png can not be used: '):
        batch_of(root)
    batch_of(root, PLAIN)


@pytest.mark.slow
def test_four_channels(model_of: Callable) -> None:
    # MMEngine's preprocessor normalizes 1 or 3 channels; with 4 the pipeline does
    model = model_of(
        **{
            'model.backbone.in_channels': 4,
            'model.data_preprocessor': dict(
                _delete_=True, type='DetDataPreprocessor', pad_size_divisor=32, pad_mask=True
            ),
        }
    )
    from mmdet.testing import demo_mm_inputs

    train_and_predict(
        model, demo_mm_inputs(2, [[4, 65, 47], [4, 33, 64]], num_items=[2, 0], num_classes=5, with_mask=True)
    )
    with pytest.raises(RuntimeError, match='4 channels'):
        model.backbone(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('aggregation', ['addition', 'gating', 'se'])
def test_a_path_does_not_hide_nan(value: float, aggregation: str) -> None:
    model = RKANResNet(18, base_channels=8, stem_channels=8, rkan=dict(aggregation=aggregation))
    x = torch.randn(2, 3, 64, 64)
    x[1, 1, 30, 31] = value
    model.eval()
    with torch.no_grad():
        last = model(x)[-1]
    assert last[0].isfinite().all(), 'the other image is not touched'
    assert not last[1].isfinite().all()


class Runner:
    """What the hook looks at."""

    iter = 6
    optim_wrapper = OptimWrapper(torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1))


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    hook, runner = FiniteHook(), Runner()
    sample = type('Sample', (), dict(img_path='a.jpg'))()
    batch = dict(inputs=[], data_samples=[sample])
    hook.after_train_iter(runner, 0, batch, dict(loss=torch.tensor(1.0), acc=torch.tensor([50.0])))
    for value in (float('nan'), float('inf')):
        with pytest.raises(FloatingPointError, match=r'loss_cls of iteration 7 is NaN or infinite, images a\.jpg'):
            hook.after_train_iter(runner, 0, batch, dict(loss_cls=torch.tensor(value), loss_box=torch.tensor(1.0)))
    with pytest.raises(FloatingPointError, match=r'1 weights are NaN or infinite .* such as b: nothing is saved'):
        hook.before_save_checkpoint(runner, dict(state_dict=dict(a=torch.ones(1), b=torch.tensor([1, float('nan')]))))
    hook.before_save_checkpoint(runner, dict(state_dict=dict(a=torch.ones(1), n=torch.tensor(3))))


def test_a_loss_scaler_is_given_time() -> None:
    hook, runner = FiniteHook(), Runner()
    runner.optim_wrapper = type('Amp', (), dict(loss_scaler=None))()
    bad, good = dict(loss=torch.tensor(float('inf'))), dict(loss=torch.tensor(1.0))
    for outputs in [bad] * 9 + [good] + [bad] * 9:
        hook.after_train_iter(runner, 0, None, outputs)
    with pytest.raises(FloatingPointError):
        hook.after_train_iter(runner, 0, None, bad)


@pytest.mark.parametrize('kind', ['missing', 'empty', 'text', 'cut jpg', 'cut png'])
def test_an_image_that_is_none_is_named(kind: str, tmp_path: Path) -> None:
    name = f'bad.{kind[-3:]}' if kind.startswith('cut') else 'bad.jpg'
    root = write_set(tmp_path / 'set', {name: noise(64, 64)}, [(5, 5, 30, 30)])
    path = Path(root, 'train', name)
    whole = path.read_bytes()
    batch_of(root)
    contents = dict(empty=b'', text=b'no image')
    if kind == 'missing':
        path.unlink()
    else:
        path.write_bytes(contents.get(kind, whole[: len(whole) * 2 // 3]))
    with pytest.raises(DataError, match=rf'image {re.escape(str(path))} can not be used: '):
        batch_of(root)


def test_what_a_camera_appends_is_no_fault(tmp_path: Path) -> None:
    root = write_set(tmp_path / 'set', {'a.jpg': noise(64, 64)}, [(5, 5, 30, 30)])
    path = Path(root, 'train/a.jpg')
    path.write_bytes(path.read_bytes() + bytes(10_000))
    batch_of(root)


@pytest.mark.parametrize('workers', [0, 1])
def test_the_image_is_named_from_a_worker_too(workers: int, tmp_path: Path) -> None:
    root = write_set(tmp_path / 'set', {'bad.png': noise(64, 64)}, [(5, 5, 30, 30)])
    _, dataset = batch_of(root)
    Path(root, 'train/bad.png').unlink()
    assert isinstance(pickle.loads(pickle.dumps(dataset)).pipeline, GuardedPipeline)
    assert len(dataset.pipeline.transforms) == 5
    loader = torch.utils.data.DataLoader(dataset, num_workers=workers, collate_fn=pseudo_collate)
    with pytest.raises(DataError) as caught:
        next(iter(loader))
    assert 'bad.png can not be used: FileNotFoundError' in str(caught.value).strip().splitlines()[-1]


@pytest.mark.slow
def test_more_classes_than_annotated(model_of: Callable, shapes_root: str, tmp_path: Path) -> None:
    """Classes that the file does not list may come last; before others they would shift every label."""
    root = write_set(tmp_path / 'set', {'a.png': noise(64, 64)}, [(5, 5, 30, 30)])
    cfg = read_config(DEMO, dict(data_root=root))
    cfg.train_dataloader.dataset.metainfo.classes = (*CLASSES, 'never', 'seen')
    check_config_of_train(cfg)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    labels = dataset[0]['data_samples'].gt_instances.labels
    assert labels.tolist() == [1]
    sizes = {f'model.roi_head.{head}.num_classes': 7 for head in ('bbox_head', 'mask_head')}
    train_and_predict(model_of(**sizes), pseudo_collate([dataset[0]]))
    cfg.train_dataloader.dataset.metainfo.classes = ('never', *CLASSES)
    with pytest.raises(UserError, match='every class would get a wrong name'):
        check_config_of_train(cfg)


def test_a_pipeline_that_is_switched_is_guarded_too(shapes_root: str, tmp_path: Path) -> None:
    cfg = read_config(DEMO, dict(data_root=shapes_root, work_dir=str(tmp_path), launcher='none'))
    steps = cfg.train_dataloader.dataset.pipeline
    cfg.custom_hooks = [dict(type='mmdet.PipelineSwitchHook', switch_epoch=0, switch_pipeline=steps[:1])]
    runner = make_runner(cfg, ('train',))
    dataset = runner.train_dataloader.dataset
    before = dataset.pipeline
    for hook in runner.hooks:
        if type(hook).__name__ in ('PipelineSwitchHook', 'GuardHook'):
            hook.before_train_epoch(runner)
    assert isinstance(before, GuardedPipeline)
    assert isinstance(dataset.pipeline, GuardedPipeline)
    assert len(dataset.pipeline.transforms) == 1


@pytest.mark.parametrize('workers', [0, 1])
def test_an_iteration_based_training_is_guarded_too(workers: int, tmp_path: Path) -> None:
    root = write_set(tmp_path / 'set', {'bad.png': noise(64, 64)}, [(5, 5, 30, 30)])
    cfg = read_config(DEMO, dict(data_root=root, work_dir=str(tmp_path), launcher='none'))
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=1, val_interval=1)
    cfg.train_dataloader.update(batch_size=1, num_workers=workers, persistent_workers=bool(workers))
    cfg.train_dataloader.sampler.type = 'InfiniteSampler'
    path = Path(root, 'train/bad.png')
    path.write_bytes(path.read_bytes()[:-2000])
    runner = make_runner(cfg, ('train',))
    with pytest.raises(DataError, match=r'bad\.png can not be used'):
        next(runner.train_loop.dataloader_iterator)
