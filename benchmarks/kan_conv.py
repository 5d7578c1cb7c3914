"""Time of one KAN convolution, as ratios to ``torch.tanh`` of its input and to unfolding, all in one run.

``python benchmarks/kan_conv.py`` checks the values against the reference first, and prints nothing when they differ.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rkan_mmdet.ops import KANConv2d

# (N, C, H, W), stride, degree: the convolutions of RKANet-50 and its 4xL at about 640 x 1066
CASES = [((2, 512, 40, 66), 2, 3), ((2, 1024, 40, 66), 2, 3), ((1, 2048, 20, 33), 1, 2), ((2, 4096, 40, 66), 2, 3)]


def once(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return (time.perf_counter() - started) * 1e3


def medians(functions: dict, rounds: int) -> dict:
    """Milliseconds of each function: the median over rounds in which all run in turn."""
    for function in functions.values():
        function()
        function()
    times: dict = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(once(function))
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def in_pairs(functions: dict, rounds: int) -> dict:
    """Milliseconds of each function, timed in turn with tanh alone: each meets the same caches and free memory."""
    ms: dict = {}
    for name in functions.keys() - {'tanh'}:
        pair = medians(
            {'tanh': functions['tanh'], name: functions[name]}, rounds if name != 'unfold' else rounds // 3 + 1
        )
        ms[name] = pair[name]
        ms.setdefault('tanh', {})[name] = pair['tanh']
    return ms


def check(conv: KANConv2d, slow: KANConv2d, x: Tensor) -> None:
    """Value and gradients against the reference, on a cut of the input."""
    outs = []
    x = x[:1, :, :15, :17].double().contiguous()
    for module in (conv, slow):
        module.double()
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        cut = KANConv2d(x.shape[1], stride=module.stride, basis=module.basis, backend=module.backend).double()
        cut.load_state_dict(module.state_dict())
        y = cut(leaf)
        y.sin().sum().backward()
        outs.append([y, leaf.grad, *(p.grad for p in cut.parameters())])
        module.float()
    for a, b in zip(*outs):
        if not torch.allclose(a, b, rtol=1e-9, atol=1e-9):
            sys.exit('the fast path differs from the reference; no time is printed')


def kept(conv: KANConv2d, leaf: Tensor) -> float:
    """Bytes that are kept for the backward pass, over those of the input."""
    storages: dict = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        conv(leaf)
    return sum(storages.values()) / leaf.nbytes


def step(function: Callable, leaf: Tensor, upstream: Tensor) -> None:
    leaf.grad = None
    function(leaf).backward(upstream)


def measure(shape: tuple, stride: int, degree: int, rounds: int, compiled: bool) -> list:
    """Two rows, forward and forward+backward, for one size."""
    x = torch.randn(shape)
    basis = dict(type='Chebyshev', degree=degree)
    conv, slow = (KANConv2d(shape[1], stride=stride, basis=basis, backend=b) for b in ('auto', 'reference'))
    slow.load_state_dict(conv.state_dict())
    check(conv, slow, x)
    last = x.to(memory_format=torch.channels_last)
    modules = dict(tanh=(torch.tanh, last), channels_last=(conv, last), nchw=(conv, x), unfold=(slow, x))
    if compiled:
        modules['compiled'] = (torch.compile(conv, fullgraph=True), last)
        modules['compiled_nchw'] = (torch.compile(conv, fullgraph=True), x)
    with torch.no_grad():
        upstream = {name: torch.randn_like(function(value)) for name, (function, value) in modules.items()}
        forward = in_pairs({name: partial(*pair) for name, pair in modules.items()}, rounds)
    both = {
        name: partial(step, function, value.clone().requires_grad_(), upstream[name])
        for name, (function, value) in modules.items()
        if name != 'unfold' or shape[1] <= 2048  # beyond, unfolding with its gradients takes several GiB
    }
    rows = []
    for direction, ms in (('forward', forward), ('forward+backward', in_pairs(both, max(3, rounds // 2)))):
        row = dict(input=list(shape), stride=stride, degree=degree, direction=direction, ms=ms)
        row['over_tanh'] = {k: ms[k] / ms['tanh'][k] for k in modules if k in ms and k not in ('tanh', 'unfold')}
        if direction != 'forward':
            row['kept_over_input'] = kept(conv, last.clone().requires_grad_())
        row['under_unfold'] = ms['unfold'] / ms['channels_last'] if 'unfold' in ms else None
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=15, help='timed rounds (default: %(default)s)')
    parser.add_argument('--cases', type=int, nargs='+', default=[0, 1, 2, 3], help='which sizes (default: all)')
    parser.add_argument('--compile', action='store_true', help='time torch.compile of the module as well')
    parser.add_argument('--json', help='write the figures to this file')
    args = parser.parse_args()
    rows = []
    for case in args.cases:
        for row in measure(*CASES[case], args.rounds, args.compile):
            rows.append(row)
            ratios = '  '.join(f'{name} {ratio:.2f}' for name, ratio in row['over_tanh'].items())
            faster = f'; {row["under_unfold"]:.0f} x faster than unfolding' if row['under_unfold'] else ''
            if 'kept_over_input' in row:
                faster += f'; keeps {row["kept_over_input"]:.3f} x the input'
            size, tanh = 'x'.join(map(str, row['input'])), row['ms']['tanh']['channels_last']
            print(f'{size} stride {row["stride"]} degree {row["degree"]} {row["direction"]}: '
                  f'tanh {tanh:.2f} ms; over tanh: {ratios}{faster}', flush=True)  # fmt: skip
    if args.json:
        with open(args.json, 'w') as file:
            json.dump(dict(torch=torch.__version__, threads=torch.get_num_threads(), rows=rows), file, indent=1)


if __name__ == '__main__':
    main()
