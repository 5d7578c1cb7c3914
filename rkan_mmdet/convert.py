"""Weights from elsewhere, by pure functions from state dict to state dict: the authors' and plain detectors'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .backbones import ResidualPath, probe_stage
from .checkpoint import unsaved_buffers
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
    if not hasattr(backbone, 'res_layers'):
        raise ValueError(f'the authors have ResNet, SENet and ResNeXt, but no {type(backbone).__name__}')
    prefix = 'resnext' if 'ResNeXt' in type(backbone).__name__ else 'resnet'
    for key in backbone.state_dict():
        if '.rkan.' not in key:
            yield key, [f'{prefix}.{key.replace(".se.conv", ".se.fc")}']  # RKAN_SENet: squeeze-and-excitation in blocks
    for name, path in backbone.named_modules():
        if isinstance(path, ResidualPath):
            yield from _path_pairs(path, name, backbone.res_layers.index(name[: -len('.rkan')]))


def _path_pairs(path: ResidualPath, name: str, stage: int) -> Iterator[tuple[str, list[str]]]:
    for ours, theirs in _PATH_NAMES.items():
        try:
            module = path.get_submodule(ours)
        except AttributeError:
            continue
        if isinstance(module, KANConv2d):
            yield from _kan_pairs(module, f'{name}.{ours}', theirs.format(i=stage))
        elif ours.startswith('kan_conv') and module is not None:
            raise ValueError(
                f"{name}.{ours} is a {type(module).__name__}: the authors' paths have KAN convolutions alone"
            )
        elif module is not None:
            for key in module.state_dict():
                yield f'{name}.{ours}.{key}', [f'{theirs.format(i=stage)}.{key}']


def from_authors(state_dict: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Translate a state dict of the authors' ``RKANet`` or ``RKANeXt`` (second generation) into ours.

    Theirs with ``skip_activation=False`` (not their default) are another function, and can not be told apart.

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
            sizes = [state_dict[key].numel() for key in theirs]
            if sizes != [shape[1:].numel()] * shape[:1].numel():  # one for each row
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


def to_authors(state_dict: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Translate a state dict of ours into the authors' layout, without the classifier.

    Their module holds paths, gates and squeeze-and-excitation blocks for all four stages; those that are inactive here
    are filled with fresh weights, so that their class loads the result strictly but for ``fc``.

    Args:
        state_dict (Mapping[str, Tensor]): Ours, of ``backbone``.
        backbone (nn.Module): The backbone that the weights are of; it is not changed.

    Returns:
        dict[str, Tensor]: A state dict for the authors' ``RKANet`` or ``RKANeXt``.

    Raises:
        ValueError: Keys are missing or left over, or a convolution has several kernels or no counterpart.
    """
    pairs = dict(_pairs(backbone))
    for what, keys in (('lacks', pairs.keys() - state_dict), ('has no place for', state_dict.keys() - pairs)):
        if keys:
            raise ValueError(f'the state dict does not fit the backbone: it {what} {", ".join(sorted(keys)[:5])}')
    out = _inactive(backbone)
    for ours, theirs in pairs.items():
        value = state_dict[ours]
        if len(theirs) > 1:
            raise ValueError(f"{ours} has {len(theirs)} kernels, with which the authors' code can not run")
        out[theirs[0]] = value.reshape(1, -1) if theirs[0].endswith('spline_linear.weight') else value.clone()
    return out


def _inactive(backbone: nn.Module) -> dict[str, Tensor]:
    """Fresh weights for everything that the authors hold for four stages, fixed grids included."""
    paths = {name: m for name, m in backbone.named_modules() if isinstance(m, ResidualPath)}
    if not paths:
        raise ValueError('the backbone has no residual path, so there is nothing for the authors to load')
    resnext, out = 'ResNeXt' in type(backbone).__name__, {}
    options = next(iter(paths.values()))
    for i, stage in enumerate(backbone.res_layers):
        path = paths.get(f'{stage}.rkan')
        in_channels, out_channels, stride = probe_stage(getattr(backbone, stage), stage)
        if out_channels < 16:
            raise ValueError(
                f"the authors' model holds se blocks, for 16 channels or more, but {stage} has {out_channels}"
            )
        inside = {} if path is None else dict(reduce_factor=max(in_channels // path.conv_reduce.out_channels, 1))
        if options.conv_reduce.out_channels > options.conv_reduce.in_channels:
            inside = dict(expand_factor=options.conv_reduce.out_channels // options.conv_reduce.in_channels)
        for aggregation in ['addition' if resnext else 'gating', dict(type='se', bias=resnext)]:
            whole = ResidualPath(
                in_channels, out_channels, stride, is_last=True, basis=_basis_pair(options, backbone),
                normalization=options.kan_conv1.normalization, aggregation=aggregation,
                shortcut=options.shortcut is not None, **inside,
            )  # fmt: skip
            for ours, theirs in _path_pairs(whole, 'rkan', i):
                value = whole.state_dict()[ours[len('rkan.') :]]
                out[theirs[0]] = value.reshape(1, -1) if theirs[0].endswith('spline_linear.weight') else value
        for which, conv in (('kan_conv1', whole.kan_conv1), ('kan_conv2', whole.kan_conv2)):
            out.update(_grids(conv, f'{which}.{i}.convs.0.conv.'))
    return out


def _basis_pair(path: ResidualPath, backbone: nn.Module) -> dict:
    """The basis of a path as a config of pairs; the second convolution is found in whichever path has one."""
    first = path.kan_conv1.basis
    seconds = [m.kan_conv2 for m in backbone.modules() if isinstance(m, ResidualPath) and m.kan_conv2 is not None]
    second = seconds[0].basis if seconds else first
    return dict(type=type(first).__name__, **{o: (getattr(first, o), getattr(second, o)) for o in first._options()})


def _grids(conv: KANConv2d, prefix: str) -> dict[str, Tensor]:
    if isinstance(conv.basis, RBF):
        return {f'{prefix}rbf.grid': torch.linspace(-1, 1, conv.basis.grid_size)}
    if isinstance(conv.basis, BSpline):
        return {f'{prefix}grid': torch.tensor(conv.basis.knots).repeat(conv.linear_weight.shape[1], 1)}
    return {}


def from_plain(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Complete the state dict of a plain detector for the same detector with paths.

    Args:
        state_dict (Mapping[str, Tensor]): Of the plain detector.
        model (nn.Module): The detector with ``zero_init=True`` paths; it is not changed.

    Returns:
        dict[str, Tensor]: A state dict for ``model``, which then computes what the plain detector does.

    Raises:
        ValueError: A path does not start at zero, the checkpoint has paths, or the two differ in more than paths.
    """
    paths = {name: m for name, m in model.named_modules() if isinstance(m, ResidualPath)}
    if not paths:
        raise ValueError('the model has no residual path')
    for name, path in paths.items():
        if not path.zero_init or not path.is_zero():
            raise ValueError(f'{name} does not start at zero: set rkan=dict(zero_init=True) in the config')
    unsaved = unsaved_buffers(model)
    state_dict = {key: value for key, value in state_dict.items() if key not in unsaved}
    target, prefixes = model.state_dict(), tuple(f'{name}.' for name in paths)
    there = [key for key in state_dict if key.startswith(prefixes)]
    if there:
        raise ValueError(f'the checkpoint has residual paths already: {", ".join(there[:5])}')
    missing = [key for key in target if key not in state_dict and not key.startswith(prefixes)]
    left = [key for key in state_dict if key not in target]
    if missing or left:
        raise ValueError(
            'the checkpoint is not of the plain form of this model: '
            + '; '.join(f'{what} {", ".join(k[:5])}' for what, k in (('missing', missing), ('left over', left)) if k)
        )
    for key, value in state_dict.items():
        if value.shape != target[key].shape:
            raise ValueError(
                f'{key} is {tuple(value.shape)} in the checkpoint and {tuple(target[key].shape)} in the model'
            )
    return {key: state_dict.get(key, value).clone() for key, value in target.items()}


def _check_grids(state_dict: Mapping[str, Tensor], backbone: nn.Module) -> None:
    """The authors store the fixed grids of RBF and B-spline; ours follow from the settings."""
    for name, conv in backbone.named_modules():
        if isinstance(conv, KANConv2d):
            stage, _, which = name.rsplit('.', 2)
            prefix = f'{which}.{backbone.res_layers.index(stage)}.convs.0.conv.'
            for key, grid in _grids(conv, prefix).items():
                found = state_dict.get(key)
                if found is not None and not (
                    found.shape == grid.shape and torch.allclose(found.float(), grid, atol=1e-5)
                ):
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
