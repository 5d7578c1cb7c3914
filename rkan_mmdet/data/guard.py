"""An image that can not be used is named, also from within a worker; one that is cut off is refused."""

from __future__ import annotations

import os
from typing import Any

from mmengine.hooks import Hook
from PIL import Image

# What the last bytes of a whole file hold; OpenCV fills in grey for what is missing of a JPEG.
_ENDS = {b'\xff\xd8': b'\xff\xd9', b'\x89P': b'IEND'}


class DataError(Exception):
    """An image or its annotations can not be used; the message names the file."""


class GuardedPipeline:
    """A pipeline whose failures name the image.

    Args:
        pipeline (Any): A ``Compose``; its attributes are found here too.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def __getattr__(self, name: str) -> Any:
        if name == 'pipeline':  # not there yet while pickle makes one
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def __call__(self, data: Any) -> Any:
        path = data.get('img_path') if isinstance(data, dict) else None
        try:
            if isinstance(path, str) and os.path.isfile(path):
                check_end(path)
            return self.pipeline(data)
        except (DataError, NameError, ImportError):  # the last two are of no image
            raise
        except Exception as error:
            reason = ' '.join(str(error).split())
            raise DataError(
                f'image {path} can not be used: {type(error).__name__}: {reason} (RKAN_DEBUG=1 shows where)'
            ) from error


def check_end(path: str) -> None:
    """Let Pillow raise its error when a JPEG or PNG file ends early."""
    with open(path, 'rb') as file:
        end = _ENDS.get(file.read(2))
        if end is None:
            return
        file.seek(max(os.path.getsize(path) - 4096, 0))
        if end in file.read():
            return
    with Image.open(path) as image:  # nothing but decoding tells a torn file from one with a long trailer
        image.load()


def guard(dataset: Any) -> None:
    """Guard the pipeline of a data set, of those within it, and of those that it joins; in place."""
    for inner in [getattr(dataset, 'dataset', None), *(getattr(dataset, 'datasets', None) or ())]:
        if inner is not None:
            guard(inner)
    if callable(getattr(dataset, 'pipeline', None)) and not isinstance(dataset.pipeline, GuardedPipeline):
        dataset.pipeline = GuardedPipeline(dataset.pipeline)


class GuardHook(Hook):
    """Guards what MMDetection's ``PipelineSwitchHook`` has put in a pipeline's place."""

    priority = 'LOWEST'

    def before_train_epoch(self, runner: Any) -> None:
        guard(runner.train_dataloader.dataset)
