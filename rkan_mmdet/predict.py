"""Detections of images, folders and videos: drawn, and in COCO's results format."""

from __future__ import annotations

import codecs
import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import mmcv
import numpy as np
from mmdet.apis.det_inferencer import IMG_EXTENSIONS
from mmdet.datasets import CocoDataset
from mmengine.structures import InstanceData
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .detector import Detector, UnreadableImage
from .launch import UserError, listed

OUTPUTS = ('vis', 'images.json', 'predictions.json')  # in the order in which they appear


class CocoIds:
    """The ids that results bear: those of the test set's annotation file where they are to be had.

    Args:
        detector (Detector): Its config names the annotation file.

    Raises:
        UserError: The annotation file can not be read, or has not all of the detector's classes.

    Attributes:
        categories (list[dict]): ``id`` and ``name`` of each label, in the order of the labels. Without an annotation
            file (of a ``CocoDataset``) the ids are 1 to n.
        file (str or None): The annotation file.
        in_order (bool): Whether the file has the classes in the order of the detector's names.
    """

    def __init__(self, detector: Detector) -> None:
        dataset = detector.dataset
        self.categories = [dict(id=i, name=name) for i, name in enumerate(detector.classes, 1)]
        self.in_order = True
        self.file = getattr(dataset, 'ann_file', '') if isinstance(dataset, CocoDataset) else ''
        self._images: dict[str, Any] = {}
        self._folder = os.path.realpath((getattr(dataset, 'data_prefix', None) or {}).get('img') or '.')
        if not self.file or not Path(self.file).is_file():
            self.file = None
            return
        try:
            document = json.loads(Path(self.file).read_text())
            images, categories = document['images'], document['categories']
            # in the file's order, as CocoDataset numbers its labels and CocoMetric its categories
            known = [dict(id=c['id'], name=c['name']) for c in categories if c['name'] in detector.classes]
            self._images = {
                os.path.normpath(image['file_name']): image['id'] for image in images if 'file_name' in image
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f'annotation file {self.file} is not of the COCO format: {error!r:.200}') from error
        lacking = [name for name in detector.classes if name not in {c['name'] for c in known}]
        if lacking or len(known) != len(detector.classes):
            what = listed(lacking, 'of them are not in it') or 'some names come twice in it'
            raise UserError(
                f"annotation file {self.file} does not fit the detector's {len(detector.classes)} classes: {what}; "
                'name another with --cfg-options test_dataloader.dataset.ann_file=FILE, or none with an empty FILE'
            )
        self.categories = known
        self.in_order = [c['name'] for c in known] == list(detector.classes)

    def of_image(self, path: str | Path) -> Any:
        """The id of an image file of the test set; None for any other file."""
        folder, name = os.path.split(path)
        return self._images.get(os.path.relpath(os.path.join(os.path.realpath(folder or '.'), name), self._folder))


class Item(NamedTuple):
    """One image of a source: the file ``path``, or the frame ``index`` of a video."""

    name: str
    path: Path | None = None
    index: int | None = None
    frame: np.ndarray | None = None


def _files_below(path: Path) -> Iterator[Path]:
    """The files in a folder and in those in it, linked ones too, each folder once."""
    seen = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        # hidden ones are passed over, and folders themselves come before links to them
        folders[:] = sorted(
            (name for name in folders if not name.startswith('.')),
            key=lambda name: (os.path.islink(os.path.join(folder, name)), name),
        )
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        yield from (Path(folder, name) for name in names if Path(folder, name).is_file())


class Images:
    """The images of a folder and of the folders in it, sorted; or one image. Hidden files are passed over."""

    fps = None

    def __init__(self, path: Path) -> None:
        self._root = path
        self.ignored: list[str] = []  # files of a folder that are no images by their names
        if path.is_file():
            self._root, self._files = path.parent, [path]
            return
        files = sorted(file.relative_to(path) for file in _files_below(path))
        files = [file for file in files if not any(part.startswith('.') for part in file.parts)]
        self._files = [path / file for file in files if file.suffix.lower() in IMG_EXTENSIONS]
        self.ignored = [str(file) for file in files if file.suffix.lower() not in IMG_EXTENSIONS]
        if not self._files:
            raise UserError(f'folder {path} holds no image ({" ".join(IMG_EXTENSIONS)})')

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Item]:
        for file in self._files:
            yield Item(file.relative_to(self._root).as_posix(), path=file)


class Video:
    """The frames of a video; their ids count from 0."""

    ignored = ()

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._capture = cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise UserError(f'{path} is neither an image nor a video that OpenCV can read')
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps < 1000 else 25.0  # some containers do not say

    def __len__(self) -> int:
        """As the file says, which may be wrong; 0 where it does not say."""
        return max(int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)

    def __iter__(self) -> Iterator[Item]:
        for index in itertools.count():
            read, frame = self._capture.read()
            if not read:
                return
            yield Item(self._name, index=index, frame=frame)


def _is_text(path: Path) -> bool:
    with path.open('rb') as file:
        head = file.read(4096)
    try:
        codecs.getincrementaldecoder('utf-8')().decode(head)
    except UnicodeDecodeError:
        return False
    return bool(head) and b'\0' not in head


def open_source(path: str | Path) -> Images | Video:
    """What is to be shown to the detector.

    Args:
        path (str or Path): An image, a folder of images, or a video.

    Raises:
        UserError: It does not exist, holds no image, or is neither image nor video.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f'INPUT {path} does not exist')
    # a broken image must not be taken for a video: OpenCV reads 001.jpg as the first of a series of files
    if path.is_dir() or path.suffix.lower() in IMG_EXTENSIONS or cv2.haveImageReader(str(path)):
        return Images(path)
    if _is_text(path):  # which FFmpeg would draw
        raise UserError(f'INPUT {path} is a text, neither an image nor a video; name the folder of the images')
    return Video(path)


def coco_results(instances: InstanceData, image_id: Any, categories: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Detections of one image in COCO's results format, as ``CocoMetric`` writes them.

    Args:
        instances (InstanceData): From a :class:`Detector`.
        image_id (int or str): The image.
        categories (Sequence[dict]): Those of :class:`CocoIds`.

    Returns:
        list[dict]: ``image_id``, ``category_id``, ``bbox`` (x, y, width, height), ``score`` and, where there are
        masks, ``segmentation`` (compressed RLE, ``counts`` a string).
    """
    rows = []
    for i, (x1, y1, x2, y2) in enumerate(instances.bboxes.tolist()):
        category = categories[int(instances.labels[i])]['id']
        row = dict(image_id=image_id, category_id=category, bbox=[x1, y1, x2 - x1, y2 - y1])
        row['score'] = float(instances.scores[i])
        if 'masks' in instances:
            mask = instances.masks[i]
            row['segmentation'] = dict(size=list(mask['size']), counts=mask['counts'].decode('ascii'))
        rows.append(row)
    return rows


class _Pictures:
    """Writes what is drawn: image files under the names they have, or one video."""

    def __init__(self, folder: Path, fps: float | None) -> None:
        self._folder, self._fps, self._writer, self._frames = folder, fps, None, 0

    def write(self, name: str, picture: np.ndarray) -> None:
        target = self._folder / name
        if self._fps is None:
            while target.suffix.lower() not in ('.jpg', '.jpeg', '.png', '.webp') or target.exists():
                target = target.with_name(f'{target.name}.png')  # .pgm, for one, has no colours
            if not mmcv.imwrite(picture, str(target)):
                raise UserError(f'{target.name} can not be written')
            return
        if self._writer is None:
            self._folder.mkdir()
            size = picture.shape[1], picture.shape[0]
            fourcc = cv2.VideoWriter_fourcc(*'mp4v')
            self._file = target.with_suffix('.mp4')
            for fps in (self._fps, round(self._fps)):  # MPEG-4 has not every rate
                self._writer = cv2.VideoWriter(str(self._file), fourcc, fps, size)
                if self._writer.isOpened():
                    break
            else:
                raise UserError('this OpenCV can write no mp4 video: leave pictures out with --no-draw')
        self._writer.write(picture)
        self._frames += 1

    def close(self) -> None:
        """Ends the video.

        Raises:
            UserError: It is cut off, as on a full disk, of which OpenCV says nothing.
        """
        if self._writer is None:
            return
        self._writer.release()
        capture = cv2.VideoCapture(str(self._file))
        if not self._file.stat().st_size or capture.get(cv2.CAP_PROP_FRAME_COUNT) < self._frames:
            raise UserError('the video can not be written whole: is the disk full?')


class Report(NamedTuple):
    """What :func:`predict` did."""

    images: int
    known: int  # images with ids of the annotation file
    detections: int
    unreadable: list[str]


def check_out(out: Path) -> None:
    """Refuse an output folder where something would be overwritten.

    Raises:
        UserError: ``out`` is a file, or holds results.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f'--out {out} is a file; name a folder')
    for name in OUTPUTS:
        if (out / name).exists():
            raise UserError(f'--out {out} holds {name} already; name another folder, or remove it')


def predict(
    detector: Detector,
    source: Images | Video,
    ids: CocoIds,
    out: str | Path,
    score_thr: float = 0.3,
    batch_size: int = 1,
    draw: bool = True,
) -> Report:
    """Write ``predictions.json``, ``images.json`` and ``vis/`` into a folder, all or nothing, with progress.

    ``predictions.json`` holds every detection, whatever its score: ``COCO(annotations).loadRes`` takes it when the
    images are of the test set, and ``COCO('images.json').loadRes`` always does. Images that can not be read are named
    and left out.

    Args:
        detector (Detector): The detector.
        source (Images or Video): From :func:`open_source`.
        ids (CocoIds): The ids to use.
        out (str or Path): The folder; made where it is not there.
        score_thr (float): The least score that is drawn. Defaults to 0.3.
        batch_size (int): Images at a time. Defaults to 1.
        draw (bool): Whether to draw at all. Defaults to True.

    Returns:
        Report: Counts, and what was left out.

    Raises:
        UserError: Nothing could be read, or ``out`` holds results or can not be written.
    """
    out, console = Path(out), Console(stderr=True, soft_wrap=True)
    check_out(out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix='.partial-', dir=out))
    except OSError as error:
        raise UserError(f'--out {out} can not be written: {error}') from error
    columns = (TextColumn('predicting'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    pictures = _Pictures(partial / 'vis', source.fps)
    images: list[dict[str, Any]] = []
    unreadable: list[str] = []
    placed: list[str] = []
    known = detections = 0
    try:
        with (partial / 'predictions.json').open('w') as results, Progress(*columns, console=console) as progress:
            task = progress.add_task('', total=len(source) or None)
            items = iter(source)
            while batch := list(itertools.islice(items, batch_size)):
                readable = []
                for item in batch:
                    try:
                        image = detector.read(item.path) if item.frame is None else detector.adapt(item.frame)
                        readable.append((item, image, detector.prepare(image)))
                    except UnreadableImage as error:
                        if len(source) == 1:
                            raise UserError(f'{item.name} can not be read: {error}') from error
                        unreadable.append(item.name)
                        text = f'warning: {item.name} can not be read and is left out: {error}'
                        console.print(text, markup=False, highlight=False)
                found = detector([data for _, _, data in readable]) if readable else []
                for (item, image, _), instances in zip(readable, found):
                    image_id = item.index if item.path is None else ids.of_image(item.path)
                    known += item.path is not None and image_id is not None
                    image_id = item.name if image_id is None else image_id
                    for row in coco_results(instances, image_id, ids.categories):
                        results.write((',\n' if detections else '[\n') + json.dumps(row))
                        detections += 1
                    size = dict(width=image.shape[1], height=image.shape[0])
                    images.append(dict(id=image_id, file_name=item.name, **size))
                    if draw:
                        pictures.write(item.name, detector.draw(image, instances, score_thr))
                progress.advance(task, len(batch))
            results.write('\n]\n' if detections else '[]\n')
        pictures.close()
        if source.fps and images and len(images) < 0.98 * len(source) - 1:  # what a video says of itself is not exact
            console.print(
                f'warning: {len(source)} frames are said to be there, {len(images)} could be read: is it cut?'
            )
        if not images:
            raise UserError('no image could be read' if unreadable else 'the video has no frame that can be read')
        info = dict(description='the images of predictions.json', **(dict(fps=source.fps) if source.fps else {}))
        document = dict(info=info, images=images, annotations=[], categories=ids.categories)
        (partial / 'images.json').write_text(json.dumps(document) + '\n')
        for name in OUTPUTS:
            if (partial / name).exists():
                os.replace(partial / name, out / name)
                placed.append(name)
    except BaseException:
        for name in placed:
            os.replace(out / name, partial / name)
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # another program wrote there
                folder.rmdir()
        raise
    partial.rmdir()
    return Report(len(images), known, detections, unreadable)
