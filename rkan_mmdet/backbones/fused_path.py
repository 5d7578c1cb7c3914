"""The residual path as it is deployed: batch norms folded into their neighbours, kernels computed once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rkan_mmdet.ops import KANConv2d, can_run
from rkan_mmdet.ops.eager import (
    Spec,
    depthwise,
    expand,
    fold,
    is_compiling,
    is_exporting,
    join,
    sum_planes,
    without_autocast,
)

from .residual_path import ResidualPath


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of a batch norm in eval mode."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale.detach(), (shift if norm.bias is None else shift + norm.bias).detach()


class FusedKANConv2d(nn.Module):
    """A KAN convolution with precomputed kernels, its outputs scaled and shifted by channel.

    Args:
        conv (KANConv2d): With a basis that is evaluated once a pixel.
        scale (Tensor[K*C], optional): Multiplied into the outputs. Defaults to None.
        shift (Tensor[K*C], optional): Added to the outputs. Defaults to None.
    """

    def __init__(self, conv: KANConv2d, scale: Tensor | None = None, shift: Tensor | None = None) -> None:
        super().__init__()
        self.backend = conv.backend
        self.spec = Spec(conv.basis, conv.stride, conv.padding, conv.dilation)
        with torch.no_grad():
            weight = conv.basis_weight
            if conv.basis_scale is not None and weight is not None:
                weight = weight * conv.basis_scale[..., None]
            functions, constant = fold(weight, conv.linear_bias, conv.kernel_size, conv.basis)
            linear = conv.linear_weight.reshape(-1, *conv.kernel_size)
            weights = expand(join(linear, functions), conv.in_channels)
            bias = weights.new_zeros(conv.num_kernels, conv.in_channels)
            if constant is not None:
                bias += constant[:, None]
            if scale is not None:
                weights *= scale.view(1, *bias.shape, 1, 1, 1)
                bias *= scale.view(bias.shape)
            if shift is not None:
                bias += shift.view(bias.shape)
        self.weight = nn.Parameter(weights, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``Tensor[N, C, H, W]`` to ``Tensor[N, K*C, H', W']``; half precision is computed in fp32."""
        dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        with without_autocast(x.device.type):
            cpp = self.backend in ('auto', 'cpp') and not can_run('cpp', basis=self.spec.basis, x=x)
            plain = is_exporting() or (is_compiling() and not cpp)
            if plain or (torch.is_grad_enabled() and x.requires_grad):
                return depthwise(x, weight, bias, self.spec).to(x.dtype)
            with torch.no_grad():
                return sum_planes(x, weight, bias, self.spec, cpp)


class _Affine(nn.Module):
    """``scale * x + shift`` by channel: a batch norm in eval mode, where no linear neighbour can take it."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale[:, None, None].clone(), requires_grad=False)
        self.shift = nn.Parameter(shift[:, None, None].clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale).to(x.dtype)


def _fold_into_conv(conv: nn.Conv2d, norm_in: nn.Module | None, norm_out: nn.Module | None) -> nn.Conv2d:
    """A convolution with the batch norm before it (then it must be 1x1) or after it."""
    with torch.no_grad():
        weight = conv.weight.clone()
        bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.clone()
        if norm_in is not None:
            scale, shift = _affine(norm_in)
            bias += (weight[:, :, 0, 0] * shift).sum(1)
            weight *= scale[:, None, None]
        if norm_out is not None:
            scale, shift = _affine(norm_out)
            weight *= scale[:, None, None, None]
            bias = bias * scale + shift
    options = dict(stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups)
    fused = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, **options)
    fused.weight = nn.Parameter(weight, requires_grad=False)
    fused.bias = nn.Parameter(bias, requires_grad=False)
    return fused


class FusedResidualPath(nn.Module):
    """A :class:`ResidualPath` in eval mode without its batch norms; the same function up to rounding.

    Args:
        path (ResidualPath): Its norms are batch norms.
    """

    def __init__(self, path: ResidualPath) -> None:
        super().__init__()
        self.conv_reduce, self.act, self.aggregation = path.conv_reduce, path.act, path.aggregation
        self.kan_conv1 = self._fuse(path.kan_conv1)
        self.conv_expand = _fold_into_conv(path.conv_expand, path.norm1, None)
        if path.kan_conv2 is None:
            self.last: nn.Module = _Affine(*_affine(path.norm2))
        else:
            self.last = self._fuse(path.kan_conv2, path.norm2)
        self.shortcut = path.shortcut
        if path.shortcut is not None and not isinstance(path.shortcut[1], nn.Identity):  # MMCV was first
            self.shortcut = _fold_into_conv(path.shortcut[0], None, path.shortcut[1])

    @staticmethod
    def _fuse(conv: nn.Module, norm: nn.Module | None = None) -> nn.Module:
        # over windows nothing is computed once a pixel
        if isinstance(conv, KANConv2d) and conv.normalization == 'tanh':
            return FusedKANConv2d(conv, *(() if norm is None else _affine(norm)))
        if norm is None:
            return conv
        if type(conv) is nn.Conv2d and conv.padding_mode == 'zeros':
            return _fold_into_conv(conv, None, norm)
        return nn.Sequential(conv, _Affine(*_affine(norm)))

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`ResidualPath.forward`."""
        r = self.act(self.conv_expand(self.kan_conv1(self.act(self.conv_reduce(x)))))
        r = self.last(r)
        return r if self.shortcut is None else r + self.shortcut(x)

    def aggregate(self, features: Tensor, residual: Tensor) -> Tensor:
        """As :meth:`ResidualPath.aggregate`."""
        return self.aggregation(features, residual)


def fuse_paths(model: nn.Module) -> nn.Module:
    """Replace the residual paths of a model by their deployed form, in place.

    For inference on a CPU and for export; a GPU's fused kernel for KAN convolutions is not used by it. Paths with other
    norms than batch norms stay as they are. MMCV's ``fuse_conv_bn`` may come before or after.

    Args:
        model (nn.Module): In eval mode.

    Returns:
        nn.Module: The model. Its state dict has other keys, and fits a model of the same config that was fused.

    Raises:
        ValueError: The model, or a path of it, is in training mode.

    Examples:
        >>> from rkan_mmdet.backbones import RKANResNet
        >>> model = RKANResNet(18, base_channels=8)
        >>> _ = model.eval()  # MMDetection's gives None
        >>> x = torch.randn(1, 3, 64, 64)
        >>> before = model(x)[3]
        >>> torch.allclose(fuse_paths(model)(x)[3], before, atol=1e-5)
        True
    """
    if any(module.training for module in model.modules() if module is model or isinstance(module, ResidualPath)):
        raise ValueError('model must be in eval mode, since its batch norms are folded, but is in training mode')
    for module in list(model.modules()):
        path = getattr(module, 'rkan', None)
        if isinstance(path, ResidualPath):
            norms = [path.norm1, path.norm2, *([] if path.shortcut is None else [path.shortcut[1]])]
            if all(isinstance(norm, nn.Identity) or getattr(norm, 'running_var', None) is not None for norm in norms):
                module.rkan = FusedResidualPath(path).eval()
    return model
