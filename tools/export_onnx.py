"""Write a detector, or its backbone, as an ONNX file; run the file, compare it with PyTorch, and only then name it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from inspect import signature
from itertools import islice
from pathlib import Path

import torch
from mmengine.config import Config
from rich.progress import track
from torch import Tensor, nn

from rkan_mmdet.launch import (
    UserError,
    add_cfg_options,
    backbone_of,
    check_checkpoint,
    check_config,
    read_config,
    run_tool,
)

# What rounding alone may do; masks are binary, so that a pixel at the threshold flips.
TOLERANCE = dict(box=0.1, score=1e-3, mask=0.05)
FEATURE_TOLERANCE = 1e-3
AP_TOLERANCE = 0.002
CHECKED_IMAGES = 8


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config of the detector')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('out', type=Path, metavar='OUT.onnx', help='the file to write; nothing is overwritten')
    parser.add_argument('--what', choices=['detector', 'backbone'], default='detector', help='default: %(default)s')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help="size of the input (default: the scale of the config's test pipeline, made a multiple of the padding)",
    )
    parser.add_argument('--dynamic', action='store_true', help='let height and width be any from 32 on')
    parser.add_argument('--score-thr', type=float, help="least score of a detection (default: the config's)")
    parser.add_argument('--opset', type=int, default=18, help="version of ONNX's operators, at least 18 (default: 18)")
    parser.add_argument(
        '--evaluate', action='store_true', help="score file and detector on the config's test set, all images"
    )
    parser.add_argument(
        '--int8',
        type=int,
        nargs='?',
        const=32,
        metavar='N',
        help='quantize the backbone to INT8 by N images of the test set (default: 32); its error is stated on others',
    )
    add_cfg_options(parser)
    args = parser.parse_args()
    if args.out.suffix != '.onnx':
        parser.error(f'OUT must end in .onnx, but got {args.out}')
    if args.out.exists():
        parser.error(f'{args.out} exists')
    if Path(f'{args.out}.failed').exists():
        parser.error(f'{args.out}.failed exists, which would be overwritten if this fails too')
    if args.opset < 18:
        parser.error(f'--opset must be at least 18, but got {args.opset}')
    if args.size and min(args.size) < 32:
        parser.error(f'--size must be at least 32 32, but got {args.size[0]} {args.size[1]}')
    if args.score_thr is not None and not 0 <= args.score_thr < 1:
        parser.error(f'--score-thr must be at least 0 and below 1, but got {args.score_thr}')
    if args.what == 'backbone' and (args.evaluate or args.score_thr is not None):
        parser.error('--evaluate and --score-thr are for --what detector')
    if args.what == 'detector' and args.int8 is not None:
        parser.error('--int8 is for --what backbone')
    if args.int8 is not None and args.int8 < 1:
        parser.error(f'--int8 must be at least 1, but got {args.int8}')
    return args


def load(args: argparse.Namespace) -> tuple[Config, nn.Module, bool]:
    """Config and detector, and whether the test set is there."""
    if not hasattr(torch.library, 'custom_op'):
        raise UserError(f'export needs torch >= 2.4, but this is {torch.__version__}')
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        if importlib.util.find_spec(name) is None:
            raise UserError(f'{name} is not installed: `pip install onnx onnxscript onnxruntime`')
    if args.dynamic and 'prefer_deferred_runtime_asserts_over_guards' not in signature(torch.export.export).parameters:
        raise UserError(f'--dynamic needs a newer torch than {torch.__version__}; export for a fixed --size')
    cfg = read_config(args.config, args.cfg_options)
    if not args.out.parent.is_dir():
        raise UserError(f'folder {args.out.parent} does not exist')
    check_checkpoint(args.checkpoint)
    try:
        check_config(cfg, ('test_dataloader',), loads_weights=False)
        has_data = True
    except UserError:
        if args.evaluate or args.int8 is not None:
            raise
        has_data = False
    if args.score_thr is not None:
        test_cfg = (cfg.get('model') or {}).get('test_cfg')
        if test_cfg is None:
            raise UserError(f'{args.config} has no model.test_cfg, to whose score_thr --score-thr could go')
        test_cfg.get('rcnn', test_cfg).score_thr = args.score_thr
    from rkan_mmdet.speed import build_detector

    return cfg, build_detector(cfg, args.checkpoint), has_data


def checked_sizes(size: tuple[int, int], dynamic: bool, multiple: int = 1) -> list[tuple[int, int]]:
    """Where height and width are free, two more: odd ones, unless they must be multiples."""
    height, width = size
    sizes = [size, *([(height // 2 + 33, width // 3 + 35), (height + 17, width + 70)] if dynamic else [])]
    return [tuple(-(-side // multiple) * multiple for side in s) for s in sizes]


def fits(batch: dict, size: tuple[int, int] | None) -> bool:
    from rkan_mmdet.exported import check_fits

    try:
        check_fits(batch['data_samples'][0], size)
    except UserError:
        return False
    return True


def check_detector(args: argparse.Namespace, cfg: Config, model: nn.Module, file: Path, size, has_data: bool) -> bool:
    """Whether anything was detected, and so compared."""
    from rkan_mmdet.exported import Difference, ExportedDetector, PaddedDetector, compare, evaluate, load_test_set
    from rkan_mmdet.speed import count_channels, random_batch

    rcnn = cfg.model.test_cfg.get('rcnn', {})
    exported = ExportedDetector(file, rcnn.get('mask_thr_binary', 0.5))
    models = dict(PyTorch=PaddedDetector(model, exported.size), ONNX=exported)
    metrics = {}
    sizes = checked_sizes(size, args.dynamic, exported.size_multiple)
    batches = [random_batch(s, 1, count_channels(model)) for s in sizes]
    what = f'{len(batches)} random image{"s" * (len(batches) > 1)}'
    loader = load_test_set(cfg) if has_data else ()
    if not args.evaluate:
        real = [batch for batch in islice(loader, CHECKED_IMAGES) if fits(batch, exported.size)]
        batches += real
        what += f' and {len(real)} of the test set'
    difference = Difference()
    for batch in track(batches, 'comparing', transient=True):
        with torch.no_grad():
            difference = difference.join(
                compare(*(m.test_step(batch)[0].pred_instances.clone() for m in models.values()))
            )
    if args.evaluate:
        shown = track(loader, 'evaluating', transient=True)
        metrics, over_set = evaluate(models, cfg, shown, loader.dataset.metainfo)
        difference = difference.join(over_set)
        what += f' and all {len(loader)} of the test set'
    print(
        f'{what}: {difference.detections} detections, {difference.missing} without a counterpart; largest difference: '
        f'boxes {difference.box:.1e} px, scores {difference.score:.1e}'
        + (f', masks {difference.mask:.1%} of their pixels' if exported.with_masks else '')
    )
    if not difference.detections:
        print('nothing was detected, so that nothing was compared: name a lower --score-thr, or the data')
    for name, value in metrics.get('PyTorch', {}).items():
        print(f'{name}: PyTorch {value:.3f}, ONNX {metrics["ONNX"][name]:.3f}')
    if not difference.few_missing or any(getattr(difference, k) > v for k, v in TOLERANCE.items()):
        raise RuntimeError(f'the file differs from PyTorch by more than rounding: {difference}')
    if any(abs(value - metrics['ONNX'][name]) > AP_TOLERANCE for name, value in metrics.get('PyTorch', {}).items()):
        raise RuntimeError(f'a metric of the file differs from PyTorch by more than {AP_TOLERANCE}')
    return bool(difference.detections)


def check_backbone(args: argparse.Namespace, cfg: Config, model: nn.Module, file: Path, size) -> Path:
    """Compare, and quantize where that is asked for; the file that is wanted."""
    from rkan_mmdet.exported import check_fits, feature_errors, load_test_set, pad_to, quantize
    from rkan_mmdet.speed import count_channels, random_batch

    def normalised(batch: dict) -> Tensor:
        fixed = None if args.dynamic else size
        check_fits(batch['data_samples'][0], fixed)
        return pad_to(model.data_preprocessor(batch, False)['inputs'], fixed)

    sizes, channels = checked_sizes(size, args.dynamic), count_channels(model)
    images = (normalised(random_batch(s, 1 + args.dynamic, channels)) for s in sizes)
    errors = feature_errors(model.backbone, file, images)
    print('floating point: ' + ', '.join(f'feature{i} {e.relative:.1e}' for i, e in enumerate(errors)) + ' (relative)')
    if not all(e.relative < FEATURE_TOLERANCE for e in errors):
        raise RuntimeError(f'the file differs from PyTorch by more than rounding: {errors}')
    if args.int8 is None:
        return file
    loader = load_test_set(cfg)
    if len(loader) < 2:
        raise UserError('--int8 needs 2 images of the test set at least: one to calibrate, another to state the error')
    count = min(args.int8, len(loader) // 2)
    batches = iter(loader)
    calibration = track(islice(batches, count), 'calibrating', total=count, transient=True)
    out = quantize(file, file.with_suffix('.int8.onnx'), map(normalised, calibration))
    others = [normalised(batch) for batch in islice(batches, count)]
    errors = feature_errors(model.backbone, out, track(others, 'measuring', transient=True))
    print(f'INT8, calibrated by {count} images, on {len(others)} others:')
    for i, error in enumerate(errors):
        print(f'  feature{i}: relative error {error.relative:.4f}, cosine {error.cosine:.6f}')
    if not all(e.cosine > 0.9 for e in errors):
        raise RuntimeError('INT8 loses the features')
    return out


def main() -> None:
    args = parse_args()
    cfg, model, has_data = load(args)
    from rkan_mmdet.deploy import DeployedDetector
    from rkan_mmdet.export import write_onnx
    from rkan_mmdet.exported import pipeline_size

    try:
        module = DeployedDetector(model) if args.what == 'detector' else backbone_of(model)
    except ValueError as error:
        raise UserError(str(error)) from None
    size = tuple(args.size) if args.size else pipeline_size(cfg)
    with tempfile.TemporaryDirectory(prefix=f'.{args.out.name}-', dir=args.out.parent) as folder:
        print(f'exporting the {args.what}, {"any size" if args.dynamic else f"{size[0]}x{size[1]}"} ..', flush=True)
        try:
            file = write_onnx(module, Path(folder, args.out.name), size, args.dynamic, args.opset)
        except ValueError as error:
            raise UserError(str(error)) from error
        compared = True
        try:
            if args.what == 'detector':
                compared = check_detector(args, cfg, model, file, size, has_data)
            else:
                file = check_backbone(args, cfg, model, file, size)
        except UserError:
            raise
        except Exception as error:  # of ONNX Runtime too, which does not run every opset
            os.replace(file, f'{args.out}.failed')
            raise UserError(f'{" ".join(str(error).split())}; the file is left as {args.out}.failed') from error
        os.replace(file, args.out)
    megabytes = args.out.stat().st_size / 2**20
    checked = 'checked by ONNX Runtime' if compared else 'runs in ONNX Runtime, NOT checked: nothing was detected'
    print(f'{args.out}: {megabytes:.1f} MiB, opset {args.opset}, input images, {checked}')


if __name__ == '__main__':
    run_tool(main)
