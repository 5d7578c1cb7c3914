"""What the command-line tools share: reading a config, and refusing at once what could only fail later."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import itertools
import logging
import math
import os
import re
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict, DictAction

from .checkpoint import (
    CheckpointError,
    dataset_meta_of,
    find_training_state,
    is_of_training,
    load_from_http,
    read_checkpoint,
    read_training_state,
    torchvision_addresses,
    unsaved_buffers,
    weights_of,
)
from .data.guard import DataError, GuardHook, guard
from .data.quick_check import check_coco, differing


class UserError(Exception):
    """Something the user can mend; tools print it as one line and exit with code 1."""


# what a config is made of, where it has it
_KINDS: dict[str, type] = {
    **dict.fromkeys(('model', 'train_cfg', 'val_cfg', 'test_cfg', 'default_hooks', 'custom_imports'), dict),
    **dict.fromkeys(('train_dataloader', 'val_dataloader', 'test_dataloader', 'optim_wrapper', 'env_cfg'), dict),
    'custom_hooks': Sequence,
    'default_scope': str,
    'work_dir': str,
}

# What remembers something that no checkpoint holds.
FORGETFUL = {'EarlyStoppingHook', 'BatchSyncRandomResize', 'CachedMosaic', 'CachedMixUp', 'DynamicRoIHead'}


class _Options(DictAction):
    """``KEY=VALUE ...``; anything else is a mistake of the caller, and said as one."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string} takes KEY=VALUE, but got {value}')
            try:
                super().__call__(parser, namespace, [value], option_string)
            except (AssertionError, RecursionError) as error:  # of brackets that do not match
                parser.error(f'{option_string} {value} can not be read: {error}')


def dicts(node: Any) -> Iterator[ConfigDict]:
    """Every dict in a config, outermost first."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for value in node:
            yield from dicts(value)


def type_name(cfg: Any) -> str:
    """The name of a config's type, without its scope; new-style configs hold classes."""
    kind = cfg.get('type') if isinstance(cfg, dict) else None
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """``--cfg-options``, as in MMDetection's own tools."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_Options,
        help='override settings of the config, as xxx=yyy; a list is key="[a,b]" or key=a,b, and nested ones are '
        'key="[(a,b),(c,d)]" without white space. data_root=DIR moves every path that lies under the old data_root',
    )


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that MMDetection's own tools share."""
    add_cfg_options(parser)
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    # torch.distributed.launch passes --local-rank
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def read_config(path: str, options: dict[str, Any] | None = None) -> Config:
    """Read a config file and apply ``--cfg-options``.

    The data's root comes from the option ``data_root``, or else from the environment variable ``MMDET_DATASETS``, or
    else from the config.

    Raises:
        UserError: The file is missing or can not be read, or the options do not fit it.
    """
    if not Path(path).is_file():
        raise UserError(f'config {path} does not exist')
    with warnings.catch_warnings():
        # mmengine looks up `mmdet::` bases by pkg_resources, which warns; the stack pins a setuptools that has it
        warnings.filterwarnings('ignore', 'pkg_resources is deprecated')
        try:
            cfg = Config.fromfile(path)
        except Exception as error:  # a config is a program and fails in many ways
            raise UserError(f'config {path} can not be read: {_one_line(error)}') from error
    options = dict(options or {})
    if 'data_root' in options and cfg.get('data_root') is None:
        raise UserError('the config names no data_root, so there is none to replace')
    root = options.pop('data_root', None) or os.environ.get('MMDET_DATASETS')
    if root and cfg.get('data_root') is not None:
        _move_data_root(cfg, str(root))
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError) as error:
        raise UserError(f'--cfg-options do not fit the config: {error}') from error
    for name, kind in _KINDS.items():
        if not isinstance(cfg.get(name), (kind, type(None))):
            raise UserError(f'{name} of the config must be a {kind.__name__}, but is {cfg[name]!r}')
    return cfg


def load_config(args: argparse.Namespace) -> Config:
    """Read ``args.config`` and apply ``args.cfg_options``, ``args.launcher`` and ``args.work_dir``.

    Raises:
        UserError: The file is missing or can not be read, or the options do not fit it.
    """
    if 'LOCAL_RANK' not in os.environ:
        os.environ['LOCAL_RANK'] = str(args.local_rank)
    cfg = read_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    # as in MMDetection: the command line before the config before the config's name
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('./work_dirs', Path(args.config).stem)
    return cfg


def _move_data_root(cfg: Config, root: str) -> None:
    old = cfg.data_root.rstrip('/')
    root = root.rstrip('/') + '/'
    if old in ('', '.'):  # below it lies everything, what is no data too
        for part in dicts(cfg._cfg_dict):
            if part.get('data_root') == cfg.data_root and part is not cfg._cfg_dict:
                part.data_root = root
        for part in dicts([cfg.get('val_evaluator'), cfg.get('test_evaluator')]):
            if isinstance(part.get('ann_file'), str):
                part.ann_file = os.path.join(root, os.path.normpath(part.ann_file))
        cfg.data_root = root
        return

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            for key, item in dict.items(value):  # ConfigDict's own would import what lazy configs name
                dict.__setitem__(value, key, moved(item))
        elif isinstance(value, list):
            value[:] = [moved(item) for item in value]
        elif isinstance(value, str) and (value == old or value.startswith(old + '/')):
            return root + value[len(old) + 1 :]
        return value

    moved(cfg._cfg_dict)


def check_config(cfg: Config, loaders: tuple[str, ...], loads_weights: bool) -> None:
    """Refuse, in one sentence and before any work, what can not run here.

    Args:
        cfg (Config): The config, with everything applied.
        loaders (tuple[str]): The data loaders that will be used, e.g. ``('train_dataloader',)``.
        loads_weights (bool): Whether ``init_cfg`` of the model will be acted upon.

    Raises:
        UserError: Something that the config asks for is not to be had.
    """
    scope = cfg.get('default_scope') or 'mmdet'
    if importlib.util.find_spec(scope) is None:
        raise UserError(
            f'this config needs {scope}, which is not installed: `pip install {scope}`'
            + (', or `make env STACK=pretrain` sets it up beside a torch that it works with' * (scope == 'mmpretrain'))
        )
    amp = str((cfg.get('optim_wrapper') or {}).get('type', '')).endswith('AmpOptimWrapper')
    if amp and 'train_dataloader' in loaders and not torch.cuda.is_available():
        raise UserError('mixed precision (--amp, AmpOptimWrapper) needs a GPU and there is none; train without it')
    for part in dicts(cfg.get('model')) if loads_weights else ():
        source = part.get('checkpoint') if part.get('type') == 'Pretrained' else None
        if isinstance(source, str):
            _check_weights(source, with_dot(part.get('prefix')))
    for name in loaders:
        if name.startswith('test') and not cfg.get(name):
            raise UserError(f'the config has no {name}, which says what images there are')
        for part in dicts((cfg.get(name) or {}).get('dataset')):
            _check_data(part, name, *_needs(cfg, name))
    evaluators = [f'{name.split("_")[0]}_evaluator' for name in loaders if not name.startswith('train')]
    for part in dicts([cfg.get(name) for name in evaluators]):
        path = part.get('ann_file')
        if isinstance(path, str) and path and '://' not in path and not Path(path).exists():
            raise UserError(f'annotation file {path} of the evaluator does not exist; {_data_help(path)}')
    for name in loaders:
        _check_scored(cfg, name)


def _check_scored(cfg: Config, loader: str) -> None:
    """The file that is scored against must have the images and categories of the one that is read."""
    dataset = (cfg.get(loader) or {}).get('dataset') or {}
    kind = None if loader.startswith('train') or not dataset.get('ann_file') else coco_class(dataset)
    if kind is None:
        return
    read = Path(dataset.get('data_root') or '', dataset.ann_file)
    for part in dicts(cfg.get(f'{loader.split("_")[0]}_evaluator')):
        scored = part.get('ann_file') if type_name(part) == 'CocoMetric' and not part.get('format_only') else None
        if not scored or '://' in f'{scored}{read}' or Path(scored).samefile(read):
            continue
        try:
            what = differing(read, scored, _classes(dataset, kind))
        except ValueError as error:
            raise UserError(str(error)) from error
        if what:
            raise UserError(
                f'annotation file {scored} of the evaluator has other {what} than {read} of {loader}, so that the AP '
                'would be wrong: name the same file for both'
            )


def _needs(cfg: Config, loader: str) -> tuple[tuple[str, ...], bool]:
    """What annotations must have besides, to be evaluated, and whether their file must have every class."""
    evaluator = cfg.get(f'{loader.split("_")[0]}_evaluator') if not loader.startswith('train') else None
    metrics = [metric for part in dicts(evaluator) for metric in _listed(part.get('metric'))]
    # without a file it makes one of the data set
    known = any(type_name(part) == 'CocoMetric' and part.get('ann_file') for part in dicts(evaluator))
    if not known:
        return (), False
    # proposals are of one class
    return ('iscrowd', *(['segmentation'] if 'segm' in metrics else [])), bool({None, 'bbox', 'segm'} & set(metrics))


def _listed(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _data_help(path: str | Path) -> str:
    fetch = ''
    if 'semi_anns' in str(path):
        fetch = ", or draw these annotations with MMDetection's split_coco.py (configs/lowdata/README.md)"
    elif '2017' in str(path):
        fetch = ', or fetch COCO 2017 with `python tools/download_coco.py`'
    return f'name the folder of your data with --cfg-options data_root=DIR or MMDET_DATASETS=DIR{fetch}'


def with_dot(prefix: str | None) -> str:
    """As MMEngine takes the ``prefix`` of an ``init_cfg``."""
    return f'{prefix.rstrip(".")}.' if prefix else ''


def _check_weights(source: str, prefix: str) -> None:
    known = source.partition('://')[2] in torchvision_addresses()
    if source.startswith('torchvision://') and not known and importlib.util.find_spec('torchvision') is None:
        raise UserError(
            f'pretrained weights {source} need torchvision, which is not installed; install it, or name '
            'a local file with --cfg-options model.backbone.init_cfg.checkpoint=FILE, or start from scratch with '
            '--cfg-options model.backbone.init_cfg=None'
        )
    if '://' not in source and not Path(source).is_file():
        name = Path(source).parent.name
        made = f'make them with `python tools/train.py configs/pretrain/{name}.py`, or ' * name.endswith('_in1k')
        raise UserError(
            f'pretrained weights {source} do not exist; {made}name a file with --cfg-options '
            'model.backbone.init_cfg.checkpoint=FILE, or start from scratch with model.backbone.init_cfg=None'
        )
    if '://' not in source:
        checkpoint = read_checkpoint(source)
        inside = checkpoint.get('model') if isinstance(checkpoint, dict) else None  # Swin's own files, and PVT's
        state, _ = weights_of(inside if isinstance(inside, dict) else checkpoint, source)
        if not any(key.startswith(prefix) for key in state):
            raise UserError(
                f'pretrained weights {source} hold none that begin with {prefix!r}; those of a backbone by itself are '
                'taken with --cfg-options model.backbone.init_cfg.prefix=None'
            )


def _check_data(dataset: ConfigDict, loader: str, needs: tuple[str, ...], all_classes: bool) -> None:
    classes = (dataset.get('metainfo') or {}).get('classes', ())
    is_file = isinstance(classes, str) and Path(classes).is_file()  # of names
    if not is_file and not (isinstance(classes, (tuple, list)) and all(isinstance(name, str) for name in classes)):
        raise UserError(
            f"metainfo.classes of {loader} must be a tuple of names, as ('cat',), or a file of them, but is {classes!r}"
        )
    root, prefix = dataset.get('data_root') or '', dataset.get('data_prefix') or {}
    names = [dataset.get('ann_file'), *(prefix.values() if isinstance(prefix, dict) else [prefix])]
    for name in [name for name in names if name] or [root]:
        if not isinstance(name, str) or not name or '://' in f'{root}{name}':
            continue
        path = Path(root, name)  # an absolute name stands alone
        if not path.exists():
            raise UserError(f'{path} of {loader} does not exist; {_data_help(path)}')
        if path.suffix == '.json' and name == dataset.get('ann_file'):
            _check_annotations(path, dataset, needs, all_classes)


def coco_class(cfg: dict) -> type | None:
    """The class of a data set that reads its file as ``CocoDataset`` does, else None."""
    from mmdet.datasets import CocoDataset
    from mmdet.registry import DATASETS

    kind = cfg.get('type')
    kind = kind if isinstance(kind, type) else DATASETS.get(str(kind))
    if not (isinstance(kind, type) and issubclass(kind, CocoDataset)):
        return None
    # those of LVIS and of panoptic sets do not
    same = all(getattr(kind, name) is getattr(CocoDataset, name) for name in ('load_data_list', 'COCOAPI'))
    return kind if same else None


def _check_annotations(path: Path, dataset: ConfigDict, needs: tuple[str, ...], all_classes: bool) -> None:
    kind = coco_class(dataset)
    if kind is None:
        return
    try:
        check_coco(path, _classes(dataset, kind), needs, all_classes)
    except ValueError as error:
        raise UserError(str(error)) from error


def _classes(dataset: ConfigDict, kind: Any) -> list[str] | None:
    classes = (dataset.get('metainfo') or {}).get('classes') or kind.METAINFO.get('classes')
    return list(classes) if isinstance(classes, (tuple, list)) else None  # a string is a file of names


def check_checkpoint(path: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Refuse a checkpoint that is not there, is torn, asks for code, or holds no weights.

    Args:
        path (str): A file, or an address.

    Returns:
        tuple: The state dict and ``meta``.

    Raises:
        UserError: ``path`` is neither a file nor an address.
        CheckpointError: It can not be fetched, or not be used.
    """
    if path.startswith(('http://', 'https://')):
        return weights_of(load_from_http(path, 'cpu'), path)
    _check_exists(path)
    return weights_of(read_checkpoint(path), path)


def _check_exists(path: str) -> None:
    if not Path(path).is_file():
        raise UserError(f'checkpoint {path} does not exist')


def prepare_training(cfg: Config, resume: str | None = None) -> dict[str, Any] | None:
    """Choose what a training starts from, read it once to know that it is safe and whole, and set the hooks that
    let a killed run go on exactly.

    Args:
        cfg (Config): Changed in place: ``resume``, ``load_from``, the seed of a resumed run, the hooks.
        resume (str, optional): A checkpoint to go on from, or ``'auto'``: the last whole one in ``cfg.work_dir``,
            and a new start where there is none. None: as the config says. Defaults to None.

    Returns:
        dict or None: What the checkpoint to go on from holds; None for a new start.

    Raises:
        UserError: The checkpoint is not there, or the work directory holds those of another training.
        CheckpointError: It is torn, or asks for code, or can not be resumed.
    """
    if resume not in (None, 'auto'):
        cfg.resume, cfg.load_from = True, resume
    state = None
    if resume == 'auto' or (cfg.get('resume') and not cfg.get('load_from')):
        found = find_training_state(cfg.work_dir, template_of(cfg))
        cfg.resume = found is not None
        if found is None:
            _check_work_dir(cfg, None)
            print(f'There is no checkpoint to resume in {cfg.work_dir}: training starts anew.')
        else:
            cfg.load_from, state = found
    else:
        if cfg.get('load_from') is not None and not isinstance(cfg.load_from, str):
            raise UserError(f'load_from must be a file or an address, but is {cfg.load_from!r}')
        local = cfg.get('load_from') and '://' not in cfg.load_from
        if local:
            _check_exists(cfg.load_from)
        _check_work_dir(cfg, cfg.load_from if cfg.get('resume') else None)
        if local and cfg.get('resume'):
            state = read_training_state(cfg.load_from)
        elif local:
            check_checkpoint(cfg.load_from)
    if state is not None:
        if (cfg.get('randomness') or {}).get('seed') is None:
            # the loader takes its seed before MMEngine reads the checkpoint's
            cfg.randomness = dict(cfg.get('randomness') or {}, seed=state['meta'].get('seed'))
        kinds = {type_name(part) for part in dicts(cfg._cfg_dict)}
        for kind in sorted(kinds & FORGETFUL):
            print(f'warning: {kind} remembers what no checkpoint holds: the resumed run is not the undisturbed one')
        batches = (cfg.get('optim_wrapper') or {}).get('accumulative_counts', 1)
        if isinstance(batches, int) and batches > 1 and state['meta']['iter'] % batches:
            print(
                f'warning: {cfg.load_from} was saved between two steps of the optimizer, which takes one every '
                f'{batches} batches: their gradients are lost, and the resumed run is not the undisturbed one'
            )
    _add_hooks(cfg)
    return state


def template_of(cfg: Config) -> str:
    """Of the names of a training's checkpoints, besides MMEngine's own."""
    return ((cfg.get('default_hooks') or {}).get('checkpoint') or {}).get('filename_tmpl') or 'epoch_{}.pth'


def _check_work_dir(cfg: Config, resumed: str | None) -> None:
    """A new run would replace what one before it saved."""
    saving = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    work_dir, elsewhere = Path(cfg.work_dir), saving.get('out_dir')
    folders = [work_dir, *([Path(elsewhere, work_dir.name)] if elsewhere and '://' not in elsewhere else [])]
    there = [
        path
        for folder in folders
        for path in sorted(folder.glob('*.pth'))
        if path.name.startswith('best_') or is_of_training(path.name, template_of(cfg))
    ]
    if there and (resumed is None or Path(resumed).resolve().parent not in [folder.resolve() for folder in folders]):
        names = ', '.join(path.name for path in there[:3]) + ', ...' * (len(there) > 3)
        raise UserError(
            f'{there[0].parent} holds checkpoints of a training ({names}), which another would replace: go on with it '
            'by --resume (where they hold more than weights), or name another --work-dir, or move them away'
        )


def _add_hooks(cfg: Config) -> None:
    defaults = dict(cfg.get('default_hooks') or {})
    saving = defaults.setdefault('checkpoint', dict(type='CheckpointHook', interval=1))
    if saving is not None and type_name(saving) == 'CheckpointHook':
        defaults['checkpoint'] = dict(saving, type='AtomicCheckpointHook')
    cfg.default_hooks = defaults
    hooks = cfg.get('custom_hooks') or []
    named = [type_name(hook) for hook in hooks]
    cfg.custom_hooks = [*hooks, *(dict(type=name) for name in ('ReseedHook', 'FiniteHook') if name not in named)]

    # so that MMDetection's own tools find them when they read the config that the run leaves in its directory
    imports = cfg.get('custom_imports') or {}
    names = imports.get('imports') or []
    names = [names] if isinstance(names, str) else names
    if 'rkan_mmdet' not in names:
        cfg.custom_imports = dict(imports, imports=[*names, 'rkan_mmdet'])


def check_names(meta: dict[str, Any], dataset: Any, path: str) -> None:
    """Say that a checkpoint names other classes than the data, or the same in another order.

    It is no error for certain: what a label means is decided by the order of the categories in the file.

    Args:
        meta (dict): Of the checkpoint.
        dataset (Dataset): Of the loader.
        path (str): The checkpoint's name, for the message.
    """
    metas = (meta, dict(dataset_meta=getattr(dataset, 'metainfo', None)))
    theirs, ours = (list(dataset_meta_of(of).get('classes') or ()) for of in metas)
    if theirs and ours and theirs != ours:
        same = sorted(map(str, theirs)) == sorted(map(str, ours))
        print(
            f'warning: checkpoint {path} has {"its classes in another order" if same else "other classes"} '
            f'({", ".join(map(str, theirs[:5]))}) than the config ({", ".join(map(str, ours[:5]))}): if the categories '
            'of the file are not in the order of those that it was trained on, its detections bear wrong names'
        )


def load_exactly(model: torch.nn.Module, state: dict[str, torch.Tensor], path: str) -> None:
    """Load weights that must be this model's: of others MMEngine only warns, and goes on with weights that nobody
    trained.

    Args:
        model (nn.Module): The model, or a wrapper of it (DDP, test-time augmentation).
        state (dict[str, Tensor]): Of the checkpoint.
        path (str): Its name, for the message.

    Raises:
        UserError: Weights are missing, or left over, or of another shape, or not finite.
    """
    while isinstance(getattr(model, 'module', None), torch.nn.Module):
        model = model.module
    renamed = [(re.sub(r'^module\.', '', name), value) for name, value in state.items()]  # of DDP
    unsaved = unsaved_buffers(model)
    named = OrderedDict((name, value) for name, value in renamed if name not in unsaved)
    named._metadata = getattr(state, '_metadata', OrderedDict())  # by it modules know weights of older versions
    missing: list[str] = []
    unexpected: list[str] = []
    shapes: list[str] = []
    try:
        missing, unexpected = model.load_state_dict(named, strict=False)
    except RuntimeError as error:
        shapes = re.findall(r'size mismatch for ([^:]+):', str(error)) or [str(error).splitlines()[-1].strip()]
    state = model.state_dict()  # statistics of norms too
    broken = [name for name, value in state.items() if torch.is_tensor(value) and not bool(value.isfinite().all())]
    faults = [
        listed(broken, 'weights in it are NaN or infinite'),
        listed(missing, 'weights of the detector are not in it'),
        listed(unexpected, 'weights in it are not of the detector'),
        listed(shapes, 'weights are of another shape'),
    ]
    if any(faults):
        raise UserError(f'checkpoint {path} does not fit the config: {"; ".join(filter(None, faults))}')


def listed(names: Sequence[str], what: str) -> str:
    """``3 weights (a, b, c)``; empty when there are none."""
    return f'{len(names)} {what} ({", ".join(names[:3])}{", ..." * (len(names) > 3)})' if names else ''


@contextlib.contextmanager
def reading_config() -> Iterator[None]:
    """Say in one line that a config has something of a kind that nobody looks for at that place."""
    try:
        yield
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f'the config can not be used: {_one_line(error)}') from error


def start_training(runner: Any, state: dict[str, Any] | None = None) -> None:
    """Train; what fails before the first epoch is something that the config or the checkpoint asks for.

    Args:
        runner (Runner): From :func:`make_runner`.
        state (dict, optional): What :func:`prepare_training` gave; its weights must be this model's. Defaults to None.

    Raises:
        UserError: Something can not be built or resumed. ``RKAN_DEBUG=1`` shows where.
    """
    loop, begun = runner.train_loop, []
    if getattr(loop, 'val_interval', 1) < 1:
        raise UserError(f'train_cfg.val_interval must be at least 1, but is {loop.val_interval}')
    call_hook = runner.call_hook

    def call_noting_begin(name: str, **options: Any) -> None:
        if name == 'before_train_epoch':
            begun.append(True)
        call_hook(name, **options)

    runner.call_hook = call_noting_begin
    if isinstance(getattr(runner, 'model', None), torch.nn.Module):
        _check_fit(runner, state)
    try:
        runner.train()
    except (UserError, CheckpointError, DataError, FloatingPointError):
        raise
    except Exception as error:
        if begun or getattr(error, 'strerror', None):  # of the disk
            raise
        raise UserError(f'the training can not begin: {_one_line(error)}') from error


def _check_fit(runner: Any, state: dict[str, Any] | None) -> None:
    path = runner._load_from
    if state is not None:
        load_exactly(runner.model, state['state_dict'], path)
        _check_scaled_lr(runner, state, path)
        check_names(state['meta'], runner.train_dataloader.dataset, path)
    elif path and '://' not in path:  # weights of a model that is like this one in part
        names = {re.sub(r'^module\.', '', name) for name in check_checkpoint(path)[0]}
        # a semi-supervised detector takes the weights of a plain one for both of its own
        if not names & {re.sub(r'^(module\.|student\.|teacher\.)*', '', name) for name in runner.model.state_dict()}:
            raise UserError(f'checkpoint {path} does not fit the config: none of its weights is of the detector')


def _check_scaled_lr(runner: Any, state: dict[str, Any], path: str) -> None:
    """MMEngine scales the rate to the GPUs at hand, and then takes the checkpoint's, scaled to whatever it was."""
    scale, optimizer = runner.cfg.get('auto_scale_lr') or {}, runner.cfg.optim_wrapper.get('optimizer') or {}
    rates = [group['initial_lr'] for group in state['optimizer'].get('param_groups', ()) if 'initial_lr' in group]
    if not (scale.get('enable') and rates and 'lr' in optimizer):
        return
    batch = runner.cfg.train_dataloader.batch_size
    rate = optimizer.lr * runner.world_size * batch / scale.base_batch_size
    if not any(math.isclose(rate, other, rel_tol=1e-3) for other in rates):  # others have an lr_mult
        raise UserError(
            f'{path} has a learning rate of {max(rates):g} and goes on so, but {runner.world_size} x {batch} '
            f'images ask for {rate:g}: resume it with as many GPUs and images as it began, or without scaling'
        )


def build_model(cfg: Config, part: ConfigDict | None = None) -> torch.nn.Module:
    """Build the model of a config, or a part of it.

    Args:
        cfg (Config): The config.
        part (ConfigDict, optional): Such as ``cfg.model.backbone``. Defaults to None: ``cfg.model``.

    Raises:
        UserError: It can not be built. ``RKAN_DEBUG=1`` shows where.
    """
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(cfg.get('default_scope') or 'mmdet')
    try:
        return MODELS.build(copy.deepcopy(part or cfg.model))  # some detectors write into what they are built from
    except Exception as error:  # an option that a class does not know, a class that no registry knows, ...
        raise UserError(f'the model of the config can not be built: {_one_line(error)}') from error


def build_dataset(dataset: ConfigDict) -> Any:
    """Build a data set of a config.

    Raises:
        UserError: It can not be built. ``RKAN_DEBUG=1`` shows where.
    """
    from mmdet.registry import DATASETS

    try:
        return DATASETS.build(dataset)
    except Exception as error:  # an option that a class does not know, a class that no registry knows, ...
        raise UserError(f'a data set of the config can not be built: {_one_line(error)}') from error


def backbone_of(model: torch.nn.Module) -> torch.nn.Module:
    """The backbone of a detector.

    Raises:
        UserError: It has none of its own, as a semi-supervised detector, which is made of two.
    """
    if not hasattr(model, 'backbone'):
        raise UserError(f'{type(model).__name__} has no backbone of its own: name the config of the detector within')
    return model.backbone


def make_runner(cfg: Config, loops: tuple[str, ...] = ()) -> Any:
    """The runner that the config asks for.

    On a CPU, a distributed launch is prepared here: MMEngine 0.10.7 sets a CUDA device and passes device ids, which a
    CPU build of torch has not.

    Args:
        cfg (Config): The config.
        loops (tuple[str]): Loops whose data is loaded now, of ``'train'``, ``'val'`` and ``'test'``. Defaults to ().

    Raises:
        UserError: Something in the config can not be built. ``RKAN_DEBUG=1`` shows where.
    """
    from mmengine.dist import is_distributed
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    _spare_config(cfg, 'test' if 'test' in loops else 'train')
    try:
        if cfg.launcher == 'pytorch' and not torch.cuda.is_available() and not is_distributed():
            torch.distributed.init_process_group('gloo')
            cfg.setdefault('model_wrapper_cfg', dict(
                type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False,
                find_unused_parameters=cfg.get('find_unused_parameters', False),
            ))  # fmt: skip
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
        build = runner.build_dataloader

        def build_guarded(*args: Any, **options: Any) -> Any:  # before an iteration-based loop starts its workers
            loader = build(*args, **options)
            guard(loader.dataset)
            return loader

        runner.build_dataloader = build_guarded
        for name in loops:
            getattr(runner, f'{name}_loop')  # made when it is first asked for
        runner.register_hook(GuardHook())
    except (UserError, CheckpointError):
        raise
    except Exception as error:  # an option that a class does not know, a launcher that did not launch this, ...
        raise UserError(f'what the config asks for can not be built: {_one_line(error)}') from error
    return runner


def _spare_config(cfg: Config, loop: str) -> None:
    """MMEngine writes the config that it runs into the work directory, under the name of the file that was read: let
    that neither replace the file itself nor, by a test, what a training has left.
    """
    path = Path(cfg.filename or '')
    kept = Path(cfg.work_dir, path.name)
    if kept.is_file() and (loop == 'test' or (path.is_file() and kept.samefile(path))):
        # the one that the last test has left may go
        names = (f'{path.stem}_{loop}{"_" * i}.py' for i in itertools.count())
        name = next(n for n in names if not Path(cfg.work_dir, n).is_file() or _is_dump(Path(cfg.work_dir, n)))
        object.__setattr__(cfg, '_filename', str(path.with_name(name)))


def _is_dump(path: Path) -> bool:
    text = path.read_text(encoding='utf-8', errors='replace')
    return 'work_dir = ' in text and '_base_' not in text and '#' not in text


def _one_line(error: Exception) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())}'


def run_tool(main: Any) -> None:
    """Run a tool's ``main``; a mistake that the user can mend becomes one line and exit code 1."""
    # every torch.load of this process, those of MMEngine's forks and of addresses too; nobody's setting undoes it
    os.environ.pop('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', None)
    os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'
    try:
        main()
    except (UserError, CheckpointError, DataError, FloatingPointError) as error:
        if os.environ.get('RKAN_DEBUG'):
            raise
        text = str(error).strip()
        if text.startswith('Caught '):  # in a worker of a loader: its traceback, and in the last line the message
            text = text.splitlines()[-1].partition(': ')[2]
        raise SystemExit(f'error: {text}') from None
    except OSError as error:  # a file that stands where a folder must be, a full disk, no permission, ...
        if error.strerror is None or os.environ.get('RKAN_DEBUG'):
            raise
        raise SystemExit(f'error: {error.filename or "a file"}: {error.strerror}') from None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # All is written. The threads of gloo now and then abort a process that takes the interpreter down around them.
        torch.distributed.barrier()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
