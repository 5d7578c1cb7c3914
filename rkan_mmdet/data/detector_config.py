"""What a detector's config says of data, classes, heads and scale."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.config import Config

from rkan_mmdet.data.coco_file import CocoFile
from rkan_mmdet.launch import coco_class, dicts, type_name

ROLES = ('train', 'val', 'test')


class DataSet(NamedTuple):
    """One data set of a config, taken out of its wrappers.

    Attributes:
        role (str): ``'train'``, ``'val'`` or ``'test'``.
        keys (tuple): Where it stands below the data loader, e.g. ``('dataset', 'dataset')``.
        cfg (dict): Its settings.
        pipeline (list[dict]): All transforms, those inside of others and of wrappers too.
        ann_file (str): Path of the annotation file.
        folder (str): Path of the images.
    """

    role: str
    keys: tuple
    cfg: dict
    pipeline: list
    ann_file: str
    folder: str

    def mend(self, inner: str) -> str:
        """The line of config that gives the data set this setting."""
        if any(isinstance(k, int) for k in self.keys):
            return f'{inner}  # in {self.role}_dataloader.{".".join(map(str, self.keys))}'
        for k in reversed(self.keys):
            inner = f'{k}=dict({inner})'
        return f'{self.role}_dataloader = dict({inner})'

    def classes(self) -> tuple[Any, bool]:
        """The classes as MMEngine takes them, and whether the config itself names them."""
        classes = (self.cfg.get('metainfo') or {}).get('classes')
        given = classes is not None
        if not given:
            classes = coco_class(self.cfg).METAINFO['classes']
        if isinstance(classes, str) and Path(classes).is_file():  # one name a line, as mmengine.list_from_file
            classes = Path(classes).read_text(encoding='utf-8').splitlines()
        return classes, given

    def loads_masks(self) -> bool:
        return any(t.get('with_mask') for t in self.pipeline if type_name(t) == 'LoadAnnotations')

    def loads_upright(self) -> bool:
        """Whether images are turned as their EXIF orientation says."""
        for t in self.pipeline:
            if type_name(t).startswith('LoadImage'):
                turns = t.get('imdecode_backend', 'cv2') in (None, 'cv2', 'pillow')
                return turns and t.get('color_type', 'color') in ('color', 'grayscale')
        return True


def join(root: Any, name: Any) -> str:
    """As ``BaseDataset._join_prefix`` does."""
    return os.path.join(root, name or '') if root and '://' not in str(name) else str(name or '')


def find_datasets(cfg: Config, role: str) -> Iterator[tuple[tuple, dict, list]]:
    """The innermost data sets of a loader.

    Args:
        cfg (Config): The config.
        role (str): ``'train'``, ``'val'`` or ``'test'``.

    Yields:
        tuple[tuple, dict, list]: Where it stands below the loader, its settings, its transforms.
    """

    def walk(node: Any, keys: tuple, transforms: list) -> Iterator[tuple[tuple, dict, list]]:
        if not isinstance(node, dict):
            return
        transforms = [t for t in dicts(node.get('pipeline')) if 'type' in t] + transforms
        if isinstance(node.get('datasets'), (list, tuple)):
            for i, inner in enumerate(node['datasets']):
                yield from walk(inner, (*keys, 'datasets', i), transforms)
        elif isinstance(node.get('dataset'), dict):
            yield from walk(node['dataset'], (*keys, 'dataset'), transforms)
        else:
            yield keys, node, transforms

    loader = cfg.get(f'{role}_dataloader')
    if isinstance(loader, dict):
        yield from walk(loader.get('dataset'), ('dataset',), [])


def coco_sets(cfg: Config) -> tuple[list[DataSet], list[tuple[str, str]]]:
    """The data sets of a config, training first.

    Args:
        cfg (Config): The config.

    Returns:
        tuple[list[DataSet], list[tuple[str, str]]]: Those that read a COCO file; role and type of the others.
    """
    sets, others = [], []
    for role in ROLES:
        for keys, node, transforms in find_datasets(cfg, role):
            if coco_class(node) is None:
                others.append((role, type_name(node)))
                continue
            prefix = node.get('data_prefix') or {}
            prefix = prefix.get('img', '') if isinstance(prefix, dict) else prefix
            root = node.get('data_root')
            sets.append(DataSet(role, keys, node, transforms, join(root, node.get('ann_file')), join(root, prefix)))
    return sets, others


def _default(head: dict, name: str) -> Any:
    """What a head takes for an argument that its config leaves out."""
    from mmdet.registry import MODELS

    kind = head.get('type')
    kind = kind if inspect.isclass(kind) or kind is None else MODELS.get(str(kind))
    for cls in kind.__mro__ if inspect.isclass(kind) else ():
        parameter = inspect.signature(cls.__init__).parameters.get(name) if '__init__' in vars(cls) else None
        if parameter is not None:
            return parameter.default
    return None


def find_heads(model: Any) -> list[tuple[tuple, str, int]]:
    """Every number of classes of a detector's heads; an RPN, which knows no classes, is passed over.

    Args:
        model (dict): The config's ``model``.

    Returns:
        list[tuple[tuple, str, int]]: Where the head stands (``('roi_head', 'bbox_head', 0)``), the key, the number.
    """
    found = []

    def walk(node: Any, keys: tuple) -> None:
        if isinstance(node, dict):
            heads = [k for k in keys if isinstance(k, str) and k.endswith('head')]
            if 'contrastive_cfg' in node:  # it names classes by text
                return
            for k in ('num_classes', 'num_things_classes') if heads else ():
                value = node.get(k, _default(node, k) if keys[-1] in heads or isinstance(keys[-1], int) else None)
                if isinstance(value, int):
                    found.append((keys, k, value))
            for k, value in node.items():
                if k not in ('rpn_head', 'semantic_head', 'train_cfg', 'test_cfg'):
                    walk(value, (*keys, k))
        elif isinstance(node, (list, tuple)):
            for i, value in enumerate(node):
                walk(value, (*keys, i))

    walk(model, ())
    return found


def heads_override(heads: Sequence[tuple[tuple, str, int]], count: int) -> str:
    """The line of config that sets the number of classes of these heads.

    Args:
        heads (Sequence): As of :func:`find_heads`.
        count (int): The number of classes.

    Returns:
        str: ``model = dict(...)``; heads in a list, which configs can not merge into, are written anew from the base.

    Examples:
        >>> heads_override([(('roi_head', 'bbox_head'), 'num_classes', 80)], 3)
        'model = dict(roi_head=dict(bbox_head=dict(num_classes=3)))'
        >>> heads_override([(('roi_head', 'bbox_head', i), 'num_classes', 80) for i in range(3)], 3)
        'model = dict(roi_head=dict(bbox_head=[dict(h, num_classes=3) for h in _base_.model.roi_head.bbox_head]))'
    """
    tree: dict = {}
    for keys, k, _ in heads:
        cut = next((i for i, part in enumerate(keys) if isinstance(part, int)), len(keys))
        node = tree
        for part in keys[: cut - (cut < len(keys))]:
            node = node.setdefault(part, {})
        if cut < len(keys):
            node[keys[cut - 1]] = f'[dict(h, {k}={count}) for h in _base_.model.{".".join(keys[:cut])}]'
        else:
            node[k] = str(count)

    def text(node: Any) -> str:
        if isinstance(node, str):
            return node
        return f'dict({", ".join(f"{name}={text(value)}" for name, value in node.items())})'

    return f'model = {text(tree)}'


def has_mask_head(model: Any) -> bool:
    """Whether a detector's config has a head that learns masks."""
    return any(
        isinstance(part.get(k), (dict, list, tuple))
        for part in dicts(model)
        for k in ('mask_head', 'panoptic_head', 'loss_mask')  # the last in the box head of RTMDet-Ins
    )


def scale_of(pipeline: list[dict]) -> tuple[Any, bool] | None:
    """Scale (a pair, or a factor) and keep_ratio of a pipeline's first resizing; the middle one of several."""
    for t in pipeline:
        name, scale = type_name(t), t.get('scale')
        if name == 'RandomChoiceResize' and t.get('scales'):
            scale = sorted(t['scales'], key=np.prod)[len(t['scales']) // 2]
        elif name == 'RandomResize' and scale is not None:
            pairs = np.array(scale if isinstance(scale[0], (list, tuple)) else [scale], float)
            scale = tuple(pairs.mean(0) * np.mean(t.get('ratio_range') or 1.0))
        elif name == 'Resize' and scale is None and t.get('scale_factor'):
            return float(np.prod(np.broadcast_to(t['scale_factor'], 2)) ** 0.5), True  # a factor
        elif name not in ('Resize', 'FixScaleResize'):
            continue
        if isinstance(scale, int):  # mmcv: a square
            scale = (scale, scale)
        if scale is not None:
            return scale, bool(t.get('keep_ratio', False)) or isinstance(scale, float)
    return None


def resized_boxes(coco: CocoFile, scale: Any, keep_ratio: bool) -> np.ndarray:
    """Widths and heights of the usable boxes, Float[N, 2], as the model sees them."""
    use = coco.read & ~coco.crowd
    boxes, sizes = coco.boxes[use, 2:], coco.sizes[use]
    if isinstance(scale, float):
        return boxes * scale
    scale = np.array(scale, float)
    if keep_ratio:
        return boxes * np.minimum(scale.max() / sizes.max(1), scale.min() / sizes.min(1))[:, None]
    return boxes * scale / sizes


def anchor_sizes(generator: dict, scales: Sequence[float] | None = None) -> np.ndarray:
    """Widths and heights of all anchors, Float[A, 2]."""
    strides = [s[0] if isinstance(s, (list, tuple)) else s for s in generator['strides']]
    scales = scales or generator.get('scales')
    if not scales:
        steps = generator['scales_per_octave']
        scales = [generator['octave_base_scale'] * 2 ** (i / steps) for i in range(steps)]
    sides = np.outer(generator.get('base_sizes') or strides, scales).ravel()
    ratios = np.sqrt(np.array(generator.get('ratios') or [1.0], float))
    return np.stack([np.outer(sides, 1 / ratios).ravel(), np.outer(sides, ratios).ravel()], 1)


def best_iou(boxes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """For each box the IoU with the best anchor, were its centre the box's: no anchor can have more."""
    best = np.zeros(len(boxes))
    for anchor in anchors:
        both = np.minimum(boxes, anchor).prod(1)
        best = np.maximum(best, both / (boxes.prod(1) + anchor.prod() - both))
    return best
