"""Exported files at work: run by ONNX Runtime in the place of their detector, compared with it, scored, quantized."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import Tensor, nn

from .launch import UserError


def open_session(file: str | Path, threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU; ``threads=0`` leaves their number to ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or int(os.environ.get('OMP_NUM_THREADS', 0))
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])


def postprocess(
    outputs: Sequence[np.ndarray],
    ori_shape: tuple[int, int],
    scale_factor: tuple[float, float] = (1.0, 1.0),
    mask_thr_binary: float = 0.5,
) -> InstanceData:
    """What is left to the host: boxes in pixels of the original image, and masks pasted into it.

    Args:
        outputs (Sequence[ndarray]): Of an exported detector: boxes (K, 4), scores (K,), labels (K,) and, where it has
            them, masks (K, S, S).
        ori_shape (tuple[int, int]): Height and width of the original image.
        scale_factor (tuple[float, float]): Width and height of the input by those of the original image.
            Defaults to (1, 1).
        mask_thr_binary (float): A pixel belongs to a mask from this probability on. Defaults to 0.5.

    Returns:
        InstanceData: ``bboxes`` (K, 4), ``scores`` (K,), ``labels`` (K,) and ``masks`` (K, H, W) of bool.

    Examples:
        >>> boxes, scores = np.array([[2, 2, 6, 6]], np.float32), np.array([0.9], np.float32)
        >>> found = postprocess([boxes, scores, np.array([3]), np.ones((1, 28, 28), np.float32)], (8, 10), (2.0, 2.0))
        >>> found.bboxes.tolist(), tuple(found.masks.shape), int(found.masks.sum())
        ([[1.0, 1.0, 3.0, 3.0]], (1, 8, 10), 4)
    """
    boxes, scores, labels = (torch.as_tensor(output) for output in outputs[:3])
    found = InstanceData(bboxes=boxes / boxes.new_tensor(scale_factor).repeat(2), scores=scores, labels=labels)
    if len(outputs) > 3:
        height, width = ori_shape[:2]
        masks = torch.zeros((len(boxes), height, width), dtype=torch.bool)
        for mask, probabilities, box in zip(masks, torch.as_tensor(outputs[3]), found.bboxes):
            pasted, window = _do_paste_mask(probabilities[None, None], box[None], height, width, skip_empty=True)
            mask[window] = pasted[0] >= mask_thr_binary
        found.masks = masks
    return found


class ExportedDetector(BaseModel):
    """An exported file in the place of its detector: ``test_step`` takes batches and gives data samples alike.

    Args:
        file (str or Path): The ONNX file.
        mask_thr_binary (float): See :func:`postprocess`. Defaults to 0.5.

    Attributes:
        size (tuple[int, int] or None): Height and width of the input, where they are fixed.
        size_multiple (int): What height and width must be a multiple of, where the file takes more than one size.

    Examples:
        >>> model = ExportedDetector('detector.onnx')  # doctest: +SKIP
        >>> model.test_step(batch)[0].pred_instances.scores  # doctest: +SKIP
    """

    def __init__(self, file: str | Path, mask_thr_binary: float = 0.5) -> None:
        super().__init__()
        self.session = open_session(file)
        self.mask_thr_binary = mask_thr_binary
        height, width = self.session.get_inputs()[0].shape[2:]
        self.size = (height, width) if isinstance(height, int) else None
        self.with_masks = len(self.session.get_outputs()) > 3
        self.size_multiple = int(self.session.get_modelmeta().custom_metadata_map.get('size_multiple', 1))

    def forward(self, inputs: Iterable[Tensor], data_samples: list, mode: str = 'predict') -> list:
        """``inputs`` are images (3, H, W) as the test pipeline packs them."""
        for image, sample in zip(inputs, data_samples):
            check_fits(sample, self.size)
            feeds = {'images': pad_to(image[None].float(), self.size).numpy()}
            if self.size is not None:
                feeds['image_size'] = np.array(image.shape[1:], np.int64)
            outputs = self.session.run(None, feeds)
            sample.pred_instances = postprocess(outputs, sample.ori_shape, sample.scale_factor, self.mask_thr_binary)
        return data_samples


class Difference(NamedTuple):
    """How far the detections of an exported file are from its detector's.

    Attributes:
        detections (int): Detections of the detector that were looked for.
        missing (int): Those without a counterpart of the same label within a pixel and 0.01 of score, and those that
            the file alone has: where two scores or overlaps are equal but for rounding, either may win.
        box (float): Largest difference of a coordinate, in pixels of the original image.
        score (float): Largest difference of a score.
        mask (float): Largest share of a mask's pixels (of the union of both) that differ.
    """

    detections: int = 0
    missing: int = 0
    box: float = 0.0
    score: float = 0.0
    mask: float = 0.0

    @property
    def few_missing(self) -> bool:
        """Whether those may be near ties, which draw others after them; most are found again in any case."""
        return self.missing <= min(4 + 0.05 * self.detections, self.detections // 2)

    def join(self, other: Difference) -> Difference:
        """The difference over both."""
        return Difference(self[0] + other[0], self[1] + other[1], *map(max, self[2:], other[2:]))


def compare(expected: InstanceData, actual: InstanceData) -> Difference:
    """Compare detection by detection.

    Examples:
        >>> a = InstanceData(bboxes=torch.tensor([[0.0, 0, 5, 5]]), scores=torch.ones(1), labels=torch.zeros(1))
        >>> b = InstanceData(bboxes=torch.tensor([[0.0, 0, 5, 5.5]]), scores=torch.ones(1), labels=torch.zeros(1))
        >>> compare(a, b)
        Difference(detections=1, missing=0, box=0.5, score=0.0, mask=0.0)
    """
    result = Difference(len(expected), len(expected) + len(actual))
    boxes = (expected.bboxes[:, None] - actual.bboxes[None]).abs().amax(-1)
    scores = (expected.scores[:, None] - actual.scores[None]).abs()
    fits = (expected.labels[:, None] == actual.labels[None]) & (boxes < 1) & (scores < 0.01)
    free = torch.ones(len(actual), dtype=torch.bool)
    for i in range(len(expected)):
        j = int(torch.where(fits[i] & free, boxes[i], torch.inf).argmin()) if len(actual) else 0
        if not len(actual) or not fits[i, j] or not free[j]:
            continue
        free[j] = False
        mask = 0.0
        if 'masks' in expected:
            a, b = expected.masks[i], actual.masks[j]
            mask = float((a ^ b).sum() / (a | b).sum().clamp(min=1))
        result = result.join(Difference(0, -2, float(boxes[i, j]), float(scores[i, j]), mask))
    return result


def _test_pipeline(cfg: Config) -> list:
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset or 'datasets' in dataset:
        dataset = dataset['dataset'] if 'dataset' in dataset else dataset['datasets'][0]
    return dataset.get('pipeline') or []


def pipeline_size(cfg: Config) -> tuple[int, int]:
    """Height and width that the test pipeline resizes to, made a multiple of what the preprocessor pads to.

    Raises:
        UserError: The pipeline names no size.
    """
    divisor = (cfg.model.get('data_preprocessor') or {}).get('pad_size_divisor', 1)
    for step in _test_pipeline(cfg):
        scale = step.get('scale')
        if 'Resize' in str(step.get('type')) and isinstance(scale, (tuple, list)) and len(scale) == 2:
            width, height = (-(-int(side) // divisor) * divisor for side in scale)
            return height, width
    raise UserError(
        "the config's test pipeline names no scale (width, height): name the size of the input by --size H W"
    )


def load_test_set(cfg: Config) -> Any:
    """The test set of a config, image by image."""
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    return Runner.build_dataloader(dict(cfg.test_dataloader, batch_size=1))


def check_fits(sample: Any, size: tuple[int, int] | None) -> None:
    """Refuse an image that is larger than a file of this size takes.

    Raises:
        UserError: The image of the data sample is larger.
    """
    if size is not None and any(side > most for side, most in zip(sample.img_shape, size)):
        height, width = sample.img_shape[:2]
        raise UserError(
            f'{sample.img_path} is {height}x{width} after the test pipeline and does not fit a file of '
            f'{size[0]}x{size[1]}: export with --dynamic, or with a larger --size'
        )


def pad_to(images: Tensor, size: tuple[int, int] | None, value: float = 0) -> Tensor:
    """Images (.., H, W) padded (or cut of their padding) on the right and below to a file's size; None leaves them."""
    if size is None:
        return images
    return F.pad(images, (0, size[1] - images.shape[-1], 0, size[0] - images.shape[-2]), value=value)


class PaddedDetector(BaseModel):
    """A detector that sees every image in the upper left of one size, as a file of fixed size does."""

    def __init__(self, model: nn.Module, size: tuple[int, int] | None) -> None:
        super().__init__(data_preprocessor=model.data_preprocessor)
        self.model, self.size = model, size

    def forward(self, inputs: Tensor, data_samples: list, mode: str = 'predict') -> list:
        inputs = pad_to(inputs, self.size, self.data_preprocessor.pad_value)
        return self.model(inputs, data_samples, mode=mode)


def evaluate(
    models: dict[str, nn.Module], cfg: Config, batches: Iterable[dict[str, list]], metainfo: dict[str, Any]
) -> tuple[dict[str, dict[str, float]], Difference]:
    """Run two models over a test set; score both by the config's evaluator and compare their detections.

    Args:
        models (dict[str, nn.Module]): Two names with their models; the first is the detector.
        cfg (Config): Its ``test_evaluator`` scores.
        batches (Iterable[dict]): The test set.
        metainfo (dict): Of the data set that they come from.

    Returns:
        tuple: For each name its metrics (``coco/bbox_mAP`` ..), and the difference over all images.
    """
    evaluators = {name: Evaluator(cfg.test_evaluator) for name in models}
    for evaluator in evaluators.values():
        evaluator.dataset_meta = metainfo
    difference, count = Difference(), 0
    for batch in batches:
        count += 1
        found = []
        for name, model in models.items():
            with torch.no_grad():
                samples = [sample.cpu() for sample in model.test_step(batch)]
            found.append(samples[0].pred_instances.clone())
            evaluators[name].process(data_samples=samples, data_batch=batch)
        difference = difference.join(compare(*found))
    return {name: evaluator.evaluate(count) for name, evaluator in evaluators.items()}, difference


def quantize(file: str | Path, out: str | Path, inputs: Iterable[Tensor], exclude_paths: bool = True) -> Path:
    """Quantize an exported backbone to INT8: ONNX Runtime's static quantization, QDQ, a scale a channel of weights.

    Weights take 7 of the 8 bits, so that the file gives the same on every CPU.

    Args:
        file (str or Path): The backbone in floating point.
        out (str or Path): The file to write.
        inputs (Iterable[Tensor]): Normalised images (1, 3, H, W) that say which ranges occur.
        exclude_paths (bool): Whether the residual paths stay in floating point: they are small, and their powers of
            tanh lose most. Defaults to True.

    Returns:
        Path: ``out``.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.inputs = iter(inputs)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.inputs, None)
            return None if image is None else {'images': image.numpy()}

    model = onnx.load(file)
    paths = [n.name for n in model.graph.node if any('.rkan' in entry.value for entry in n.metadata_props)]
    quantize_static(
        model,
        str(out),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        # weights of 7 bits: CPUs without VNNI add products of 8 bits up in 16, which overflows unseen
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=paths if exclude_paths else None,
    )
    return Path(out)


class FeatureError(NamedTuple):
    """Of one output of a backbone: norm of the difference by norm, and cosine, over all images."""

    relative: float
    cosine: float


def feature_errors(backbone: nn.Module, file: str | Path, inputs: Iterable[Tensor]) -> list[FeatureError]:
    """How far the outputs of an exported backbone are from the backbone's.

    Args:
        backbone (nn.Module): In eval mode.
        file (str or Path): What was exported, quantized or not.
        inputs (Iterable[Tensor]): Normalised images (1, 3, H, W).

    Returns:
        list[FeatureError]: One a level.
    """
    session, sums = open_session(file), None
    for image in inputs:
        with torch.no_grad():
            expected = backbone(image)
        expected = [expected] if isinstance(expected, Tensor) else expected
        rows = []
        for a, b in zip(expected, session.run(None, {'images': image.numpy()})):
            a, b = a.double(), torch.from_numpy(b).double()
            if a.shape != b.shape:
                raise RuntimeError(f'the file gives a feature of {tuple(b.shape)} for {tuple(a.shape)}')
            rows.append(torch.stack([(a - b).square().sum(), a.square().sum(), b.square().sum(), (a * b).sum()]))
        sums = torch.stack(rows) if sums is None else sums + torch.stack(rows)
    return [FeatureError(float((d / aa).sqrt()), float(ab / (aa * bb).sqrt())) for d, aa, bb, ab in sums]
