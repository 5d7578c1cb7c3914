"""Time the inference of a detector, or of two against each other: images of one size, or a data set's.

Loading of images is not timed; everything else of a prediction is, from the image on the host to the results. With
``--train``, loss and gradients of a batch are timed instead.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from rich.progress import Progress, TimeRemainingColumn
from torch import nn

from rkan_mmdet.detector import choose_device
from rkan_mmdet.launch import UserError, add_cfg_options, backbone_of, check_config, read_config, run_tool
from rkan_mmdet.speed import (
    build_detector,
    count_channels,
    count_detections,
    count_multiply_adds,
    count_parameters,
    dataset_batches,
    fuse,
    peak_memory,
    predict,
    quartiles,
    random_annotated_batch,
    random_batch,
    share_weights,
    time_in_turn,
    train_backbone,
    train_step,
)

NOTHING_FOUND = (
    ': what follows the proposals did nothing, masks among it; name a checkpoint, or let all pass by, in Mask R-CNN, '
    '--cfg-options model.test_cfg.rcnn.score_thr=0'
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config of the detector')
    parser.add_argument('checkpoint', nargs='?', help='its checkpoint (default: random weights)')
    parser.add_argument('--against', metavar='CONFIG', help='a second detector, timed in turn with the first')
    parser.add_argument('--against-checkpoint', metavar='FILE', help='the checkpoint of the second')
    parser.add_argument('--size', type=int, nargs=2, default=[640, 640], metavar=('H', 'W'), help='size of the images')
    parser.add_argument('--dataset', action='store_true', help="take the test set's images instead, by its pipeline")
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=100, help='timed predictions (default: %(default)s)')
    parser.add_argument('--warmup', type=int, default=10, help='predictions before them (default: %(default)s)')
    parser.add_argument('--device', default='auto', help='auto (a GPU where there is one), cpu, cuda, cuda:1')
    parser.add_argument('--fuse', action='store_true', help='fold batch norms into convolutions first')
    parser.add_argument('--amp', action='store_true', help='under autocast, in half precision')
    parser.add_argument('--backbone', action='store_true', help='time the backbone alone')
    parser.add_argument('--train', action='store_true', help='time loss and gradients of random images and boxes')
    parser.add_argument('--json', type=Path, help='write the figures to this file')
    add_cfg_options(parser)
    args = parser.parse_args()
    for name in ('batch_size', 'rounds', 'warmup'):
        if getattr(args, name) < (name != 'warmup'):
            parser.error(f'--{name.replace("_", "-")} must be at least {int(name != "warmup")}')
    if min(args.size) < 32:
        parser.error(f'--size must be at least 32 32, but got {args.size[0]} {args.size[1]}')
    if args.train and (args.dataset or args.fuse):
        parser.error('--train takes random images and no folded norms: leave out --dataset and --fuse')
    if args.json and args.json.exists():
        parser.error(f'--json {args.json} exists')
    return args


def make_models(args: argparse.Namespace) -> dict[str, tuple[Config, nn.Module]]:
    """Each detector by its name, with its config."""
    models = {}
    for path, checkpoint in ((args.config, args.checkpoint), (args.against, args.against_checkpoint)):
        if path is None:
            continue
        cfg = read_config(path, args.cfg_options)
        check_config(cfg, ('test_dataloader',) if args.dataset else (), loads_weights=False)
        name = Path(path).stem
        models[name if name not in models else f'{name} (2)'] = (cfg, build_detector(cfg, checkpoint, args.device))
    return models


def make_run(args: argparse.Namespace, cfg: Config, model: nn.Module) -> tuple[nn.Module, Callable, int]:
    """What is timed, a function that runs it on the batch of a round, and how many batches there are."""
    if args.fuse:
        model = fuse(model)
    if args.dataset:
        batches = dataset_batches(cfg, min(args.rounds, 50) * args.batch_size, args.batch_size)
    elif args.train:
        batches = [random_annotated_batch(model, tuple(args.size), args.batch_size)]
        model.train()
    else:
        batches = [random_batch(tuple(args.size), args.batch_size, count_channels(model))]
    function = train_step if args.train else predict
    if args.backbone:
        with torch.no_grad():
            batches = [model.data_preprocessor(batch)['inputs'] for batch in batches]
        model = backbone_of(model)
        function = train_backbone if args.train else torch.no_grad()(lambda backbone, inputs: backbone(inputs))
    autocast = torch.autocast(args.device.partition(':')[0], enabled=args.amp)
    return model, partial(run_round, autocast(function), model, batches), len(batches)


def run_round(function: Callable, model: nn.Module, batches: list, i: int) -> Any:
    return function(model, batches[i % len(batches)])


def main() -> None:
    args = parse_args()
    if args.against_checkpoint and not args.against:
        raise UserError('--against-checkpoint needs --against')
    args.device = choose_device(args.device)
    if args.amp and args.device == 'cpu' and not args.backbone:
        raise UserError("--amp needs a GPU, or --backbone: on a CPU MMCV's NMS takes fp32 alone")
    models = make_models(args)
    shared = None
    if len(models) == 2 and args.checkpoint is None and args.against_checkpoint is None:
        shared = share_weights(*(model for _, model in models.values()))
    runs = {name: make_run(args, *pair) for name, pair in models.items()}
    cuda = args.device.startswith('cuda')
    if cuda and torch.device(args.device).index is not None:
        torch.cuda.set_device(args.device)  # the one that is timed
    with Progress(*Progress.get_default_columns()[:3], TimeRemainingColumn(), transient=True) as progress:
        task = progress.add_task('timing', total=args.rounds + args.warmup)
        functions = {name: run for name, (_, run, _) in runs.items()}
        seconds = time_in_turn(functions, args.rounds, args.warmup, cuda, lambda: progress.advance(task))

    device = torch.cuda.get_device_name() if cuda else f'CPU ({platform.processor() or platform.machine()})'
    what = 'images of the test set' if args.dataset else f'random images of {args.size[0]}x{args.size[1]}'
    what += ', training' if args.train else ''
    print(
        f'{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {"AMP" if args.amp else "fp32"}, '
        f'batch {args.batch_size}, {what}'
    )
    rows, of_first = {}, ' (the last two: of the first batch)' * args.dataset
    for name, (model, run, batches) in runs.items():
        low, median, high = quartiles(seconds[name])
        rows[name] = dict(
            fps=args.batch_size / median,
            ms=dict(median=median * 1e3, quartiles=[low * 1e3, high * 1e3]),
            parameters=count_parameters(model),
            multiply_adds=count_multiply_adds(partial(run, 0)) // args.batch_size,
            peak_memory=peak_memory(partial(run, 0), cuda),
        )
        print(
            f'{name}: {rows[name]["fps"]:.2f} img/s ({median * 1e3:.1f} ms, quartiles {low * 1e3:.1f} to '
            f'{high * 1e3:.1f}), {rows[name]["parameters"] / 1e6:.2f} M parameters, '
            f'{rows[name]["multiply_adds"] / 1e9:.2f} G multiply-adds an image, '
            f'{rows[name]["peak_memory"] / 2**20:.0f} MiB of tensors besides the model{of_first}'
        )
        if not (args.backbone or args.train):
            counts = [count_detections(run(i)) for i in range(batches)]
            found = rows[name]['detections'] = None if None in counts else statistics.mean(counts)
            if found is not None:
                print(f'  {found:g} detections an image' + NOTHING_FOUND * (found == 0))
    result = dict(
        device=device, torch=torch.__version__, amp=args.amp, batch_size=args.batch_size, images=what, models=rows
    )
    if len(runs) == 2:
        ratios = [b / a for a, b in zip(*seconds.values())]
        low, median, high = quartiles(ratios)
        result['speed_ratio'] = dict(median=median, quartiles=[low, high])
        first, second = runs
        if shared:
            print('Both have the same random weights, and paths that add nothing: they find the same.')
        elif None in (args.checkpoint, args.against_checkpoint) and not (args.backbone or args.train):
            print(
                'With random weights the two make different numbers of detections, which cost time: name checkpoints.'
            )
        print(f'{first} has {median:.3f} of the speed of {second} (paired; quartiles {low:.3f} to {high:.3f})')
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    run_tool(main)
