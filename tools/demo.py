"""The demo: make the shapes set, train an RKAN detector, score it by COCO mAP, and leave two pictures.

What is done already is not done again; an interrupted training goes on where it stopped.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import cv2

from rkan_mmdet.data.shapes import make_shapes
from rkan_mmdet.launch import UserError, read_config, run_tool
from rkan_mmdet.plot import build_pair, draw_predictions, plot_curves

CONFIG = 'configs/demo/mask-rcnn_rkan-r18_fpn_shapes.py'


def run(*command: str) -> None:
    print('$ python ' + shlex.join(command), flush=True)
    if subprocess.run([sys.executable, *command]).returncode:
        raise UserError(f'`python {" ".join(command)}` failed; its messages are above')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'), help='default: %(default)s')
    parser.add_argument('--retrain', action='store_true', help='train again; the old work dir is kept under a new name')
    parser.add_argument('--epochs', type=int, help="stop after so many (default: the config's, to the README's AP)")
    args = parser.parse_args()
    if args.epochs is not None and args.epochs < 1:
        parser.error(f'--epochs must be at least 1, but got {args.epochs}')
    return args


def main() -> None:
    args = parse_args()
    os.environ.pop('MMDET_DATASETS', None)  # of other data: the demo draws its own
    cfg = read_config(CONFIG)
    work_dir = args.work_dir
    if args.retrain and work_dir.exists():
        kept = work_dir.with_name(f'{work_dir.name}-until-{time.strftime("%Y%m%d-%H%M%S")}')
        work_dir.rename(kept)
        print(f'the former run is kept in {kept}')
    work_dir.mkdir(parents=True, exist_ok=True)
    try:
        data = make_shapes(cfg.data_root.rstrip('/'))
    except FileExistsError as error:
        raise UserError(str(error)) from error
    epochs = args.epochs or cfg.train_cfg.max_epochs
    checkpoint = work_dir / f'epoch_{epochs}.pth'
    last = max((int(path.stem[6:]) for path in work_dir.glob('epoch_*.pth') if path.stem[6:].isdigit()), default=0)
    if last > epochs and not checkpoint.exists():
        raise UserError(f'{work_dir} holds a longer training (epoch_{last}.pth): say --retrain, or --work-dir DIR')
    if checkpoint.exists():
        print(f'{checkpoint} is there: not trained again (make demo ARGS=--retrain does)')
    else:
        options = ['--cfg-options', f'train_cfg.max_epochs={epochs}'] if args.epochs else []
        run('tools/train.py', CONFIG, '--work-dir', str(work_dir), '--resume', *options)
    run('tools/test.py', CONFIG, str(checkpoint), '--work-dir', str(work_dir))
    curves = plot_curves([work_dir], work_dir / 'curves.png')
    pictures = work_dir / 'predictions.png'
    cv2.imwrite(str(pictures), draw_predictions([build_pair(cfg, str(checkpoint))])[..., ::-1])
    print(f"""
The COCO figures are above. See also
  {curves}        loss and AP by epoch
  {pictures}   ground truth (left of each pair) beside predictions
Next
  the data        {data}/ is a COCO-format set: put yours in its place with --cfg-options data_root=DIR
  the detector    {CONFIG}
  real COCO       python tools/train.py configs/rkan/mask-rcnn_rkan-r50_fpn_1x_coco.py --auto-scale-lr""")


if __name__ == '__main__':
    run_tool(main)
