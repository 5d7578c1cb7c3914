"""Show what an RKAN detector learned: PNG files and one HTML report.

The functions of each KAN convolution above the inputs that reach them, the path's share of its stage's output, feature
maps with and without the path, and predictions, beside those of another detector with --against.
"""

import argparse
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import cv2
import rich.progress
import torch
from mmdet.models import BaseDetector

from rkan_mmdet.backbones import ResidualPath
from rkan_mmdet.data.guard import guard
from rkan_mmdet.launch import (
    UserError,
    add_cfg_options,
    build_dataset,
    check_checkpoint,
    check_config,
    read_config,
    run_tool,
)
from rkan_mmdet.plot import build_pair, draw_figures, draw_predictions
from rkan_mmdet.report import NOTHING, kan_convs, look, make_html, png
from rkan_mmdet.speed import build_detector


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config file of the detector')
    parser.add_argument('checkpoint', help='its weights')
    parser.add_argument('--out', type=Path, help='the folder to make (default: kan, beside the checkpoint)')
    parser.add_argument(
        '--images', type=int, default=16, help='images of the test set to look at; 0: the functions alone, without data'
    )
    parser.add_argument('--initial', metavar='CHECKPOINT', help='weights before training, drawn as dashed lines')
    parser.add_argument(
        '--against', nargs=2, metavar=('CONFIG', 'CHECKPOINT'), help='a second detector, for predictions side by side'
    )
    parser.add_argument('--score-thr', type=float, default=0.3, help='draw no prediction below (default: %(default)s)')
    add_cfg_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.images < 0:
        raise UserError(f'--images must be at least 0, but got {args.images}')
    if not 0 <= args.score_thr <= 1:
        raise UserError(f'--score-thr must be in [0, 1], but got {args.score_thr}')
    if args.out is None:
        args.out = Path('kan') if '://' in args.checkpoint else Path(args.checkpoint).parent / 'kan'
    if args.out.exists():
        raise UserError(f'--out {args.out} exists already; name another folder')
    if args.against and not args.images:
        raise UserError('--against compares predictions on images, so --images must be at least 1, but got 0')
    pairs = [(args.config, args.checkpoint), *([args.against] if args.against else [])]
    configs = []
    for config, checkpoint in pairs:
        check_checkpoint(checkpoint)
        configs.append(read_config(config, args.cfg_options))
        if args.images:
            check_config(configs[-1], ('test_dataloader',), loads_weights=False)
    cfg, device = configs[0], 'cuda' if torch.cuda.is_available() else 'cpu'
    model = build_detector(cfg, args.checkpoint, device)
    if args.images and not isinstance(model, BaseDetector):
        raise UserError(f'{args.config} is of {type(model).__name__}, which is no detector: say --images 0')
    if not any(isinstance(module, ResidualPath) for module in model.modules()):
        raise UserError(f'the detector of {args.config} has no residual KAN path')
    initial = {}
    if args.initial:
        check_checkpoint(args.initial)
        initial = kan_convs(build_detector(cfg, args.initial))

    seen, images, dataset = NOTHING, [], None
    if args.images:
        dataset = build_dataset(cfg.test_dataloader.dataset)
        guard(dataset)
        with rich.progress.Progress(*rich.progress.Progress.get_default_columns()) as progress:
            track = partial(progress.track, description='images')
            seen, images = look(model, dataset, args.images, track)
    pictures = {name: png(figure) for name, figure in draw_figures(model, seen, images, initial)}

    def those(kind: str) -> dict:
        return {name: picture for name, picture in pictures.items() if name.startswith(kind)}

    text = (
        'Each panel is a tap of the kernel: what an input pixel of that value at that place adds to the output. '
        'All channels share them. Grey: where 95 % of the functions lie before training. '
        + 'Dashed: before training. ' * bool(initial)
        + 'Below: the inputs that reached the convolution.' * bool(args.images)
    )
    sections = [('Learned functions', text, those('functions'), [])]
    if seen.shares:
        rows = [['stage', 'mean share', 'median', 'largest', 'channels above 0.5']]
        for stage, share in seen.shares.items():
            values = (share.mean(), share.median(), share.max(), (share > 0.5).float().mean())
            rows.append([stage, *(f'{float(value):.3f}' for value in values)])
        text = (
            "The path's share of the stage's output in each channel: the energy of what the path changes, over that of "
            f'the blocks and of the change together, over {min(args.images, len(dataset))} images.'
        )
        sections.append(('Share of the path', text, those('share'), rows))
        sections.append(('Feature maps', 'Mean absolute value over the channels.', those('feature maps'), []))
    if args.images:
        detectors = [(model, dataset)]
        if args.against:
            detectors.insert(0, build_pair(configs[1], args.against[1], device))
        sheet = draw_predictions(detectors, min(4, args.images), args.score_thr)
        pictures['predictions'] = cv2.imencode('.png', sheet[..., ::-1])[1].tobytes()
        text = f'Scores above {args.score_thr}. From left to right: ground truth, '
        text += f'{args.against[0]}, {args.config}.' if args.against else 'predictions (two images a row).'
        sections.append(('Predictions', text, those('predictions'), []))

    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f'.{args.out.name}-', dir=args.out.parent))
    try:
        for caption, picture in pictures.items():
            (part / f'{caption.replace(" ", "_")}.png').write_bytes(picture)
        title = f'What {args.config} learned'
        (part / 'report.html').write_text(make_html(title, sections), encoding='utf-8')
        os.chmod(part, 0o755)  # a temporary folder is its owner's alone
        part.rename(args.out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f'{args.out / "report.html"}, and {len(list(args.out.glob("*.png")))} pictures beside it')


if __name__ == '__main__':
    run_tool(main)
