"""The image files of a COCO annotation file: missing, torn, turned, or of another size than the file says."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from rkan_mmdet.data.coco_file import CocoFile
from rkan_mmdet.data.findings import Finding, Report, in_order
from rkan_mmdet.data.guard import check_end

EXIF_ORIENTATION = 0x0112
SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
_AS_STORED = "dict(type='LoadImageFromFile', color_type='color_ignore_orientation')"


class _ImageFile(NamedTuple):
    path: str
    image: dict
    stored: tuple[int, int]
    orientation: int
    is_deep: bool  # 16 bits a pixel
    kind: str | None  # Pillow's name of the format


def _open(path: str) -> tuple[tuple[int, int], int, bool, str | None, bool]:
    """Size as stored, EXIF orientation, whether a pixel has 16 bits, the format, and whether the file is whole."""
    with Image.open(path) as image:
        size, kind, mode = image.size, image.format, image.mode
        if kind == 'TIFF':
            size = image.tag_v2[256], image.tag_v2[257]  # Pillow's own is turned already
            if max(image.tag_v2.get(258, (1,))) >= 32:
                raise ValueError('pixels of 32 bits')  # of which OpenCV makes no picture
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
        # as OpenCV takes it, which turns no AVIF
        orientation = orientation if isinstance(orientation, int) and kind != 'AVIF' else 1
    is_deep = mode.startswith('I') or (kind == 'PNG' and _png_depth(path) == 16)
    try:
        if kind in ('JPEG', 'PNG'):
            check_end(path)
        else:
            with Image.open(path) as image:
                image.load()
    except (OSError, SyntaxError, ValueError):
        return size, orientation, is_deep, kind, False
    return size, orientation, is_deep, kind, True


def _png_depth(path: str) -> int:
    """Bits of a value: Pillow makes 8 of the 16 that a coloured one can have."""
    with open(path, 'rb') as file:
        return file.read(25)[24]


def examine_images(
    coco: CocoFile,
    folder: str | Path,
    upright: bool = True,
    track: Callable[[Sequence], Iterable] = iter,
) -> list[Finding]:
    """Compare the file with the images: headers alone are read.

    Args:
        coco (CocoFile): The file.
        folder (str or Path): Where its images lie (``data_prefix['img']``).
        upright (bool): Whether images are turned as their EXIF orientation says, as MMDetection does by default.
            Defaults to True.
        track (Callable): Wraps the sequence of images, e.g. to show progress. Defaults to no progress.

    Returns:
        list[Finding]: The worst first.
    """
    report = Report()
    folder = str(folder)
    if not Path(folder).is_dir():
        mend = (
            f"data_prefix=dict(img='{os.path.basename(os.path.normpath(folder))}/')  # the right one, below data_root"
        )
        return [Finding('error', 'folder-missing', f'the folder {folder} of the images does not exist', mend=mend)]
    missing, unreadable, torn, found = [], [], [], []
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # only headers are read
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow's, on odd metadata
            for image in track(coco.images):
                name = image.get('file_name')
                if not isinstance(name, str) or '://' in name:
                    continue
                path = os.path.join(folder, name)
                try:
                    *found_in, whole = _open(path)
                except FileNotFoundError:
                    missing.append(image)
                except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                    unreadable.append(path)
                else:
                    found.append(_ImageFile(path, image, *found_in))
                    torn += [] if whole else [path]
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    _examine_folder(coco, folder, missing, report)
    text = 'image files that MMDetection can not read'
    report.add('error', 'file-unreadable', text, unreadable, mend='restore them, or remove them from the file')
    text = 'image files that end early: the rest is read as grey, or the run stops'
    report.add('error', 'file-torn', text, torn, mend='restore them, or remove them from the file')
    deep = [file.path for file in found if file.is_deep]
    text = 'images of 16 bits a pixel, of which MMDetection keeps the upper 8: values below 256 are black to it'
    report.add('warning', 'file-deep', text, deep, mend='stretch what is in them over 8 bits, and save them so')
    mend = f'{_AS_STORED}  # in train_pipeline and test_pipeline'
    _examine_sizes([file for file in found if file.kind != 'TIFF'], upright, mend, report)
    mend = 'save them anew without their orientation: OpenCV turns TIFFs whatever it is told'
    _examine_sizes([file for file in found if file.kind == 'TIFF'], True, mend, report)
    return in_order(report)


def _examine_folder(coco: CocoFile, folder: str, missing: list[dict], report: Report) -> None:
    there: dict[str, str] = {}
    for parent, _, names in os.walk(folder):
        there.update({os.path.relpath(os.path.join(parent, n), folder): n for n in names})
    by_name = {name.lower(): path for path, name in there.items()}
    by_stem = {os.path.splitext(name)[0]: path for name, path in by_name.items()}

    def show(image: dict) -> str:
        name = os.path.basename(image['file_name'].replace('\\', '/')).lower()
        near = by_name.get(name) or by_stem.get(os.path.splitext(name)[0])
        return f'{image["file_name"]} (there is {near})' if near else image['file_name']

    mend = f'data_prefix and file_name must give the path of each image: {folder} + file_name'
    first = missing[0]['file_name'].replace('\\', '/') if missing else ''
    if '/' in first and os.path.basename(first) in there:
        mend = "in the file: i['file_name'] = os.path.basename(i['file_name']) for each image i; or data_prefix=dict"
        mend += '(img=...) of the folder above'
    elif missing and first in there.values():
        path = next(path for path, name in there.items() if name == first)
        below = os.path.join(os.path.basename(os.path.normpath(folder)), os.path.dirname(path))
        mend = f"data_prefix=dict(img='{below}/')"
    report.add('error', 'file-missing', f'image files are not in {folder}', missing, show, mend)
    listed = {os.path.normpath(str(image.get('file_name'))) for image in coco.images}
    extra = sorted(p for p in there if p not in listed and p.lower().endswith(SUFFIXES))
    report.add('note', 'file-not-listed', f'images in {folder} are not in the file: nobody will see them', extra)


def _examine_sizes(found: list[_ImageFile], upright: bool, as_stored: str, report: Report) -> None:
    turned, unsure, noted, differ = [], [], [], []
    for file in found:
        stored = file.stored
        seen = stored[::-1] if file.orientation in (5, 6, 7, 8) else stored
        loaded, other = (seen, stored) if upright else (stored, seen)
        claimed = (file.image.get('width'), file.image.get('height'))
        if claimed == loaded:
            if 2 <= file.orientation <= 8:
                (unsure if claimed == other else noted).append(file)
        elif claimed == other:
            turned.append(file)
        else:
            differ.append(file)

    def show(file: _ImageFile) -> str:
        said = f'{file.image.get("width")}x{file.image.get("height")}'
        exif = f', EXIF orientation {file.orientation}' if 2 <= file.orientation <= 8 else ''
        return f'{file.path}: {file.stored[0]}x{file.stored[1]} stored{exif}, {said} in the file'

    if upright:
        text = (
            'images with an EXIF rotation whose size in the file is the stored one: MMDetection turns them, and no box'
        )
        mend = as_stored
    else:
        text = (
            'images with an EXIF rotation whose size in the file is the upright one: the loader leaves them as stored'
        )
        mend = "dict(type='LoadImageFromFile')  # in train_pipeline and test_pipeline: no color_type, backend cv2"
    report.add('error', 'exif-rotated', text, turned, show, mend)
    text = 'images with an EXIF orientation that leaves the size as it is: were the boxes drawn on the '
    text += ('upright' if upright else 'stored') + ' image, as MMDetection loads it?'
    report.add('warning', 'exif-unsure', text, unsure, show, f'if not: {as_stored}' if upright else 'look at some')
    text = 'images with an EXIF rotation, loaded as the file says'
    report.add('note', 'exif-agrees', text, noted, show)
    swapped = bool(differ) and all((f.image.get('height'), f.image.get('width')) == f.stored for f in differ)
    text = 'images of another size than the file says' + (': width and height are swapped' if swapped else '')
    mend = 'write the sizes of the image files into the json; when the images were resized, scale the boxes with them'
    report.add('error', 'size-differs', text, differ, show, mend)
