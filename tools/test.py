"""Test (and evaluate) a detector: MMDetection's own command line, with checks before any work."""

import argparse
import os
from copy import deepcopy
from pathlib import Path

from mmdet.engine.hooks.utils import trigger_visualization_hook
from mmdet.evaluation import DumpDetResults
from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process

from rkan_mmdet.data.detector_config import has_mask_head
from rkan_mmdet.launch import (
    UserError,
    add_common_arguments,
    check_checkpoint,
    check_config,
    check_names,
    load_config,
    load_exactly,
    make_runner,
    reading_config,
    run_tool,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Test (and evaluate) a detector')
    parser.add_argument('config', help='test config file path')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--work-dir', help='the directory to save the file containing evaluation metrics')
    parser.add_argument('--out', help='dump predictions to a pickle file for offline evaluation')
    parser.add_argument('--show', action='store_true', help='show prediction results')
    parser.add_argument('--show-dir', help='directory (under the work dir and time stamp) for painted images')
    parser.add_argument('--wait-time', type=float, default=2, help='the interval of show (s)')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation by flipping (boxes only)')
    add_common_arguments(parser)
    return parser.parse_args()


def use_tta(cfg: Config) -> None:
    """Wrap the model and the pipeline as MMDetection's tool does."""
    if has_mask_head(cfg.model):
        raise UserError('--tta can not merge masks (MMDetection supports boxes only); test without it')
    if 'tta_model' not in cfg:
        nms = dict(type='nms', iou_threshold=0.5)
        cfg.tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=nms, max_per_img=100))
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if 'tta_pipeline' not in cfg:
        keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
        flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
        pack = [dict(type='PackDetInputs', meta_keys=keys)]
        cfg.tta_pipeline = [*deepcopy(dataset.pipeline[:-1]), dict(type='TestTimeAug', transforms=[flips, pack])]
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline


def main() -> None:
    args = parse_args()
    setup_cache_size_limit_of_dynamo()
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        raise UserError(f'--out must end in .pkl or .pickle, but got {args.out}')
    if args.wait_time < 0:
        raise UserError(f'--wait-time must be at least 0, but got {args.wait_time}')
    out = args.out and Path(args.out)
    if out and out.exists():
        raise UserError(f'--out {out} exists; name another file')
    if out and out.parent.exists() and not out.parent.is_dir():
        raise UserError(f'--out {out} can not be written: {out.parent} is a file')
    if args.show_dir and os.path.isabs(args.show_dir) and os.path.isdir(args.show_dir) and os.listdir(args.show_dir):
        raise UserError(f'--show-dir {args.show_dir} is not empty, and images in it could be replaced; name another')
    with reading_config():
        cfg = load_config(args)
        cfg.load_from, cfg.resume = args.checkpoint, False  # the config that a resumed training leaves says True
        if args.show or args.show_dir:
            cfg = trigger_visualization_hook(cfg, args)
        if args.tta:
            use_tta(cfg)
        state, meta = check_checkpoint(args.checkpoint)
        check_config(cfg, ('test_dataloader',), loads_weights=False)
    runner = make_runner(cfg, ('test',))
    load_exactly(runner.model, state, args.checkpoint)
    check_names(meta, runner.test_dataloader.dataset, args.checkpoint)
    partial = out and out.with_name(f'.{out.name}.partial.pkl')
    if out:
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=str(partial)))
    try:
        runner.test()
        if out and is_main_process():
            os.replace(partial, out)
    finally:
        if out and is_main_process():
            partial.unlink(missing_ok=True)


if __name__ == '__main__':
    run_tool(main)
