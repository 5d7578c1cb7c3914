"""Is an annotation file sound enough to begin with? The few faults that would stop or spoil every run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_BYTES = 2**26  # a larger file takes many seconds to read, and some program has made it
TOLERATED = 0.01  # share of the boxes that may be lost before it is an error: COCO itself has some
KEYS = dict(
    images=('id', 'file_name', 'width', 'height'),
    annotations=('id', 'image_id', 'category_id', 'bbox', 'area'),
    categories=('id', 'name'),
)


def check_coco(
    path: str | Path, classes: Sequence[str] | None = None, needs: Sequence[str] = (), all_classes: bool = False
) -> None:
    """Refuse a file that is not of COCO's form, or whose categories the config would name wrongly.

    Args:
        path (str or Path): The annotation file; one of more than 64 MiB is not read.
        classes (Sequence[str], optional): The classes of the config. None: they are not looked at. Defaults to None.
        needs (Sequence[str]): What an annotation must have besides, for an evaluation. Defaults to ().
        all_classes (bool): Whether every class must be a category of the file: ``CocoMetric`` stops at a prediction of
            one that is not. Defaults to False.

    Raises:
        ValueError: What is wrong in it.
    """
    if Path(path).stat().st_size > MAX_BYTES:
        return
    try:
        document = json.loads(Path(path).read_text(encoding='utf-8'))
    except ValueError as error:  # a UnicodeDecodeError is one
        raise ValueError(f'annotation file {path} is not JSON: {error}') from None

    def refuse(what: str) -> None:
        raise ValueError(
            f'annotation file {path} is not of the COCO form: {what}; `python -m rkan_mmdet.data.check {path}` says '
            'what to do'
        )

    if not isinstance(document, dict):
        refuse(f'it holds a {type(document).__name__}')
    for name, keys in KEYS.items():
        entries = document.get(name, [] if name == 'annotations' else None)
        if not isinstance(entries, list):
            refuse(f'it has no list {name!r}')
        for i, entry in enumerate(entries):
            for key in (*keys, *(needs if name == 'annotations' else ())):
                if not isinstance(entry, dict) or key not in entry:
                    refuse(f'{name}[{i}] has no {key!r}')
    for i, image in enumerate(document['images']):
        if not isinstance(image['file_name'], str):
            refuse(f'file_name of images[{i}] must be a text, but is {image["file_name"]!r}')
        for key in ('width', 'height'):
            if not (math.isfinite(number(image[key])) and image[key] >= 1):
                refuse(f'{key} of images[{i}] must be at least 1, but is {image[key]!r}')
    images = {as_key(image['id']) for image in document['images']}
    if len(images) < len(document['images']):
        refuse('several images have the same id')
    categories = {as_key(category['id']) for category in document['categories']}
    annotations = document.get('annotations', [])
    for key, known, what in (('image_id', images, 'not an image'), ('category_id', categories, 'no category')):
        bad = [i for i, annotation in enumerate(annotations) if as_key(annotation[key]) not in known]
        if len(bad) > TOLERATED * len(annotations):
            refuse(f'annotations[{bad[0]}] names {key} {annotations[bad[0]][key]!r}, which is {what} of the file')
    scored = {as_key(c['id']) for c in document['categories'] if classes is None or c['name'] in classes}
    for i, annotation in enumerate(annotations):
        is_scored = 'segmentation' in needs and as_key(annotation['category_id']) in scored
        if is_scored and stops_evaluation(annotation['segmentation'], True):
            refuse(f'segmentation of annotations[{i}] has no polygon, or a first one of fewer than three points')
        box = annotation['bbox']
        if not (isinstance(box, list) and len(box) == 4 and all(math.isfinite(number(v)) for v in box)):
            refuse(f'bbox of annotations[{i}] must be four finite numbers (x, y, width, height), but is {box!r}')
        if 'iscrowd' in needs and annotation['iscrowd'] not in (0, 1):
            refuse(f'iscrowd of annotations[{i}] must be 0 or 1, but is {annotation["iscrowd"]!r}')
        if not math.isfinite(number(annotation['area'])):
            refuse(f'area of annotations[{i}] must be a finite number, but is {annotation["area"]!r}')
    if classes is not None:
        _check_classes(path, [category['name'] for category in document['categories']], list(classes))
        missing = [name for name in classes if name not in {category['name'] for category in document['categories']}]
        if all_classes and missing:
            raise ValueError(
                f'annotation file {path} has no category {", ".join(missing)}, a prediction of which would stop the '
                'evaluation: add it to its categories, or take it out of the classes of the config'
            )


def differing(path: str | Path, other: str | Path, classes: Sequence[str] | None) -> str:
    """``'images'`` or ``'categories'`` (those of the classes) if two files have other ones, else an empty text.

    Raises:
        ValueError: The other one is not of COCO's form.
    """
    if max(Path(path).stat().st_size, Path(other).stat().st_size) > MAX_BYTES:
        return ''
    images, categories = [], []
    try:
        for file in (path, other):
            document = json.loads(Path(file).read_text(encoding='utf-8'))
            images.append({as_key(image['id']) for image in document['images']})
            named = [(as_key(category['id']), category['name']) for category in document['categories']]
            categories.append([(i, name) for i, name in named if classes is None or name in classes])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'annotation file {file} is not of the COCO form: {error!r:.200}') from None
    if images[0] != images[1]:
        return 'images'
    return 'categories' if categories[0] != categories[1] else ''


def stops_evaluation(segmentation: Any, needed: bool) -> bool:
    """Whether pycocotools can make nothing of a mask; it looks at the first polygon alone to know what it has."""
    if segmentation is None:
        return needed
    if not isinstance(segmentation, list) or (segmentation and isinstance(segmentation[0], dict)):
        return False  # one RLE, or several
    return not segmentation or not isinstance(segmentation[0], list) or len(segmentation[0]) <= 4


def number(value: Any) -> float:
    """What a file has where a number belongs; NaN for anything else, and for what no float holds."""
    try:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def as_key(value: Any) -> Any:
    """An id that a dict can hold, whatever the file has there."""
    return value if isinstance(value, (int, float, str)) else repr(value)


def _check_classes(path: str | Path, names: list[str], classes: list[str]) -> None:
    """The classes that the file has must be the first of the config's, in the file's order, as labels count them."""
    order = [name for name in names if name in classes]
    if not order:
        raise ValueError(
            f'annotation file {path} has the categories {", ".join(map(str, names))}, of which none is a class of the '
            f'config, which has {", ".join(map(str, classes))}'
        )
    if classes[: len(order)] != order:
        raise ValueError(
            f'annotation file {path} has its categories in the order {", ".join(order)}, the config its classes in the '
            f'order {", ".join(map(str, classes))}; MMDetection numbers classes by the order in the file, so every '
            'class would get a wrong name'
        )
