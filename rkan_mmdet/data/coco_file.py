"""A COCO annotation file as arrays, with what MMDetection would read of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from rkan_mmdet.data.quick_check import as_key, number
from rkan_mmdet.launch import UserError


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
        self.names = [as_key(category.get('name')) for category in self.categories]
        by_id = {as_key(image.get('id')): image for image in self.images}
        self.image_of = [by_id.get(as_key(a.get('image_id'))) for a in self.annotations]
        self.boxes = _boxes([a.get('bbox') for a in self.annotations])
        self.sizes = np.array([_size(image) for image in self.image_of], float).reshape(-1, 2)
        self.crowd = np.array([bool(a.get('iscrowd')) for a in self.annotations], bool)
        self.areas = np.array([number(a.get('area')) for a in self.annotations], float)
        ids = {as_key(category.get('id')) for category in self.categories}
        known = [as_key(a.get('category_id')) in ids for a in self.annotations]
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


def _whole(values: Iterable) -> bool:
    return all(isinstance(v, int) and 0 <= v < 1 << 31 for v in values)


def _size(image: dict | None) -> tuple[float, float]:
    return (number(image.get('width')), number(image.get('height'))) if image else (math.nan, math.nan)


def _boxes(boxes: list) -> np.ndarray:
    out = np.full((len(boxes), 4), math.nan)
    for i, box in enumerate(boxes):
        if isinstance(box, (list, tuple)) and len(box) == 4:
            out[i] = [number(v) for v in box]
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


def dropped_images(coco: CocoFile, rule: dict, classes: Sequence[str]) -> tuple[list[dict], list[dict]]:
    """The images that ``CocoDataset.filter_data`` drops.

    Args:
        coco (CocoFile): The file.
        rule (dict): A ``filter_cfg``.
        classes (Sequence[str]): The classes that are read.

    Returns:
        tuple[list[dict], list[dict]]: Those without a box, and those that are too small.
    """
    ids = {as_key(c.get('id')) for c in coco.categories if c.get('name') in classes}
    with_boxes = {as_key(a.get('image_id')) for a in coco.annotations if as_key(a.get('category_id')) in ids}
    empty = [i for i in coco.images if rule.get('filter_empty_gt') and as_key(i.get('id')) not in with_boxes]
    least = rule.get('min_size', 0)
    return empty, [i for i in coco.images if not min(_size(i)) >= least]


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
        if not parts or not all(math.isfinite(number(v)) for part in parts for v in part):
            return None
        xs, ys = [v for part in parts for v in part[0::2]], [v for part in parts for v in part[1::2]]
        return min(xs), min(ys), max(xs), max(ys)
    if not isinstance(segmentation, dict):
        return None
    counts, size = segmentation.get('counts'), segmentation.get('size')
    if not (isinstance(counts, (list, str)) and isinstance(size, list) and len(size) == 2 and _whole(size)):
        return None
    if not min(size):  # pycocotools divides by it
        return None
    if isinstance(counts, list):
        if not _whole(counts) or sum(counts) != size[0] * size[1]:
            return None
        segmentation = mask_utils.frPyObjects(segmentation, *size)
    x, y, w, h = mask_utils.toBbox(segmentation)
    return (x, y, x + w, y + h) if w > 0 and h > 0 else None
