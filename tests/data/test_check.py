"""The data check: each way to break a sound set is found, with the line that mends it; sound sets pass."""

from __future__ import annotations

import copy
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmcv import imfrombytes
from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from rkan_mmdet.data import check
from rkan_mmdet.data.check import examine_annotations, examine_config
from rkan_mmdet.data.coco_file import CocoFile
from rkan_mmdet.data.detector_config import find_heads, has_mask_head, heads_override, scale_of
from rkan_mmdet.data.findings import Finding
from rkan_mmdet.data.image_files import examine_images
from rkan_mmdet.data.quick_check import check_coco
from rkan_mmdet.launch import UserError, read_config

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / 'configs/demo/mask-rcnn_rkan-r18_fpn_shapes.py')
CLASSES = ('disc', 'box', 'triangle', 'star', 'ring')


@pytest.fixture
def data(shapes_root: str, tmp_path: Path) -> Path:
    """A copy of the shapes set, to be broken."""
    return Path(shutil.copytree(shapes_root, tmp_path / 'shapes'))


@pytest.fixture
def demo(data: Path) -> Config:
    return read_config(DEMO, dict(data_root=str(data)))


def document(data: Path, split: str = 'train') -> dict:
    return json.loads((data / f'annotations/instances_{split}.json').read_text())


def save(data: Path, content: Any, split: str = 'train') -> Path:
    path = data / f'annotations/instances_{split}.json'
    path.write_text(json.dumps(content))
    return path


def names(findings: list[Finding], severity: str = 'error') -> set[str]:
    return {f.name for f in findings if f.severity == severity}


def named(findings: list[Finding], name: str) -> Finding:
    found = [f for f in findings if f.name == name]
    assert found, f'{name} is not among {[f.name for f in findings]}'
    return found[0]


def test_sound_data_passes(data: Path, demo: Config) -> None:
    for split in ('train', 'val'):
        findings = examine_annotations(data / f'annotations/instances_{split}.json', data / split)
        assert not names(findings) | names(findings, 'warning'), findings
    assert not names(examine_config(demo)) | names(examine_config(demo), 'warning')


# --- the file ------------------------------------------------------------------------------------------------------

first = lambda d: d['annotations'][0]  # noqa: E731


def every(d: dict, **values: Any) -> None:
    for a in d['annotations']:
        a.update({k: v(a) if callable(v) else v for k, v in values.items()})


def without(entries: list[dict], name: str) -> None:
    for entry in entries:
        del entry[name]


def fractions(a: dict) -> list[float]:
    return [v / 192 for v in a['bbox']]


def corners(a: dict) -> list[float]:
    x, y, w, h = a['bbox']
    return [x, y, x + w, y + h]


def renumber_categories(d: dict) -> None:
    """Ids that fall in the order of the categories, and fit the annotations."""
    for entries, key in ((d['categories'], 'id'), (d['annotations'], 'category_id')):
        for entry in entries:
            entry[key] = 100 - entry[key]


BREAKAGES: dict[str, tuple[Callable[[dict], Any], str, str]] = {
    # what is done to the file; the severity; a part of the line that mends it
    'box-empty': (lambda d: first(d).update(bbox=[5, 5, 0, 20]), 'error', 'remove'),
    'box-outside': (lambda d: first(d).update(bbox=[300, 5, 20, 20]), 'error', 'remove'),
    'box-over-edge': (lambda d: first(d).update(bbox=[180, 5, 40, 20]), 'warning', 'cut them off'),
    'box-broken': (lambda d: first(d).update(bbox=[5, 5, float('nan'), 20]), 'error', '[x, y, width, height]'),
    'box-normalised': (lambda d: every(d, bbox=fractions), 'error', 'multiply bbox by'),
    'box-corners': (lambda d: every(d, bbox=corners), 'error', 'bbox = [x1, y1, x2 - x1, y2 - y1]'),
    'box-ignored': (lambda d: first(d).update(ignore=1), 'note', ''),
    'area-zero': (lambda d: first(d).update(area=0), 'error', "a['area'] = a['bbox'][2] * a['bbox'][3]"),
    'area-wrong': (lambda d: first(d).update(area=1e5), 'warning', "a['area']"),
    'area-broken': (lambda d: first(d).update(area='big'), 'error', "a['area']"),
    'crowd-missing': (lambda d: without(d['annotations'], 'iscrowd'), 'error', "a['iscrowd'] = 0"),
    'crowd-broken': (lambda d: first(d).update(iscrowd='0'), 'error', "a['iscrowd'] = 0"),
    'category-order': (lambda d: renumber_categories(d), 'warning', 'number the categories from 1'),
    'image-id-large': (lambda d: d['images'][-1].update(id=2**63 + 1), 'error', 'number them anew'),
    'image-unknown': (lambda d: first(d).update(image_id=99), 'error', "'id' of 'images'"),
    'category-unknown': (lambda d: first(d).update(category_id=99), 'error', "'id' of 'categories'"),
    'image-id-twice': (lambda d: d['images'][1].update(id=1), 'error', 'number them anew'),
    'annotation-id-twice': (lambda d: d['annotations'][1].update(id=1), 'error', 'number them anew'),
    'category-id-twice': (lambda d: d['categories'][1].update(id=1), 'error', 'number them anew'),
    'category-twice': (lambda d: d['categories'][1].update(name='disc'), 'error', 'one name'),
    'category-space': (lambda d: d['categories'][1].update(name='box '), 'note', ''),
    'annotation-id-0': (lambda d: first(d).update(id=0), 'warning', 'from 1'),
    'annotation-id-string': (lambda d: every(d, id=lambda a: f'a{a["id"]}'), 'error', 'number them anew'),
    'image-twice': (lambda d: d['images'][1].update(file_name='000000.jpg'), 'warning', ''),
    'image-size': (lambda d: d['images'][0].update(width='192'), 'error', 'write the width'),
    'empty': (lambda d: d.update(annotations=[]), 'error', 'another ann_file'),
    'class-never': (lambda d: d['categories'].append(dict(id=9, name='cube')), 'note', ''),
    'mask-missing': (lambda d: first(d).pop('segmentation'), 'warning', 'with_mask=False'),
    'mask-broken': (lambda d: first(d).update(segmentation=[[1, 2, 3, 4]]), 'error', 'mend or remove'),
    'mask-size': (lambda d: halve_mask(d), 'error', 'size of the image'),
    'mask-elsewhere': (lambda d: first(d).update(segmentation=[[0, 0, 2, 0, 2, 2]]), 'error', 'one source'),
}


@pytest.mark.parametrize('name', BREAKAGES)
def test_a_broken_file(name: str, data: Path) -> None:
    change, severity, mend = BREAKAGES[name]
    content = document(data)
    change(content)
    path = save(data, content)
    finding = named(examine_annotations(path), name)
    assert finding.severity == severity
    assert mend in finding.mend
    assert finding.count >= 1
    assert finding.examples or name == 'empty'


@pytest.mark.parametrize(
    ('entries', 'key'),
    [('annotations', 'area'), ('annotations', 'bbox'), ('annotations', 'id'), ('images', 'width'), ('images', 'id'),
     ('images', 'file_name'), ('categories', 'name')],
)  # fmt: skip
def test_a_missing_key(entries: str, key: str, data: Path) -> None:
    content = document(data)
    without(content[entries], key)
    finding = named(examine_annotations(save(data, content)), 'key-missing')
    assert finding.severity == 'error'
    assert finding.count == len(content[entries])
    assert finding.examples[0] == f'{entries}[0]'


def test_few_lost_boxes_of_many_are_a_warning(data: Path) -> None:
    content = document(data)
    more = [dict(first(content), id=1000 + i) for i in range(200)]
    content['annotations'] += more
    content['annotations'][0]['bbox'] = [5, 5, 0, 20]
    assert named(examine_annotations(save(data, content)), 'box-empty').severity == 'warning'


def test_ids_that_are_strings_in_one_place(data: Path) -> None:
    content = document(data)
    every(content, category_id=lambda a: str(a['category_id']))
    finding = named(examine_annotations(save(data, content)), 'category-unknown')
    assert finding.count == len(content['annotations'])
    assert 'a string in one place and a number in the other' in finding.text


def test_what_is_read_is_what_mmdetection_reads(data: Path) -> None:
    """Of random boxes, many of them degenerate, the same ones are kept."""
    rng, content = np.random.default_rng(0), document(data)
    content['annotations'] = [
        dict(
            id=i + 1, image_id=int(rng.integers(1, 9)), category_id=int(rng.integers(1, 7)), iscrowd=0,
            bbox=np.round(rng.uniform([-60, -60, -2, -2], [250, 250, 20, 20]), 1).tolist(),
            area=float(rng.integers(-1, 5)), ignore=int(rng.integers(0, 5) == 0),
        )
        for i in range(400)
    ]  # fmt: skip
    path = save(data, content)
    coco = CocoFile(path)
    dataset = CocoDataset(ann_file=str(path), data_prefix=dict(img=''), metainfo=dict(classes=CLASSES), test_mode=True)
    kept = sum(len(dataset.get_data_info(i)['instances']) for i in range(len(dataset)))
    assert kept == coco.read.sum()
    assert 50 < kept < 300


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('{', 'is not JSON'),
        ('[]', r'a list \(of results\?\)'),
        ('3', 'holds a int'),
        ('{"images": []}', "no list 'categories'"),
        ('{"images": [1], "categories": []}', r'images\[0\] is 1, not a dict'),
        ('{"images": [], "categories": [], "annotations": {}}', "no list 'annotations'"),
        (b'\xff\xfe\x00', 'is not JSON'),
    ],
)
def test_what_is_no_coco_file(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / 'a.json'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        examine_annotations(path)


def halve_mask(d: dict) -> None:
    mask = mask_utils.decode(first(d)['segmentation'])[::2, ::2]
    rle = mask_utils.encode(np.asfortranarray(mask))
    first(d)['segmentation'] = dict(rle, counts=rle['counts'].decode())


def drop(name: str) -> Callable[[dict], None]:
    return lambda d: without(d['annotations'], name)


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        (drop('area'), KeyError, 'area'),
        (lambda d: without(d['images'], 'width'), KeyError, 'width'),
        (lambda d: d['annotations'][1].update(id=1), AssertionError, 'are not unique'),
        (halve_mask, (AssertionError, ValueError), None),
    ],
)
def test_what_is_said_to_stop_a_run_does(change: Callable, error: Any, message: Any, data: Path, demo: Config) -> None:
    content = document(data)
    change(content)
    assert names(examine_annotations(save(data, content)))
    init_default_scope('mmdet')

    def read() -> list:
        dataset = DATASETS.build(demo.train_dataloader.dataset)
        return [dataset[i] for i in range(len(dataset))]

    with pytest.raises(error, match=message):
        read()


def perfect(data: Path) -> dict:
    """The scores of the ground truth of the val set, given back as predictions."""
    content = document(data, 'val')
    metric = CocoMetric(f'{data}/annotations/instances_val.json', metric='bbox')
    metric.dataset_meta = dict(classes=CLASSES)
    for image in content['images']:
        found = [a for a in content['annotations'] if a['image_id'] == image['id'] and not a.get('iscrowd')]
        boxes = torch.tensor([a['bbox'] for a in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        pred = dict(
            bboxes=boxes, scores=torch.ones(len(found)),
            labels=torch.tensor([a['category_id'] - 1 for a in found], dtype=torch.long),
        )  # fmt: skip
        metric.process({}, [dict(pred_instances=pred, img_id=image['id'], ori_shape=(192, 192))])
    return metric.evaluate(len(content['images']))


def test_what_is_said_of_the_evaluator(data: Path) -> None:
    assert perfect(data)['coco/bbox_mAP'] == 1
    content = document(data, 'val')
    content['annotations'][0]['id'] = 0
    save(data, content, 'val')
    assert perfect(data)['coco/bbox_mAP'] < 1  # annotation-id-0: a match that counts as a miss
    without(content['annotations'], 'iscrowd')
    save(data, content, 'val')
    with pytest.raises(KeyError, match='iscrowd'):  # crowd-missing
        perfect(data)
    content = document(data, 'val')
    every(content, iscrowd=0)
    del content['categories'][-1]  # class-unknown: a prediction of the last label
    save(data, content, 'val')
    with pytest.raises(IndexError):
        perfect(data)


ODD = [
    None, 'x', -1, 0, float('inf'), float('nan'), [], {}, [1], True, dict(a=1), '7', 3.5, 10**30, 'http://x/y', '..',
    [[1, 2, 3, 4, 5, 6]], [['a'] * 6], dict(counts=[1, 2], size=[1, 3]), dict(counts=['a'], size=[1, 1]),
    dict(counts=[3], size=['a', 2]), dict(counts='52', size=[0, 0]), dict(counts='52', size=[0, 64]), 10**400,
]  # fmt: skip


def test_odd_values_are_findings_and_no_crash(data: Path, demo: Config) -> None:
    rng, content = random.Random(0), document(data)
    for i in range(300):
        changed = copy.deepcopy(content)
        for _ in range(rng.choice([1, 3])):
            entry = rng.choice(changed[rng.choice(['images', 'annotations', 'categories'])])
            entry[rng.choice(list(entry))] = rng.choice(ODD)
        findings = examine_annotations(save(data, changed), data / 'train', demo if i % 2 else None)
        json.dumps([f._asdict() for f in findings])


# --- the images ----------------------------------------------------------------------------------------------------


def rotate(path: Path, orientation: int, size: tuple[int, int] = (192, 128)) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(path).resize(size).save(path, exif=exif)


def look(data: Path, cfg: Config | None = None) -> list[Finding]:
    return examine_annotations(data / 'annotations/instances_train.json', data / 'train', cfg)


def resize_first(data: Path, width: int, height: int) -> None:
    content = document(data)
    content['images'][0].update(width=width, height=height)
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] != 1]
    save(data, content)


def test_missing_files(data: Path) -> None:
    (data / 'train/000003.jpg').unlink()
    (data / 'train/000004.jpg').rename(data / 'train/000004.JPG')
    content = document(data)
    content['images'][5]['file_name'] = 5
    save(data, content)
    assert named(look(data), 'file-name').examples == ('5',)
    finding = named(look(data), 'file-missing')
    assert (finding.severity, finding.count) == ('error', 2)
    assert finding.examples == ('000003.jpg', '000004.jpg (there is 000004.JPG)')


@pytest.mark.parametrize(('prefix', 'part'), [('train/', 'os.path.basename'), ('', "img='train/deep/'")])
def test_files_that_are_elsewhere(prefix: str, part: str, data: Path) -> None:
    content = document(data)
    for image in content['images']:
        image['file_name'] = prefix + image['file_name']
    save(data, content)
    if not prefix:
        (data / 'train/deep').mkdir()
        for path in (data / 'train').glob('*.jpg'):
            path.rename(data / 'train/deep' / path.name)
    finding = named(look(data), 'file-missing')
    assert finding.count == 8
    assert part in finding.mend


def test_files_that_are_torn_or_no_images(data: Path) -> None:
    whole = (data / 'train/000000.jpg').read_bytes()
    (data / 'train/000000.jpg').write_bytes(whole[: len(whole) // 2])
    (data / 'train/000001.jpg').write_bytes(b'')
    (data / 'train/000002.jpg').write_text('not an image')
    (data / 'train/000003.jpg').write_bytes(whole + b'\0' * 10_000)  # a trailer, as some cameras write
    findings = look(data)
    assert [Path(e).name for e in named(findings, 'file-torn').examples] == ['000000.jpg']
    assert named(findings, 'file-unreadable').count == 2


def test_sizes_that_differ(data: Path) -> None:
    image = cv2.imread(str(data / 'train/000000.jpg'))
    cv2.imwrite(str(data / 'train/000000.jpg'), cv2.resize(image, (100, 50)))
    finding = named(look(data), 'size-differs')
    assert finding.severity == 'error'
    assert finding.examples[0].endswith('000000.jpg: 100x50 stored, 192x192 in the file')
    resize_first(data, 50, 100)
    assert 'width and height are swapped' in named(look(data), 'size-differs').text


def test_exif_rotation(data: Path, demo: Config) -> None:
    """What is said of turned images is what MMDetection's loader does with them."""
    rotate(data / 'train/000000.jpg', 6)
    resize_first(data, 192, 128)  # the size as stored, of which annotation tools speak that ignore EXIF
    finding = named(look(data), 'exif-rotated')
    assert finding.severity == 'error'
    assert '192x128 stored, EXIF orientation 6, 192x128 in the file' in finding.examples[0]

    load = dict(type='LoadImageFromFile')
    init_default_scope('mmdet')
    dataset = demo.train_dataloader.dataset
    shape = lambda: DATASETS.build(dict(dataset, pipeline=[load]))[0]['img_shape']  # noqa: E731
    assert shape() == (192, 128)  # turned, while the file says height 128
    load = eval(finding.mend.partition('  #')[0])
    assert shape() == (128, 192)
    dataset.pipeline[0] = load
    findings = look(data, demo)
    assert 'exif-rotated' not in names(findings)
    assert named(findings, 'exif-agrees').severity == 'note'

    resize_first(data, 128, 192)  # now the upright size, which this loader does not give
    assert 'no color_type' in named(look(data, demo), 'exif-rotated').mend
    assert named(look(data), 'exif-agrees').severity == 'note'
    rotate(data / 'train/000000.jpg', 3)
    resize_first(data, 192, 128)
    assert named(look(data), 'exif-unsure').severity == 'warning'


def test_pictures_of_other_depths(data: Path) -> None:
    """A TIFF that is turned, one of 32 bits, one of 16: as MMDetection's loader takes them."""
    content = document(data)
    for i, image in enumerate(content['images'][:3]):
        (data / 'train' / image['file_name']).unlink()
        image.update(file_name=f'{i}.tif', width=128, height=192)
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] > 3]
    save(data, content)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (192, 128)).save(data / 'train/0.tif', exif=exif)
    Image.fromarray(np.full((192, 128), 0.5, np.float32)).save(data / 'train/1.tif')
    Image.fromarray(np.full((192, 128), 200, np.uint16)).save(data / 'train/2.tif')
    (data / 'train' / content['images'][3]['file_name']).unlink()
    content['images'][3].update(file_name='3.tif', width=128, height=192)
    save(data, dict(content, annotations=[a for a in content['annotations'] if a['image_id'] > 4]))
    cv2.imwrite(str(data / 'train/3.tif'), np.full((192, 128), 2000, np.int16))
    (data / 'train' / content['images'][4]['file_name']).unlink()
    content['images'][4].update(file_name='4.png', width=128, height=192)
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] > 5]
    save(data, content)
    cv2.imwrite(str(data / 'train/4.png'), np.full((192, 128, 3), 200, np.uint16))  # coloured, of which Pillow says RGB
    findings = look(data)
    assert named(findings, 'exif-agrees').count == 1
    assert 'exif-rotated' not in names(findings)
    assert [Path(e).name for e in named(findings, 'file-unreadable').examples] == ['1.tif']
    assert [Path(e).name for e in named(findings, 'file-deep').examples] == ['2.tif', '3.tif', '4.png']
    save(data, dict(content, images=[dict(content['images'][0], width=192, height=128)], annotations=[]))
    for upright in (True, False):  # OpenCV turns a TIFF whatever it is told
        coco = CocoFile(data / 'annotations/instances_train.json')
        finding = named(examine_images(coco, data / 'train', upright), 'exif-rotated')
        assert 'without their orientation' in finding.mend
    loaded = [imfrombytes((data / f'train/{i}.tif').read_bytes()) for i in range(4)]
    assert not imfrombytes((data / 'train/4.png').read_bytes()).any()
    assert loaded[0].shape == (192, 128, 3)
    assert loaded[1] is None
    assert not loaded[2].any()
    assert loaded[3] is not None


def test_an_exif_orientation_that_is_no_number(data: Path) -> None:
    # one entry: the orientation as a text of four bytes
    exif = b'Exif\0\0MM\0*' + b'\0\0\0\x08' + b'\0\x01' + b'\x01\x12\0\x02\0\0\0\x04abc\0' + b'\0\0\0\0'
    Image.open(data / 'train/000000.jpg').resize((192, 128)).save(data / 'train/000000.jpg', exif=exif)
    resize_first(data, 192, 128)
    assert not [name for name in names(look(data)) if name.startswith('exif')]


def test_images_that_are_not_listed(data: Path) -> None:
    content = document(data)
    content['images'] = content['images'][:6]
    save(data, content)
    assert named(look(data), 'file-not-listed').examples == ('000006.jpg', '000007.jpg')


def test_a_folder_that_is_not_there(data: Path, demo: Config) -> None:
    with pytest.raises(UserError, match=r'--images .*nowhere is not a folder'):
        examine_annotations(data / 'annotations/instances_train.json', data / 'nowhere')
    demo.train_dataloader.dataset.data_prefix.img = 'nowhere/'
    finding = named(examine_config(demo), 'folder-missing')
    assert (finding.split, finding.mend.partition('  #')[0]) == ('train', "data_prefix=dict(img='nowhere/')")


# --- with a config ---------------------------------------------------------------------------------------------------


def with_classes(cfg: Config, *classes: str) -> None:
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        cfg[loader].dataset.metainfo = dict(classes=classes)


def test_names_that_differ_a_little(demo: Config) -> None:
    with_classes(demo, 'Disc', 'box ', 'triangle', 'star', 'rings')
    finding = named(examine_config(demo), 'class-unknown')
    assert finding.count == 3
    assert finding.examples[0] == "'Disc' (is 'disc' meant?)"
    assert finding.mend.splitlines()[0] == f'metainfo = dict(classes={CLASSES!r})'
    assert finding.mend.splitlines()[1] == 'train_dataloader = dict(dataset=dict(metainfo=metainfo))'


def test_the_classes_of_coco_by_default(demo: Config) -> None:
    del demo.train_dataloader.dataset['metainfo']
    demo.model.roi_head.bbox_head.num_classes = demo.model.roi_head.mask_head.num_classes = 80
    finding = named(examine_config(demo), 'class-unknown')
    assert (finding.severity, finding.split, finding.count) == ('error', 'train', 80)
    assert 'nothing is left to learn' in finding.text
    assert 'roi_head=dict(bbox_head=dict(num_classes=5), mask_head=dict(num_classes=5))' in finding.mend


def test_the_lines_that_mend_classes_do(data: Path, tmp_path: Path) -> None:
    """Written into a config, they leave no error."""
    base = tmp_path / 'base.py'
    lines = [f"_base_ = ['{DEMO}']", f"data_root = '{data}/'"]
    for loader, split in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        lines.append(
            f"{loader}_dataloader = dict(dataset=dict(data_root=data_root, metainfo=dict(classes=('a', 'b'))))"
        )
        if loader != 'train':
            lines.append(f"{loader}_evaluator = dict(ann_file=data_root + 'annotations/instances_{split}.json')")
    base.write_text('\n'.join(lines) + '\n')
    findings = examine_config(read_config(str(base)))
    mends = [line for f in findings if f.name == 'class-unknown' for line in f.mend.splitlines()]
    assert len(mends) >= 4
    mended = tmp_path / 'mended.py'
    mended.write_text('\n'.join([f"_base_ = ['{base}']", *mends, 'test_dataloader = val_dataloader']) + '\n')
    assert not names(examine_config(read_config(str(mended))))


def test_the_other_faults_of_classes(demo: Config) -> None:
    with_classes(demo, 'ring', 'box', 'triangle', 'star', 'disc')
    finding = named(examine_config(demo), 'class-order')
    assert finding.severity == 'error'
    assert finding.examples == ("'ring' for 'disc'", "'disc' for 'ring'")
    with_classes(demo, 'disc', 'box', 'triangle')
    findings = examine_config(demo)
    assert named(findings, 'class-ignored').severity == 'warning'
    assert 'num_classes=3' in named(findings, 'num-classes').mend
    with_classes(demo, 'disc', 'box', 'triangle', 'star', 'star')
    assert 'class-twice' in names(examine_config(demo))
    demo.train_dataloader.dataset.metainfo = dict(classes='disc')
    finding = named(examine_config(demo), 'classes-string')
    assert "classes=('disc',)" in finding.mend


def test_classes_from_a_file(demo: Config, tmp_path: Path) -> None:
    (tmp_path / 'names.txt').write_text('\n'.join(CLASSES) + '\n')
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        demo[loader].dataset.metainfo = dict(classes=str(tmp_path / 'names.txt'))
    assert not names(examine_config(demo))


def test_label_order_is_the_order_of_the_file(data: Path, demo: Config) -> None:
    """The claim behind class-order and classes-differ, by MMDetection itself."""
    content = document(data, 'val')
    content['categories'].reverse()
    save(data, content, 'val')
    dataset = demo.val_dataloader.dataset
    built = CocoDataset(
        ann_file=f'{data}/annotations/instances_val.json', metainfo=dataset.metainfo, data_prefix=dict(img='')
    )
    assert built.cat2label == {5: 0, 4: 1, 3: 2, 2: 3, 1: 4}
    finding = named(examine_config(demo), 'classes-differ')
    assert (finding.severity, finding.split) == ('error', 'val')
    assert finding.examples[0] == "label 0: 'disc' in training, 'ring' here"


def test_heads(demo: Config) -> None:
    demo.model.roi_head.bbox_head.num_classes = 7
    finding = named(examine_config(demo), 'num-classes')
    assert finding.examples == ('roi_head.bbox_head.num_classes=7',)
    assert finding.mend == 'model = dict(roi_head=dict(bbox_head=dict(num_classes=5)))'
    del demo.model.roi_head.bbox_head['num_classes']  # then the head takes its own default
    assert named(examine_config(demo), 'num-classes').examples == ('roi_head.bbox_head.num_classes=80',)


@pytest.mark.parametrize(
    ('config', 'heads'),
    [
        ('cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py', 4),
        ('dino/dino-4scale_r50_8xb2-12e_coco.py', 1),
        ('retinanet/retinanet_r50_fpn_1x_coco.py', 1),
        ('rpn/rpn_r50_fpn_1x_coco.py', 0),
        ('htc/htc_r50_fpn_1x_coco.py', 6),  # not the semantic head
    ],
)
def test_heads_of_other_detectors(config: str, heads: int, tmp_path: Path) -> None:
    path = tmp_path / 'c.py'
    path.write_text(f"_base_ = ['mmdet::{config}']\n")
    found = find_heads(read_config(str(path)).model)
    assert [value for *_, value in found] == [80] * heads
    if heads:
        path.write_text(f"_base_ = ['mmdet::{config}']\n{heads_override(found, 3)}\n")
        assert [value for *_, value in find_heads(read_config(str(path)).model)] == [3] * heads


def test_masks_that_the_config_needs(data: Path, demo: Config) -> None:
    content = document(data)
    without(content['annotations'], 'segmentation')
    save(data, content)
    finding = named(examine_config(demo), 'mask-missing')
    assert finding.severity == 'error'
    assert finding.mend.startswith(
        "model = dict(type='FasterRCNN', roi_head=dict(mask_roi_extractor=None, mask_head=None))"
    )
    init_default_scope('mmdet')
    dataset = DATASETS.build(demo.train_dataloader.dataset)
    with pytest.raises(KeyError, match='mask'):  # as it says
        [dataset[i] for i in range(8)]
    boxes = copy.deepcopy(demo)
    boxes.model.roi_head.mask_head = None
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        for t in boxes[loader].dataset.pipeline:
            if t.type == 'LoadAnnotations':
                t.with_mask = False
    finding = named(examine_config(boxes), 'metric-without-masks')
    assert finding.mend == "val_evaluator = dict(metric='bbox')"
    boxes.val_evaluator.metric = boxes.test_evaluator.metric = 'bbox'
    assert not names(examine_config(boxes))
    demo.train_dataloader.dataset.pipeline[1].with_mask = False
    assert 'masks-not-loaded' in names(examine_config(demo))


def test_polygons_alone_are_read_without_poly2mask(demo: Config) -> None:
    demo.train_dataloader.dataset.pipeline[1].poly2mask = False
    assert 'mask-rle' in names(examine_config(demo))


@pytest.mark.parametrize('mask', [[], [[10, 20, 12, 22], [10, 20, 30, 20, 30, 40]], [[1, 2]]], ids=str)
@pytest.mark.parametrize('is_read', [True, False])
def test_masks_that_stop_the_evaluator(mask: list, is_read: bool, data: Path, demo: Config) -> None:
    content = document(data, 'val')
    content['annotations'][0].update(segmentation=mask, ignore=int(not is_read))
    path = save(data, content, 'val')
    finding = named(examine_config(demo), 'mask-unscored')
    assert (finding.severity, finding.count) == ('error', 1)
    with pytest.raises(Exception, match=r'incorrect type|out of range|not supported'):  # as it says
        [COCO(path).annToRLE(a) for a in content['annotations']]
    with pytest.raises(ValueError, match=r'segmentation of annotations\[0\] has no polygon'):
        check_coco(path, needs=('iscrowd', 'segmentation'))
    check_coco(path, needs=('iscrowd',))
    demo.train_dataloader.dataset.ann_file = demo.val_dataloader.dataset.ann_file
    assert not [f for f in examine_config(demo) if f.name == 'mask-unscored' and f.split == 'train']


def test_filters(data: Path, demo: Config) -> None:
    demo.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=True, min_size=200)
    finding = named(examine_config(demo), 'empty-after-filter')
    assert finding.mend == ('train_dataloader = dict(dataset=dict(filter_cfg=dict(filter_empty_gt=True, min_size=0)))')
    demo.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=True, min_size=32)
    content = document(data)
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] != 3]
    save(data, content)
    findings = examine_config(demo)
    assert named(findings, 'filtered').severity == 'note'
    init_default_scope('mmdet')
    kept = len(DATASETS.build(demo.train_dataloader.dataset))
    assert named(findings, 'filtered').count == 8 - kept


def test_evaluators(data: Path, demo: Config) -> None:
    demo.val_evaluator.ann_file = f'{data}/annotations/instances_train.json'
    finding = named(examine_config(demo), 'evaluator-file')
    assert finding.mend == f"val_evaluator = dict(ann_file='{data}/annotations/instances_val.json')"
    demo.val_evaluator = [ConfigDict(type='CocoMetric', ann_file=str(data / 'none.json'))]
    assert 'none.json of the evaluator does not exist' in named(examine_config(demo), 'evaluator-file').text


def test_a_missing_iscrowd_matters_where_it_is_scored(data: Path, demo: Config) -> None:
    for split in ('train', 'val'):
        content = document(data, split)
        without(content['annotations'], 'iscrowd')
        save(data, content, split)
    found = {f.split: f.severity for f in examine_config(demo) if f.name == 'crowd-missing'}
    assert found == {'train': 'note', 'val': 'error'}


def test_a_test_set_without_annotations(data: Path, demo: Config) -> None:
    content = document(data, 'val')
    del content['annotations']
    path = data / 'annotations/image_info_test.json'
    path.write_text(json.dumps(content))
    demo.test_dataloader = copy.deepcopy(demo.val_dataloader)
    demo.test_dataloader.dataset.ann_file = 'annotations/image_info_test.json'
    demo.test_evaluator = ConfigDict(type='CocoMetric', metric='bbox', ann_file=str(path))
    assert [f.split for f in examine_config(demo) if f.severity == 'error'] == ['test']
    demo.test_evaluator.format_only = True
    assert not names(examine_config(demo))


def test_files_that_are_missing(demo: Config) -> None:
    demo.train_dataloader.dataset.ann_file = 'annotations/nowhere.json'
    finding = named(examine_config(demo), 'annotation-file-missing')
    assert 'annotations/nowhere.json does not exist' in finding.text


def test_the_same_images_in_two_splits(data: Path, demo: Config) -> None:
    shutil.copy(data / 'train/000005.jpg', data / 'val/000001.jpg')
    finding = named(examine_config(demo), 'same-images')
    assert (finding.severity, finding.split, finding.count) == ('warning', 'val', 1)
    assert finding.examples[0].endswith('val/000001.jpg')


def test_wrapped_data_sets(demo: Config) -> None:
    inner = demo.train_dataloader.dataset
    inner.metainfo = dict(classes=('a', 'b'))
    demo.train_dataloader.dataset = ConfigDict(
        type='RepeatDataset', times=2, dataset=dict(type='ClassBalancedDataset', oversample_thr=0.1, dataset=inner)
    )
    finding = named(examine_config(demo), 'class-unknown')
    assert 'train_dataloader = dict(dataset=dict(dataset=dict(dataset=dict(metainfo=metainfo))))' in finding.mend
    other = copy.deepcopy(inner)
    other.metainfo = dict(classes=CLASSES)
    demo.train_dataloader.dataset = ConfigDict(type='ConcatDataset', datasets=[inner, other])
    found = [f for f in examine_config(demo) if f.name == 'class-unknown' and f.split == 'train']
    assert len(found) == 1
    assert found[0].mend.splitlines()[1] == 'metainfo=metainfo  # in train_dataloader.dataset.datasets.0'


def test_other_data_sets_are_named(demo: Config) -> None:
    demo.val_dataloader.dataset.type = 'mmdet.VOCDataset'
    demo.test_dataloader = demo.val_dataloader
    finding = named(examine_config(demo), 'not-coco')
    assert (finding.severity, finding.split) == ('note', 'val')
    assert finding.text.startswith('VOCDataset does not read')
    demo.train_dataloader.dataset.type = 'VOCDataset'
    with pytest.raises(UserError, match='no data set of the config reads a COCO file'):
        examine_config(demo)


def test_small_objects_and_anchors(data: Path, demo: Config) -> None:
    content = document(data)
    for a in content['annotations']:
        a['bbox'][2:] = [7, 7]
    save(data, content)
    findings = examine_config(demo)
    finding = named(findings, 'small-objects')
    assert finding.severity == 'warning'
    assert "dict(type='Resize', scale=(288, 288), keep_ratio=True)" in finding.mend
    # the smallest anchor has 16 px, and 7^2 / 16^2 is below the assigner's 0.3
    finding = named(findings, 'anchors')
    assert finding.severity == 'warning'
    assert finding.mend.startswith('model = dict(rpn_head=dict(anchor_generator=dict(scales=[2])))')
    demo.model.rpn_head.anchor_generator.scales = [2]
    assert not [f for f in examine_config(demo) if f.name == 'anchors']


def test_one_file_against_a_config(data: Path, demo: Config) -> None:
    """The data set of the config that names the file is compared, else the training set."""
    demo.val_dataloader.dataset.metainfo = dict(classes=('a', 'b', 'c', 'd', 'e'))
    path = data / 'annotations/instances_val.json'
    assert named(examine_annotations(path, data / 'val', demo), 'class-unknown').split == 'val'
    copied = shutil.copy(path, data / 'copy.json')
    assert not names(examine_annotations(copied, data / 'val', demo))
    demo.model.roi_head.bbox_head.num_classes = 2
    assert names(examine_annotations(copied, None, demo)) == {'num-classes'}


# --- the command -----------------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, 'argv', ['check', *map(str, arguments)])
    with pytest.raises(SystemExit) as error:
        check.main()
    return error.value.code


def test_the_report(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    path = data / 'annotations/instances_train.json'
    assert run(monkeypatch, path, '--images', data / 'train') == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith('fit for training')
    content = document(data)
    first(content)['bbox'] = [5, 5, 0, 20]
    save(data, content)
    assert run(monkeypatch, path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('ERROR   box-empty (1): boxes narrower or lower than a pixel')
    assert lines[1].strip() == 'annotation 1 of 000000.jpg: bbox [5, 5, 0, 20]'
    assert lines[2].strip().startswith('mend: remove')
    assert lines[-1].startswith('1 error, ')
    options = ('--config', DEMO, '--cfg-options', f'data_root={data}', '--json')
    assert run(monkeypatch, *options) == 1
    report = json.loads(capsys.readouterr().out)
    assert report['fit'] is False
    assert {'severity', 'name', 'text', 'count', 'examples', 'mend', 'split'} == set(report['findings'][0])
    assert report['findings'][0]['name'] == 'box-empty'
    assert report['findings'][0]['split'] == 'train'


def test_arguments_that_do_not_go_together(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for arguments, message in (
        ([], 'name an annotation file, or --config, or both'),
        (['--config', DEMO, '--images', data], '--images goes with an annotation file'),
        (['a.json', '--cfg-options', 'a=1'], '--cfg-options go with --config'),
    ):
        assert run(monkeypatch, *arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_module_runs(data: Path) -> None:
    command = [sys.executable, '-m', 'rkan_mmdet.data.check']
    done = subprocess.run([*command, 'none.json'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == 'error: annotation file none.json does not exist\n'
    options = ['--config', DEMO, '--cfg-options', f'data_root={data}']
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith('0 errors, ')


def test_masks_of_a_box_head() -> None:
    assert has_mask_head(dict(bbox_head=dict(type='RTMDetInsSepBNHead', loss_mask=dict(type='DiceLoss'))))
    assert not has_mask_head(dict(bbox_head=dict(type='RTMDetSepBNHead')))


@pytest.mark.parametrize(('factor', 'expected'), [(2, 2.0), (0.5, 0.5), ((0.5, 0.5), 0.5), ((1.0, 4.0), 2.0)])
def test_a_factor_is_no_size(factor: object, expected: float) -> None:
    assert scale_of([dict(type='Resize', scale_factor=factor)]) == (pytest.approx(expected), True)
    assert scale_of([dict(type='Resize', scale=2)]) == ((2, 2), False)
