"""The shapes set: deterministic, sound by pycocotools, not trivial, nothing overwritten."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmdet.evaluation import CocoMetric
from pycocotools.coco import COCO

from rkan_mmdet.data.shapes import CLASSES, draw, make_shapes


@pytest.fixture(scope='module')
def annotations() -> list:
    return [draw(7, i)[1] for i in range(200)]


def test_it_is_deterministic_and_depends_on_seed_and_index() -> None:
    image, found = draw(3, 5)
    again, found_again = draw(3, 5)
    assert np.array_equal(image, again)
    assert found == found_again
    assert not np.array_equal(image, draw(4, 5)[0])
    assert not np.array_equal(image, draw(3, 6)[0])


def test_it_holds_what_coco_holds(annotations: list) -> None:
    objects = [a for image in annotations for a in image if not a['iscrowd']]
    areas = np.array([a['area'] for a in objects])
    shares = [(areas < 32**2).mean(), ((areas >= 32**2) & (areas < 96**2)).mean(), (areas >= 96**2).mean()]
    assert min(shares) > 0.03
    assert {a['category_id'] for a in objects} == set(range(1, len(CLASSES) + 1))
    assert any(not image for image in annotations)
    assert 0.01 < np.mean([any(a['iscrowd'] for a in image) for image in annotations]) < 0.12


def test_objects_hide_one_another(annotations: list) -> None:
    from pycocotools import mask as mask_utils

    overlapping = 0
    for image in annotations:
        masks = [mask_utils.decode(a['segmentation']) for a in image]
        assert (np.sum(masks, axis=0) <= 1).all() if masks else True  # a pixel belongs to the top object alone
        boxes = [a['bbox'] for a in image]
        ious = mask_utils.iou(boxes, boxes, [0] * len(boxes)) if len(boxes) > 1 else np.zeros((1, 1))
        overlapping += (ious - np.eye(len(ious)) > 0.02).any()
    assert overlapping > 60  # of 200 images


def test_the_files_are_sound(shapes_root: str) -> None:
    for split, count in (('train', 8), ('val', 4)):
        coco = COCO(f'{shapes_root}/annotations/instances_{split}.json')
        assert len(coco.imgs) == count
        for annotation in coco.anns.values():
            image = coco.imgs[annotation['image_id']]
            x, y, w, h = annotation['bbox']
            assert 0 <= x < x + w <= image['width']
            assert 0 <= y < y + h <= image['height']
            assert coco.annToMask(annotation).sum() == annotation['area'] > 0
        for image in coco.imgs.values():
            assert cv2.imread(f'{shapes_root}/{split}/{image["file_name"]}').shape == (192, 192, 3)


def test_the_ground_truth_scores_one(shapes_root: str) -> None:
    """Through CocoMetric: boxes and masks given back as predictions have an AP of 1."""
    import torch

    path = f'{shapes_root}/annotations/instances_val.json'
    coco, metric = COCO(path), CocoMetric(path, metric=['bbox', 'segm'])
    metric.dataset_meta = dict(classes=CLASSES)
    for image_id in coco.imgs:
        found = [a for a in coco.imgToAnns[image_id] if not a['iscrowd']]
        boxes = torch.tensor([a['bbox'] for a in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = (
            torch.from_numpy(np.stack([coco.annToMask(a) for a in found]).astype(bool))
            if found
            else torch.zeros(0, 192, 192)
        )
        pred = dict(
            bboxes=boxes, scores=torch.ones(len(found)), masks=masks,
            labels=torch.tensor([a['category_id'] - 1 for a in found], dtype=torch.long),
        )  # fmt: skip
        metric.process({}, [dict(pred_instances=pred, img_id=image_id, ori_shape=(192, 192))])
    result = metric.evaluate(len(coco.imgs))
    assert result['coco/bbox_mAP'] == 1.0
    assert result['coco/segm_mAP'] == 1.0


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    make = lambda **options: make_shapes(tmp_path / 'set', quiet=True, **dict(dict(num_train=2, num_val=1), **options))  # noqa: E731
    folder = make()
    stamp = (folder / 'annotations/instances_train.json').stat().st_mtime_ns
    assert make() == folder
    assert (folder / 'annotations/instances_train.json').stat().st_mtime_ns == stamp
    with pytest.raises(FileExistsError, match='exists and is not this set'):
        make(num_train=3)
    assert len(json.loads((folder / 'annotations/instances_train.json').read_text())['images']) == 2
    assert [p.name for p in tmp_path.iterdir()] == ['set']


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(num_train=0), ValueError, 'num_train must be an int >= 1'),
        (dict(size=32), ValueError, 'size must be an int >= 64'),
        (dict(train_seed=1.5), TypeError, 'train_seed must be an int'),
        (dict(train_seed=4, val_seed=4), ValueError, 'val_seed must differ from train_seed'),
    ],
)
def test_bad_arguments_are_named(options: dict, error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        make_shapes(tmp_path / 'set', **options)
    assert not (tmp_path / 'set').exists()
