"""How the residual path's time and memory grow: image size, batch, degree, stages, kernels, L factor.

Each row is one training step (forward and backward) of the paths of RKANet-50 alone; ``python benchmarks/growth.py``
prints the tables and writes docs/images/growth.png. An exponent is the slope in a doubly logarithmic plot.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track

from rkan_mmdet.backbones import ResidualPath
from rkan_mmdet.plot import plt
from rkan_mmdet.speed import peak_memory, quartiles, time_in_turn

STAGES = {2: (256, 512, 4), 3: (512, 1024, 8), 4: (1024, 2048, 16)}  # channels in, out, and pixels a cell of the input


class Case(NamedTuple):
    size: int = 640  # sides of the square image
    batch: int = 1
    degree: int = 3
    stages: int = 1  # paths beside so many of the last stages
    kernels: int = 1
    factor: int = 0  # the L factor; 0: reduced to half, as RKANet-50


SWEEPS = {
    'image size': [Case(size=size) for size in (320, 480, 640, 800, 1120, 1600)],
    'batch': [Case(batch=batch) for batch in (1, 2, 4, 8)],
    'degree': [Case(degree=degree) for degree in (1, 2, 3, 4, 5, 6, 8, 10)],
    'stages': [Case(stages=stages) for stages in (1, 2, 3)],
    'kernels': [Case(kernels=kernels) for kernels in (1, 2, 4)],
    'L factor': [Case(factor=factor) for factor in (0, 1, 2, 4, 6)],
}
FIELDS = dict(zip(SWEEPS, Case._fields))


def make_step(case: Case) -> Callable[[int], None]:
    basis = dict(type='Chebyshev', degree=(case.degree, max(1, case.degree - 1)))
    pairs = []
    for stage in list(STAGES)[-case.stages :]:
        channels, out, cell = STAGES[stage]
        path = ResidualPath(
            channels, out, 2, stage == 4, basis=basis, num_kernels=case.kernels, expand_factor=case.factor or None
        )
        x = torch.randn(case.batch, channels, case.size // cell, case.size // cell, requires_grad=True)
        pairs.append((path, x))

    def step(round_number: int = 0) -> None:
        for path, x in pairs:
            path.zero_grad(set_to_none=True)
            x.grad = None
            path(x).sum().backward()

    return step


def slope(xs: list, ys: list) -> float:
    xs, ys = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / sum((x - mean_x) ** 2 for x in xs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=7, help='timed rounds (default: %(default)s)')
    parser.add_argument('--sweeps', nargs='+', choices=list(SWEEPS), default=list(SWEEPS), help='default: all')
    parser.add_argument('--out', type=Path, default=Path('docs/images/growth.png'), help='default: %(default)s')
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error('--rounds must be at least 1')
    figure, axes = plt.subplots(
        1, len(args.sweeps), figsize=(3 * len(args.sweeps), 3), layout='constrained', squeeze=False
    )
    for name, axis in zip(args.sweeps, axes[0]):
        cases = {getattr(case, FIELDS[name]): case for case in SWEEPS[name]}
        steps = {value: make_step(case) for value, case in cases.items()}
        memory = {value: peak_memory(step, False) / 2**20 for value, step in track(steps.items(), name, transient=True)}
        seconds = {value: quartiles(t)[1] for value, t in time_in_turn(steps, args.rounds, 1).items()}
        values = list(cases)
        exponent = ''
        if values[0] > 0:
            powers = [slope(values, list(figures.values())) for figures in (seconds, memory)]
            exponent = '; time grows with the power {:.2f}, memory with {:.2f}'.format(*powers)
        print(f'\n{name}{exponent}\n\n| {name} | ms | MiB |\n| --- | --- | --- |')
        for value in values:
            print(f'| {value or "none"} | {1e3 * seconds[value]:.1f} | {memory[value]:.1f} |')
        axis.plot(values, [1e3 * seconds[value] for value in values], 'o-', label='ms')
        axis.plot(values, [memory[value] for value in values], 's--', label='MiB')
        axis.set(xlabel=name, ylim=(0, None))
        axis.legend()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == '__main__':
    main()
