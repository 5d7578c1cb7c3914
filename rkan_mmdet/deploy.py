"""Whole detectors as one graph, from pixels to detections: what :mod:`rkan_mmdet.export` writes.

MMDetection's own modules compute everything that is a tensor; what is Python in its post-processing (loops over images,
data-dependent branches, MMCV's compiled NMS and RoIAlign) is written here once more, for one image, in a form that
``torch.export`` can follow.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.ops import RoIAlign, nms, roi_align
from mmdet.models.dense_heads import RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from mmdet.models.roi_heads import BBoxHead, FCNMaskHead, SingleRoIExtractor, StandardRoIHead
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor, nn

SUPPORTED = (
    'one-stage detectors whose head leaves predict_by_feat as it is in BaseDenseHead (RetinaNet, FCOS, ATSS, RTMDet), '
    'and two-stage detectors with RPNHead, StandardRoIHead, SingleRoIExtractor with RoIAlign, BBoxHead (Shared2FC, '
    'ConvFC) and FCNMaskHead (Faster R-CNN, Mask R-CNN)'
)


if 'prefer_deferred_runtime_asserts_over_guards' not in inspect.signature(torch.export.export).parameters:
    raise ImportError(f'rkan_mmdet.deploy needs a torch.export newer than that of torch {torch.__version__}')


# schemas: torch 2.4 reads no annotations that are strings
@torch.library.custom_op(
    'rkan_mmdet::nms',
    mutates_args=(),
    schema='(Tensor boxes, Tensor scores, float iou_threshold, int max_output) -> Tensor',
)
def nms_op(boxes: Tensor, scores: Tensor, iou_threshold: float, max_output: int) -> Tensor:
    """Indices of what is kept, best first; what scores 0 or less never is. ONNX: ``NonMaxSuppression``."""
    valid = (scores > 0).nonzero().squeeze(1)
    if not len(valid):
        return valid
    _, keep = nms(boxes[valid], scores[valid], iou_threshold)
    return valid[keep][:max_output]


@nms_op.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, max_output: int) -> Tensor:
    return scores.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.long)


@torch.library.custom_op(
    'rkan_mmdet::roi_align',
    mutates_args=(),
    schema='(Tensor features, Tensor boxes, int[] size, float scale, int sampling_ratio, bool aligned) -> Tensor',
)
def roi_align_op(
    features: Tensor, boxes: Tensor, size: Sequence[int], scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """(1, C, H, W) and (n, 4) boxes to (n, C, *size). ONNX: ``RoiAlign``."""
    rois = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1)
    return roi_align(features, rois, tuple(size), scale, sampling_ratio, 'avg', aligned)


@roi_align_op.register_fake
def _(features: Tensor, boxes: Tensor, size: Sequence[int], scale: float, sampling_ratio: int, aligned: bool) -> Tensor:
    return features.new_empty(boxes.shape[0], features.shape[1], *size)


def _unchanged(module: nn.Module, base: type, *methods: str) -> bool:
    """Whether a module is of this class and predicts as this class does."""
    return isinstance(module, base) and all(getattr(type(module), m) is getattr(base, m) for m in methods)


def _refuse(module: Any, why: str = 'can not be exported') -> None:
    raise ValueError(f'{type(module).__name__} {why}; supported are {SUPPORTED}')


def _check_head(head: nn.Module, base: type) -> None:
    if not isinstance(head, BaseDenseHead) or not (
        head.predict_by_feat.__func__ is BaseDenseHead.predict_by_feat
        and _unchanged(head, base, '_predict_by_feat_single', '_bbox_post_process')
    ):
        _refuse(head)
    if getattr(head.loss_cls, 'custom_cls_channels', False):
        _refuse(head.loss_cls, 'has class channels of its own, which can not be exported')


def _check_nms(cfg: Any) -> None:
    options = dict(cfg.nms)
    kind = options.pop('type', 'nms')
    unknown = set(options) - {'iou_threshold', 'class_agnostic', 'split_thr'}
    if kind not in ('nms', nms) or unknown:
        raise ValueError(
            f'nms={dict(cfg.nms)} can not be exported: supported are type nms, iou_threshold and class_agnostic'
        )
    if cfg.max_per_img <= 0:
        raise ValueError(f'max_per_img must be at least 1 for an export, but got {cfg.max_per_img}')


def _clip(boxes: Tensor, size: tuple[Any, Any], coder: Any) -> Tensor:
    """As the coders do it, which write into slices and ask for the number of boxes."""
    if not getattr(coder, 'clip_border', True):
        return boxes
    sides = [
        side.clamp(min=0).minimum(limit) if isinstance(limit, Tensor) else side.clamp(0, limit)
        for side, limit in zip(boxes.unbind(-1), (size[1], size[0]) * 2)
    ]
    return torch.stack(sides, -1)


def _candidates(head: nn.Module, cfg: Any, features: Sequence[Tensor], size: tuple[Any, Any]) -> tuple[Tensor, ...]:
    """Boxes, scores and groups for NMS of a dense head: BaseDenseHead's and RPNHead's ``_predict_by_feat_single``.

    What BaseDenseHead drops gets the score -1. The groups are labels, in an RPN levels.
    """
    outs = head(features)
    factors = outs[2] if len(outs) > 2 else [None] * len(outs[0])
    shapes = [score.shape[-2:] for score in outs[0]]
    priors = head.prior_generator.grid_priors(shapes, dtype=outs[0][0].dtype, device=outs[0][0].device)
    rpn, limit = isinstance(head, RPNHead), cfg.get('nms_pre', -1)
    parts = []
    for level, (score, box, factor, prior) in enumerate(zip(outs[0], outs[1], factors, priors)):
        score = score.permute(0, 2, 3, 1).reshape(-1, head.cls_out_channels)
        box = box.permute(0, 2, 3, 1).reshape(-1, head.bbox_coder.encode_size)
        score = score.sigmoid() if head.use_sigmoid_cls else score.softmax(-1)[:, :-1]
        classes, flat = score.shape[1], score.flatten()
        if not rpn:
            flat = torch.where(flat > cfg.get('score_thr', 0), flat, -1)
        top, index = flat.topk(torch.sym_min(limit, flat.shape[0]) if limit > 0 else flat.shape[0])
        anchor = index // classes if classes > 1 else index
        group = torch.full_like(index, level) if rpn else index % classes
        if factor is not None:
            top = torch.where(top > 0, top * factor.permute(0, 2, 3, 1).flatten().sigmoid()[anchor], top)
        parts.append((get_box_tensor(prior)[anchor], box[anchor], top, group))
    priors, deltas, scores, groups = (torch.cat(column) for column in zip(*parts))
    boxes = _clip(get_box_tensor(head.bbox_coder.decode(priors, deltas)), size, head.bbox_coder)
    smallest = cfg.get('min_bbox_size', -1)
    if smallest >= 0:
        sides = boxes[:, 2:] - boxes[:, :2]
        scores = torch.where((sides > smallest).all(1), scores, -1)
    return boxes, scores, groups


def _batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, cfg: Any) -> Tensor:
    """Indices of what is kept, best first: MMCV's ``batched_nms``, which moves each group to a place of its own."""
    if not cfg.nms.get('class_agnostic', False):
        largest = torch.where(scores[:, None] > 0, boxes, 0).max()
        boxes = boxes + (groups * (largest + 1))[:, None]
    return torch.ops.rkan_mmdet.nms(boxes, scores, cfg.nms.iou_threshold, cfg.max_per_img)


def _pool(extractor: SingleRoIExtractor, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """SingleRoIExtractor without indices of unknown number.

    Every level sees all boxes, those of other levels shrunk to a point: it costs next to nothing there, and no level is
    ever without boxes.
    """
    levels = extractor.map_roi_levels(torch.cat([boxes[:, :1], boxes], 1), len(extractor.roi_layers))
    pooled = None
    for level, (layer, feature) in enumerate(zip(extractor.roi_layers, features)):
        own = (levels == level)[:, None]
        found = torch.ops.rkan_mmdet.roi_align(
            feature,
            torch.where(own, boxes, 0),
            list(layer.output_size),
            layer.spatial_scale,
            layer.sampling_ratio,
            layer.aligned,
        )
        pooled = found if pooled is None else torch.where(own[..., None, None], found, pooled)
    return pooled


class DeployedDetector(nn.Module):
    """A detector of MMDetection for one image, from pixels to detections, as ``torch.export`` can take it.

    Args:
        model (nn.Module): The detector; its weights are shared, not copied.

    Raises:
        ValueError: The detector has a part that can not be exported; the message names it and what is supported.

    Examples:
        >>> deployed = DeployedDetector(model)  # doctest: +SKIP
        >>> boxes, scores, labels = deployed(torch.rand(1, 3, 480, 640) * 255)  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if _unchanged(model, TwoStageDetector, 'predict', 'extract_feat'):
            self._check_two_stages(model)
        elif _unchanged(model, SingleStageDetector, 'predict', 'extract_feat'):
            _check_head(model.bbox_head, BaseDenseHead)
            _check_nms(model.test_cfg)
        else:
            _refuse(model)
        self.model = model.eval() or model  # MMDetection's ResNet gives None
        self.with_mask = isinstance(model, TwoStageDetector) and model.roi_head.with_mask

    @staticmethod
    def _check_two_stages(model: nn.Module) -> None:
        _check_head(model.rpn_head, RPNHead)
        _check_nms(model.test_cfg.rpn)
        roi_head = model.roi_head
        steps = ('predict', 'predict_bbox', 'predict_mask', '_bbox_forward', '_mask_forward')
        if not _unchanged(roi_head, StandardRoIHead, *steps) or roi_head.with_shared_head:
            _refuse(roi_head)
        _check_nms(model.test_cfg.rcnn)
        head = roi_head.bbox_head
        if not _unchanged(head, BBoxHead, '_predict_by_feat_single') or not head.with_reg or head.custom_cls_channels:
            _refuse(head)
        extractors = [roi_head.bbox_roi_extractor]
        if roi_head.with_mask:
            if not _unchanged(roi_head.mask_head, FCNMaskHead, '_predict_by_feat_single'):
                _refuse(roi_head.mask_head)
            extractors.append(roi_head.mask_roi_extractor)
        for extractor in extractors:
            if not _unchanged(extractor, SingleRoIExtractor, 'forward', 'map_roi_levels'):
                _refuse(extractor)
            for layer in extractor.roi_layers:
                if not isinstance(layer, RoIAlign) or layer.pool_mode != 'avg':
                    _refuse(layer)

    def preprocess(self, images: Tensor, size: tuple[Any, Any]) -> Tensor:
        """What the detector's data preprocessor does: channels in its order, mean and deviation, padding."""
        pre = self.model.data_preprocessor
        if pre._channel_conversion:
            images = images.flip(1)
        if pre._enable_normalize:
            images = (images - pre.mean) / pre.std
        height, width = images.shape[2:]
        if isinstance(size[0], Tensor):
            rows = torch.arange(height, device=images.device)[:, None] < size[0]
            images = torch.where(rows & (torch.arange(width, device=images.device) < size[1]), images, pre.pad_value)
        divisor = pre.pad_size_divisor
        if divisor > 1:
            images = F.pad(images, (0, -width % divisor, 0, -height % divisor), value=pre.pad_value)
        return images

    def forward(self, images: Tensor, image_size: Tensor | None = None) -> tuple[Tensor, ...]:
        """Detect.

        Args:
            images (Tensor[1, 3, H, W]): One image as the test pipeline packs it: resized, float, 0 to 255, BGR
                where the pipeline reads BGR. Normalising and padding are inside.
            image_size (Tensor[2], optional): Height and width of the image, which lies in the upper left of
                ``images``; whatever else is there counts as padding. Defaults to all of it.

        Returns:
            tuple[Tensor]: Boxes (K, 4) as x1, y1, x2, y2 in pixels of the input, scores (K,), best first, labels (K,),
            and with a mask head masks (K, S, S), the probability of each cell of the box.
        """
        size = tuple(images.shape[2:]) if image_size is None else image_size.unbind()
        features = self.model.extract_feat(self.preprocess(images, size))
        if not isinstance(self.model, TwoStageDetector):
            boxes, scores, labels = _candidates(self.model.bbox_head, self.model.test_cfg, features, size)
            keep = _batched_nms(boxes, scores, labels, self.model.test_cfg)
            return boxes[keep], scores[keep], labels[keep]
        cfg = self.model.test_cfg.rpn
        boxes, scores, levels = _candidates(self.model.rpn_head, cfg, features, size)
        boxes = boxes[_batched_nms(boxes, scores, levels, cfg)]
        boxes, scores, labels = self._classify(features, boxes, size)
        if not self.with_mask:
            return boxes, scores, labels
        return boxes, scores, labels, self._mask(features, boxes, labels)

    def _classify(self, features: Sequence[Tensor], rois: Tensor, size: tuple[Any, Any]) -> tuple[Tensor, ...]:
        """BBoxHead's ``_predict_by_feat_single`` with ``multiclass_nms``."""
        head, cfg = self.model.roi_head.bbox_head, self.model.test_cfg.rcnn
        torch._check(rois.shape[0] > 0)  # an RPN keeps its best box at least; the coder asks
        score, deltas = head(_pool(self.model.roi_head.bbox_roi_extractor, features, rois))
        scores = score.softmax(-1)[:, :-1]
        classes = scores.shape[1]
        boxes = 1 if head.reg_class_agnostic else classes
        rois = rois[:, None].expand(-1, boxes, -1).reshape(-1, 4)
        decoded = _clip(
            get_box_tensor(head.bbox_coder.decode(rois, deltas.reshape(-1, head.bbox_coder.encode_size))),
            size,
            head.bbox_coder,
        )
        decoded = decoded.reshape(-1, boxes, 4).expand(-1, classes, -1).reshape(-1, 4)
        labels = torch.arange(classes, device=scores.device).expand(scores.shape[0], -1).flatten()
        scores = scores.flatten()
        scores = torch.where(scores > cfg.score_thr, scores, -1)
        keep = _batched_nms(decoded, scores, labels, cfg)
        return decoded[keep], scores[keep], labels[keep]

    def _mask(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        head = self.model.roi_head.mask_head
        masks = head(_pool(self.model.roi_head.mask_roi_extractor, features, boxes)).sigmoid()
        if head.class_agnostic:
            return masks[:, 0]
        return masks.gather(1, labels[:, None, None, None].expand(-1, 1, *masks.shape[2:]))[:, 0]
