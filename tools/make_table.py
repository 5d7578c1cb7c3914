"""Make the paper's COCO table from work directories: Markdown and JSON; a missing run is blank."""

import argparse
import json
import re
from functools import partial
from pathlib import Path
from typing import Optional

import torch
from rich.progress import track

from rkan_mmdet.checkpoint import list_checkpoints
from rkan_mmdet.launch import UserError, read_config, run_tool, template_of
from rkan_mmdet.plot import read_scalars
from rkan_mmdet.speed import build_detector, count_parameters, predict, quartiles, random_batch, time_in_turn

CONFIGS = Path(__file__).resolve().parents[1] / 'configs' / 'rkan'
METRICS = {
    'box AP': 'coco/bbox_mAP',
    'box AP50': 'coco/bbox_mAP_50',
    'mask AP': 'coco/segm_mAP',
    'mask AP50': 'coco/segm_mAP_50',
}
VOC_METRICS = {'VOC AP50': 'pascal_voc/AP50'}
# The authors' figures: Mask R-CNN, their recipe, at 640 px (SENet's are not in their README).
AUTHORS = {
    'r50': (35.59, 53.58, 31.94, 50.79, 118.2),
    'rkan-r50': (35.92, 54.21, 32.16, 51.20, 105.5),
    'rkan-r50-2xl': (36.13, 54.30, 32.29, 51.38, 97.2),
    'se-r50': (35.94, 54.10, 32.14, 51.13, 90.0),
    'rkan-se-r50': (36.35, 54.48, 32.37, 51.64, 82.4),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='*', type=Path, help="the rows (default: Mask R-CNN in the authors' recipe)")
    parser.add_argument('--work-dirs', type=Path, help='holds one folder a config (default: work_dirs)')
    parser.add_argument('--best', action='store_true', help='the best epoch for box and mask apart, not the last')
    parser.add_argument(
        '--fps',
        type=int,
        metavar='ROUNDS',
        help='measure the speed of runs as the authors: a 640x640 image, fp32 (theirs: 100)',
    )
    parser.add_argument('--json', type=Path, help='write the figures to this file')
    return parser.parse_args()


def split_name(config: Path) -> tuple:
    """``(before, backbone, after)`` of ``mask-rcnn_rkan-r50_fpn_authors-1x_coco``."""
    parts = config.stem.split('_')
    if len(parts) < 3:
        raise UserError(f'{config} is not named MODEL_BACKBONE_REST.py')
    return parts[0], parts[1], '_'.join(parts[2:])


def find_baseline(config: Path) -> str:
    """The name of the plain model of a config."""
    before, backbone, after = split_name(config)
    return '_'.join((before, re.sub(r'^rkan-(e-)?|-\dxl$', '', backbone), after))


def read_run(work_dir: Path, best: bool, metrics: dict) -> dict:
    """AP in percent of a run, and the epoch (or iteration) it is of; empty when nothing was validated."""
    try:
        curves = read_scalars(work_dir)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(str(error)) from error
    row = {}
    for name, key in metrics.items():
        if key in curves:
            epoch, value = curves[key][-1]
            if best:  # AP50 is read where AP is best, as one would choose a checkpoint
                epoch = max(curves.get(key.replace('_50', ''), curves[key]), key=lambda point: point[1])[0]
                value = dict(curves[key])[epoch]
            row[name] = round(100 * value, 2)
            row['epoch'] = int(curves[key][-1][0])
    return row


def measure_fps(config: Path, checkpoint: str, rounds: int) -> float:
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = build_detector(read_config(str(config)), checkpoint, device)
    run = partial(predict, model, random_batch((640, 640), 1))
    seconds = time_in_turn({'': lambda i: run()}, rounds, 10, device == 'cuda')
    return 1 / quartiles(seconds[''])[1]


def make_row(config: Path, args: argparse.Namespace, metrics: dict) -> dict:
    cfg = read_config(str(config))
    row = dict(model=split_name(config)[1], config=config.stem)
    unit = 'iteration' if 'max_iters' in cfg.train_cfg else 'epoch'
    row.update(unit=unit, epochs=cfg.train_cfg.get('max_iters') or cfg.train_cfg.get('max_epochs', 0))
    row.update(read_run(args.work_dirs / config.stem, args.best, metrics))
    row['parameters'] = count_parameters(build_detector(cfg))
    checkpoints = list_checkpoints(args.work_dirs / config.stem, template_of(cfg)) if args.fps else []
    if checkpoints:  # random weights find nothing, and what finds nothing is fast
        row['FPS'] = round(measure_fps(config, str(checkpoints[0]), args.fps), 2)
    if row['model'] in AUTHORS and config.stem == f'mask-rcnn_{row["model"]}_fpn_authors-1x_coco':
        row['authors'] = dict(zip((*METRICS, 'FPS'), AUTHORS[row['model']]))
    return row


def join_draws(rows: dict, metrics: dict) -> dict:
    """The rows of draws of one set (``-s1``, ``-s2``, ...) as one, with the means of those that have run."""
    groups: dict = {}
    for config, row in rows.items():
        groups.setdefault(re.sub(r'-s\d+$', '', config), []).append(row)
    joined = {}
    for config, group in groups.items():
        if len(group) == 1:
            joined[group[0]['config']] = group[0]
            continue
        runs = [row for row in group if 'epoch' in row]
        row = dict(group[0], config=config, runs=runs, draws=[run['config'].rpartition('-')[2] for run in runs])
        for name in (*metrics, 'FPS', 'epoch'):
            row.pop(name, None)
            values = [run[name] for run in runs if name in run]
            if values:
                row[name] = min(values) if name == 'epoch' else round(sum(values) / len(values), 2)
        joined[config] = row
    return joined


def difference(row: dict, rows: dict, name: str) -> Optional[float]:
    base = rows.get(find_baseline(Path(row['config'])), {})
    if base is row or name not in row or name not in base or row.get('draws') != base.get('draws'):
        return None
    return round(row[name] - base[name], 2)


def markdown(rows: dict, metrics: dict) -> str:
    names = (*metrics, 'FPS')
    head = ['model', *names, 'parameters', *(f"authors' {name}" for name in names)]
    lines = ['| ' + ' | '.join(head) + ' |', '| --- ' * len(head) + '|']
    models = [row['model'] for row in rows.values()]
    for row in rows.values():
        unfinished = row.get('epoch', row['epochs']) < row['epochs']
        note = f' ({row["unit"]} {row["epoch"]} of {row["epochs"]})' if unfinished else ''
        if row.get('draws'):
            note = f', mean of {len(row["draws"])} draws{note}'
        cells = [(row['model'] if models.count(row['model']) == 1 else row['config']) + note]
        for name in names:
            change = difference(row, rows, name)
            cells.append(
                f'{row[name]:.1f}' + (f' ({change:+.1f})' if change is not None else '') if name in row else ''
            )
        cells.append(f'{row["parameters"] / 1e6:.2f} M')
        cells += [f'{row["authors"].get(name, "")}' if 'authors' in row else '' for name in names]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def main() -> None:
    args = parse_args()
    if args.fps is not None and args.fps < 1:
        raise UserError(f'--fps must be at least 1, but got {args.fps}')
    if args.work_dirs is not None and not args.work_dirs.is_dir():
        raise UserError(f'--work-dirs {args.work_dirs} is not a folder')
    args.work_dirs = args.work_dirs or Path('work_dirs')
    if args.json and args.json.exists():
        raise UserError(f'--json {args.json} exists; name another file')
    configs = args.configs or sorted(CONFIGS.glob('mask-rcnn_*_fpn_authors-1x_coco.py'), key=lambda p: (len(p.stem), p))
    voc = [re.search(r'(^|[-_])voc', config.stem) is not None for config in configs]
    if any(voc) != all(voc):
        raise UserError('configs of COCO and of VOC have no metric in common; make two tables')
    metrics = VOC_METRICS if any(voc) else METRICS
    rows = {}
    for config in track(configs, 'reading', transient=True):
        rows[config.stem] = make_row(config, args, metrics)
    rows = join_draws(rows, metrics)
    for row in rows.values():
        row['difference'] = {name: difference(row, rows, name) for name in metrics if name in row}
    print(markdown(rows, metrics))
    print(
        "\nIn brackets: difference to the plain model. The authors' figures are theirs. MMDetection logs AP to 0.1 %."
    )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(list(rows.values()), indent=1) + '\n')


if __name__ == '__main__':
    run_tool(main)
