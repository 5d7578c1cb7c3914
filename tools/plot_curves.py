"""Plot loss and AP against epochs from MMEngine's logs, several runs in one picture."""

import argparse
from pathlib import Path

from rkan_mmdet.launch import UserError, run_tool
from rkan_mmdet.plot import METRICS, plot_curves, read_scalars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('work_dirs', nargs='+', type=Path, help='work directories of tools/train.py')
    parser.add_argument('--out', type=Path, default=Path('curves.png'), help='the picture (default: %(default)s)')
    parser.add_argument('--labels', nargs='+', help='names of the runs in the legend (default: their folders)')
    parser.add_argument('--metrics', nargs='+', help=f'beside the loss (default: {", ".join(METRICS)})')
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f'--out {args.out} exists already; name another file')
    if args.out.suffix.lower() not in ('.png', '.pdf', '.svg'):
        raise UserError(f'--out must end in .png, .pdf or .svg, but got {args.out}')
    labels = args.labels or [str(path) for path in args.work_dirs]
    if len(labels) != len(args.work_dirs):
        raise UserError(f'--labels must name {len(args.work_dirs)} runs, but got {len(labels)}')
    if len(set(labels)) != len(labels):
        raise UserError(f'--labels must differ from each other, but got {", ".join(labels)}')
    try:
        known = sorted({name for work_dir in args.work_dirs for name in read_scalars(work_dir)})
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None
    for metric in args.metrics or ():
        if metric not in known:
            raise UserError(f'--metrics {metric} is in no log; there are {", ".join(known)}')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(plot_curves(dict(zip(labels, args.work_dirs)), args.out, args.metrics or METRICS))


if __name__ == '__main__':
    run_tool(main)
