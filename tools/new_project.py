"""Write a config for your own data from a base: classes, paths, heads, evaluators, learning rate, schedule."""

import argparse
import os
import shlex
from functools import partial

from rkan_mmdet.data.check import make_progress, show_findings, summary, tracker
from rkan_mmdet.data.project import Split, write_project
from rkan_mmdet.launch import UserError, run_tool


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', help='the config to be written, as FILE.py')
    parser.add_argument('--base', required=True, help='the config to start from: a file, or mmdet::...')
    what = dict(nargs=2, metavar=('JSON', 'IMAGES'))
    parser.add_argument('--train', **what, required=True, help='COCO file and folder of images to learn from')
    parser.add_argument('--val', **what, required=True, help='those to be scored')
    parser.add_argument('--test', **what, help='those of tools/test.py (default: those of --val)')
    parser.add_argument('--batch-size', type=int, metavar='N', help="images on each GPU at once (default: the base's)")
    parser.add_argument('--gpus', type=int, default=1, metavar='N', help='how many GPUs (default: %(default)s)')
    parser.add_argument('--epochs', type=int, metavar='N', help="length of the training (default: the base's)")
    parser.add_argument('--scale', type=int, nargs=2, metavar=('W', 'H'), help='the size that images are resized to')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with make_progress() as progress:
        findings, said = write_project(
            args.out,
            args.base,
            Split(*args.train),
            Split(*args.val),
            track=partial(tracker, progress),
            test=args.test and Split(*args.test),
            batch_size=args.batch_size,
            gpus=args.gpus,
            epochs=args.epochs,
            scale=args.scale,
        )
    show_findings(f for f in findings if f.severity != 'note')
    print(summary(findings))
    if any(f.severity == 'error' for f in findings):
        raise UserError(f'the data has errors, listed above: {args.out} is not written')
    if os.environ.get('MMDET_DATASETS'):
        print('MMDET_DATASETS is set, and names another place of the data to all tools: unset it before training.')
    command = ['python', 'tools/train.py', args.out]
    if args.gpus > 1:
        command = ['tools/dist_train.sh', args.out, str(args.gpus)]
    print(f'{args.out} is written. {said}.\nNext: {shlex.join(command)}')


if __name__ == '__main__':
    run_tool(main)
