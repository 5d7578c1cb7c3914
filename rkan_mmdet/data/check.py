"""Is this data fit to be trained on? ``python -m rkan_mmdet.data.check`` finds what ends in mAP 0 before any training.

``python -m rkan_mmdet.data.check annotations.json --images DIR [--config CFG]`` looks at one COCO file; with
``--config CFG`` alone, at every data set that the config names. Each finding comes with the lines of config that mend
it. Exit code 0: no error; 1: errors.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from mmengine.config import Config
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rkan_mmdet.data.coco_file import CocoFile
from rkan_mmdet.data.config_findings import (
    compare_labels,
    examine_evaluator,
    examine_heads,
    examine_split,
    same_images,
)
from rkan_mmdet.data.detector_config import DataSet, coco_sets
from rkan_mmdet.data.file_findings import examine_file
from rkan_mmdet.data.findings import Finding, in_order
from rkan_mmdet.data.image_files import examine_images
from rkan_mmdet.launch import UserError, add_cfg_options, read_config, run_tool


def examine_annotations(
    path: str | Path, images: str | Path | None = None, cfg: Config | None = None, track: Callable | None = None
) -> list[Finding]:
    """Examine one COCO file.

    Args:
        path (str or Path): The annotation file.
        images (str or Path, optional): The folder of its images. None: they are not looked at. Defaults to None.
        cfg (Config, optional): A config to compare with: that of its data sets which names this file, or else its
            training set, and the model's heads. Defaults to None.
        track (Callable, optional): Called with a sequence of images, iterates over it. Defaults to no progress.

    Returns:
        list[Finding]: The worst first.

    Raises:
        UserError: The file or the folder is missing, or the file is not COCO's, or the config has no data set of COCO.

    Examples:
        >>> examine_annotations('data/shapes/annotations/instances_train.json', 'data/shapes/train')  # doctest: +SKIP
    """
    if images is not None and not Path(images).is_dir():
        raise UserError(f'--images {images} is not a folder')
    coco = CocoFile(path)
    unseen = [Finding('note', 'images-not-seen', 'no --images: no image file was looked at')] if images is None else []
    if cfg is None:
        findings = examine_file(coco) + unseen
        return in_order(findings + (examine_images(coco, images, track=track or iter) if images is not None else []))
    sets, _ = coco_sets(cfg)
    if not sets:
        raise UserError('no data set of the config reads a COCO file, so there is nothing to compare with')
    this = os.path.realpath(str(path))
    found = next((s for s in sets if os.path.realpath(s.ann_file) == this), sets[0])
    findings = examine_split(cfg, found, coco, None if images is None else str(images), track or iter)
    train = next((s for s in sets if s.role == 'train'), found)
    return in_order(findings + examine_heads(cfg, train) + unseen)


def examine_config(cfg: Config, track: Callable | None = None) -> list[Finding]:
    """Examine every data set that a config names, with the heads and the evaluators.

    Args:
        cfg (Config): The config.
        track (Callable, optional): Called with a sequence of images, iterates over it. Defaults to no progress.

    Returns:
        list[Finding]: By split, the worst first.

    Raises:
        UserError: The config has no data set of COCO, or a file is not COCO's.

    Examples:
        >>> from rkan_mmdet.launch import read_config
        >>> cfg = read_config('configs/demo/mask-rcnn_rkan-r18_fpn_shapes.py')  # doctest: +SKIP
        >>> [f.name for f in examine_config(cfg) if f.severity == 'error']  # doctest: +SKIP
        []
    """
    sets, others = coco_sets(cfg)
    if not sets:
        raise UserError('no data set of the config reads a COCO file')
    text = '{} does not read its file as CocoDataset does: it is not checked'
    findings = [Finding('note', 'not-coco', text.format(kind), split=role) for role, kind in others]
    files: dict[str, CocoFile] = {}

    def read(path: str) -> CocoFile:
        real = os.path.realpath(path)
        if real not in files:
            files[real] = CocoFile(path)
        return files[real]

    done: dict[tuple, str] = {}
    good: list[tuple[DataSet, CocoFile]] = []
    for found in sets:
        same = (os.path.realpath(found.ann_file), os.path.realpath(found.folder), str(found.cfg.get('metainfo')))
        if found.role == 'test' and done.get(same) == 'val' and cfg.get('test_evaluator') == cfg.get('val_evaluator'):
            continue
        done[same] = found.role
        if not Path(found.ann_file).is_file():
            text = f'the annotation file {found.ann_file} does not exist'
            mend = "data_root = 'DIR/'  # or --cfg-options data_root=DIR, and ann_file below it"
            findings.append(Finding('error', 'annotation-file-missing', text, mend=mend, split=found.role))
            continue
        coco = read(found.ann_file)
        good.append((found, coco))
        findings += examine_split(cfg, found, coco, found.folder, track or iter)
        if found.role != 'train':
            findings += examine_evaluator(cfg, found, coco, read)
    train = [pair for pair in good if pair[0].role == 'train']
    first = next((s for s in sets if s.role == 'train'), None)
    if first is not None:
        findings += examine_heads(cfg, first)
    for pair in good if train else ():
        findings += compare_labels(train[0], pair)
        for mine in train if pair[0].role != 'train' else ():
            findings += same_images(mine, pair)
    order = ('train', 'val', 'test', '')
    return sorted(in_order(findings), key=lambda f: order.index(f.split))


def show_findings(findings: Iterable[Finding], print: Callable[[str], None] = print) -> None:
    """Print findings for people, a few lines each."""
    for finding in findings:
        split = f'{finding.split}: ' * bool(finding.split)
        count = f' ({finding.count})' * bool(finding.examples or finding.count > 1)
        print(f'{finding.severity.upper():<8}{split}{finding.name}{count}: {finding.text}')
        for example in finding.examples:
            print(f'          {example}')
        if finding.count > len(finding.examples) > 0:
            print(f'          and {finding.count - len(finding.examples)} more')
        for i, line in enumerate(finding.mend.splitlines()):
            print(f'          {"mend: " if i == 0 else "      "}{line}')


def summary(findings: Sequence[Finding]) -> str:
    """The last line of the report."""
    counts = Counter(f.severity for f in findings)
    words = [f'{counts[s]} {s}{"s" * (counts[s] != 1)}' for s in ('error', 'warning', 'note')]
    verdict = 'not fit for training: mend the errors first' if counts['error'] else 'fit for training'
    return f'{", ".join(words)}: {verdict}'


def tracker(progress: Progress, images: Sequence) -> Iterator:
    """Iterate over images with a bar and the time that is left."""
    task = progress.add_task('looking at images', total=len(images))
    for image in images:
        yield image
        progress.advance(task)
    progress.remove_task(task)


def make_progress() -> Progress:
    """A bar on stderr that is gone when all is done."""
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m rkan_mmdet.data.check', description=__doc__.splitlines()[0])
    parser.add_argument('annotations', nargs='?', help='a COCO file; without one, all that the config names')
    parser.add_argument('--images', metavar='DIR', help='the folder of its images (default: they are not looked at)')
    parser.add_argument('--config', metavar='CFG', help='a config, whose classes, heads, scale and paths are compared')
    parser.add_argument('--json', action='store_true', help='print the findings as JSON')
    add_cfg_options(parser)
    args = parser.parse_args()
    if args.annotations is None and args.config is None:
        parser.error('name an annotation file, or --config, or both')
    if args.images is not None and args.annotations is None:
        parser.error('--images goes with an annotation file; with --config alone the folders are those of the config')
    if args.cfg_options and args.config is None:
        parser.error('--cfg-options go with --config')

    cfg = None if args.config is None else read_config(args.config, args.cfg_options)
    with make_progress() as progress:
        track = partial(tracker, progress)
        if args.annotations is None:
            findings = examine_config(cfg, track)
        else:
            findings = examine_annotations(args.annotations, args.images, cfg, track)
    bad = any(f.severity == 'error' for f in findings)
    if args.json:
        print(json.dumps(dict(fit=not bad, findings=[f._asdict() for f in findings]), indent=1))
    else:
        show_findings(findings)
        print(summary(findings))
    sys.exit(int(bad))


if __name__ == '__main__':
    run_tool(main)
