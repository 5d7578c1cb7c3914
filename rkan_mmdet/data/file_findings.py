"""A COCO annotation file by itself: what MMDetection would drop, mistake or die of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np

from rkan_mmdet.data.coco_file import CocoFile, mask_box
from rkan_mmdet.data.findings import Finding, Report, in_order, lost
from rkan_mmdet.data.quick_check import KEYS, as_key, number, stops_evaluation


def _twice(values: Iterable) -> list:
    return [value for value, count in Counter(values).items() if count > 1]


def examine_file(coco: CocoFile, role: str = '', masks: bool | None = None) -> list[Finding]:
    """What the file says of itself, without any image.

    Args:
        coco (CocoFile): The file.
        role (str): ``'train'`` when nothing is scored on it; ``'val'``, ``'test'``, or empty when that is not known.
            Defaults to ``''``.
        masks (bool, optional): Whether masks will be read: True, False, or None when that is not known. Defaults to
            None.

    Returns:
        list[Finding]: The worst first.
    """
    report = Report()
    _examine_keys(coco, role, report)
    _examine_boxes(coco, report)
    if masks is not False:
        _examine_masks(coco, role, bool(masks), report)
    total = len(coco.annotations)
    if not coco.images:
        report.append(Finding('error', 'empty', 'the file lists no images', mend='name another ann_file'))
    elif not (coco.read & ~coco.crowd).any():
        text = f'none of the {total} annotations is a box that MMDetection would keep' if total else 'no annotations'
        report.append(Finding('error', 'empty', text, mend='mend what stands above, or name another ann_file'))
    else:
        counts = Counter(as_key(a.get('category_id')) for a, read in zip(coco.annotations, coco.read) if read)
        never = [c.get('name') for c in coco.categories if not counts[as_key(c.get('id'))]]
        report.add('note', 'class-never', f'classes, of {len(coco.names)}, are never annotated', never, repr)
        with_boxes = {id(image) for image, read in zip(coco.image_of, coco.read) if read}
        without = [image for image in coco.images if id(image) not in with_boxes]
        text = 'images without any box: filter_empty_gt=True drops them in training'
        report.add('note', 'image-empty', text, without, lambda image: str(image.get('file_name')))
        sides = np.sqrt(coco.boxes[coco.read & ~coco.crowd, 2:].prod(1))
        small = f'{(sides < 32).mean():.0%} of the boxes are small to COCO (area below 32^2), half are below'
        small += f' {np.median(sides):.0f} px (root of the area), 10 % below {np.quantile(sides, 0.1):.0f} px'
        report.append(Finding('note', 'box-sizes', small, int((sides < 32).sum())))
    return in_order(report)


_WRITE = {
    'area': "in the file: a['area'] = a['bbox'][2] * a['bbox'][3] for each annotation a",
    'width': 'write the width of each image file into the json',
    'height': 'write the height of each image file into the json',
}


def _examine_keys(coco: CocoFile, role: str, report: Report) -> None:
    for name, names in KEYS.items():
        entries = getattr(coco, name)
        for k in names:
            text = f'entries of {name!r} have no {k!r}: MMDetection stops with an error'
            bad = [i for i, entry in enumerate(entries) if entry.get(k) is None]
            report.add('error', 'key-missing', text, bad, lambda i, name=name: f'{name}[{i}]', _WRITE.get(k, ''))
    bad = [i for i, a in enumerate(coco.annotations) if a.get('iscrowd') is None]
    text = "annotations have no 'iscrowd': COCO's evaluator stops with KeyError"
    text += ' (nothing is scored on this set)' if role == 'train' else ''
    mend = "in the file: a['iscrowd'] = 0 for each annotation a"
    report.add('note' if role == 'train' else 'error', 'crowd-missing', text, bad, coco.at, mend)
    bad = [i for i, a in enumerate(coco.annotations) if a.get('iscrowd') not in (None, 0, 1)]
    text = "annotations whose 'iscrowd' is neither 0 nor 1: a text counts as crowd, which nothing learns or scores"
    report.add('error', 'crowd-broken', text, bad, lambda i: f'{coco.at(i)}: {coco.annotations[i]["iscrowd"]!r}', mend)
    for k in ('width', 'height'):
        bad = [i for i in coco.images if i.get(k) is not None and not (number(i[k]) > 0 and number(i[k]).is_integer())]
        report.add(
            'error', 'image-size', f'images whose {k} is not a positive whole number', bad,
            lambda i, k=k: f'{i.get("file_name")}: {i[k]!r}', _WRITE[k],
        )  # fmt: skip

    bad = [image for image in coco.images if not isinstance(image.get('file_name', ''), (str, type(None)))]
    text = 'images whose file_name is no text: loading stops with an error'
    report.add('error', 'file-name', text, bad, lambda image: repr(image['file_name']), 'write it as a string')
    for name, what in (('images', 'image'), ('annotations', 'annotation'), ('categories', 'category')):
        ids = [as_key(entry['id']) for entry in getattr(coco, name) if 'id' in entry]
        text = dict(
            image='image ids that stand twice: only the last image is read, and has the boxes of both',
            annotation='annotation ids that stand twice: MMDetection stops with an AssertionError',
            category='category ids that stand twice: labels and classes no longer fit',
        )[what]
        mend = f"number them anew in the file, references too: {name}[i]['id'] = i + 1"
        report.add('error', f'{what}-id-twice', text, _twice(ids), repr, mend)
        text = f"{what} ids that are strings, where COCO's are whole numbers"
        fatal = what == 'annotation' and any(isinstance(i, str) and not i.isdigit() for i in ids)
        bad = [i for i in ids if isinstance(i, str)]
        report.add('error' if fatal else 'warning', f'{what}-id-string', text, bad, repr, mend)
    ids = [category.get('id') for category in coco.categories]
    if role != 'train' and all(isinstance(i, (int, float)) for i in ids) and ids != sorted(ids):
        text = 'category ids do not ascend in the order of the categories: the mean is right, but with classwise=True '
        text += "MMDetection shows classes' AP under each other's names"
        mend = 'number the categories from 1 in their order, category_id of the annotations too'
        report.append(Finding('warning', 'category-order', text, len(ids), tuple(map(repr, ids[:3])), mend))
    bad = [i['id'] for i in coco.images if isinstance(i.get('id'), int) and i['id'] >= 2**63]
    text = 'image ids from 2^63 on: beside others MMDetection makes floating-point numbers of them, some the same'
    report.add('error', 'image-id-large', text, bad, repr, "number them anew in the file: images[i]['id'] = i + 1")
    bad = [i for i, a in enumerate(coco.annotations) if a.get('id') == 0]
    text = "the annotation id 0: COCO's evaluator takes its match for a miss"
    report.add('warning', 'annotation-id-0', text, bad, coco.at, 'number the annotations from 1')
    text = 'category names that stand twice: both become classes, and the heads have too few'
    report.add('error', 'category-twice', text, _twice(map(str, coco.names)), repr, 'give each category one name')
    names = [name for name in coco.names if isinstance(name, str) and name != name.strip()]
    report.add(
        'note', 'category-space', 'category names with blanks around them: classes must have them too', names, repr
    )
    paths = _twice(str(image.get('file_name')) for image in coco.images)
    report.add('warning', 'image-twice', 'image files that are listed twice', paths)

    total = len(coco.annotations)
    bad = [i for i, image in enumerate(coco.image_of) if image is None]
    known = {str(image.get('id')) for image in coco.images}
    hint = '' if not any(str(coco.annotations[i].get('image_id')) in known for i in bad) else _AS_STRINGS
    text = f'annotations whose image_id is of no image{hint}: they are never read'
    report.add(lost(len(bad), total), 'image-unknown', text, bad, coco.at, "set image_id to an 'id' of 'images'")
    bad = np.flatnonzero(~coco.known_category).tolist()
    known = {str(category.get('id')) for category in coco.categories}
    hint = '' if not any(str(coco.annotations[i].get('category_id')) in known for i in bad) else _AS_STRINGS
    text = f'annotations whose category_id is of no category{hint}: they are dropped'
    report.add(
        lost(len(bad), total), 'category-unknown', text, bad,
        lambda i: f'{coco.at(i)}: category_id {coco.annotations[i].get("category_id")!r}',
        "set category_id to an 'id' of 'categories'",
    )  # fmt: skip


_AS_STRINGS = ' (it is a string in one place and a number in the other)'


def _examine_boxes(coco: CocoFile, report: Report) -> None:
    total = len(coco.annotations)

    def show(i: int) -> str:
        return f'{coco.at(i)}: bbox {coco.annotations[i].get("bbox")!r:.80}'

    broken = ~np.isfinite(coco.boxes).all(1)
    bad = [i for i in np.flatnonzero(broken) if coco.annotations[i].get('bbox') is not None]
    text = 'boxes that are not four finite numbers: a crash, or a loss of NaN'
    report.add('error', 'box-broken', text, bad, show, 'remove them, or write [x, y, width, height] in pixels')
    bad = [i for i, a in enumerate(coco.annotations) if a.get('ignore')]
    report.add('note', 'box-ignored', "annotations with 'ignore', which MMDetection drops", bad, coco.at)
    judged = ~broken & np.isfinite(coco.sizes).all(1)
    if not judged.any():
        return
    x, y, w, h = coco.boxes[judged].T
    width, height = coco.sizes[judged].T
    index = np.flatnonzero(judged)

    unit = (coco.boxes[judged] >= 0).all(1) & (coco.boxes[judged].max(1) <= 1) & (np.minimum(width, height) > 4)
    if unit.mean() > 0.5:
        text = 'boxes are in fractions of the image, not in pixels: all are dropped as smaller than a pixel'
        mend = "in the file: multiply bbox by [width, height, width, height] of the image, and set 'area'"
        return report.add('error', 'box-normalised', text, index[unit], show, mend)
    over = (x + w > width + 1) | (y + h > height + 1)
    corners = (w > x) & (h > y) & (w <= width + 1) & (h <= height + 1)
    if over.mean() > 0.3 and corners.mean() > 0.99:
        text = 'boxes are [x1, y1, x2, y2], where COCO has [x, y, width, height]'
        mend = 'in the file: bbox = [x1, y1, x2 - x1, y2 - y1]'
        return report.add('error', 'box-corners', text, index[over], show, mend)

    bad = np.flatnonzero(coco.empty & ~broken)
    text = 'boxes narrower or lower than a pixel: dropped in training, missed by definition in the evaluation'
    report.add(lost(len(bad), total), 'box-empty', text, bad, show, 'remove these annotations from the file')
    bad = np.flatnonzero(coco.outside)
    text = 'boxes wholly outside of their image: dropped in training, missed by definition in the evaluation'
    report.add(lost(len(bad), total), 'box-outside', text, bad, show, 'remove these annotations from the file')
    partly = (over | (x < -1) | (y < -1)) & ~coco.outside[judged] & ~coco.empty[judged]
    text = (
        'boxes that reach over the edge of their image by more than a pixel: cut off in training, not in the evaluation'
    )
    mend = 'in the file: cut them off at the edge; x and y are the top left corner, not the centre'
    report.add('error' if partly.mean() > 0.1 else 'warning', 'box-over-edge', text, index[partly], show, mend)

    sound = ~broken & ~coco.empty
    product = np.where(sound, coco.boxes[:, 2:].prod(1), math.nan)
    with np.errstate(invalid='ignore'):
        flat = sound & (coco.areas <= 0)
        large = coco.areas > 1.05 * product + 1

    def area(i: int) -> str:
        return f'{show(i)}, area {coco.annotations[i].get("area")!r}'

    text = 'annotations of area 0 or less, whatever their box: MMDetection drops them'
    report.add(lost(flat.sum(), total), 'area-zero', text, np.flatnonzero(flat), area, _WRITE['area'])
    text = 'annotations whose area is larger than their box: they count as of the wrong size (small, medium, large)'
    report.add('warning', 'area-wrong', text, np.flatnonzero(large), area, _WRITE['area'])
    bad = [i for i, a in enumerate(coco.annotations) if a.get('area') is not None and math.isnan(coco.areas[i])]
    report.add('error', 'area-broken', 'annotations whose area is not a number', bad, area, _WRITE['area'])


def _examine_masks(coco: CocoFile, role: str, needed: bool, report: Report) -> None:
    if not needed and not coco.has_mask.any():
        return
    bad = np.flatnonzero(~coco.has_mask & coco.read)
    text = 'annotations without a mask'
    text += ": training on masks stops with KeyError: 'mask'" if needed else ', where others have one'
    mend = 'remove them, or train on boxes alone: a Faster R-CNN config, and with_mask=False in LoadAnnotations'
    report.add('error' if needed else 'warning', 'mask-missing', text, bad, coco.at, mend)
    if role != 'train':
        bad = [i for i, a in enumerate(coco.annotations) if stops_evaluation(a.get('segmentation'), needed)]
        text = "masks, also of annotations that are not read, that stop COCO's evaluator: none, or a first polygon of"
        mend = "remove polygons of fewer than three points from 'segmentation', and annotations that have no other"
        severity = 'error' if needed else 'warning'
        report.add(severity, 'mask-unscored', f'{text} fewer than three points', bad, coco.at, mend)
    broken, size, elsewhere = [], [], []
    for i in np.flatnonzero(coco.has_mask & coco.read):
        segmentation, (width, height) = coco.annotations[i]['segmentation'], coco.sizes[i]
        box = mask_box(segmentation, width, height)
        if box is None:
            broken.append(i)
        elif isinstance(segmentation, dict) and list(segmentation['size']) != [height, width]:
            size.append(i)
        elif not coco.crowd[i]:
            x, y, w, h = coco.boxes[i]
            both = (min(box[2], x + w) - max(box[0], x), min(box[3], y + h) - max(box[1], y))
            shared = max(both[0], 0) * max(both[1], 0)
            if shared < 0.5 * (w * h + (box[2] - box[0]) * (box[3] - box[1]) - shared):
                elsewhere.append(i)
    total = len(coco.annotations)
    text = 'masks that are neither polygons [[x, y, ...]] of three points or more nor a whole RLE'
    report.add(lost(len(broken), total), 'mask-broken', text, broken, coco.at, 'mend or remove them in the file')
    text = "masks as RLE whose size [height, width] is not the image's: loading stops with an error"
    report.add('error', 'mask-size', text, size, coco.at, 'encode them at the size of the image')
    text = 'masks that lie elsewhere than their box (IoU below 0.5)'
    report.add(lost(len(elsewhere), total), 'mask-elsewhere', text, elsewhere, coco.at, 'make both of one source')
