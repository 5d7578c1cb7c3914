"""Pictures: training curves from MMEngine's JSON logs, predictions beside ground truth."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from mmengine.config import Config

matplotlib.use('Agg')
from matplotlib import pyplot as plt


def read_scalars(work_dir: str | Path) -> dict[str, list[tuple[float, float]]]:
    """Read what MMEngine logged in a work directory, resumed runs joined.

    Args:
        work_dir (str or Path): A work directory of ``tools/train.py``.

    Returns:
        dict[str, list[tuple[float, float]]]: For each scalar its (epoch, value) pairs; ``loss`` by fractions of an
        epoch, and each metric (``coco/bbox_mAP``) at the end of one.

    Raises:
        FileNotFoundError: There is no log.
    """
    files = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
    if not files:
        raise FileNotFoundError(f'{work_dir} holds no */vis_data/scalars.json: has anything been trained there?')
    curves: dict[str, dict[float, float]] = {}
    for file in files:  # a resumed run repeats what it lost: the later file counts
        rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        last = max((row['step'] / row['epoch'] for row in rows if row.get('epoch')), default=1)
        for row in rows:
            # training rows count iterations and name the epoch they are in, validation rows count epochs
            epoch = row['step'] if 'epoch' not in row else row['step'] / last
            for name, value in row.items():
                if isinstance(value, (int, float)) and name not in ('step', 'epoch', 'iter'):
                    curves.setdefault(name, {})[epoch] = value
    return {name: sorted(points.items()) for name, points in curves.items()}


def plot_curves(
    work_dirs: Sequence[str | Path],
    out: str | Path,
    metrics: Sequence[str] = ('coco/bbox_mAP', 'coco/segm_mAP'),
) -> Path:
    """Draw loss and metrics against epochs, one line a run.

    Args:
        work_dirs (Sequence[str or Path]): Work directories; their names are the legend.
        out (str or Path): The PNG file to write.
        metrics (Sequence[str]): Drawn where a run has them.

    Returns:
        Path: ``out``.
    """
    runs = {Path(work_dir).name: read_scalars(work_dir) for work_dir in work_dirs}
    shown = [m for m in metrics if any(m in curves for curves in runs.values())]
    figure, axes = plt.subplots(1, 1 + len(shown), figsize=(5 * (1 + len(shown)), 4), squeeze=False)
    for axis, name in zip(axes[0], ['loss', *shown]):
        for run, curves in runs.items():
            if name in curves:
                axis.plot(*zip(*curves[name]), label=run, marker='o' if name != 'loss' else '')
        axis.set(title=name, xlabel='epoch')
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return Path(out)


def plot_predictions(
    cfg: Config, checkpoint: str, out: str | Path, count: int = 6, score_thr: float = 0.5, scale: float = 2.0
) -> Path:
    """Draw ground truth (left) beside predictions (right) for the first images of the test set.

    Args:
        cfg (Config): Its ``test_dataloader`` says which images.
        checkpoint (str): The weights.
        out (str or Path): The PNG file to write.
        count (int): How many images. Defaults to 6.
        score_thr (float): Predictions below are not drawn. Defaults to 0.5.
        scale (float): Enlargement of the pictures. Defaults to 2.0.

    Returns:
        Path: ``out``.
    """
    import cv2
    import torch
    from mmdet.apis import init_detector
    from mmdet.registry import DATASETS, VISUALIZERS
    from mmengine.dataset import pseudo_collate

    model = init_detector(cfg, checkpoint, device='cuda' if torch.cuda.is_available() else 'cpu')
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    visualizer = VISUALIZERS.build(dict(type='DetLocalVisualizer', name='plot_predictions'))
    visualizer.dataset_meta = dataset.metainfo
    pictures: list[Any] = []
    # boxes at the border are drawn as far as they are inside
    warnings.filterwarnings('ignore', 'Warning: The (bbox|polygon) is out of bounds')
    for i in range(min(count, len(dataset))):
        data = dataset[i]
        with torch.no_grad():
            sample = model.test_step(pseudo_collate([data]))[0].cpu()
        image = cv2.cvtColor(cv2.imread(sample.img_path), cv2.COLOR_BGR2RGB)
        # ground truth is in the resized image, predictions are in the original
        factors = sample.gt_instances.bboxes.new_tensor(sample.scale_factor).repeat(2)
        sample.gt_instances.bboxes = sample.gt_instances.bboxes / factors
        if 'masks' in sample.gt_instances:
            sample.gt_instances.masks = sample.gt_instances.masks.resize(sample.ori_shape[:2])
        visualizer.add_datasample('image', image, sample, draw_gt=True, pred_score_thr=score_thr)
        picture = visualizer.get_image()
        pictures.append(cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC))
    columns = 2
    rows = math.ceil(len(pictures) / columns)
    height, width = (max(p.shape[axis] for p in pictures) for axis in (0, 1))
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    plt.imsave(out, sheet)
    return Path(out)
