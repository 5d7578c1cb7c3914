"""Weights from elsewhere, by pure functions from state dict to state dict: the authors' and plain detectors'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .backbones import ResidualPath
from .ops import KANConv2d
from .ops.bases import RBF, BSpline, Polynomial

# Our parameter of a KAN convolution: the authors' name of it, by kind of basis.
_KAN_NAMES = {
    Polynomial: dict(
        linear_weight='base_linear.weight', basis_weight='polynomial_weight', basis_scale='scaler',
        arctan_scale='arctan_scale',
    ),
    RBF: dict(linear_weight='base_linear.weight', linear_bias='base_linear.bias', basis_weight='spline_linear.weight'),
    BSpline: dict(linear_weight='base_weight', basis_weight='spline_weight', basis_scale='spline_scaler'),
}  # fmt: skip
# Our submodule of a path: the authors' list of it over the stages.
_PATH_NAMES = {
    'conv_reduce': 'conv_reduce.{i}',
    'kan_conv1': 'kan_conv1.{i}',
    'norm1': 'kan_bn.{i}',
    'conv_expand': 'conv_expand.{i}',
    'kan_conv2': 'kan_conv2.{i}',
    'norm2': 'kan_expand_bn.{i}',
    'shortcut.0': 'conv_shortcut.{i}',
    'shortcut.1': 'shortcut_bn.{i}',
    'aggregation.conv': 'gate_convs.{i}',
    'aggregation.conv1': 'se_blocks.{i}.1',
    'aggregation.conv2': 'se_blocks.{i}.3',
}


def _kan_pairs(conv: KANConv2d, ours: str, theirs: str) -> Iterator[tuple[str, list[str]]]:
    for kind, names in _KAN_NAMES.items():
        if isinstance(conv.basis, kind):
            for name, _ in conv.named_parameters():
                yield f'{ours}.{name}', [f'{theirs}.convs.{k}.conv.{names[name]}' for k in range(conv.num_kernels)]
            return
    raise ValueError(f'the authors have no basis such as {conv.basis!r}')


def _pairs(backbone: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Each key of ours with the keys of the authors that it is made of (one a kernel, else one)."""
    prefix = 'resnext' if 'ResNeXt' in type(backbone).__name__ else 'resnet'
    for key in backbone.state_dict():
        if '.rkan.' not in key:
            yield key, [f'{prefix}.{key}']
    for name, path in backbone.named_modules():
        if not isinstance(path, ResidualPath):
            continue
        stage = backbone.res_layers.index(name[: -len('.rkan')])
        for ours, theirs in _PATH_NAMES.items():
            try:
                module = path.get_submodule(ours)
            except AttributeError:
                continue
            if isinstance(module, KANConv2d):
                yield from _kan_pairs(module, f'{name}.{ours}', theirs.format(i=stage))
            elif module is not None:
                for key in module.state_dict():
                    yield f'{name}.{ours}.{key}', [f'{theirs.format(i=stage)}.{key}']


def from_authors(state_dict: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Translate a state dict of the authors' ``RKANet`` or ``RKANeXt`` (second generation) into ours.

    Args:
        state_dict (Mapping[str, Tensor]): Theirs. It holds modules for all four stages, whichever are active, so it
            can not tell which are: ``backbone`` does.
        backbone (nn.Module): The backbone that the weights are for, e.g. an ``RKANResNet``; it is not changed.

    Returns:
        dict[str, Tensor]: A state dict for ``backbone``.

    Raises:
        ValueError: Keys are missing, of another shape, or left over (other than the classifier and what is inactive).
    """
    target, out, used = backbone.state_dict(), {}, set()
    missing = []
    for ours, theirs in _pairs(backbone):
        absent = [key for key in theirs if key not in state_dict]
        if absent:
            missing += absent
            continue
        used.update(theirs)
        shape = target[ours].shape
        if len(theirs) > 1 or state_dict[theirs[0]].shape != shape:
            if sum(state_dict[key].numel() for key in theirs) != shape.numel():
                found = ', '.join(f'{key} {tuple(state_dict[key].shape)}' for key in theirs)
                raise ValueError(f'{found} does not make {ours} {tuple(shape)}: is this the right backbone?')
            out[ours] = torch.cat([state_dict[key].reshape(1, *shape[1:]) for key in theirs])
        else:
            out[ours] = state_dict[theirs[0]].clone()
    _check_grids(state_dict, backbone)
    if missing:
        raise ValueError(f'the state dict has no {", ".join(missing[:5])}{" ..." if len(missing) > 5 else ""}')
    left = [key for key in state_dict if key not in used and not _is_inactive(key, backbone)]
    if left:
        raise ValueError(f'no place in the backbone for {", ".join(left[:5])}{" ..." if len(left) > 5 else ""}')
    return out


def _check_grids(state_dict: Mapping[str, Tensor], backbone: nn.Module) -> None:
    """The authors store the fixed grids of RBF and B-spline; ours follow from the settings."""
    for name, conv in backbone.named_modules():
        if not isinstance(conv, KANConv2d) or not isinstance(conv.basis, (RBF, BSpline)):
            continue
        stage, _, which = name.rsplit('.', 2)
        key = f'{which}.{backbone.res_layers.index(stage)}.convs.0.conv.'
        if isinstance(conv.basis, RBF):
            key, grid = f'{key}rbf.grid', torch.linspace(-1, 1, conv.basis.grid_size)
        else:
            key, grid = f'{key}grid', torch.tensor(conv.basis.knots)
        found = state_dict.get(key)
        if found is not None and not (found.shape[-1] == len(grid) and torch.allclose(found.float(), grid, atol=1e-5)):
            raise ValueError(f'{key} is not the grid of {conv.basis!r} in {name}')


def _is_inactive(key: str, backbone: nn.Module) -> bool:
    """Whether a key of the authors' does nothing in the model that ``backbone`` describes."""
    name, _, rest = key.partition('.')
    if name in ('resnet', 'resnext'):
        return rest.startswith('fc.')
    if name in ('gate_convs', 'se_blocks'):  # kept for every stage, whichever mechanism is chosen
        return True
    index = rest.split('.')[0]
    if not index.isdigit() or int(index) >= len(backbone.res_layers):
        return False
    stage = getattr(backbone, backbone.res_layers[int(index)])
    if not hasattr(stage, 'rkan') or key.endswith('.grid'):  # a fixed grid is no weight
        return True
    return name == 'kan_conv2' and stage.rkan.kan_conv2 is None
