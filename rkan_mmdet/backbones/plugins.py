"""Plugins for the blocks of MMDetection's ResNets."""

from __future__ import annotations

from mmengine.registry import MODELS
from torch import Tensor, nn

from rkan_mmdet.checks import check_int


@MODELS.register_module()
class SEPlugin(nn.Module):
    """Squeeze-and-excitation, as a plugin: ``x * sigmoid(Conv(relu(Conv(avgpool(x)))))``, without biases.

    SENet-50 is a ResNet-50 with it after the last norm of each block: ``plugins=[dict(cfg=dict(type='SEPlugin'),
    position='after_conv3')]``. MMDetection's ``SELayer`` names its channels otherwise than plugins are built with.
    Source: arXiv 1709.01507, section 3.

    Args:
        in_channels (int): Channels of the input.
        ratio (int): Divisor of the channels between the two convolutions. Defaults to 16.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: ``ratio`` is larger than ``in_channels``, or an argument is below 1.

    Examples:
        >>> import torch
        >>> SEPlugin(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    _abbr_ = 'se'

    def __init__(self, in_channels: int, ratio: int = 16) -> None:
        super().__init__()
        check_int('in_channels', in_channels, 1)
        if check_int('ratio', ratio, 1) > in_channels:
            raise ValueError(f'ratio must be at most the {in_channels} channels, but got {ratio}')
        self.conv1 = nn.Conv2d(in_channels, in_channels // ratio, 1, bias=False)
        self.conv2 = nn.Conv2d(in_channels // ratio, in_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``Tensor[N, C, H, W]`` to the same shape."""
        weight = self.conv2(self.conv1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * weight
