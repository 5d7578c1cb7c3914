"""Detect in an image, a folder of images or a video: drawn pictures, and a COCO results file.

    python tools/predict.py CONFIG CHECKPOINT street.jpg --out found

writes found/vis/street.jpg, found/predictions.json (every detection, in COCO's results format) and found/images.json
(which images and categories its ids mean).
"""

import argparse
from pathlib import Path

from rkan_mmdet.detector import Detector, choose_device
from rkan_mmdet.launch import UserError, add_cfg_options, read_config, run_tool
from rkan_mmdet.predict import CocoIds, check_out, open_source, predict


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the detector')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('input', type=Path, help='an image, a folder (and the folders in it), or a video')
    parser.add_argument('--out', type=Path, help='the folder to write (default: predictions/NAME_OF_INPUT)')
    parser.add_argument(
        '--score-thr', type=float, default=0.3, help='least score that is drawn; JSON holds all (default: %(default)s)'
    )
    parser.add_argument('--batch-size', type=int, default=1, help='images at a time (default: %(default)s)')
    parser.add_argument('--device', default='auto', help='auto (a GPU where there is one), cpu, cuda, cuda:1')
    parser.add_argument('--no-draw', action='store_true', help='write JSON alone')
    add_cfg_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not 0 <= args.score_thr <= 1:
        raise UserError(f'--score-thr must be from 0 to 1, but got {args.score_thr}')
    if args.batch_size < 1:
        raise UserError(f'--batch-size must be at least 1, but got {args.batch_size}')
    cfg = read_config(args.config, args.cfg_options)
    source = open_source(args.input)
    out = args.out or Path('predictions') / args.input.resolve().stem
    check_out(out)
    detector = Detector(cfg, args.checkpoint, choose_device(args.device))
    ids = CocoIds(detector)
    if source.ignored:
        some = ', '.join(source.ignored[:3]) + ', ...' * (len(source.ignored) > 3)
        print(f'passed over, since their names are not of images ({len(source.ignored)}): {some}')
    if not ids.in_order:
        print(
            f'warning: {ids.file} has the classes in another order than the detector: category_id follows the file, as '
            "MMDetection's scores do; names in pictures follow the detector, as MMDetection's pictures do"
        )
    report = predict(detector, source, ids, out, args.score_thr, args.batch_size, not args.no_draw)
    what = 'images' if source.fps is None else f'frames ({source.fps:g} a second)'
    print(f'{report.detections} detections in {report.images} {what}: {out / "predictions.json"}')
    if not args.no_draw:
        print(f'drawn from a score of {args.score_thr:g} on: {out / "vis"}')
    if source.fps is not None:
        print('image_id: the number of the frame, from 0')
    elif report.known:
        others = f', the file name for {report.images - report.known} that are not in it'
        print(f'image_id: of {ids.file}{others * (report.known < report.images)}')
    else:
        print("image_id: the file name, since no image is of the config's test set")
    known = 'from 1 in the order of the classes, since the annotation file of the test set is not here'
    print(f'category_id: {f"of {ids.file}" if ids.file else known}')
    if report.unreadable:
        names = ', '.join(report.unreadable[:5]) + ', ...' * (len(report.unreadable) > 5)
        raise UserError(f'{len(report.unreadable)} images could not be read and are left out: {names}')


if __name__ == '__main__':
    run_tool(main)
