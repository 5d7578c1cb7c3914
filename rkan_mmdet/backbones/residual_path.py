"""The residual path beside one stage, and the three ways it joins the stage's output."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.checkpoint
from mmcv.cnn import build_conv_layer, build_norm_layer
from mmengine.model import BaseModule
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn

from rkan_mmdet.checks import check_bool, check_choice, check_float, check_int
from rkan_mmdet.ops import KANConv2d


class Addition(nn.Module):
    """``F + r`` (the default)."""

    def forward(self, features: Tensor, residual: Tensor) -> Tensor:
        """Both ``Tensor[N, C, H, W]``; so is the result."""
        return features + residual


class Gating(nn.Module):
    """``g * F + (1 - g) * r`` with ``g = sigmoid(Conv1x1(r))``.

    Args:
        channels (int): Channels of the stage's output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, features: Tensor, residual: Tensor) -> Tensor:
        """Both ``Tensor[N, C, H, W]``; so is the result."""
        residual = residual.to(features.dtype)  # under autocast some norms give another; lerp takes one
        return torch.lerp(residual, features, self.conv(residual).sigmoid().to(features.dtype))


class SqueezeExcitation(nn.Module):
    """``F + r * w`` with ``w = sigmoid(Conv(relu(Conv(avgpool(r)))))``, a weight a channel.

    Args:
        channels (int): Channels of the stage's output.
        ratio (int): Divisor of the channels between the two convolutions. Defaults to 16.
        bias (bool): Whether the two have a bias: so in the authors' RKANeXt, not in their RKANet. Defaults to False.
    """

    def __init__(self, channels: int, ratio: int = 16, bias: bool = False) -> None:
        super().__init__()
        check_int('ratio', ratio, 1)
        check_bool('bias', bias)
        if ratio > channels:
            raise ValueError(f'ratio of the se aggregation must be at most the {channels} channels, but got {ratio}')
        self.conv1 = nn.Conv2d(channels, channels // ratio, 1, bias=bias)
        self.conv2 = nn.Conv2d(channels // ratio, channels, 1, bias=bias)

    def forward(self, features: Tensor, residual: Tensor) -> Tensor:
        """Both ``Tensor[N, C, H, W]``; so is the result."""
        weight = residual.mean((2, 3), keepdim=True)
        weight = self.conv2(self.conv1(weight).relu()).sigmoid()
        return features + residual * weight


AGGREGATIONS = dict(addition=Addition, gating=Gating, se=SqueezeExcitation)


def _build_aggregation(cfg: str | dict[str, Any], channels: int) -> nn.Module:
    if isinstance(cfg, str):
        cfg = dict(type=cfg)
    if not isinstance(cfg, dict) or 'type' not in cfg:
        raise TypeError(f"aggregation must be a name or a dict such as dict(type='se', bias=True), but got {cfg!r}")
    options = dict(cfg)
    name = check_choice('aggregation', options.pop('type'), tuple(AGGREGATIONS))
    allowed = ('ratio', 'bias') if name == 'se' else ()
    for option in options:
        if option not in allowed:
            raise TypeError(f'aggregation {name!r} has no option {option!r}; it takes {", ".join(allowed) or "none"}')
    return Addition() if name == 'addition' else AGGREGATIONS[name](channels, **options)


def _basis_of(basis: Any, which: int) -> Any:
    """The settings of the first (0) or second (1) KAN convolution: each option that is a pair gives one of its two."""
    if not isinstance(basis, dict):
        return basis
    out = {}
    for name, value in basis.items():
        if isinstance(value, (tuple, list)):
            if len(value) != 2:
                raise ValueError(
                    f'basis[{name!r}] must be one value or a pair for the first and second KAN convolution, '
                    f'but got {value!r}'
                )
            value = value[which]
        out[name] = value
    return out


class ResidualPath(BaseModule):
    """The residual path of one stage, from the stage's input to the stage's output.

    ``SiLU(Conv1x1) -> norm(KANConv3x3, stride) -> SiLU(Conv1x1) -> [KANConv3x3, last stage only] -> norm``, plus
    ``norm(Conv1x1(x))`` with ``shortcut``. Source: arXiv 2410.05500, section 3.2; the authors' ``RKANet``.

    Args:
        in_channels (int): Channels of the stage's input.
        out_channels (int): Channels of the stage's output.
        stride (int): Stride of the whole stage. Defaults to 1.
        is_last (bool): Whether this is the last stage, which has a second KAN convolution. Defaults to False.
        reduce_factor (int): The path has ``in_channels // reduce_factor`` channels inside. Defaults to 2.
        expand_factor (int, optional): The path has ``in_channels * expand_factor`` channels instead (the authors'
            "L" models). Defaults to None.
        num_kernels (int): Kernels of the first KAN convolution. Defaults to 1.
        basis (dict): The functions; any option may be a pair, for the first and the second KAN convolution.
            Defaults to ``dict(type='Chebyshev', degree=(3, 2))``.
        normalization (str): See :func:`rkan_mmdet.ops.kan_conv2d`. Defaults to ``'tanh'``.
        aggregation (str or dict): ``'addition'``, ``'gating'``, ``'se'`` or e.g. ``dict(type='se', bias=True)``.
            Defaults to ``'addition'``.
        shortcut (bool): Whether to add a strided 1x1 convolution of the input. Defaults to False.
        norm_cfg (dict): The path's norms. Defaults to ``dict(type='BN')``.
        norm_eval (bool): Whether batch norms of the path use their running statistics in training; the backbone's own
            ``norm_eval`` does not reach them, since a new path has no statistics yet. Defaults to False.
        zero_init (bool): Whether the last norms start at weight 0, so that the stage starts as the plain one.
            Defaults to False.
        with_cp (bool): Whether to recompute the path in the backward pass to save memory. Its batch norms then see
            each batch twice, as with MMDetection's ``with_cp``. Defaults to False.
        backend (str): See :func:`rkan_mmdet.ops.kan_conv2d`. Defaults to ``'auto'``.
        conv_cfg (dict, optional): A control arm: plain depthwise 3x3 convolutions of this type stand in place of the
            KAN convolutions, e.g. ``dict(type='Conv2d')``; ``basis``, ``normalization`` and ``backend`` are then not
            used. Defaults to None.
        adapter (bool): Whether the path is trained although its stage is frozen (``frozen_stages``), as an adapter
            beside a frozen backbone. Defaults to False.

    Raises:
        TypeError: An argument is of the wrong type, or an option is unknown.
        ValueError: A value is not allowed.

    Examples:
        >>> path = ResidualPath(1024, 2048, stride=2, is_last=True)
        >>> path(torch.randn(1, 1024, 8, 8)).shape
        torch.Size([1, 2048, 4, 4])
        >>> sum(p.numel() for p in path.parameters())
        1578083
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        is_last: bool = False,
        reduce_factor: int = 2,
        expand_factor: int | None = None,
        num_kernels: int = 1,
        basis: dict[str, Any] = dict(type='Chebyshev', degree=(3, 2)),  # noqa: B006 (read only)
        normalization: str = 'tanh',
        aggregation: str | dict[str, Any] = 'addition',
        shortcut: bool = False,
        norm_cfg: dict[str, Any] = dict(type='BN'),  # noqa: B006 (read only)
        norm_eval: bool = False,
        zero_init: bool = False,
        with_cp: bool = False,
        backend: str = 'auto',
        conv_cfg: dict[str, Any] | None = None,
        adapter: bool = False,
    ) -> None:
        super().__init__()
        check_int('in_channels', in_channels, 1)
        check_int('out_channels', out_channels, 1)
        check_int('stride', stride, 1)
        check_int('num_kernels', num_kernels, 1)
        if conv_cfg is not None and (not isinstance(conv_cfg, dict) or 'type' not in conv_cfg):
            raise TypeError(f"conv_cfg must be None or a dict such as dict(type='Conv2d'), but got {conv_cfg!r}")
        if check_int('reduce_factor', reduce_factor, 1) > in_channels:
            raise ValueError(
                f'reduce_factor must be at most the {in_channels} channels of the stage, but got {reduce_factor}'
            )
        self.norm_eval = check_bool('norm_eval', norm_eval)
        self.zero_init = check_bool('zero_init', zero_init)
        self.with_cp = check_bool('with_cp', with_cp)
        self.adapter = check_bool('adapter', adapter)
        channels = in_channels // reduce_factor
        if expand_factor is not None:
            channels = in_channels * check_int('expand_factor', expand_factor, 1)

        def build_conv(which: int, in_channels: int, kernels: int, stride: int) -> nn.Module:
            if conv_cfg is not None:
                options = dict(stride=stride, padding=1, groups=in_channels, bias=False)
                try:
                    conv = build_conv_layer(conv_cfg, in_channels, in_channels * kernels, 3, **options)
                except Exception as error:  # of a layer of the user's choice
                    raise ValueError(f'conv_cfg={conv_cfg!r} gives no depthwise convolution: {error}') from None
                _try(f'conv_cfg={conv_cfg!r}', conv, in_channels, in_channels * kernels, stride)
                return conv
            options = dict(basis=_basis_of(basis, which), normalization=normalization, backend=backend)
            return KANConv2d(in_channels, kernels, stride=stride, **options)

        # The norms come first: MMCV folds a batch norm into the last convolution listed before it (fuse_conv_bn), and
        # between these and any such convolution stands more than nothing.
        self.norm1 = _build_norm(norm_cfg, channels * num_kernels)
        self.norm2 = _build_norm(norm_cfg, out_channels)
        self.conv_reduce = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.kan_conv1 = build_conv(0, channels, num_kernels, stride)
        self.conv_expand = nn.Conv2d(channels * num_kernels, out_channels, 1, bias=False)
        self.kan_conv2 = build_conv(1, out_channels, 1, 1) if check_bool('is_last', is_last) else None
        self.act = nn.SiLU()
        self.shortcut = None
        if check_bool('shortcut', shortcut):
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), _build_norm(norm_cfg, out_channels)
            )
        self.aggregation = _build_aggregation(aggregation, out_channels)
        self.drawn: list[int | None] | None = None  # versions after init_weights
        if zero_init:
            self.zero_()
            if not all(norm.weight.requires_grad for norm in self._last_norms()):
                raise ValueError(f'zero_init needs norms that are trained, but got norm_cfg={norm_cfg!r}')

    def _last_norms(self) -> list[nn.Module]:
        return [self.norm2] if self.shortcut is None else [self.norm2, self.shortcut[1]]

    def is_zero(self) -> bool:
        """Whether the path gives 0, by its last norms."""
        return not any(
            norm.weight is None or norm.weight.any() or (norm.bias is not None and norm.bias.any())
            for norm in self._last_norms()
        )

    def is_dead(self) -> bool:
        """Whether the path gives 0 and is frozen."""
        return not any(p.requires_grad for p in self.parameters()) and self.is_zero()

    def zero_(self) -> None:
        """Zero the last norms: the path gives 0, and the stage is the plain one.

        Raises:
            ValueError: It can not be, by the path's aggregation or norms.
        """
        if isinstance(self.aggregation, Gating):
            raise ValueError(
                "zero_init must be False with aggregation 'gating', but got True: a path of zeros still scales the "
                "stage's output by sigmoid(bias)"
            )
        norms = self._last_norms()
        if any(norm.weight is None for norm in norms):
            raise ValueError(f'zero_init needs norms with a weight, but got {self.norm2}')
        for norm in norms:
            nn.init.zeros_(norm.weight)
            if norm.bias is not None:
                nn.init.zeros_(norm.bias)

    def init_weights(self) -> None:
        """Restore the path's own initialisation, which a backbone's ``init_cfg`` for all convolutions overwrites."""
        for module in self.modules():
            if module is not self and hasattr(module, 'reset_parameters'):
                module.reset_parameters()
        for conv in (self.kan_conv1, self.kan_conv2):
            for name in ('init_weights', 'init_offset'):  # of deformable convolutions, whose offsets start at zero
                getattr(conv, name, lambda: None)()
        if self.zero_init:
            self.zero_()
        self._is_init = True
        self.drawn = self.versions()

    def versions(self) -> list[int | None]:
        """Of the parameters: they change when something writes to them."""
        return [None if p.is_inference() else p._version for p in self.parameters()]

    def train(self, mode: bool = True) -> ResidualPath:
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _forward(self, x: Tensor) -> Tensor:
        r = self.act(self.conv_reduce(x))
        r = self.norm1(self.kan_conv1(r))
        r = self.act(self.conv_expand(r))
        if self.kan_conv2 is not None:
            r = self.kan_conv2(r)
        r = self.norm2(r)
        return r if self.shortcut is None else r + self.shortcut(x)

    def forward(self, x: Tensor) -> Tensor:
        """The residual ``r`` of the stage's input.

        Args:
            x (Tensor[N, in_channels, H, W]): The stage's input.

        Returns:
            Tensor[N, out_channels, H', W']: Of the size of the stage's output.
        """
        if self.with_cp and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def aggregate(self, features: Tensor, residual: Tensor) -> Tensor:
        """Join the stage's output and the path's (both ``Tensor[N, out_channels, H', W']``)."""
        return self.aggregation(features, residual)


def _build_norm(norm_cfg: dict[str, Any], channels: int) -> nn.Module:
    if not isinstance(norm_cfg, dict) or 'type' not in norm_cfg:
        raise TypeError(f"norm_cfg must be a dict such as dict(type='BN'), but got {norm_cfg!r}")
    if 'eps' in norm_cfg:  # torch looks at these two when they are used
        check_float("norm_cfg['eps']", norm_cfg['eps'], 0)
    if norm_cfg.get('momentum') is not None:
        check_float("norm_cfg['momentum']", norm_cfg['momentum'], -1)
    try:
        norm = build_norm_layer(norm_cfg, channels)[1]
    except Exception as error:  # of a layer of the user's choice
        raise ValueError(f'norm_cfg={norm_cfg!r} gives no norm layer for {channels} channels: {error}') from None
    _try(f'norm_cfg={norm_cfg!r}', norm, channels, channels, 1)
    return norm


def _try(setting: str, module: nn.Module, channels: int, out_channels: int, stride: int) -> None:
    """Raise at construction when a module of the user's choice can not stand in a path."""
    parameter = next(module.parameters(), None)
    x = torch.zeros(1, channels, 3, 3, device=None if parameter is None else parameter.device)
    expected = (1, out_channels, *[-(-3 // stride)] * 2)
    module.eval()
    try:
        with torch.no_grad():
            found = tuple(module(x).shape)
    except Exception as error:
        raise ValueError(f'{setting} takes no feature map of shape (N, C, H, W): {error}') from None
    finally:
        module.train()
    if found != expected:
        raise ValueError(f'{setting} makes {found} of {tuple(x.shape)}, where {expected} is wanted')
