"""How a residual path is put beside a stage, written once; the registered backbones."""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.models.backbones import RegNet, Res2Net, ResNeSt, ResNet, ResNetV1d, ResNeXt
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn

from rkan_mmdet.checks import check_bool

from .residual_path import ResidualPath

_OPTIONS = tuple(
    name
    for name in inspect.signature(ResidualPath).parameters
    if name not in ('in_channels', 'out_channels', 'stride', 'is_last')
)


class _Mixin:
    """Mixed into the class of a module at run time, so that it stays the module it was, state-dict keys included."""

    def __reduce_ex__(self, protocol: int) -> tuple:
        if '_made_at_run_time' in vars(type(self)):  # then pickle can not find the class by name, so it is told how
            return _new, type(self).__bases__, self.__dict__
        return super().__reduce_ex__(protocol)


@functools.cache
def _mixed(mixin: type[_Mixin], cls: type[nn.Module]) -> type[nn.Module]:
    return type(f'RKAN{cls.__name__}', (mixin, cls), dict(_made_at_run_time=True))


def _new(mixin: type[_Mixin], cls: type[nn.Module]) -> nn.Module:
    mixed = _mixed(mixin, cls)
    return mixed.__new__(mixed)


class _StageWithPath(_Mixin):
    """The stage's own forward beside that of its path."""

    _is_sequence = _runs_children = False  # set by attach_paths

    def forward(self, x: Tensor) -> Tensor:
        if self._is_sequence:
            features = x
            for name, block in self._modules.items():
                if name != 'rkan':
                    features = block(features)
        elif self._runs_children:  # the path would be run as one more
            path = self._modules.pop('rkan')
            try:
                features = super().forward(x)
            finally:
                self._modules['rkan'] = path
        else:
            features = super().forward(x)
        return self.rkan.aggregate(features, self.rkan(x))

    def init_weights(self) -> None:
        if hasattr(super(), 'init_weights'):
            super().init_weights()
        else:  # a stage that is no mmengine module does not pass the call on
            self.rkan.init_weights()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]
    for m, _ in modes:  # eval() of a backbone freezes stages too
        m.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for m, mode in modes:
            m.training = mode


def _runs_children(stage: nn.Module, path: ResidualPath, in_channels: int) -> bool:
    """Whether a stage runs whatever its children are, a path among them."""
    ran = []
    handle = path.register_forward_pre_hook(lambda *_: ran.append(True))
    with _evaluating(stage), _evaluating(path):
        stage.add_module('rkan', path)
        try:
            stage(path.conv_reduce.weight.new_zeros(1, in_channels, 33, 33))
        except Exception:  # the path does not follow the last of its children
            return True
        finally:
            del stage.rkan
            handle.remove()
    return bool(ran)


def probe_stage(stage: nn.Module, name: str) -> tuple[int, int, int]:
    """Input channels, output channels and stride of a stage, asked of the stage itself."""
    convs = [module for module in stage.modules() if isinstance(module, nn.Conv2d)]
    if not convs:
        raise ValueError(f'stage {name!r} ({type(stage).__name__}) has no 2D convolution to tell its input channels')
    in_channels = convs[0].in_channels
    x = torch.linspace(-1, 1, in_channels * 33 * 33).to(convs[0].weight).view(1, in_channels, 33, 33)
    before = x.clone()
    try:
        with _evaluating(stage):
            out = stage(x)
    except Exception as error:
        raise ValueError(
            f'stage {name!r} ({type(stage).__name__}) does not take one tensor of {in_channels} channels, so a '
            f'residual path can not stand beside it: {error}'
        ) from error
    if not isinstance(out, Tensor) or out.dim() != 4:
        raise ValueError(
            f'stage {name!r} ({type(stage).__name__}) must give one tensor of shape (N, C, H, W), '
            f'but gave {type(out).__name__}'
        )
    if type(x) is Tensor and not x.is_meta and not torch.equal(x, before):  # the others hold no values
        raise ValueError(
            f'stage {name!r} ({type(stage).__name__}) changes its input in place, so that a path beside it would take '
            'another: let what it begins with be of inplace=False'
        )
    height, width = out.shape[2:]
    stride = 32 // (height - 1) if height > 1 else 0
    if height != width or not stride or (33 - 1) // stride + 1 != height:
        raise ValueError(
            f'stage {name!r} ({type(stage).__name__}) makes {height}x{width} of 33x33, which no stride of a 3x3 '
            'convolution with padding 1 does'
        )
    return in_channels, out.shape[1], stride


def _check_called(backbone: nn.Module, stage: nn.Module, name: str) -> None:
    """Refuse a stage whose blocks the backbone runs by itself: it would pass a path by, or run it as one more."""
    called, forward, own = [], stage.forward, vars(stage).get('forward')
    conv = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))

    def noted(*args: Any, **kwargs: Any) -> Any:  # no hook, which a call of stage.forward would pass by
        called.append(True)
        return forward(*args, **kwargs)

    stage.forward = noted
    try:
        with _evaluating(backbone), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # they come when it is used
            backbone(torch.zeros(1, conv.in_channels, 64, 64).to(conv.weight))
    except Exception:  # it takes other inputs, or is not whole yet: then nothing is known
        return
    finally:
        del stage.forward
        if own is not None:
            stage.forward = own
    if not called:
        raise ValueError(
            f'{type(backbone).__name__} does not call stage {name!r} ({type(stage).__name__}) but what is in it, so '
            'that a path beside it would have no part; name stages that it calls'
        )


def _check_settings(stages: Sequence[str], stage_with_rkan: Any, rkan: Any) -> list[dict[str, Any]]:
    if not isinstance(stage_with_rkan, (tuple, list)):
        raise TypeError(f'stage_with_rkan must be a sequence of bools, one a stage, but got {stage_with_rkan!r}')
    if len(stage_with_rkan) != len(stages):
        raise ValueError(
            f'stage_with_rkan must have {len(stages)} entries, one for each of {", ".join(stages)}, '
            f'but got {tuple(stage_with_rkan)}'
        )
    for i, value in enumerate(stage_with_rkan):
        check_bool(f'stage_with_rkan[{i}]', value)
    if rkan is None or isinstance(rkan, dict):
        rkan = [rkan] * len(stages)
    if not isinstance(rkan, (tuple, list)):
        raise TypeError(f'rkan must be a dict, or a list of dicts (or None), one a stage, but got {rkan!r}')
    if len(rkan) != len(stages):
        raise ValueError(f'rkan as a list must have {len(stages)} entries, one a stage, but got {len(rkan)}')
    settings = []
    for i, value in enumerate(rkan):
        if value is not None and not isinstance(value, dict):
            raise TypeError(f'rkan[{i}] must be a dict or None (the defaults), but got {value!r}')
        for option in value or ():
            if option not in _OPTIONS:
                raise TypeError(f'rkan has no option {option!r}; it takes {", ".join(_OPTIONS)}')
        settings.append(dict(value or {}))
    return settings


def attach_paths(
    backbone: nn.Module,
    stages: Sequence[str],
    stage_with_rkan: Sequence[bool],
    rkan: dict[str, Any] | Sequence[dict[str, Any] | None] | None = None,
) -> None:
    """Put a residual path beside stages of a backbone, in place.

    A stage with a path computes ``aggregate(stage(x), path(x))`` and holds the path as ``stage.rkan``; its own
    parameters keep their names. The backbone's ``init_weights``, ``train`` and freezing then heed the paths.

    Args:
        backbone (nn.Module): Has the stages as submodules.
        stages (Sequence[str]): Names of all the stages, in order. The path of the last has a second KAN convolution.
        stage_with_rkan (Sequence[bool]): Which of them get a path.
        rkan (dict or list, optional): Options of :class:`ResidualPath`, for all stages or one entry a stage; None
            means its defaults. Defaults to None.

    Raises:
        TypeError: An argument is of the wrong type, or an option is unknown.
        ValueError: A value is not allowed, a stage is not one tensor (N, C, H, W) to one such tensor, or the backbone
            does not call it.

    Examples:
        >>> net = nn.ModuleDict(dict(a=nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1))))
        >>> attach_paths(net, ['a'], [True])
        >>> net['a'](torch.randn(1, 8, 9, 9)).shape
        torch.Size([1, 16, 5, 5])
    """
    settings = _check_settings(stages, stage_with_rkan, rkan)
    for i, name in enumerate(stages):
        if stage_with_rkan[i]:
            try:
                stage = backbone.get_submodule(name)
            except AttributeError as error:
                raise ValueError(f'{type(backbone).__name__} has no stage {name!r}: {error}') from None
            if hasattr(stage, 'rkan'):
                raise ValueError(f'stage {name!r} ({type(stage).__name__}) has a path, or something else named rkan')
            in_channels, out_channels, stride = probe_stage(stage, name)
            _check_called(backbone, stage, name)
            path = ResidualPath(in_channels, out_channels, stride, is_last=i == len(stages) - 1, **settings[i])
            path.train(backbone.training)
            beside, own = next(stage.parameters()), path.conv_reduce.weight
            if (own.dtype, own.device) != (beside.dtype, beside.device):
                path.to(beside)
            stage._is_sequence = type(stage).forward is nn.Sequential.forward
            stage._runs_children = not stage._is_sequence and _runs_children(stage, path, in_channels)
            stage.add_module('rkan', path)
            stage.__class__ = _mixed(_StageWithPath, type(stage))
    if not isinstance(backbone, _WithPaths):
        backbone.__class__ = _mixed(_WithPaths, type(backbone))
    backbone._freeze_stages()


@contextmanager
def _checked_loading(backbone: nn.Module) -> Iterator[set[ResidualPath]]:
    """While weights load: one line says that paths are new, in place of their keys; none that fits is an error.

    Gives the paths of which weights were loaded.
    """
    fresh, loaded, handles = [], set(), []
    for name, module in backbone.named_modules():
        if isinstance(module, ResidualPath):

            def hook(module: nn.Module, incompatible: Any, prefix: str = f'{name}.') -> None:
                missing = [key for key in incompatible.missing_keys if key.startswith(prefix)]
                # a checkpoint that has some of a path's keys is not a plain one: then the list is wanted
                if len(missing) == len([k for k in module.state_dict() if not k.endswith('num_batches_tracked')]):
                    fresh.append(prefix[:-1])
                    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if k not in missing]
                else:
                    loaded.add(module)

            handles.append(module.register_load_state_dict_post_hook(hook))

    def check(state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        ours = backbone.state_dict()
        if not any(f'{prefix}{key}' in state_dict and state_dict[f'{prefix}{key}'].shape == ours[key].shape
                   for key in ours if not key.endswith('num_batches_tracked')):  # fmt: skip
            name, value = next(iter(ours.items()))
            raise ValueError(
                f'no weight of the checkpoint in init_cfg={backbone.init_cfg!r} fits {type(backbone).__name__}, whose '
                f'weights are like {name!r} of shape {tuple(value.shape)}; "prefix" takes those of a part'
            )

    handles.append(backbone._register_load_state_dict_pre_hook(check))
    try:
        yield loaded
    finally:
        for handle in handles:
            handle.remove()
    if fresh:
        print_log(
            f'The checkpoint holds no residual KAN path; {", ".join(fresh)} start from their own initialisation.',
            logger='current',
            level=logging.INFO,
        )


class _WithPaths(_Mixin):
    """What a backbone with paths does otherwise than the plain one."""

    def init_weights(self) -> None:
        """As the plain backbone; the paths keep their own initialisation.

        Raises:
            ValueError: No weight of the checkpoint in ``init_cfg`` is one of this backbone.
        """
        before = {m: m.versions() for m in self.modules() if isinstance(m, ResidualPath)}
        with _checked_loading(self) as loaded:
            if hasattr(super(), 'init_weights'):
                super().init_weights()
        for name, module in self.named_modules():
            if not isinstance(module, ResidualPath):
                continue
            # some backbones write to all of their modules, after the path has drawn its weights or in place of that
            if module not in loaded and module.versions() not in (before[module], module.drawn):
                module.init_weights()
            if module.is_dead():
                print_log(
                    f'{name} is frozen with its stage, and starts at zero: it adds nothing, unless a checkpoint has it '
                    'or adapter=True lets it be trained.',
                    logger='current',
                    level=logging.WARNING,
                )

    def _freeze_stages(self) -> None:
        adapters = [m for m in self.modules() if isinstance(m, ResidualPath) and m.adapter]
        trained = [p for adapter in adapters for p in adapter.parameters() if p.requires_grad]
        if hasattr(super(), '_freeze_stages'):
            super()._freeze_stages()
        for parameter in trained:
            parameter.requires_grad_(True)

    def train(self, mode: bool = True) -> _WithPaths:
        """As the plain backbone, but its ``norm_eval`` does not reach a path that is trained. Returns self."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, ResidualPath) and module.conv_reduce.weight.requires_grad:
                module.train(mode)
        return self


@MODELS.register_module()
def RKANBackbone(
    backbone: dict[str, Any],
    stages: Sequence[str],
    stage_with_rkan: Sequence[bool],
    rkan: dict[str, Any] | Sequence[dict[str, Any] | None] | None = None,
) -> nn.Module:
    """Any backbone that calls stages which take one tensor and give one, with residual KAN paths.

    The backbone stays what it is: its class, its forward and its state-dict keys. ``aggregation='se'`` has no biases
    unless asked for (``dict(type='se', bias=True)``), whatever the backbone is.

    Args:
        backbone (dict): Config of the plain backbone.
        stages (Sequence[str]): Names of all its stages, in order, e.g. ``('stage1', 'stage2', 'stage3', 'stage4')``.
        stage_with_rkan (Sequence[bool]): Which of them have a path.
        rkan (dict or list, optional): Options of the paths, see :class:`RKANResNet`. Defaults to None.

    Returns:
        nn.Module: The backbone.

    Raises:
        TypeError: An argument is of the wrong type, or an option is unknown.
        ValueError: A value is not allowed, a stage is not one tensor to one tensor, or the backbone does not call it.

    Examples:
        >>> model = RKANBackbone(
        ...     dict(type='mmdet.CSPNeXt', deepen_factor=0.17, widen_factor=0.25),
        ...     stages=('stage1', 'stage2', 'stage3', 'stage4'), stage_with_rkan=(False, False, False, True))
        >>> [tuple(f.shape) for f in model(torch.randn(2, 3, 64, 64))]
        [(2, 64, 8, 8), (2, 128, 4, 4), (2, 256, 2, 2)]
    """
    if not isinstance(backbone, dict) or 'type' not in backbone:
        raise TypeError(f"backbone must be a config such as dict(type='CSPNeXt'), but got {backbone!r}")
    if not isinstance(stages, (tuple, list)) or not all(isinstance(name, str) for name in stages):
        raise TypeError(f'stages must be a sequence of names, but got {stages!r}')
    model = MODELS.build(backbone)
    attach_paths(model, stages, stage_with_rkan, rkan)
    return model


class _RKANBackbone(_WithPaths):
    """Adds ``stage_with_rkan`` and ``rkan`` to a backbone of MMDetection that lists its stages in ``res_layers``."""

    _se_bias = False  # whether `se` has biases unless asked: it depends on the backbone in the authors' code

    def __init__(
        self,
        *args: Any,
        stage_with_rkan: Sequence[bool] = (False, False, False, True),
        rkan: dict[str, Any] | Sequence[dict[str, Any] | None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        settings = _check_settings(self.res_layers, stage_with_rkan, rkan)
        for options in settings:
            given = options.get('aggregation')
            given = given if isinstance(given, dict) else dict(type=given)
            if given.get('type') == 'se':
                options['aggregation'] = {'bias': self._se_bias, **given}
        attach_paths(self, self.res_layers, stage_with_rkan, settings)


@MODELS.register_module()
class RKANResNet(_RKANBackbone, ResNet):
    """ResNet with residual KAN paths.

    Every argument of :class:`mmdet.models.ResNet` keeps its meaning. Source: arXiv 2410.05500.

    Args:
        stage_with_rkan (Sequence[bool]): Which stages have a path. Defaults to ``(False, False, False, True)``.
        rkan (dict or list, optional): Options of the paths, see :class:`ResidualPath`; a list gives each stage its
            own (None: the defaults). Defaults to None.

    Raises:
        TypeError: An argument is of the wrong type, or an option is unknown.
        ValueError: A value is not allowed.

    Examples:
        >>> model = RKANResNet(50, stage_with_rkan=(False, False, True, True)).eval()
        >>> [tuple(f.shape) for f in model(torch.randn(1, 3, 64, 64))]
        [(1, 256, 16, 16), (1, 512, 8, 8), (1, 1024, 4, 4), (1, 2048, 2, 2)]
    """


@MODELS.register_module()
class RKANResNetV1d(_RKANBackbone, ResNetV1d):
    """ResNet-D with residual KAN paths; see :class:`RKANResNet`."""


@MODELS.register_module()
class RKANResNeXt(_RKANBackbone, ResNeXt):
    """ResNeXt with residual KAN paths; see :class:`RKANResNet`. ``aggregation='se'`` has biases here."""

    _se_bias = True


@MODELS.register_module()
class RKANRes2Net(_RKANBackbone, Res2Net):
    """Res2Net with residual KAN paths; see :class:`RKANResNet`."""


@MODELS.register_module()
class RKANResNeSt(_RKANBackbone, ResNeSt):
    """ResNeSt with residual KAN paths; see :class:`RKANResNet`."""


@MODELS.register_module()
class RKANRegNet(_RKANBackbone, RegNet):
    """RegNet with residual KAN paths; see :class:`RKANResNet`."""
