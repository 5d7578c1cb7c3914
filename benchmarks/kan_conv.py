"""Time of one KAN convolution, as ratios to ``torch.tanh`` of its input and to unfolding, all in one run.

``python benchmarks/kan_conv.py`` checks values and gradients of all sizes against the reference first, and prints no
time when they differ.
With ``--device cuda`` the ratios are to a copy of as many bytes as the input and the output have.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rkan_mmdet.ops import KANConv2d, can_run

# (N, C, H, W), stride, degree: the convolutions of RKANet-50 and its 4xL at about 640 x 1066
CASES = [((2, 512, 40, 66), 2, 3), ((2, 1024, 40, 66), 2, 3), ((2, 2048, 20, 33), 1, 2), ((2, 4096, 40, 66), 2, 3)]

GPU_CASES = [((16, 512, 40, 66), 2, 3), ((16, 2048, 20, 33), 1, 2)]  # and of a batch, which no cache holds

ON_CPU, ON_GPU = ('auto', 'eager', 'reference'), ('triton', 'eager', 'reference')


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


def build(shape: tuple, stride: int, degree: int, backends: tuple, device: str = 'cpu') -> tuple[Tensor, dict]:
    """An input, and modules of the same weights by their backends; the same ones each time."""
    torch.manual_seed(0)
    basis = dict(type='Chebyshev', degree=degree)
    convs = {b: KANConv2d(shape[1], stride=stride, basis=basis, backend=b).to(device) for b in backends}
    for conv in convs.values():
        conv.load_state_dict(convs[backends[0]].state_dict())
    return torch.randn(shape, device=device), convs


def check_all(cases: list, backends: tuple, device: str, compiled: bool = False) -> None:
    """:func:`check` of every size, the last backend being the judge."""
    for case in cases:
        x, convs = build(*case, backends, device)
        *fast, slow = convs.values()
        for conv in fast:
            check(conv, slow, x)
        if compiled:
            torch.compiler.reset()
            check(fast[0], slow, x, partial(torch.compile, fullgraph=True))


def check(conv: KANConv2d, slow: KANConv2d, x: Tensor, wrap: Callable = lambda module: module) -> None:
    """Value and gradients in float32 against the reference in float64, on 40 channels of the input, in both formats."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        outs = []
        for module, dtype in ((conv, torch.float32), (slow, torch.float64)):
            leaf = x[:, :40].to(dtype, memory_format=memory_format, copy=True).requires_grad_()
            cut = KANConv2d(leaf.shape[1], stride=module.stride, basis=module.basis, backend=module.backend)
            cut.to(x.device, dtype).load_state_dict(module.state_dict())
            y = (wrap if module is conv else lambda module: module)(cut)(leaf)
            y.sin().sum().backward()
            outs.append([y, leaf.grad, *(p.grad for p in cut.parameters())])
        for a, b in zip(*outs):
            if not (a - b).abs().max() <= 2e-5 * (1 + b.abs().max()):
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
    x, convs = build(shape, stride, degree, ON_CPU)
    conv, plain, slow = convs.values()
    last = x.to(memory_format=torch.channels_last)
    modules = dict(
        tanh=(torch.tanh, last), channels_last=(conv, last), nchw=(conv, x), eager=(plain, last), unfold=(slow, x)
    )
    if compiled:
        torch.compiler.reset()  # or the sizes of one case after the other make it compile for any size, and then refuse
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


def main_on_cpu(args: argparse.Namespace) -> list:
    check_all([CASES[i] for i in args.cases], ON_CPU, 'cpu', args.compile)
    rows = []
    print(f"'auto' takes {can_run('cpp') or 'cpp'!r}; 'eager' beside it is plain torch, in channels_last")
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
    return rows


def capture(function: Callable, calls: int) -> torch.cuda.CUDAGraph:
    """A graph of some calls, whose replay leaves the host's work out."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
        function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph


def in_graphs(functions: dict, rounds: int, calls: int = 10) -> dict:
    """Microseconds of each function on the GPU: the median over rounds in which all run in turn."""
    graphs = {name: capture(function, calls) for name, function in functions.items()}
    times: dict = {name: [] for name in functions}
    for i in range(-2, rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= 0:
                times[name].append(start.elapsed_time(end) / calls * 1e3)
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def measure_on_gpu(shape: tuple, stride: int, degree: int, dtype: torch.dtype, last: bool, rounds: int) -> dict:
    """One size in one dtype and memory format: the copy, the forward pass, and the backward pass that follows it."""
    x, convs = build(shape, stride, degree, ON_GPU, 'cuda')
    x = x.to(dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        upstream = torch.randn_like(convs['triton'](x))
    source = torch.randn((x.nbytes + upstream.nbytes) // 8, device='cuda')  # half is read, half is written
    target = torch.empty_like(source)

    def both(conv: KANConv2d) -> None:
        torch.autograd.grad(conv(leaf), [leaf, *conv.parameters()], upstream)

    functions: dict = {'copy': lambda: target.copy_(source)}
    for name, conv in convs.items():
        functions[name] = torch.no_grad()(partial(conv, x))
        functions[f'{name} both'] = partial(both, conv)
    us = in_graphs(functions, rounds)
    over = {name: [us[name] / us['copy'], (us[f'{name} both'] - us[name]) / us['copy']] for name in convs}
    return dict(input=list(shape), stride=stride, degree=degree, dtype=str(dtype)[6:], channels_last=last,
                us=us, over_copy=over)  # fmt: skip


def main_on_gpu(args: argparse.Namespace) -> list:
    check_all([(CASES + GPU_CASES)[i] for i in args.cases], ON_GPU, 'cuda')
    rows = []
    print(
        f'{torch.cuda.get_device_name()}, torch {torch.__version__}: forward and backward, in copies of as many bytes'
    )
    for case in args.cases:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for last in (False, True):
                row = measure_on_gpu(*(CASES + GPU_CASES)[case], dtype, last, args.rounds)
                rows.append(row)
                ratios = '  '.join(f'{name} {a:.2f} {b:.2f}' for name, (a, b) in row['over_copy'].items())
                size, layout = 'x'.join(map(str, row['input'])), 'channels_last' if last else 'NCHW'
                print(f'{size} stride {row["stride"]} degree {row["degree"]} {row["dtype"]} {layout}: '
                      f'copy {row["us"]["copy"]:.1f} us; {ratios}', flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=15, help='timed rounds (default: %(default)s)')
    parser.add_argument('--cases', type=int, nargs='+', help='which sizes (default: all)')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument('--compile', action='store_true', help='time torch.compile of the module as well')
    parser.add_argument('--json', help='write the figures to this file')
    args = parser.parse_args()
    if args.device == 'cuda' and (args.compile or not torch.cuda.is_available()):
        parser.error('--device cuda needs a GPU, and times no --compile')
    known = range(len(CASES) + (len(GPU_CASES) if args.device == 'cuda' else 0))
    args.cases = known if args.cases is None else args.cases
    if args.rounds < 1 or not set(args.cases) <= set(known):
        parser.error(f'--rounds must be at least 1, and --cases of {", ".join(map(str, known))}')
    if args.json and Path(args.json).exists():
        parser.error(f'--json {args.json} exists')
    rows = main_on_gpu(args) if args.device == 'cuda' else main_on_cpu(args)
    if args.json:
        with open(args.json, 'w') as file:
            json.dump(
                dict(torch=torch.__version__, threads=torch.get_num_threads(), device=args.device, rows=rows),
                file,
                indent=1,
            )


if __name__ == '__main__':
    main()
