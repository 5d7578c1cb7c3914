"""A COCO annotation file by itself: what MMDetection would drop, mistake or die of."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as mask_utils

from rkan_mmdet.launch import UserError

TOLERATED = 0.01  # share of the boxes that may be lost before it is an error: COCO itself has some


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        severity (str): ``'error'``: a run would crash, or would learn or be scored on something else than the data
            says; ``'warning'``: it would be worse than it could be; ``'note'``: good to know.
        name (str): What it is, for programs.
        text (str): What it is, for people.
        count (int): How many images, annotations, classes.
        examples (tuple[str]): Up to three of them.
        mend (str): The lines of config that mend it, or what to do to the file; empty for most notes.
        split (str): ``'train'``, ``'val'``, ``'test'``, or empty.
    """

    severity: str
    name: str
    text: str
    count: int = 1
    examples: tuple[str, ...] = ()
    mend: str = ''
    split: str = ''


class CocoFile:
    """A parsed annotation file, with its boxes as an array.

    Args:
        path (str or Path): The JSON file.

    Attributes:
        images, annotations, categories (list[dict]): As in the file.
        image_of (list[dict or None]): The image of each annotation.
        boxes (ndarray[N, 4]): The boxes as the file has them; NaN for what is not four numbers.
        sizes (ndarray[N, 2]): Width and height of the image of each box; NaN when unknown.

    Raises:
        UserError: It is missing, not JSON, or not of COCO's form.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        document = _read(self.path)
        self.images: list[dict] = document['images']
        self.categories: list[dict] = document['categories']
        self.annotations: list[dict] = document.get('annotations', [])
        self.names = [key(category.get('name')) for category in self.categories]
        by_id = {key(image.get('id')): image for image in self.images}
        self.image_of = [by_id.get(key(a.get('image_id'))) for a in self.annotations]
        self.boxes = _boxes([a.get('bbox') for a in self.annotations])
        self.sizes = np.array([_size(image) for image in self.image_of], float).reshape(-1, 2)
        self.crowd = np.array([bool(a.get('iscrowd')) for a in self.annotations], bool)
        self.areas = np.array([_number(a.get('area')) for a in self.annotations], float)
        ids = {key(category.get('id')) for category in self.categories}
        known = [key(a.get('category_id')) in ids for a in self.annotations]
        self.known_category = np.array(known, bool)
        # the conditions of CocoDataset.parse_data_info
        x, y, w, h = self.boxes.T
        with np.errstate(invalid='ignore'):
            self.empty = (w < 1) | (h < 1)
            inside = (np.minimum(x + w, self.sizes[:, 0]) > np.maximum(x, 0)) & (
                np.minimum(y + h, self.sizes[:, 1]) > np.maximum(y, 0)
            )
            self.outside = ~inside & ~self.empty & np.isfinite(self.boxes).all(1) & np.isfinite(self.sizes).all(1)
            self.read = inside & ~self.empty & (self.areas > 0) & self.known_category
        self.read &= ~np.array([bool(a.get('ignore')) for a in self.annotations], bool)
        masks = [bool(a.get('segmentation')) for a in self.annotations]
        self.has_mask = np.array(masks, bool)

    def at(self, index: int) -> str:
        """The annotation of this index in words."""
        image = self.image_of[index]
        name = image.get('file_name') if image else f'image_id {self.annotations[index].get("image_id")!r}'
        return f'annotation {self.annotations[index].get("id")} of {name}'


def key(value: Any) -> Any:
    """An id that a dict can hold, whatever the file has there."""
    return value if isinstance(value, (int, float, str)) else repr(value)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _whole(values: Iterable) -> bool:
    return all(isinstance(v, int) and 0 <= v < 1 << 31 for v in values)


def _size(image: dict | None) -> tuple[float, float]:
    return (_number(image.get('width')), _number(image.get('height'))) if image else (math.nan, math.nan)


def _boxes(boxes: list) -> np.ndarray:
    out = np.full((len(boxes), 4), math.nan)
    for i, box in enumerate(boxes):
        if isinstance(box, (list, tuple)) and len(box) == 4:
            out[i] = [_number(v) for v in box]
    return out


def _read(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise UserError(f'annotation file {path} does not exist')
    try:
        with open(path, encoding='utf-8') as file:
            document = json.load(file)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise UserError(f'annotation file {path} is not JSON: {error}') from None
    if isinstance(document, list):
        raise UserError(f'annotation file {path} is not of COCO: it is a list (of results?), not a dict')
    if not isinstance(document, dict):
        raise UserError(f'annotation file {path} is not of COCO: it holds a {type(document).__name__}, not a dict')
    for name in ('images', 'categories', 'annotations'):
        entries = document.get(name, [] if name == 'annotations' else None)
        if not isinstance(entries, list):
            raise UserError(f'annotation file {path} is not of COCO: it has no list {name!r}')
        for i, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise UserError(f'annotation file {path} is not of COCO: {name}[{i}] is {entry!r:.60}, not a dict')
    return document


class Report(list):
    """Findings, with the frequent form of adding one."""

    def add(self, severity: str, name: str, text: str, bad: Iterable, show: Callable = str, mend: str = '') -> None:
        """Nothing, when ``bad`` is empty."""
        bad = list(bad)
        if bad:
            self.append(Finding(severity, name, text, len(bad), tuple(show(b) for b in bad[:3]), mend))


def lost(count: int, total: int) -> str:
    """The severity of ``count`` boxes of ``total`` that no training would see."""
    return 'error' if count > TOLERATED * total else 'warning'


def dropped_images(coco: CocoFile, rule: dict, classes: Sequence[str]) -> tuple[list[dict], list[dict]]:
    """The images that ``CocoDataset.filter_data`` drops.

    Args:
        coco (CocoFile): The file.
        rule (dict): A ``filter_cfg``.
        classes (Sequence[str]): The classes that are read.

    Returns:
        tuple[list[dict], list[dict]]: Those without a box, and those that are too small.
    """
    ids = {key(c.get('id')) for c in coco.categories if c.get('name') in classes}
    with_boxes = {key(a.get('image_id')) for a in coco.annotations if key(a.get('category_id')) in ids}
    empty = [i for i in coco.images if rule.get('filter_empty_gt') and key(i.get('id')) not in with_boxes]
    least = rule.get('min_size', 0)
    return empty, [i for i in coco.images if not min(_size(i)) >= least]


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
        _examine_masks(coco, bool(masks), report)
    total = len(coco.annotations)
    if not coco.images:
        report.append(Finding('error', 'empty', 'the file lists no images', mend='name another ann_file'))
    elif not (coco.read & ~coco.crowd).any():
        text = f'none of the {total} annotations is a box that MMDetection would keep' if total else 'no annotations'
        report.append(Finding('error', 'empty', text, mend='mend what stands above, or name another ann_file'))
    else:
        counts = Counter(key(a.get('category_id')) for a, read in zip(coco.annotations, coco.read) if read)
        never = [c.get('name') for c in coco.categories if not counts[key(c.get('id'))]]
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


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """The worst first."""
    return sorted(findings, key=lambda f: ('error', 'warning', 'note').index(f.severity))


_KEYS = dict(
    images=('id', 'file_name', 'width', 'height'),
    annotations=('id', 'image_id', 'category_id', 'bbox', 'area'),
    categories=('id', 'name'),
)
_WRITE = {
    'area': "in the file: a['area'] = a['bbox'][2] * a['bbox'][3] for each annotation a",
    'width': 'write the width of each image file into the json',
    'height': 'write the height of each image file into the json',
}


def _examine_keys(coco: CocoFile, role: str, report: Report) -> None:
    for name, names in _KEYS.items():
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
    for k in ('width', 'height'):
        bad = [
            i for i in coco.images if i.get(k) is not None and not (_number(i[k]) > 0 and _number(i[k]).is_integer())
        ]
        report.add(
            'error', 'image-size', f'images whose {k} is not a positive whole number', bad,
            lambda i, k=k: f'{i.get("file_name")}: {i[k]!r}', _WRITE[k],
        )  # fmt: skip

    for name, what in (('images', 'image'), ('annotations', 'annotation'), ('categories', 'category')):
        ids = [key(entry['id']) for entry in getattr(coco, name) if 'id' in entry]
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


def mask_box(segmentation: Any, width: float, height: float) -> tuple[float, float, float, float] | None:
    """The box (x1, y1, x2, y2) of a mask in COCO's form.

    Args:
        segmentation (list or dict): Polygons, or an RLE.
        width (float): Of the image.
        height (float): Of the image.

    Returns:
        tuple[float] or None: None when the mask is not of COCO's form, or holds nothing.
    """
    if isinstance(segmentation, list):
        if not all(isinstance(part, list) for part in segmentation):
            return None
        parts = [part for part in segmentation if len(part) >= 6 and len(part) % 2 == 0]
        if not parts or not all(math.isfinite(_number(v)) for part in parts for v in part):
            return None
        xs, ys = [v for part in parts for v in part[0::2]], [v for part in parts for v in part[1::2]]
        return min(xs), min(ys), max(xs), max(ys)
    if not isinstance(segmentation, dict):
        return None
    counts, size = segmentation.get('counts'), segmentation.get('size')
    if not (isinstance(counts, (list, str)) and isinstance(size, list) and len(size) == 2 and _whole(size)):
        return None
    if isinstance(counts, list):
        if not _whole(counts) or sum(counts) != size[0] * size[1]:
            return None
        segmentation = mask_utils.frPyObjects(segmentation, *size)
    x, y, w, h = mask_utils.toBbox(segmentation)
    return (x, y, x + w, y + h) if w > 0 and h > 0 else None


def _examine_masks(coco: CocoFile, needed: bool, report: Report) -> None:
    if not needed and not coco.has_mask.any():
        return
    bad = np.flatnonzero(~coco.has_mask & coco.read)
    text = 'annotations without a mask'
    text += ": training on masks stops with KeyError: 'mask'" if needed else ', where others have one'
    mend = 'remove them, or train on boxes alone: a Faster R-CNN config, and with_mask=False in LoadAnnotations'
    report.add('error' if needed else 'warning', 'mask-missing', text, bad, coco.at, mend)
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
