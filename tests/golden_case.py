"""Reads a golden case: outputs of the authors' own code on weights that are generated here.

``<case>.json`` holds the authors' settings, the input shape, the mode and their state-dict keys with shapes;
``<case>.npz`` the outputs ``stage3`` and ``stage4``, whole, or a few hundred values with their flat ``stage3_index``,
and fixed grids under their own key. ``python tests/golden_case.py FULL COMPACT`` makes the compact form of a folder.
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rkan_mmdet.backbones import RKANResNet, RKANResNeXt

VALUES = 200


def _draw(key: str, shape: list) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape)


def weight(key: str, shape: list) -> Tensor:
    """The value of one entry of the authors' state dict, from its name alone."""
    leaf, z = key.rsplit('.', 1)[-1], _draw(key, shape)
    if leaf == 'num_batches_tracked':
        return torch.zeros(shape, dtype=torch.long)
    if leaf == 'running_var':
        value = 1 + 0.2 * np.abs(z)
    elif leaf in ('running_mean', 'bias'):
        value = 0.1 * z
    elif leaf in ('scaler', 'spline_scaler') or (leaf == 'weight' and len(shape) == 1):
        value = 1 + 0.1 * z
    elif leaf in ('polynomial_weight', 'spline_weight'):
        value = z / np.sqrt(shape[1] * shape[2])
    else:
        value = z * np.sqrt(0.7 / np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def image(shape: list) -> Tensor:
    """The input image."""
    return torch.from_numpy(_draw('image', shape).astype(np.float32))


class Case:
    """One golden case of a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about = json.loads(path.read_text())
        with np.load(path.with_suffix('.npz')) as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}

    def state_dict(self) -> dict:
        """The authors' state dict, grids included."""
        state = {key: weight(key, shape) for key, shape in self.about['shapes'].items()}
        grids = {key: torch.from_numpy(value) for key, value in self.arrays.items() if key.endswith('grid')}
        return {**state, **grids}

    def backbone(self) -> nn.Module:
        """Ours with the authors' settings."""
        settings = dict(self.about['settings'])
        version, mechanisms = settings.pop('version'), settings.pop('mechanisms')
        kind = settings.pop('kan_type', 'chebyshev')
        names = dict(chebyshev='Chebyshev', legendre='Legendre', jacobi='Jacobi', hermite='Hermite')
        if kind == 'rbf':
            basis = dict(type='RBF', grid_size=tuple(settings.pop('grid_size', (3, 2))))
        elif kind == 'b_spline':
            basis = dict(type='BSpline', grid_size=(3, 2), order=(3, 2))
        else:
            basis = dict(type=names[kind], degree=(3, 2))
        options = dict(basis=basis, shortcut=settings.pop('shortcut', False))
        reduce = settings.pop('reduce_factor', [2] * 4)
        if settings.pop('inv_bottleneck', False):
            options['expand_factor'] = settings.pop('inv_factor')
        assert not settings, f'{self.path.name}: settings not understood: {settings}'
        rkan = [dict(options, reduce_factor=f, aggregation=m or 'addition') for f, m in zip(reduce, mechanisms)]
        active = [m is not None for m in mechanisms]
        if version.startswith('resnext'):
            depth, form = version[len('resnext') :].split('_')
            groups, width = form[:-1].split('x')
            return RKANResNeXt(
                depth=int(depth), groups=int(groups), base_width=int(width), stage_with_rkan=active, rkan=rkan
            )
        return RKANResNet(int(version[len('resnet') :]), stage_with_rkan=active, rkan=rkan)

    def expected(self, name: str) -> tuple:
        """The values of an output, and a function that picks the same of ours."""
        index = self.arrays.get(f'{name}_index')
        if index is None:
            return torch.from_numpy(self.arrays[name]), lambda out: out
        return torch.from_numpy(self.arrays[name]), lambda out: out.flatten()[torch.from_numpy(index.astype(np.int64))]

    def compact(self, folder: Path) -> None:
        """Write the compact form."""
        rng, arrays = np.random.default_rng(0), {}
        for name, value in self.arrays.items():
            if name.startswith('stage'):
                index = np.sort(rng.choice(value.size, VALUES, replace=False)).astype(np.int32)
                arrays[f'{name}_index'], value = index, value.ravel()[index]
            arrays[name] = value
        np.savez_compressed(folder / f'{self.path.stem}.npz', **arrays)
        (folder / self.path.name).write_text(json.dumps(self.about, separators=(',', ':')) + '\n')


if __name__ == '__main__':
    source, target = map(Path, sys.argv[1:])
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.glob('*.json')):
        Case(file).compact(target)
