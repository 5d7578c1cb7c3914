"""Detectors and backbones as ONNX files: standard operators, NMS and RoIAlign inside, no plugin.

:mod:`rkan_mmdet.exported` runs, compares and scores what is written.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .deploy import DeployedDetector
from .speed import count_channels

OPSET = 18


def _translations() -> dict[Any, Any]:
    """The two operators of :mod:`rkan_mmdet.deploy` in ONNX's standard ones."""
    from onnxscript import opset18 as op

    def to_nms(boxes, scores, iou_threshold: float, max_output: int):
        selected = op.NonMaxSuppression(
            op.Unsqueeze(boxes, op.Constant(value_ints=[0])),
            op.Unsqueeze(scores, op.Constant(value_ints=[0, 1])),
            op.Constant(value_ints=[max_output]),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[0.0]),
        )  # rows of (batch, class, box)
        return op.Gather(selected, op.Constant(value_int=2), axis=1)

    def to_roi_align(features, boxes, size, scale: float, sampling_ratio: int, aligned: bool):
        batch_indices = op.Expand(op.Constant(value_int=0), op.Shape(boxes, start=0, end=1))
        return op.RoiAlign(
            features,
            boxes,
            batch_indices,
            coordinate_transformation_mode='half_pixel' if aligned else 'output_half_pixel',
            mode='avg',
            output_height=size[0],
            output_width=size[1],
            sampling_ratio=sampling_ratio,
            spatial_scale=scale,
        )

    ops = torch.ops.rkan_mmdet
    return {ops.nms.default: to_nms, ops.roi_align.default: to_roi_align}


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter says that torchvision is missing, which nothing here needs."""
    logger = logging.getLogger('torch.onnx')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)


def _dims(module: nn.Module, multiple: int) -> dict[int, Any]:
    dims = {} if isinstance(module, DeployedDetector) else {0: torch.export.Dim('batch', min=1)}
    for axis, name in ((2, 'height'), (3, 'width')):
        dims[axis] = multiple * torch.export.Dim(name, min=32 // multiple, max=2**15 // multiple)
    return dims


def _export(
    module: nn.Module, size: tuple[int, int], dynamic: bool
) -> tuple[torch.export.ExportedProgram, dict[int, Any] | None, int]:
    """The program, its dynamic dimensions, and what height and width must be a multiple of."""
    module.eval()
    batch, channels = 1, count_channels(module)
    if (
        dynamic
    ):  # torch.export takes a 1 for a constant, of the highest level of a pyramid too: an image of many strides
        batch, size = 1 if isinstance(module, DeployedDetector) else 2, (320, 448)
    device = next(module.parameters()).device
    images = (torch.rand(batch, channels, *size, device=device),)
    with torch.no_grad(), _quiet():
        if not dynamic:
            whole = (torch.tensor(size, device=device),) * isinstance(module, DeployedDetector)
            return torch.export.export(module, images + whole), None, 1
        for multiple in (1, 32):  # necks that double a size rather than ask for the one below take no odd ones
            dims = _dims(module, multiple)
            try:
                program = torch.export.export(
                    module, images, dynamic_shapes=(dims,), prefer_deferred_runtime_asserts_over_guards=True
                )
                return program, dims, multiple
            except torch._dynamo.exc.UserError as error:
                reason = str(error).splitlines()[0]
    raise ValueError(f'{type(module).__name__} can not be exported for any size, only for a fixed one: {reason}')


def export_program(module: nn.Module, size: tuple[int, int], dynamic: bool = False) -> torch.export.ExportedProgram:
    """``torch.export`` of a backbone or a :class:`DeployedDetector`.

    Args:
        module (nn.Module): A backbone, whose input is normalised already, or a :class:`DeployedDetector`.
        size (tuple[int, int]): Height and width of the input; without a meaning where they are dynamic.
        dynamic (bool): Whether height and width may be any from 32 on (multiples of 32 where the model takes no
            others), and a backbone's batch any. Defaults to False.

    Returns:
        torch.export.ExportedProgram: ``program.module()(images)`` gives what the module gives.

    Examples:
        >>> from rkan_mmdet.backbones import RKANResNet
        >>> program = export_program(RKANResNet(18), (64, 96), dynamic=True)
        >>> [tuple(f.shape) for f in program.module()(torch.randn(2, 3, 65, 130))][-1]
        (2, 512, 3, 5)
    """
    return _export(module, size, dynamic)[0]


def write_onnx(
    module: nn.Module, out: str | Path, size: tuple[int, int], dynamic: bool = False, opset: int = OPSET
) -> Path:
    """Write a backbone or a :class:`DeployedDetector` as an ONNX file of standard operators.

    Args:
        module (nn.Module): A backbone, whose input is normalised already, or a :class:`DeployedDetector`.
        out (str or Path): The file; it must not exist. The weights are inside.
        size (tuple[int, int]): Height and width of the input; without a meaning where they are dynamic.
        dynamic (bool): Whether height and width may be any from 32 on (multiples of 32 where the model takes no
            others), and a backbone's batch any. Defaults to False.
        opset (int): Version of ONNX's operators, at least 18. Defaults to 18.

    Returns:
        Path: ``out``. The input is ``images``; a detector of fixed size takes ``image_size`` too, height and width of
        the image that lies in the upper left, and without it all of ``images``. The outputs are ``boxes``, ``scores``,
        ``labels`` (and ``masks``), or ``feature0`` and on.

    Raises:
        FileExistsError: ``out`` exists.
        ValueError: The opset is too old or too new, or the module takes no dynamic sizes.
        RuntimeError: The file holds an operator that is not ONNX's own.

    Examples:
        >>> write_onnx(DeployedDetector(model), 'detector.onnx', (800, 1344))  # doctest: +SKIP
    """
    import onnx

    out = Path(out)
    if out.exists():
        raise FileExistsError(f'{out} exists')
    if opset < OPSET:
        raise ValueError(f'opset must be at least {OPSET}, but got {opset}')
    program, dims, multiple = _export(module, size, dynamic)
    sized = isinstance(module, DeployedDetector) and not dynamic
    if isinstance(module, DeployedDetector):
        names = ['boxes', 'scores', 'labels', 'masks'][: 3 + module.with_mask]
    else:
        names = [f'feature{i}' for i in range(len(program.graph_signature.user_outputs))]
    with _quiet():
        exported = torch.onnx.export(
            program,
            custom_translation_table=_translations(),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=['images', 'image_size'][: 1 + sized],
            output_names=names,
            dynamic_shapes=None if dims is None else (dims,),
        )
    proto = exported.model_proto
    written = next(entry.version for entry in proto.opset_import if entry.domain in ('', 'ai.onnx'))
    if written != opset:
        raise ValueError(f'opset {opset} can not be written: this exporter gives {written}')
    if sized:  # an input that need not be given
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(size, np.int64), 'image_size'))
    onnx.helper.set_model_props(proto, dict(size_multiple=str(multiple)))
    del proto.graph.value_info[:]  # shapes in the exporter's own symbols; runtimes infer them again
    for output in proto.graph.output if isinstance(module, DeployedDetector) else ():
        output.type.tensor_type.shape.dim[0].dim_param = 'detections'
    for node in proto.graph.node:  # the module a node comes from is of use, the exporting machine's paths are not
        kept = [entry for entry in node.metadata_props if entry.key == 'pkg.torch.onnx.name_scopes']
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    foreign = {f'{node.domain}::{node.op_type}' for node in proto.graph.node if node.domain not in ('', 'ai.onnx')}
    if foreign or proto.functions:
        raise RuntimeError(
            f'the graph holds operators that are not of ONNX: {", ".join(sorted(foreign)) or "functions"}'
        )
    onnx.checker.check_model(proto, full_check=True)
    handle, partial = tempfile.mkstemp(prefix=f'.{out.name}-', dir=out.parent)
    try:
        with os.fdopen(handle, 'wb') as file:
            file.write(proto.SerializeToString())
        os.chmod(partial, 0o644)
        os.replace(partial, out)
    except BaseException:
        os.unlink(partial)
        raise
    return out
