"""A COCO annotation file against a config: classes, heads, scales, filters, evaluators, and splits that overlap."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config

from rkan_mmdet.data.coco_file import CocoFile, dropped_images
from rkan_mmdet.data.detector_config import (
    DataSet,
    anchor_sizes,
    best_iou,
    coco_sets,
    find_heads,
    has_mask_head,
    heads_override,
    resized_boxes,
    scale_of,
)
from rkan_mmdet.data.file_findings import examine_file
from rkan_mmdet.data.findings import Finding, lost
from rkan_mmdet.data.image_files import examine_images
from rkan_mmdet.data.quick_check import as_key
from rkan_mmdet.launch import UserError, dicts, type_name


def _like(name: Any, names: Sequence) -> str | None:
    """The name that was probably meant."""

    def plain(text: Any) -> str:
        return ' '.join(str(text).replace('_', ' ').replace('-', ' ').split()).casefold()

    same = [n for n in names if plain(n) == plain(name)]
    near = same or difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=0.8)
    return near[0] if near else None


def _examine_classes(found: DataSet, coco: CocoFile, model: Any) -> list[Finding]:
    classes, given = found.classes()
    heads = find_heads(model)

    def mend(names: Iterable) -> str:
        names = tuple(names)
        lines = [f'metainfo = dict(classes={names!r})', found.mend('metainfo=metainfo')]
        if any(value != len(names) for *_, value in heads):
            lines.append(heads_override(heads, len(names)))
        return '\n'.join(lines)

    if isinstance(classes, str):
        text = f'classes={classes!r} is a string, of which each letter becomes a class: a comma is missing'
        return [Finding('error', 'classes-string', text, mend=mend([classes]))]
    classes = tuple(classes)
    findings = []
    unknown = [c for c in classes if c not in coco.names]
    if unknown:
        free = [n for n in coco.names if n not in classes]
        meant = {c: _like(c, free) for c in unknown}
        wanted = {meant.get(c, c) for c in classes}
        names = [n for n in coco.names if n in wanted]
        if not given or not names or None in meant.values():
            names = coco.names
        whose = 'the config' if given else f'{type_name(found.cfg)}, as the config names none,'
        text = f'of {len(classes)} classes of {whose} are not in the json: '
        if len(unknown) == len(classes):
            text += 'nothing is left to learn'
        else:
            text += 'labels and names no longer fit, and a prediction of the last labels stops the evaluator'
        shown = [f'{c!r}' + (f' (is {meant[c]!r} meant?)' if meant[c] else '') for c in unknown[:3]]
        findings.append(Finding('error', 'class-unknown', text, len(unknown), tuple(shown), mend(names)))
    counts = Counter(as_key(a.get('category_id')) for a in coco.annotations)
    boxes = {as_key(c.get('name')): counts[as_key(c.get('id'))] for c in coco.categories}
    ignored = [n for n in coco.names if n not in classes and boxes[n]]
    if ignored and not unknown:
        text = f'classes of the json are not among the {len(classes)} of the config: their boxes are dropped'
        shown = tuple(f'{n!r} ({boxes[n]} boxes)' for n in ignored[:3])
        findings.append(Finding('warning', 'class-ignored', text, len(ignored), shown, mend(coco.names)))
    repeated = [c for c, count in Counter(classes).items() if count > 1]
    if repeated:
        text = 'classes that the config names twice: labels and classes no longer fit'
        shown = tuple(map(repr, repeated[:3]))
        findings.append(Finding('error', 'class-twice', text, len(repeated), shown, mend(dict.fromkeys(classes))))
    order = [n for n in coco.names if n in classes]
    if not unknown and not repeated and order != list(classes) and len(order) == len(classes):
        text = 'the classes of the config stand in another order than in the json, whose order numbers the labels: '
        text += 'results would bear wrong names'
        wrong = [f'{a!r} for {b!r}' for a, b in zip(classes, order) if a != b]
        findings.append(Finding('error', 'class-order', text, len(wrong), tuple(wrong[:3]), mend(order)))
    return findings


def compare_labels(train: tuple[DataSet, CocoFile], other: tuple[DataSet, CocoFile]) -> list[Finding]:
    """Each file numbers its labels by its own order of categories: the two must be the same."""
    a, b = ([n for n in coco.names if n in found.classes()[0]] for found, coco in (train, other))
    if a == b:
        return []
    shown = [f'label {i}: {m!r} in training, {n!r} here' for i, (m, n) in enumerate(zip(a, b)) if m != n]
    shown += [f'{len(a)} classes in training, {len(b)} here'] if len(a) != len(b) else []
    text = 'labels mean another class than in training: the order of the categories in the two files differs'
    mend = 'in the file: write the categories of the training file, in its order'
    return [Finding('error', 'classes-differ', text, len(shown), tuple(shown[:3]), mend, other[0].role)]


def check_heads(cfg: Config) -> None:
    """Refuse heads with fewer classes than the training set: a label without an output is taken for background.

    Raises:
        UserError: With the lines that mend it.
    """
    for found in coco_sets(cfg)[0]:
        classes, given = found.classes()
        if found.role != 'train' or not given or not isinstance(classes, (list, tuple)):
            continue
        count = len(classes)
        wrong = [(keys, k, value) for keys, k, value in find_heads(cfg.get('model')) if value < count]
        if wrong:
            raise UserError(f'the training set has {count} classes, the heads fewer: {heads_override(wrong, count)}')


def examine_heads(cfg: Config, train: DataSet) -> list[Finding]:
    classes, _ = train.classes()
    count = 1 if isinstance(classes, str) else len(classes)
    heads = find_heads(cfg.get('model'))
    wrong = [(keys, k, value) for keys, k, value in heads if value != count]
    findings = []
    if wrong:
        text = f'heads are not made for the {count} classes of the training set: '
        more = any(value > count for *_, value in wrong)
        text += 'they learn classes that nobody names' if more else 'labels without an output stop the run'
        shown = tuple(f'{".".join(map(str, keys))}.{k}={value}' for keys, k, value in wrong[:3])
        mend = heads_override(wrong, count)
        findings.append(Finding('error', 'num-classes', text, len(wrong), shown, mend, 'train'))
    loads = [t.get('with_mask', False) for t in train.pipeline if type_name(t) == 'LoadAnnotations']
    if has_mask_head(cfg.get('model')) and loads and not any(loads):
        text = 'the model has a mask head, and the training set loads no masks'
        mend = "dict(type='LoadAnnotations', with_bbox=True, with_mask=True)  # in train_pipeline"
        findings.append(Finding('error', 'masks-not-loaded', text, mend=mend, split='train'))
    return findings


def _examine_scale(cfg: Config, found: DataSet, coco: CocoFile) -> list[Finding]:
    scaling = scale_of(found.pipeline)
    if scaling is None or not (coco.read & ~coco.crowd).any():
        return []
    scale, keep_ratio = scaling
    boxes = resized_boxes(coco, scale, keep_ratio)
    sides = np.sqrt(boxes.prod(1))
    findings = []
    shape = 'x'.join(f'{v:.0f}' for v in scale) if not isinstance(scale, float) else f'factor {scale:g}'
    text = f'at the scale of the pipeline ({shape}) half of the boxes are below {np.median(sides):.0f} px (root of the '
    text += f'area), 10 % below {np.quantile(sides, 0.1):.0f} px'
    findings.append(Finding('note', 'box-sizes-resized', text))
    tiny = sides < 8
    if tiny.mean() > 0.1:
        factor = next((k for k in (1.5, 2, 3) if (sides * k < 8).mean() <= 0.1), 4)
        larger = scale * factor if isinstance(scale, float) else tuple(round(v * factor) for v in scale)
        name = 'scale_factor' if isinstance(scale, float) else 'scale'
        mend = f"dict(type='Resize', {name}={larger}, keep_ratio={keep_ratio})  # in train_pipeline and test_pipeline"
        text = f'boxes ({tiny.mean():.0%}) are below 8 px when resized to {shape}: two cells of the finest features'
        findings.append(Finding('warning', 'small-objects', text, int(tiny.sum()), mend=mend))
    return findings + _examine_anchors(cfg.get('model') or {}, boxes)


def _examine_anchors(model: dict, boxes: np.ndarray) -> list[Finding]:
    """Boxes that no anchor is ever taught: with every anchor their IoU is below the assigner's ``min_pos_iou``."""
    train_cfg, name = model.get('train_cfg') or {}, 'rpn_head' if model.get('rpn_head') else 'bbox_head'
    head = model.get(name)
    assigner = (train_cfg.get('rpn') or {} if name == 'rpn_head' else train_cfg).get('assigner')
    generator = (head.get('anchor_generator') if isinstance(head, dict) else None) or {}
    if type_name(generator) != 'AnchorGenerator' or type_name(assigner) != 'MaxIoUAssigner':
        return []
    least = assigner.get('min_pos_iou', 0.0)
    missed = best_iou(boxes, anchor_sizes(generator)) < least
    if missed.mean() <= 0.1:  # COCO itself, by its usual configs, has about half of it
        return []
    text = f'boxes ({missed.mean():.0%}) have an IoU below {least} with every anchor, once resized: nothing learns them'
    mend = ''
    now = list(generator.get('scales') or [])
    if now:
        tried = [[s * m for s in now] for m in (0.5, 0.25, 2)] + [
            [s * 0.5 for s in now] + now,
            now + [s * 2 for s in now],
        ]
        left = [(best_iou(boxes, anchor_sizes(generator, scales)) < least).mean() for scales in tried]
        best = [int(s) if s == int(s) else s for s in tried[int(np.argmin(left))]]
        mend = f'model = dict({name}=dict(anchor_generator=dict(scales={best})))  # leaves {min(left):.0%}'
    return [Finding('warning', 'anchors', text, int(missed.sum()), mend=mend)]


def _examine_filter(found: DataSet, coco: CocoFile) -> list[Finding]:
    """What ``CocoDataset.filter_data`` leaves of a training set."""
    rule = found.cfg.get('filter_cfg') or {}
    if found.cfg.get('test_mode') or not rule or not coco.images:
        return []
    empty, small = dropped_images(coco, rule, found.classes()[0])
    least = rule.get('min_size', 0)
    dropped = {id(i) for i in empty + small}
    if not dropped:
        return []
    text = f'of {len(coco.images)} images are dropped: {len(empty)} without a box of these classes (filter_empty_gt), '
    text += f'{len(small)} with a side below {least} px (min_size)'
    mend = found.mend(f'filter_cfg=dict(filter_empty_gt={not empty and bool(rule.get("filter_empty_gt"))}, min_size=0)')
    share = len(dropped) / len(coco.images)
    severity = 'error' if share == 1 else 'warning' if small or share > 0.5 else 'note'
    name = 'empty-after-filter' if share == 1 else 'filtered'
    return [Finding(severity, name, text, len(dropped), mend=mend)]


_BOXES_ALONE = """model = dict(type='FasterRCNN', roi_head=dict(mask_roi_extractor=None, mask_head=None))  # no masks
dict(type='LoadAnnotations', with_bbox=True)  # in train_pipeline and test_pipeline
val_evaluator = dict(metric='bbox')  # and test_evaluator"""


def examine_split(cfg: Config, found: DataSet, coco: CocoFile, images: str | None, track: Callable) -> list[Finding]:
    findings = [
        f._replace(mend=_BOXES_ALONE) if f.name == 'mask-missing' and not coco.has_mask.any() else f
        for f in examine_file(coco, found.role, masks=found.loads_masks())
    ]
    metrics = [e for e in dicts(cfg.get(f'{found.role}_evaluator')) if type_name(e) == 'CocoMetric']
    if found.role != 'train' and metrics and all(e.get('format_only') for e in metrics):  # images alone will do
        findings = [f for f in findings if f.name != 'empty' or not coco.images]
    findings += _examine_classes(found, coco, cfg.get('model'))
    findings += _examine_filter(found, coco)
    if found.role == 'train':
        findings += _examine_scale(cfg, found, coco)
        rle = [isinstance(a.get('segmentation'), dict) for a in coco.annotations]
        ignored = np.array(rle, bool) & ~coco.crowd & coco.read
        if found.loads_masks() and ignored.any() and any(t.get('poly2mask') is False for t in found.pipeline):
            text = 'masks are RLE, which poly2mask=False ignores, with their boxes'
            mend = "dict(type='LoadAnnotations', with_bbox=True, with_mask=True, poly2mask=True)  # in train_pipeline"
            severity = lost(int(ignored.sum()), len(coco.annotations))
            findings.append(Finding(severity, 'mask-rle', text, int(ignored.sum()), mend=mend))
    if images is not None:
        findings += examine_images(coco, images, found.loads_upright(), track)
    return [f._replace(split=found.role) for f in findings]


def examine_evaluator(cfg: Config, found: DataSet, coco: CocoFile, read: Callable[[str], CocoFile]) -> list[Finding]:
    findings = []
    name = f'{found.role}_evaluator'
    for part in dicts(cfg.get(name)):
        if type_name(part) != 'CocoMetric':
            continue
        metrics = part.get('metric', 'bbox')
        if 'segm' in ([metrics] if isinstance(metrics, str) else metrics):
            if not has_mask_head(cfg.get('model')):
                text = "the evaluator wants 'segm', and the model makes no masks: it stops with KeyError"
                findings.append(Finding('error', 'metric-without-masks', text, mend=f"{name} = dict(metric='bbox')"))
            elif not found.loads_masks():  # else said already
                bad = np.flatnonzero(coco.read & ~coco.has_mask)
                if len(bad):
                    text = "annotations without a mask: the evaluator, which wants 'segm', stops with KeyError"
                    shown = tuple(coco.at(i) for i in bad[:3])
                    mend = f"{name} = dict(metric='bbox')"
                    findings.append(Finding('error', 'mask-missing', text, len(bad), shown, mend))
        path = part.get('ann_file')
        if not isinstance(path, str) or '://' in path or os.path.realpath(path) == os.path.realpath(found.ann_file):
            continue
        mend = f'{name} = dict(ann_file={found.ann_file!r})'
        if not Path(path).is_file():
            text = f'the annotation file {path} of the evaluator does not exist'
            findings.append(Finding('error', 'evaluator-file', text, mend=mend))
            continue
        other = read(path)
        here, there = ({as_key(i.get('id')) for i in c.images} for c in (coco, other))
        if here != there or coco.names != other.names:
            text = f'the evaluator scores against another file ({path}), with other images or categories'
            findings.append(Finding('error', 'evaluator-file', text, mend=mend))
    return [f._replace(split=found.role) for f in findings]


def _file_hash(path: str) -> str:
    return hashlib.sha1(Path(path).read_bytes()).hexdigest()


def same_images(train: tuple[DataSet, CocoFile], other: tuple[DataSet, CocoFile]) -> list[Finding]:
    """Images of one split that are in training too, by path or byte for byte."""

    def by_size(found: DataSet, coco: CocoFile) -> dict[int, set[str]]:
        out: dict[int, set[str]] = {}
        for image in coco.images:
            path = os.path.realpath(os.path.join(found.folder, str(image.get('file_name'))))
            if os.path.isfile(path):
                out.setdefault(os.path.getsize(path), set()).add(path)
        return out

    ours, theirs = by_size(*train), by_size(*other)
    same = []
    for size in set(ours) & set(theirs):
        same += sorted(ours[size] & theirs[size])
        rest = theirs[size] - ours[size]
        hashes = {_file_hash(path) for path in ours[size]} if rest else set()
        same += sorted(path for path in rest if _file_hash(path) in hashes)
    if not same:
        return []
    text = 'images are in the training set too: what is scored was learned by heart'
    mend = 'give each image to one split alone'
    return [Finding('warning', 'same-images', text, len(same), tuple(same[:3]), mend, other[0].role)]
