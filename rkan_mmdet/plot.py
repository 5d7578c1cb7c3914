"""Pictures: training curves from MMEngine's JSON logs, predictions beside ground truth, learned KAN functions."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from mmengine.config import Config

from .report import Observations, kan_convs

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

METRICS = ('coco/bbox_mAP', 'coco/segm_mAP', 'pascal_voc/mAP')


def read_scalars(work_dir: str | Path) -> dict[str, list[tuple[float, float]]]:
    """Read what MMEngine logged in a work directory, resumed runs joined; a new run replaces the one before it.

    Args:
        work_dir (str or Path): A work directory of ``tools/train.py``.

    Returns:
        dict[str, list[tuple[float, float]]]: For each scalar its (epoch, value) pairs; ``loss`` by fractions of an
        epoch, and each metric (``coco/bbox_mAP``) at the end of one. Where training counts iterations, those stand
        in place of epochs.

    Raises:
        FileNotFoundError: There is no log.
        ValueError: A log is damaged, or holds nothing; the message names it.
    """
    return _read_curves(work_dir)[0]


# Of a line of MMEngine's text log: the epoch, and the iteration of how many.
_PLACE = re.compile(r' Epoch\(train\)\s+\[\s*(\d+)\]\[\s*(\d+)/(\d+)\]')


def _read_curves(work_dir: str | Path) -> tuple[dict[str, list[tuple[float, float]]], str]:
    """As :func:`read_scalars`, and whether its numbers are of an ``'epoch'`` or an ``'iteration'``."""
    files = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
    if not files:
        raise FileNotFoundError(f'{work_dir} holds no */vis_data/scalars.json: has anything been trained there?')
    runs = [_read_rows(file) for file in files]
    if not any(runs):
        raise ValueError(f'{files[-1]} holds no line of a log')
    epochs = {row.get('epoch') for rows in runs for row in rows if 'loss' in row}
    # an iteration-based loop leaves its epoch at 0 when it validates, and its rows may call it the first
    by_iteration = None in epochs or (
        epochs == {1} and any(r['step'] == 0 for rows in runs for r in rows if 'loss' not in r)
    )
    longest = max((row['step'] / row['epoch'] for rows in runs for row in rows if row.get('epoch')), default=1) or 1
    curves: dict[str, dict[float, float]] = {}
    reached = 0  # the iteration of the last training row
    for file, rows in zip(files, runs):
        training = [row for row in rows if 'loss' in row]
        places = {} if by_iteration else _places(file, training, longest)
        if training:  # what an earlier run did beyond the point that this one began at is undone
            first = (training[0]['step'] if by_iteration else training[0]['epoch']) - 1
            curves = {name: {at: v for at, v in points.items() if at <= first} for name, points in curves.items()}
        for row in rows:
            if 'loss' in row:
                reached = row['step']
            # validation rows count epochs
            at = max(row['step'], reached) if by_iteration else places.get(id(row), row['step'])
            for name, value in row.items():
                if isinstance(value, (int, float)) and name not in ('step', 'epoch', 'iter'):
                    curves.setdefault(name, {})[at] = value
    curves = {name: points for name, points in curves.items() if points}
    return {name: sorted(points.items()) for name, points in curves.items()}, 'iteration' if by_iteration else 'epoch'


def _places(file: Path, training: list[dict], longest: float) -> dict[int, float]:
    """Where training rows stand, in epochs, by their ids.

    The text log beside them says it. Without it an epoch is taken to be as long as the rows of all runs need.
    """
    lines = [
        line
        for log in sorted(file.parents[1].glob('*.log'))[:1]
        for line in log.read_text(errors='replace').splitlines()
    ]
    found = [tuple(map(int, match.groups())) for match in map(_PLACE.search, lines) if match]
    places = {}
    for i, row in enumerate(training):
        epoch = row['epoch']
        if i < len(found) and found[i][0] == epoch:
            places[id(row)] = epoch - 1 + found[i][1] / found[i][2]
        else:
            places[id(row)] = min(max(row['step'] / longest, epoch - 1), epoch)
    return places


def _read_rows(file: Path) -> list[dict]:
    rows = []
    for i, line in enumerate(file.read_text(errors='replace').splitlines(), 1):
        if not line.endswith('}'):  # of a run that was killed
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(type(row.get(name, 1)) is int for name in ('step', 'epoch')):
            raise ValueError(f'line {i} of {file} is not of a log of MMEngine')
        if 'step' not in row:
            raise ValueError(f'line {i} of {file} has no step')
        rows.append(row)
    return rows


def _label(text: str) -> str:
    """As matplotlib shows it literally, and in a legend whatever it begins with."""
    return (' ' * text.startswith('_') + text).replace('$', r'\$')


def plot_curves(
    work_dirs: Sequence[str | Path] | Mapping[str, str | Path],
    out: str | Path,
    metrics: Sequence[str] = METRICS,
) -> Path:
    """Draw loss and metrics against epochs (or iterations, where training counts those), one line a run.

    Args:
        work_dirs (Sequence or Mapping): Work directories; their names are the legend, or the keys of a mapping.
        out (str or Path): The PNG file to write.
        metrics (Sequence[str]): Drawn where a run has them. Defaults to COCO's box and mask AP and VOC's AP.

    Returns:
        Path: ``out``.
    """
    if not isinstance(work_dirs, Mapping):
        short = len({Path(work_dir).name for work_dir in work_dirs}) == len(work_dirs)
        work_dirs = {Path(work_dir).name if short else str(work_dir): work_dir for work_dir in work_dirs}
    read = {label: _read_curves(work_dir) for label, work_dir in work_dirs.items()}
    runs = {label: curves for label, (curves, _) in read.items()}
    units = sorted({unit for _, unit in read.values()})
    shown = [m for m in metrics if any(m in curves for curves in runs.values())]
    figure, axes = plt.subplots(1, 1 + len(shown), figsize=(5 * (1 + len(shown)), 4), squeeze=False)
    for axis, name in zip(axes[0], ['loss', *shown]):
        for run, curves in runs.items():
            if name in curves:
                axis.plot(*zip(*curves[name]), label=_label(run), marker='o' if name != 'loss' else '')
        axis.set(title=name, xlabel=' or '.join(units))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return Path(out)


def build_pair(cfg: Config, checkpoint: str, device: str = 'cpu') -> tuple[Any, Any]:
    """The detector of a config with these weights, and its test set.

    Args:
        cfg (Config): The config.
        checkpoint (str): The weights.
        device (str): Defaults to ``'cpu'``.

    Returns:
        tuple: The detector in eval mode, and the data set.
    """
    from .launch import build_dataset
    from .speed import build_detector

    return build_detector(cfg, checkpoint, device), build_dataset(cfg.test_dataloader.dataset)


def _steps(dataset: Any) -> list[Any]:
    """The steps of a data set's pipeline, through its wrappers."""
    while not hasattr(dataset, 'pipeline'):
        dataset = dataset.datasets[0] if hasattr(dataset, 'datasets') else dataset.dataset
    return dataset.pipeline.transforms


def _first_resize(names: list[str]) -> int:
    return next((i for i, name in enumerate(names) if 'Resize' in name), len(names))


def draw_predictions(
    detectors: Sequence[tuple[Any, Any]], count: int = 6, score_thr: float = 0.5, scale: float = 2.0
) -> np.ndarray:
    """Draw ground truth beside predictions for the first images of a data set.

    Args:
        detectors (Sequence[tuple]): Of each detector the model, in eval mode, and its data set; from left to right.
        count (int): How many images. Defaults to 6.
        score_thr (float): Predictions below are not drawn. Defaults to 0.5.
        scale (float): Enlargement of the pictures, up to 1600 pixels for an image with all of its predictions.
            Defaults to 2.0.

    Returns:
        ndarray: RGB, (H, W, 3) of uint8.

    Raises:
        UserError: The data sets hold different images, or fewer classes than a detector finds.
    """
    import cv2
    from mmdet.registry import VISUALIZERS
    from mmdet.structures.bbox import get_box_tensor

    from .detector import colours_of, to_bgr
    from .launch import UserError
    from .speed import predict

    metainfo = detectors[-1][1].metainfo
    metainfo = metainfo[0] if isinstance(metainfo, list) else metainfo  # of sets that were joined
    classes = tuple(metainfo.get('classes') or ())
    visualizer = VISUALIZERS.build(dict(type='DetLocalVisualizer', name='draw_predictions'))
    visualizer.dataset_meta = dict(classes=[*map(_label, classes)], palette=colours_of(metainfo, classes))
    pictures: list[Any] = []
    for i in range(min(count, *(len(dataset) for _, dataset in detectors))):
        row: list[Any] = []
        path = None
        for model, dataset in detectors:
            data = dataset[i]
            sample = predict(model, dict(inputs=[data['inputs']], data_samples=[data['data_samples']]))[0].cpu()
            before, path = path, sample.get('img_path') or dataset.get_data_info(i)['img_path']
            if before is not None and os.path.realpath(before) != os.path.realpath(path):
                raise UserError(f'the two configs test on different images: {before} and {path}')
            steps = _steps(dataset)
            image = cv2.cvtColor(to_bgr(steps[0](dict(img_path=path, img_id=0))['img']), cv2.COLOR_BGR2RGB)
            names = [type(step).__name__ for step in steps]
            if len(sample.pred_instances) and int(sample.pred_instances.labels.max()) >= len(classes):
                raise UserError(f'a detector finds more classes than the {len(classes)} that the data set names')
            if 'bboxes' in sample.gt_instances:
                truth = get_box_tensor(sample.gt_instances.bboxes)
                if 'LoadAnnotations' in names[: _first_resize(names)]:  # resized with the image, unlike predictions
                    truth = truth / truth.new_tensor(sample.get('scale_factor', (1.0, 1.0))).repeat(2)
                sample.gt_instances.bboxes = truth
            if 'masks' in sample.gt_instances:
                sample.gt_instances.masks = sample.gt_instances.masks.resize(sample.ori_shape[:2])
            with warnings.catch_warnings():
                # boxes at the border are drawn as far as they are inside
                warnings.filterwarnings('ignore', 'Warning: The (bbox|polygon) is out of bounds')
                visualizer.add_datasample('image', image, sample, draw_gt=not row, pred_score_thr=score_thr)
            row.append(visualizer.get_image())
        line = np.hstack(row)
        factor = min(scale, 1600 / line.shape[1])  # of an aerial image a sheet would be a gigabyte
        how = cv2.INTER_CUBIC if factor > 1 else cv2.INTER_AREA
        pictures.append(cv2.resize(line, None, fx=factor, fy=factor, interpolation=how))
    columns = 1 if len(detectors) > 1 else 2
    rows = math.ceil(len(pictures) / columns)
    height, width = (max(p.shape[axis] for p in pictures) for axis in (0, 1))
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet


def draw_functions(conv: Any, title: str, inputs: Any = None, initial: Any = None) -> Figure:
    """Draw every learned function of a KAN convolution, at its place in the kernel.

    Behind each stands in grey where 95 % of the functions lie that its initialisation draws.

    Args:
        conv (KANConv2d): The convolution.
        title (str): Above the picture.
        inputs (Tensor[L], optional): Values that reached the convolution; drawn as a histogram below, and the
            functions over their range (the outermost 0.1 % cut off). Defaults to None: from -3 to 3.
        initial (KANConv2d, optional): The convolution before training, drawn as dashed lines. Defaults to None.

    Returns:
        Figure: To be saved and closed.
    """
    import torch

    windowed = conv.normalization != 'tanh'
    low, high = (-1.0, 1.0) if windowed else (-3.0, 3.0)
    if inputs is not None and not windowed:
        low, high = np.quantile(inputs.numpy(), [0.001, 0.999])
        low, high = (low, high) if high - low > 1e-6 else (low - 1, high + 1)
    x = torch.linspace(float(low), float(high), 201, dtype=torch.float64)

    def functions(module: Any) -> np.ndarray:
        with torch.no_grad():
            return module.functions(x).numpy()

    learned = copy.deepcopy(conv).cpu().double()
    fresh = copy.deepcopy(learned)
    draws = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(200):
            fresh.reset_parameters()
            draws.append(functions(fresh))
    band = np.quantile(np.concatenate(draws), [0.025, 0.975], axis=(0, 1))  # all taps start alike
    (rows, columns), below = conv.kernel_size, int(inputs is not None)
    figure, axes = plt.subplots(
        rows + below, columns, figsize=(1 + 2.4 * columns, 0.8 + 1.9 * (rows + below)), layout='constrained',
        sharex=True, squeeze=False,
    )  # fmt: skip
    curves = [] if initial is None else [(functions(copy.deepcopy(initial).cpu().double()), '--', '0.4', 1.0)]
    curves.append((functions(learned), '-', None, 1.6))
    lowest = min(band.min(), *(values.min() for values, *_ in curves))
    highest = max(band.max(), *(values.max() for values, *_ in curves))
    margin = 0.05 * (highest - lowest)
    for tap, axis in enumerate(axes[:rows].flat):
        axis.fill_between(x, *band, color='0.88')
        for values, style, colour, width in curves:
            axis.plot(x, values[:, tap].T, style, color=colour, lw=width)
        axis.axhline(0, color='0.6', lw=0.5)
        axis.set_title(f'row {tap // columns - rows // 2:+d}, column {tap % columns - columns // 2:+d}', fontsize=8)
        axis.set_ylim(lowest - margin, highest + margin)
    if below:
        grid = axes[rows, 0].get_gridspec()
        for axis in axes[rows]:
            axis.remove()
        axis = figure.add_subplot(grid[rows, :])
        axis.hist(inputs.numpy(), bins=80, range=(float(low), float(high)), color='tab:grey')
        axis.set(yticks=[], ylabel='inputs', xlim=(float(low), float(high)))
    label = 'normalized input (the linear term is left out)' if windowed else 'input x'
    figure.supxlabel(label, fontsize=9)
    figure.suptitle(f'{title}: {conv.basis!r}', fontsize=10)
    return figure


def draw_shares(shares: dict[str, Any]) -> Figure:
    """Draw each channel's share of the path in its stage's output, largest first, one line a stage.

    Args:
        shares (dict[str, Tensor[C]]): Of :func:`rkan_mmdet.report.observe`.

    Returns:
        Figure: To be saved and closed.
    """
    figure, axis = plt.subplots(figsize=(7, 3.2), layout='constrained')
    for stage, share in shares.items():
        ordered = np.sort(share.numpy())[::-1]
        axis.plot(np.linspace(0, 1, len(ordered)), ordered, label=f'{stage} ({len(ordered)} channels)')
    axis.set(xlabel='part of the channels', ylabel="the path's share", ylim=(0, 1), xlim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def draw_feature_maps(rows: Sequence[tuple[Any, dict[str, Any]]], title: str) -> Figure:
    """Draw mean absolute feature maps beside their images.

    Args:
        rows (Sequence[tuple]): For each image the image ``(H, W, 3)`` in RGB and its named maps ``(h, w)``; the
            maps of a row share one colour scale.
        title (str): Above the picture.

    Returns:
        Figure: To be saved and closed.
    """
    columns = 1 + len(rows[0][1])
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(2.6 * columns, 0.4 + 2.1 * len(rows)), squeeze=False, layout='constrained'
    )
    for line, (image, maps) in zip(axes, rows):
        line[0].imshow(image)
        line[0].set_title('image', fontsize=9)
        top = max(float(m.max()) for m in maps.values())
        for axis, (name, values) in zip(line[1:], maps.items()):
            shown = axis.imshow(values, vmin=0, vmax=top or 1)
            axis.set_title(name, fontsize=9)
        figure.colorbar(shown, ax=line[-1], fraction=0.05)
        for axis in line:
            axis.set_axis_off()
    figure.suptitle(title, fontsize=10)
    return figure


def draw_figures(
    model: Any, seen: Observations, images: Sequence[Any] = (), initial: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, Figure]]:
    """Draw everything that was observed of a model: functions, and where images were seen, shares and feature maps.

    Args:
        model (nn.Module): Holds KAN convolutions.
        seen (Observations): Of :func:`rkan_mmdet.report.observe`.
        images (Sequence[ndarray]): RGB, beside the feature maps. Defaults to ().
        initial (Mapping[str, KANConv2d], optional): The KAN convolutions before training. Defaults to None.

    Yields:
        tuple[str, Figure]: What it shows, and the picture, to be closed before the next is asked for.
    """
    for name, conv in kan_convs(model).items():
        yield f'functions of {name}', draw_functions(conv, name, seen.inputs.get(name), (initial or {}).get(name))
    if seen.shares:
        yield 'share of the path', draw_shares(seen.shares)
    for stage, rows in seen.maps.items():
        yield f'feature maps of {stage}', draw_feature_maps(list(zip(images, rows)), stage)
