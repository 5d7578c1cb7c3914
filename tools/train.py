"""Train a detector: MMDetection's own command line, with the checks of rkan_mmdet.launch before any work."""

import argparse

from mmdet.utils import setup_cache_size_limit_of_dynamo

from rkan_mmdet.data.config_findings import check_heads
from rkan_mmdet.launch import (
    UserError,
    add_common_arguments,
    check_config,
    load_config,
    make_runner,
    prepare_training,
    reading_config,
    run_tool,
    start_training,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train a detector')
    parser.add_argument('config', help='train config file path')
    parser.add_argument('--work-dir', help='the dir to save logs and models')
    parser.add_argument('--amp', action='store_true', help='enable automatic-mixed-precision training')
    parser.add_argument('--auto-scale-lr', action='store_true', help='enable automatically scaling LR')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='a checkpoint to resume from; without one, the last whole one in the work directory',
    )
    add_common_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    setup_cache_size_limit_of_dynamo()
    with reading_config():
        cfg = load_config(args)
        if args.amp:
            cfg.optim_wrapper.type = 'AmpOptimWrapper'
            cfg.optim_wrapper.loss_scale = 'dynamic'
        if args.auto_scale_lr:
            if not {'enable', 'base_batch_size'} <= set(cfg.get('auto_scale_lr') or {}):
                raise UserError(
                    '--auto-scale-lr needs auto_scale_lr=dict(enable=..., base_batch_size=...) in the config'
                )
            cfg.auto_scale_lr.enable = True
        state = prepare_training(cfg, args.resume)
        check_config(cfg, ('train_dataloader', 'val_dataloader'), loads_weights=True)
        check_heads(cfg)
    start_training(make_runner(cfg, ('train', 'val')), state)


if __name__ == '__main__':
    run_tool(main)
