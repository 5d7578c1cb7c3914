"""Speed, memory and size of detectors: what tools/benchmark.py and tools/make_table.py print."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmcv.cnn import fuse_conv_bn
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d
from mmdet.models.backbones.csp_darknet import Focus
from mmdet.structures import DetDataSample
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

from .backbones import ResidualPath, fuse_paths
from .data.guard import guard
from .detector import load_weights
from .launch import UserError, build_dataset, build_model
from .ops.cpp_kan_conv import FLOP_FORMULAS


def build_detector(cfg: Config, checkpoint: str | None = None, device: str = 'cpu') -> nn.Module:
    """The detector of a config in eval mode, from a checkpoint or else from random weights.

    Args:
        cfg (Config): The config.
        checkpoint (str, optional): A checkpoint of it. Defaults to None.
        device (str): Defaults to ``'cpu'``.

    Returns:
        nn.Module: The detector.

    Raises:
        CheckpointError: The checkpoint can not be read without running code of it.
        UserError: It is not there, or not this detector's.
    """
    model = build_model(cfg)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    model.eval()  # not chained: MMDetection's ResNet gives None
    return model.to(device)


def fuse(model: nn.Module) -> nn.Module:
    """Fold batch norms into convolutions, on a CPU those of residual paths too; the model is changed."""
    return fuse_conv_bn(model if next(model.parameters()).is_cuda else fuse_paths(model))


def share_weights(model: nn.Module, plain: nn.Module) -> bool:
    """Give a detector the weights of another that differs in residual paths, and the paths nothing to add.

    So both find the same objects, whose further treatment takes time too.

    Args:
        model (nn.Module): The detector that is changed, in its weights alone.
        plain (nn.Module): The other; its paths, if there are any, are zeroed too.

    Returns:
        bool: False when they differ in more than paths, or a path can not be zeroed: they may find other objects.
    """
    ours, theirs = ({k: v for k, v in m.state_dict().items() if '.rkan.' not in k} for m in (model, plain))
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        return False
    try:
        for path in (module for m in (model, plain) for module in m.modules() if isinstance(module, ResidualPath)):
            path.zero_()
    except ValueError:
        return False
    model.load_state_dict(theirs, strict=False)
    return True


def count_channels(model: nn.Module) -> int:
    """Of the images that a model takes."""
    first = next(module for module in model.modules() if isinstance(module, (nn.Conv2d, Focus)))
    return first.in_channels if isinstance(first, nn.Conv2d) else first.conv.conv.in_channels // 4  # of four pixels


def random_batch(size: tuple[int, int], batch_size: int, channels: int = 3) -> dict[str, list]:
    """A batch of random images of one size ``(height, width)``, as a data loader gives it."""
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0))
    generator = torch.Generator().manual_seed(0)
    return dict(
        inputs=[
            torch.randint(0, 256, (channels, *size), dtype=torch.uint8, generator=generator) for _ in range(batch_size)
        ],
        data_samples=[DetDataSample(metainfo=dict(meta, img_id=i, img_path='')) for i in range(batch_size)],
    )


def dataset_batches(cfg: Config, images: int, batch_size: int) -> list[dict[str, list]]:
    """The first images of the config's test set, through its pipeline; their loading is not timed."""
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    dataset = build_dataset(cfg.test_dataloader.dataset)
    if not len(dataset):
        raise UserError('the test set holds no image')
    guard(dataset)
    items = [dataset[i % len(dataset)] for i in range(images)]
    return [
        {key: [item[key] for item in items[i : i + batch_size]] for key in ('inputs', 'data_samples')}
        for i in range(0, images - batch_size + 1, batch_size)
    ]


def count_detections(samples: Any) -> float | None:
    """Detections an image in what :func:`predict` gave; None of a model that finds no instances."""
    found = [len(sample.pred_instances) for sample in samples if 'pred_instances' in sample]
    return sum(found) / len(found) if found else None


def predict(model: nn.Module, batch: dict[str, list]) -> Any:
    """One prediction, from the images on the host to the results."""
    with torch.no_grad():
        return model.test_step(batch)


def random_annotated_batch(model: nn.Module, size: tuple[int, int], batch_size: int) -> dict[str, list]:
    """As :func:`random_batch`, with ten random boxes and masks an image; a detector takes what it needs."""
    classes = max(m.num_classes for m in model.modules() if hasattr(m, 'num_classes'))  # an RPN has 1
    shapes = [[count_channels(model), *size]] * batch_size
    batch = demo_mm_inputs(batch_size, shapes, num_items=[10] * batch_size, with_mask=True)
    for sample in batch['data_samples']:  # its own labels leave the first class out, which may be the only one
        sample.gt_instances.labels = torch.arange(10) % classes
    return batch


def train_step(model: nn.Module, batch: dict[str, list]) -> None:
    """Loss and gradients of one batch; the gradients are dropped again."""
    losses = model(**model.data_preprocessor(batch, training=True), mode='loss')
    model.parse_losses(losses)[0].backward()
    model.zero_grad(set_to_none=True)


def train_backbone(backbone: nn.Module, inputs: torch.Tensor) -> None:
    """As :func:`train_step`, of the backbone alone, with the sum of its features as the loss."""
    trained = [features.sum() for features in backbone(inputs) if features.requires_grad]
    if not trained:
        raise UserError('nothing of the backbone is trained: it is frozen')
    sum(trained).backward()
    backbone.zero_grad(set_to_none=True)


def time_in_turn(
    functions: dict[str, Callable[[int], Any]], rounds: int, warmup: int, cuda: bool = False, tick: Any = None
) -> dict[str, list[float]]:
    """Seconds of each function, called in turn in every round so that drifts of the machine meet all alike.

    Args:
        functions (dict): Name to a function of the number of the round.
        rounds (int): Timed rounds.
        warmup (int): Rounds before them that are not timed.
        cuda (bool): Whether to wait for the GPU around each call. Defaults to False.
        tick (Callable, optional): Called after each round, for progress. Defaults to None.

    Returns:
        dict[str, list[float]]: Name to the seconds of each timed round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(-warmup, rounds):
        for name, function in functions.items():
            if cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            function(max(i, 0))
            if cuda:
                torch.cuda.synchronize()
            if i >= 0:
                seconds[name].append(time.perf_counter() - started)
        if tick is not None:
            tick()
    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The median between the first and third quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method='inclusive'))


def peak_memory(function: Callable[[], Any], cuda: bool) -> int:
    """Bytes of tensors that are live at once while ``function`` runs, above what is there before it."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault('KINETO_LOG_LEVEL', '6')  # its start and stop are said aloud otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == '[memory]']
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns() if hasattr(e, 'start_ns') else e.start_us()):  # torch 2.1
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def _count_gradients(
    grad_shape, x_shape, w_shape, _bias, _stride, _padding, _dilation, transposed, _out, _groups, output_mask, out_shape
) -> int:
    """Each gradient of a convolution takes as many as the convolution; torch's own count overlooks the groups."""
    return sum(output_mask[:2]) * conv_flop_count(x_shape, w_shape, grad_shape, transposed)


def _count_attention(query, key, value, *rest, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _count_attention_gradients(grad, query, key, value, *rest, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def count_multiply_adds(function: Callable[[], Any]) -> int:
    """Multiply-adds of the convolutions, attention and matrix products that ``function`` runs.

    KAN convolutions are counted: each plane of the basis is a depthwise convolution. Deformable convolutions are, as
    plain ones. Elementwise functions (norms, activations, the tanh and the powers of a basis), sampling (RoIAlign,
    deformable attention) and NMS are not.
    """
    aten, deformable = torch.ops.aten, 0
    formulas = {aten.convolution_backward: _count_gradients, **FLOP_FORMULAS}  # older torch registers none
    if hasattr(aten, '_scaled_dot_product_flash_attention_for_cpu'):  # torch has formulas for those of a GPU
        formulas[aten._scaled_dot_product_flash_attention_for_cpu] = _count_attention
        formulas[aten._scaled_dot_product_flash_attention_for_cpu_backward] = _count_attention_gradients

    def count(module: nn.Module, inputs: Any, out: Any) -> None:  # MMCV's own operators pass torch's counter by
        nonlocal deformable
        if isinstance(module, (DeformConv2d, ModulatedDeformConv2d)):
            gradients = out.requires_grad * (inputs[0].requires_grad + module.weight.requires_grad)
            deformable += out.numel() * module.weight[0].numel() * (1 + gradients)

    handle = nn.modules.module.register_module_forward_hook(count)
    try:
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            function()
    finally:
        handle.remove()
    return counter.get_total_flops() // 2 + deformable
