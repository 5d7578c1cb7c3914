"""A small COCO-format set for detection and instance segmentation, drawn from a seed.

``python -m rkan_mmdet.data.shapes`` writes it; :func:`make_shapes` does the same from Python. Read it with
MMDetection's plain ``CocoDataset`` (``metainfo=dict(classes=shapes.CLASSES)``) and score it with ``CocoMetric``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_utils
from rich.progress import track

from rkan_mmdet.checks import check_int

CLASSES = ('disc', 'box', 'triangle', 'star', 'ring')
VERSION = 1  # of the drawing: a change of the pictures changes it
# Radii in pixels whose areas are small, medium and large to COCO (up to 32^2, 96^2, more), and how often they come.
SIZES = (((10, 17), 0.28), ((18, 34), 0.44), ((60, 86), 0.28))
EMPTY = 0.04  # share of images without any object
CROWD = 0.05  # share of images with a crowd: many little objects of a class under one annotation


def _noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    coarse = rng.standard_normal((cells, cells, 3)).astype(np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    image = rng.uniform(60, 195, 3).astype(np.float32) + np.zeros((size, size, 3), np.float32)
    for cells in (4, 12, 40):
        image += 12 * _noise(rng, size, cells) / 3**0.5
    y, x = np.mgrid[:size, :size]
    angle, frequency, phase = rng.uniform(0, np.pi), rng.uniform(0.1, 0.6), rng.uniform(0, 2 * np.pi)
    wave = np.sin(frequency * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    image += 12 * wave[..., None].astype(np.float32)
    for _ in range(rng.integers(0, 5)):  # lines that are no object
        ends = rng.integers(0, size, (2, 2))
        cv2.line(image, ends[0].tolist(), ends[1].tolist(), rng.uniform(0, 255, 3).tolist(), int(rng.integers(1, 4)))
    return image


def _mask(rng: np.random.Generator, size: int, label: int, centre: np.ndarray, radius: float) -> np.ndarray:
    """The filled shape as a (size, size) array of 0 and 1."""
    mask = np.zeros((size, size), np.uint8)
    kind, turn = CLASSES[label], rng.uniform(0, 2 * np.pi)
    if kind in ('disc', 'ring'):
        middle = np.round(centre).astype(int).tolist()
        cv2.circle(mask, middle, round(radius), 1, -1)
        if kind == 'ring':
            cv2.circle(mask, middle, round(radius * 0.5), 0, -1)
        return mask
    corners, inner = dict(box=(4, 1.0), triangle=(3, 1.0), star=(10, 0.5))[kind]
    angles = turn + 2 * np.pi * np.arange(corners) / corners
    radii = radius * np.where(np.arange(corners) % 2, inner, 1.0)
    stretch = np.array([1.0, rng.uniform(0.6, 1.0) if kind == 'box' else 1.0])
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None] * stretch + centre
    cv2.fillPoly(mask, [np.round(points).astype(np.int32)], 1)
    return mask


def _paint(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray) -> None:
    inside = mask.astype(bool)
    around = image[inside].mean(0)
    while True:
        colour = rng.uniform(0, 255, 3)
        if np.abs(colour - around).max() >= 70:
            break
    image[inside] = colour + 6 * _noise(rng, len(image), 30)[inside]


def _annotation(mask: np.ndarray, label: int, crowd: bool) -> dict[str, Any]:
    rle = mask_utils.encode(np.asfortranarray(mask))
    box = mask_utils.toBbox(rle).tolist()
    rle['counts'] = rle['counts'].decode('ascii')
    return dict(
        category_id=label + 1, bbox=box, area=float(mask.sum()), segmentation=rle, iscrowd=int(crowd)
    )  # fmt: skip


def draw(seed: int, index: int, size: int = 192) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Draw one image.

    Args:
        seed (int): The seed of the split.
        index (int): The number of the image in it; each image depends on these two alone.
        size (int): Side in pixels, at least 64. Defaults to 192.

    Returns:
        tuple[ndarray, list[dict]]: The BGR image (size, size, 3) of uint8, and its annotations in COCO's form without
        ids (``segmentation`` is a compressed RLE of what is visible).

    Examples:
        >>> image, annotations = draw(seed=0, index=1)
        >>> image.shape, sorted(annotations[0])
        ((192, 192, 3), ['area', 'bbox', 'category_id', 'iscrowd', 'segmentation'])
    """
    rng = np.random.default_rng([seed, index])
    image = _background(rng, size)
    placed: list[tuple[int, np.ndarray, int, bool]] = []  # label, visible mask, full area, crowd
    if rng.random() >= EMPTY:
        scale = size / 192
        ranges = [SIZES[i][0] for i in rng.choice(len(SIZES), rng.integers(2, 7), p=[p for _, p in SIZES])]
        radii = sorted((rng.uniform(low, high) * scale for low, high in ranges), reverse=True)
        shapes = []
        for radius in radii:  # large ones first, so that small ones lie on top
            label, margin = int(rng.integers(len(CLASSES))), 0.7 * radius  # little is cut off by the border
            shapes.append((label, _mask(rng, size, label, rng.uniform(margin, size - margin, 2), radius), False))
        if rng.random() < CROWD:
            label, centre = int(rng.integers(len(CLASSES))), rng.uniform(0.2, 0.8, 2) * size
            parts = [
                _mask(rng, size, label, centre + rng.normal(0, 18 * scale, 2), rng.uniform(5, 8) * scale)
                for _ in range(12)
            ]
            shapes.append((label, np.maximum.reduce(parts), True))
        for label, mask, crowd in shapes:
            if not mask.any():
                continue
            _paint(rng, image, mask)
            placed = [(other, seen & (1 - mask), full, c) for other, seen, full, c in placed]
            placed.append((label, mask, int(mask.sum()), crowd))
    image = np.clip(image + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8)
    # what is mostly hidden, or a sliver, nobody could name
    visible = [p for p in placed if p[1].sum() >= max(0.4 * p[2], 40 * (size / 192) ** 2)]
    return image, [_annotation(mask, label, crowd) for label, mask, _, crowd in visible]


def _write_split(folder: Path, name: str, count: int, seed: int, size: int, quiet: bool) -> None:
    (folder / name).mkdir()
    images, annotations = [], []
    for index in track(range(count), description=f'drawing {name}', disable=quiet):
        image, found = draw(seed, index, size)
        file_name = f'{index:06d}.jpg'
        if not cv2.imwrite(str(folder / name / file_name), image, [cv2.IMWRITE_JPEG_QUALITY, 95]):
            raise OSError(f'could not write {folder / name / file_name}')
        images.append(dict(id=index + 1, file_name=file_name, width=size, height=size))
        annotations += [dict(a, id=len(annotations) + k, image_id=index + 1) for k, a in enumerate(found, 1)]
    categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)]
    info = dict(description=f'shapes {name}', seed=seed, version=VERSION)
    document = dict(info=info, licenses=[], images=images, annotations=annotations, categories=categories)
    (folder / 'annotations' / f'instances_{name}.json').write_text(json.dumps(document))


def make_shapes(
    out: str | Path,
    num_train: int = 1200,
    num_val: int = 50,
    train_seed: int = 1,
    val_seed: int = 2,
    size: int = 192,
    quiet: bool = False,
) -> Path:
    """Write the set: ``train/``, ``val/`` and ``annotations/instances_{train,val}.json``.

    Nothing is overwritten: a folder that holds this very set is left as it is.

    Args:
        out (str or Path): The folder to make.
        num_train (int): Images in ``train``. Defaults to 1200.
        num_val (int): Images in ``val``. Defaults to 50.
        train_seed (int): Defaults to 1.
        val_seed (int): Must differ from ``train_seed``. Defaults to 2.
        size (int): Side of an image in pixels, at least 64. Defaults to 192.
        quiet (bool): Whether to show no progress. Defaults to False.

    Returns:
        Path: ``out``.

    Raises:
        FileExistsError: ``out`` holds something else.
        TypeError: An argument is of the wrong type.
        ValueError: A value is not allowed.

    Examples:
        >>> folder = make_shapes(tempfile.mkdtemp() + '/shapes', num_train=2, num_val=1, quiet=True)
        >>> sorted(p.name for p in folder.iterdir())
        ['annotations', 'shapes.json', 'train', 'val']
    """
    numbers = dict(num_train=num_train, num_val=num_val, train_seed=train_seed, val_seed=val_seed, size=size)
    for name, minimum in dict(num_train=1, num_val=1, train_seed=0, val_seed=0, size=64).items():
        check_int(name, numbers[name], minimum)
    if train_seed == val_seed:
        raise ValueError(f'val_seed must differ from train_seed, but both are {val_seed}: the images would be the same')
    out, settings = Path(out), dict(numbers, version=VERSION)
    if out.exists():
        try:
            if json.loads((out / 'shapes.json').read_text()) == settings:
                return out
        except (OSError, ValueError):
            pass
        raise FileExistsError(f'{out} exists and is not this set; name another folder, or remove it')
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f'.{out.name}-', dir=out.parent))
    try:
        (partial / 'annotations').mkdir()
        _write_split(partial, 'train', num_train, train_seed, size, quiet)
        _write_split(partial, 'val', num_val, val_seed, size, quiet)
        (partial / 'shapes.json').write_text(json.dumps(settings))
        partial.chmod(0o755)
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', default='data/shapes', help='the folder to make (default: %(default)s)')
    for name, default in dict(num_train=1200, num_val=50, train_seed=1, val_seed=2, size=192).items():
        parser.add_argument(f'--{name.replace("_", "-")}', type=int, default=default, help='default: %(default)s')
    try:
        print(f'{make_shapes(**vars(parser.parse_args()))} is ready')
    except (OSError, ValueError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
