"""A config for one's own data, written from a base: classes, paths, heads, evaluators, learning rate and schedule."""

from __future__ import annotations

import math
import os
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config
from yapf.yapflib.yapf_api import FormatCode

from rkan_mmdet.data.check import examine_config
from rkan_mmdet.data.coco_file import CocoFile, dropped_images
from rkan_mmdet.data.detector_config import (
    ROLES,
    find_datasets,
    find_heads,
    has_mask_head,
    heads_override,
)
from rkan_mmdet.data.findings import Finding
from rkan_mmdet.data.schedule import Schedule, counted, plan_schedule, plan_schedulers, scaled
from rkan_mmdet.launch import UserError, coco_class, dicts, type_name

_YAPF = dict(based_on_style='pep8', column_limit=119, dedent_closing_brackets=True, coalesce_brackets=True)


class Split(NamedTuple):
    """A COCO file and the folder of its images."""

    annotations: str
    images: str


class _Code(str):
    """An expression that stands in a config as it is."""


def _code(value: Any) -> str:
    if isinstance(value, _Code):
        return str(value)
    if isinstance(value, dict):
        value = {
            k: v for k, v in value.items() if (k, v) != ('_scope_', 'mmdet')
        }  # MMEngine's mark of the base's scope
        if all(isinstance(k, str) and k.isidentifier() for k in value):
            return f'dict({", ".join(f"{k}={_code(v)}" for k, v in value.items())})'
        return f'{{{", ".join(f"{k!r}: {_code(v)}" for k, v in value.items())}}}'
    if isinstance(value, list):
        return f'[{", ".join(map(_code, value))}]'
    if isinstance(value, tuple):
        return f'({", ".join(map(_code, value))}{"," * (len(value) == 1)})'
    return repr(value)


def _base_expression(role: str, keys: Sequence) -> str:
    return f'_base_.{role}_dataloader' + ''.join(f'[{k}]' if isinstance(k, int) else f'.{k}' for k in keys)


class _Project:
    """The parts of the config, one method each."""

    def __init__(self, cfg: Config, splits: dict[str, Split], coco: CocoFile, scale: Sequence[int] | None) -> None:
        self.cfg, self.splits, self.coco, self.scale = cfg, splits, coco, scale
        paths = [path for split in splits.values() for path in split]
        if len({os.path.isabs(path) for path in paths}) > 1:
            paths = [os.path.abspath(path) for path in paths]
        common = os.path.commonpath(paths)
        self.root = (common or '.').rstrip('/') + '/'
        below = [Path(os.path.relpath(path, self.root)).as_posix() for path in paths]
        files, folders = below[0::2], ['' if path == '.' else f'{path}/' for path in below[1::2]]
        self.below = {role: Split(*pair) for role, *pair in zip(splits, files, folders)}

    def metainfo(self) -> dict:
        out: dict[str, Any] = dict(classes=tuple(self.coco.names))
        for role in ROLES:
            for _, node, _ in find_datasets(self.cfg, role):
                kind = coco_class(node)
                palette = (node.get('metainfo') or {}).get('palette') or (kind and kind.METAINFO.get('palette'))
                if isinstance(palette, list) and len(palette) < len(self.coco.names):
                    out['palette'] = 'random'  # pictures of more classes than colours stop with an AssertionError
        return out

    def pipeline(self, role: str) -> list[str]:
        """The lines that give a pipeline the new scale."""
        keys, node, transforms = next(find_datasets(self.cfg, role))
        own = node.get('pipeline') or []
        sized = [t for t in transforms if {'scale', 'scales', 'img_scale', 'size', 'crop_size'} & set(t)]
        index = [i for i, t in enumerate(own) if type_name(t) == 'Resize' and t.get('scale')]
        if len(sized) != 1 or len(index) != 1:
            names = ', '.join(type_name(t) for t in sized) or 'no transform'
            raise UserError(
                f'--scale is for pipelines with one Resize; the {role} pipeline of the base has its sizes in {names}: '
                'leave --scale out and set them in the new config'
            )
        return [
            f'{role}_pipeline = {_base_expression(role, keys)}.pipeline',
            f'{role}_pipeline[{index[0]}].update(scale={tuple(self.scale)!r})',
        ]

    def loader(self, role: str, batch_size: int) -> dict:
        keys, node, _ = next(find_datasets(self.cfg, role))
        annotations, images = self.below.get(role, self.below['val'])
        new: dict[str, Any] = dict(
            metainfo=_Code('metainfo'), data_root=_Code('data_root'), ann_file=annotations, data_prefix=dict(img=images)
        )
        prefix = node.get('data_prefix') or {}
        if 'datasets' in keys or coco_class(node) is None or not (isinstance(prefix, dict) and set(prefix) <= {'img'}):
            rule = dict(filter_cfg=node.get('filter_cfg') or dict(filter_empty_gt=True))
            new = dict(
                _delete_=True,
                type='CocoDataset',
                **new,
                **(rule if role == 'train' else dict(test_mode=True)),
                pipeline=_Code(f'{_base_expression(role, keys)}.pipeline'),
            )
        if self.scale:
            new['pipeline'] = _Code(f'{"train" if role == "train" else "val"}_pipeline')
        for k in reversed(keys[: keys.index('datasets')] if 'datasets' in keys else keys):
            new = {k: new}
        return dict(batch_size=batch_size, **new) if role == 'train' else new

    def evaluator(self, role: str) -> dict | list:
        ann_file = _Code(f'data_root + {self.below.get(role, self.below["val"]).annotations!r}')
        given = self.cfg.get(f'{role}_evaluator')
        fresh = dict(type='CocoMetric', ann_file=ann_file, metric='bbox')
        if has_mask_head(self.cfg.get('model')):
            fresh['metric'] = ['bbox', 'segm']
        if isinstance(given, (list, tuple)):
            # a list in a config replaces that of its base
            kept = [dict(p, ann_file=ann_file) for p in given if type_name(p) == 'CocoMetric'] or [fresh]
            return kept + [dict(p) for p in given if not type_name(p).endswith('Metric')]
        if type_name(given) == 'CocoMetric':
            return dict(ann_file=ann_file)
        return dict(_delete_=True, **fresh)

    def iterations(self, plan: Schedule, gpus: int) -> int:
        """Of an epoch."""
        keys, node, _ = next(find_datasets(self.cfg, 'train'))
        dropped = dropped_images(self.coco, node.get('filter_cfg') or {}, self.coco.names)
        count = len(self.coco.images) - len({id(image) for part in dropped for image in part})
        part = self.cfg.train_dataloader
        for k in keys[: keys.index('datasets')] if 'datasets' in keys else keys:
            part = part[k]
            count *= part.get('times', 1) if isinstance(part, dict) else 1
        return max(1, math.ceil(math.ceil(count / gpus) / (plan.batch // gpus)))


def _read_base(base: str) -> tuple[Config, str]:
    """The base, and its name for use from anywhere."""
    if '::' not in base:
        if not Path(base).is_file():
            raise UserError(f'--base {base} does not exist')
        base = os.path.abspath(base)
    cfg = _parse(f'_base_ = [{base!r}]\n', f'--base {base}')
    if not (cfg.get('train_cfg') or {}).get('max_epochs'):
        raise UserError(f'--base {base} does not train by epochs (EpochBasedTrainLoop): choose one that does')
    for role in ROLES:
        nodes = list(find_datasets(cfg, role))
        if not nodes:
            raise UserError(f'--base {base} has no {role}_dataloader: choose a whole config')
        if any('seg' in (node.get('data_prefix') or {}) for _, node, _ in nodes):
            raise UserError(f'--base {base} learns from semantic maps too, which a COCO file has not: choose another')
    if not find_heads(cfg.get('model')):
        raise UserError(f'--base {base} has no head with num_classes: choose a detector of classes')
    return cfg, base


def _parse(text: str, what: str) -> Config:
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'pkg_resources is deprecated')
        try:
            return Config.fromstring(text, '.py')
        except Exception as error:  # a config is a program and fails in many ways
            raise UserError(
                f'{what} can not be read: {type(error).__name__}: {" ".join(str(error).split())}'
            ) from error


def _box_base(base: str) -> str:
    """A base without masks to name in place of this one."""
    twin = Path(base).with_name(Path(base).name.replace('mask-rcnn', 'faster-rcnn'))
    if '::' not in base and twin.name != Path(base).name and twin.is_file():
        return os.path.relpath(twin)
    return 'configs/rkan/faster-rcnn_rkan-r50_fpn_1x_coco.py'


class Project(NamedTuple):
    """A config that is still to be written.

    Attributes:
        base (str): The base, by its whole path.
        body (str): What stands below the base.
        title (str): What it is, in one sentence.
        length (str): The length of the run, in one sentence.
    """

    base: str
    body: str
    title: str
    length: str

    def text(self, out: str | None = None) -> str:
        """The config, for a file in this place; None: for any."""
        base, folder = self.base, os.path.abspath(Path(out or '').parent)
        # behind a link MMEngine looks for a relative base in two places at once: where `..` leads by name and by link
        if out is not None and '::' not in base and folder == os.path.realpath(folder):
            base = Path(os.path.relpath(base, folder)).as_posix()
            base = base if base.startswith('.') else f'./{base}'
        return f'# {self.title}\n_base_ = [{base!r}]\n{self.body}'


def make_project(
    base: str,
    train: Split,
    val: Split,
    test: Split | None = None,
    batch_size: int | None = None,
    gpus: int = 1,
    epochs: int | None = None,
    scale: Sequence[int] | None = None,
) -> Project:
    """A config for one's own data.

    Args:
        base (str): A config file, or ``'mmdet::...'``.
        train (Split): What is learned from; its categories, in their order, become the classes.
        val (Split): What is scored.
        test (Split, optional): Defaults to ``val``.
        batch_size (int, optional): Images on each GPU at once. Defaults to the base's.
        gpus (int): Defaults to 1.
        epochs (int, optional): Defaults to the base's; milestones keep their share of the run.
        scale (Sequence[int], optional): Width and height that images are resized to. Defaults to the base's.

    Returns:
        Project: The config.

    Raises:
        UserError: An argument is out of range, a file is missing, or the base does not suit.
    """
    for name, value, least in (('batch-size', batch_size, 1), ('gpus', gpus, 1), ('epochs', epochs, 1)):
        if value is not None and value < least:
            raise UserError(f'--{name} must be at least {least}, but got {value}')
    if scale is not None and min(scale) < 32:
        raise UserError(f'--scale must be at least 32 32, but got {scale[0]} {scale[1]}')
    splits = dict(train=train, val=val, **({} if test is None else dict(test=test)))
    for role, split in splits.items():
        if not Path(split.annotations).is_file():
            raise UserError(f'--{role}: annotation file {split.annotations} does not exist')
        if not Path(split.images).is_dir():
            raise UserError(f'--{role}: {split.images} is not a folder')
    cfg, base = _read_base(base)
    coco = CocoFile(train.annotations)
    if not coco.names or not all(isinstance(name, str) for name in coco.names):
        raise UserError(f'annotation file {train.annotations} is not of COCO: categories need names')
    if has_mask_head(cfg.get('model')) and not coco.has_mask.any():
        raise UserError(
            f'--base {Path(base).name} learns masks and {train.annotations} has none: choose a base of boxes alone, '
            f'such as {_box_base(base)}'
        )

    project = _Project(cfg, splits, coco, scale)
    batch_size = batch_size or cfg.train_dataloader.get('batch_size')
    if batch_size is None:
        raise UserError(f'--base {base} has no batch_size: name one with --batch-size')
    plan = plan_schedule(cfg, batch_size, gpus, Path(base).name)
    length = project.iterations(plan, gpus)
    run = epochs or cfg.train_cfg.max_epochs
    schedulers, warmup = plan_schedulers(cfg, plan, run, length)

    count, lines = len(coco.names), []
    if not cfg.get('custom_imports'):
        lines.append("custom_imports = dict(imports=['rkan_mmdet'])")
    lines += ['', f'metainfo = {_code(project.metainfo())}', f'data_root = {project.root!r}']
    lines += ['', heads_override(find_heads(cfg.model), count), '']
    if scale is not None:
        lines += [*project.pipeline('train'), *project.pipeline('val')]
    loaders = {role: project.loader(role, batch_size) for role in ROLES}
    evaluators = {role: project.evaluator(role) for role in ROLES[1:]}
    for role in ROLES:
        for name, part in ((f'{role}_dataloader', loaders[role]), (f'{role}_evaluator', evaluators.get(role))):
            # what is deleted can not be named twice: MMEngine takes the mark off when it merges for the first time
            twin = name.replace('test', 'val')
            same = role == 'test' and part == (loaders if 'dataloader' in name else evaluators)['val']
            if same and not any('_delete_' in d for d in dicts(part)):
                lines.append(f'{name} = {twin}')
            elif part is not None:
                lines.append(f'{name} = {_code(part)}')
    lines += ['', *_comment(plan.why), *_optimiser(cfg, plan)]
    lines += _length(cfg, run)
    given = cfg.get('param_scheduler') or []
    if schedulers != [dict(s) for s in ([given] if isinstance(given, dict) else given)]:
        lines += [*_comment(warmup), f'param_scheduler = {_code(schedulers)}']
    steps = math.ceil(run * length / plan.accumulate)  # MMEngine ends with one
    said = f'{counted(run, "epoch")} of {counted(length, "iteration")}: {counted(steps, "step")} of the optimiser'
    if steps < 1000:
        more = math.ceil(1000 * plan.accumulate / length)
        said += f'; that is few for a detector (COCO gets 90 000): --epochs {more} makes it 1000'
    body, _ = FormatCode('\n'.join(lines), style_config=_YAPF)
    title = f'{Path(base).stem} for {count} class{"es" * (count > 1)} of your own; made by tools/new_project.py.'
    return Project(base, body.rstrip() + '\n', title, said)


def _comment(text: str) -> list[str]:
    return [f'# {line}' for line in textwrap.wrap(text, 117)]


def _optimiser(cfg: Config, plan: Schedule) -> list[str]:
    wrapper: dict[str, Any] = {}
    if plan.accumulate != cfg.optim_wrapper.get('accumulative_counts', 1):
        wrapper['accumulative_counts'] = plan.accumulate
    if plan.ratio != 1:
        wrapper['optimizer'] = dict(lr=plan.lr)
    lines = [f'optim_wrapper = {_code(wrapper)}'] * bool(wrapper)
    if cfg.get('auto_scale_lr'):  # it would scale what is right already
        lines += [f'auto_scale_lr = dict(base_batch_size={plan.batch})  # lr is right for this batch']
    return lines


def _length(cfg: Config, epochs: int) -> list[str]:
    before = cfg.train_cfg.max_epochs
    if epochs == before:
        return []
    new: dict[str, Any] = dict(max_epochs=epochs)
    if cfg.train_cfg.get('dynamic_intervals'):
        pairs = cfg.train_cfg.dynamic_intervals
        new['dynamic_intervals'] = [(scaled(start, epochs / before, 0), every) for start, every in pairs]
    lines = [f'train_cfg = {_code(new)}']
    changes = []
    for i, hook in enumerate(cfg.get('custom_hooks') or []):
        for k in ('switch_epoch', 'num_last_epochs'):
            if isinstance(hook.get(k), int):
                changes.append(f'custom_hooks[{i}].update({k}={scaled(hook[k], epochs / before, 0)})')
    return lines + ['custom_hooks = _base_.custom_hooks', *changes] * bool(changes)


def write_project(
    out: str, base: str, train: Split, val: Split, track: Callable | None = None, **options: Any
) -> tuple[list[Finding], str]:
    """Write a config for one's own data, unless the data has errors.

    Args:
        out (str): The config to be written; it must not exist.
        base (str): As in :func:`make_project`.
        train (Split): As in :func:`make_project`.
        val (Split): As in :func:`make_project`.
        track (Callable, optional): Called with a sequence of images, iterates over it. Defaults to no progress.
        **options: The other arguments of :func:`make_project`.

    Returns:
        tuple[list[Finding], str]: What the checks found in the data, and a sentence on the length of the run. The file
        is written if none of the findings is an error.

    Raises:
        UserError: As in :func:`make_project`; or ``out`` exists, or is not ``.py``.
    """
    path = Path(out)
    if path.suffix != '.py':
        raise UserError(f'{out} must end in .py')
    if path.exists():
        raise UserError(f'{out} exists: name another file, or remove it')
    project = make_project(base, train, val, **options)
    findings = examine_config(_parse(project.text(), 'the new config'), track)
    if any(f.severity == 'error' for f in findings):
        return findings, project.length
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        part.write_text(project.text(out), encoding='utf-8')
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return findings, project.length
