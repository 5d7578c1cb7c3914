"""A trained detector that takes any image: its weights read safely, its pipeline, its class names, its pictures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmcv.cnn import VGG
from mmcv.transforms import Compose
from mmdet.models import BaseDetector
from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads.mask_heads import FusedSemanticHead
from mmdet.structures import DetDataSample
from mmdet.structures.mask import encode_mask_results
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as mask_utils
from torch import nn

from .checkpoint import dataset_meta_of
from .launch import UserError, build_dataset, build_model, check_checkpoint, check_config, load_exactly


class UnreadableImage(UserError):
    """An image file that is broken, or that the detector's pipeline can not take."""


def choose_device(name: str) -> str:
    """The device that ``name`` (``'auto'``: a GPU where there is one) stands for.

    Raises:
        UserError: It can not be used.
    """
    device = ('cuda' if torch.cuda.is_available() else 'cpu') if name == 'auto' else name
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device {name} can not be used: {str(error).splitlines()[0]}') from error
    return device


def load_weights(model: nn.Module, path: str) -> dict[str, Any]:
    """Load a checkpoint that must fit exactly.

    Args:
        model (nn.Module): The detector.
        path (str): A file, or an ``https://`` address.

    Returns:
        dict: The checkpoint's ``meta``, empty where it has none.

    Raises:
        CheckpointError: The file can not be read without running code of it.
        UserError: It is not there, or not this detector's.
    """
    state, meta = check_checkpoint(path)
    load_exactly(model, state, path)
    return meta


def _first_dataset(cfg: Config) -> Any:
    """The test set, out of its wrappers, without its data."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset')
    while dataset and ('dataset' in dataset or 'datasets' in dataset):
        dataset = dataset['dataset'] if 'dataset' in dataset else dataset['datasets'][0]
    if not dataset or not dataset.get('pipeline'):
        raise UserError('the config has no test_dataloader.dataset.pipeline, which says how an image is prepared')
    return build_dataset(dict(dataset, lazy_init=True))


def _check_classes(model: nn.Module, classes: Any, source: str) -> tuple[str, ...]:
    if not (isinstance(classes, (tuple, list)) and classes and all(isinstance(name, str) for name in classes)):
        raise UserError(f'{source} must name the classes in a tuple, but gives {classes!r}')
    for name, module in model.named_modules():
        # as MMDetection's NumClassCheckHook: these have classes of their own
        own = 'rpn_head' in name.split('.') or isinstance(module, (RPNHead, VGG, FusedSemanticHead))
        heads = getattr(module, 'num_classes', len(classes))
        if not own and heads != len(classes):
            raise UserError(f'{source} names {len(classes)} classes, but {name} of the detector has {heads}')
    return tuple(classes)


def colours_of(metainfo: dict[str, Any], classes: Sequence[str]) -> Any:
    """A colour for each class: the data set's where it has enough, else ``'random'``."""
    palette = metainfo.get('palette') or []
    enough = not isinstance(palette, str) and len(palette) >= len(classes)
    return [tuple(colour) for colour in palette] if enough else 'random'


def to_bgr(image: np.ndarray) -> np.ndarray:
    """What a pipeline's loader gives as a picture to draw on: BGR, (H, W, 3) of uint8."""
    picture = np.clip(image, 0, 255).astype(np.uint8)
    if picture.ndim == 2 or picture.shape[2] == 1:
        picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR)
    return np.ascontiguousarray(picture[..., :3])


class Detector:
    """A detector with what is needed to show it any image.

    Class names are the checkpoint's, or else those of the config's test set. Images are prepared by the pipeline of
    the test set, whose first step, ``LoadImageFromFile``, also gives the picture that is drawn on: so boxes and
    pictures agree for files with an EXIF rotation too.

    Args:
        cfg (Config): The config.
        checkpoint (str): Its weights.
        device (str): Defaults to ``'cpu'``.

    Raises:
        CheckpointError: The checkpoint can not be read safely.
        UserError: It does not fit the config, or class names and heads disagree.

    Examples:
        >>> detector = Detector(read_config('config.py'), 'epoch_12.pth')  # doctest: +SKIP
        >>> image = detector.read('street.jpg')  # doctest: +SKIP
        >>> found = detector([detector.prepare(image)])[0]  # doctest: +SKIP
        >>> picture = detector.draw(image, found, score_thr=0.5)  # doctest: +SKIP
    """

    def __init__(self, cfg: Config, checkpoint: str, device: str = 'cpu') -> None:
        check_config(cfg, (), loads_weights=False)
        init_default_scope(cfg.get('default_scope') or 'mmdet')
        dataset = _first_dataset(cfg)
        model = build_model(cfg)
        if not isinstance(model, BaseDetector):
            raise UserError(f'the config is of {type(model).__name__}, which is no detector of MMDetection')
        model = revert_sync_batchnorm(model)
        meta = load_weights(model, checkpoint)
        trained_on = {key.lower(): value for key, value in (dataset_meta_of(meta) or meta).items()}
        if trained_on.get('classes'):
            self.classes = _check_classes(model, trained_on['classes'], f'checkpoint {checkpoint}')
        else:
            names = dataset.metainfo.get('classes')
            self.classes = _check_classes(model, names, 'test_dataloader.dataset.metainfo.classes')
        model.eval()  # not chained: MMDetection's ResNet gives None
        self.model = model.to(device)
        self.dataset = dataset
        steps = dataset.pipeline.transforms
        if not type(steps[0]).__name__.endswith('LoadImageFromFile'):
            raise UserError(f'the test pipeline must begin with LoadImageFromFile, not {type(steps[0]).__name__}')
        self._loader = steps[0]
        self._steps = Compose([step for step in steps[1:] if not type(step).__name__.endswith('LoadAnnotations')])
        self._visualizer = DetLocalVisualizer(name='predict')
        palette = colours_of(dataset.metainfo, self.classes)
        self._visualizer.dataset_meta = dict(
            classes=[name.replace('$', r'\$') for name in self.classes], palette=palette
        )

    def read(self, path: str | Path) -> np.ndarray:
        """Read an image as the test pipeline does.

        Args:
            path (str or Path): The file.

        Returns:
            ndarray: BGR, (H, W, 3) of uint8, unless the pipeline's loader asks for something else.

        Raises:
            UnreadableImage: It is broken, or no image.
        """
        try:
            with warnings.catch_warnings(), Image.open(path) as image:
                warnings.simplefilter('ignore', Image.DecompressionBombWarning)
                image.load()  # OpenCV fills what is cut off with grey, and says nothing
        except (UnidentifiedImageError, Image.DecompressionBombError):
            pass  # Pillow does not take all that OpenCV takes
        except (OSError, SyntaxError) as error:
            raise UnreadableImage(str(error)) from error
        except ValueError:
            pass  # of metadata, which OpenCV does not read
        try:
            return self._loader(dict(img_path=str(path)))['img']
        except Exception as error:  # a broken file fails in many ways
            raise UnreadableImage('it is broken, or no image') from error

    def adapt(self, frame: np.ndarray) -> np.ndarray:
        """A BGR picture of uint8 (a video's frame) as the pipeline's loader would give it."""
        if self._loader.color_type.startswith('grayscale'):
            frame = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
        return frame.astype(np.float32) if self._loader.to_float32 else frame

    def prepare(self, image: np.ndarray) -> dict[str, Any]:
        """An image of :meth:`read` through the rest of the test pipeline.

        Raises:
            UnreadableImage: A step fails, as resizing a strip of one pixel can.
        """
        size = image.shape[:2]
        data = dict(img=image, img_id=0, img_path='', img_shape=size, ori_shape=size)
        try:
            return self._steps(data)
        except (cv2.error, ValueError) as error:
            raise UnreadableImage(f'its {size[1]}x{size[0]} pixels do not go through the test pipeline') from error

    @torch.no_grad()
    def __call__(self, prepared: Sequence[dict[str, Any]]) -> list[InstanceData]:
        """Detect in one batch.

        Args:
            prepared (Sequence[dict]): Results of :meth:`prepare`.

        Returns:
            list[InstanceData]: For each image ``bboxes`` (n, 4) as x1, y1, x2, y2 in the image, ``scores`` (n,),
            ``labels`` (n,) and, where the detector has masks, ``masks``: n compressed RLEs. All on the CPU.
        """
        batch = {key: [item[key] for item in prepared] for key in ('inputs', 'data_samples')}
        found = []
        for sample in self.model.test_step(batch):
            if 'pred_instances' not in sample:
                raise UserError(f'{type(self.model).__name__} gives no boxes: detectors and instance segmentors do')
            got = sample.pred_instances.cpu()
            instances = InstanceData(bboxes=got.bboxes, scores=got.scores, labels=got.labels)
            if 'masks' in got:  # RLEs from here on: a hundred masks of a large photograph are a gigabyte
                masks = got.masks.numpy() if isinstance(got.masks, torch.Tensor) else got.masks
                instances.masks = encode_mask_results(masks)
            found.append(instances)
        return found

    def draw(self, image: np.ndarray, instances: InstanceData, score_thr: float) -> np.ndarray:
        """Draw the detections of at least this score on a copy of the image.

        Args:
            image (ndarray): From :meth:`read` or :meth:`adapt`.
            instances (InstanceData): Its detections.
            score_thr (float): The least score drawn.

        Returns:
            ndarray: BGR, (H, W, 3) of uint8.
        """
        picture = to_bgr(image)
        kept = instances[instances.scores >= score_thr]
        if not len(kept):
            return picture
        if 'masks' in kept:
            kept.masks = mask_utils.decode(kept.masks).transpose(2, 0, 1).astype(bool)
        sample = DetDataSample(pred_instances=kept)
        with warnings.catch_warnings():
            # what reaches over the border is drawn as far as it is inside
            warnings.filterwarnings('ignore', r'Warning: The \w+ is out of bounds')
            self._visualizer.add_datasample('image', picture[..., ::-1], sample, draw_gt=False, pred_score_thr=-1)
        return np.ascontiguousarray(self._visualizer.get_image()[..., ::-1])
