"""torch.compile of the op, the path and the backbone as one graph, gradients too; torch.export and the older tracer."""

from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from rkan_mmdet.backbones import ResidualPath, RKANResNet
from rkan_mmdet.ops import KANConv2d

pytestmark = pytest.mark.slow
GRAPH = 'aot_eager'  # forward and backward as one graph each, without the minutes of a C++ compiler


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


OPTIONS = [
    dict(stride=2),
    dict(num_kernels=2, basis=dict(type='Legendre', degree=7)),
    dict(basis=dict(type='RBF')),
    dict(basis=dict(type='BSpline')),
    dict(basis=dict(type='Linear')),
]


def gradients(module: nn.Module, function: object, x: torch.Tensor) -> dict:
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    outs = function(leaf)
    outs = outs if isinstance(outs, tuple) else (outs,)
    sum((out * torch.linspace(-1, 1, out.shape[-1])).sum() for out in outs).backward()
    return dict(
        x=leaf.grad, **{f'out{i}': out.detach() for i, out in enumerate(outs)},
        **{name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None},
    )  # fmt: skip


def assert_same(module: nn.Module, compiled: object, x: torch.Tensor, tolerance: float = 1e-5) -> None:
    expected, actual = gradients(module, module, x), gradients(module, compiled, x)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        error = (actual[name] - value).abs().max() / (1e-3 + value.abs().max())
        assert error < tolerance, f'{name} differs by {error:.1e}'


@pytest.mark.parametrize('options', [*OPTIONS, dict(normalization='min-max')], ids=str)
def test_op(options: dict) -> None:
    conv = KANConv2d(6, **options).double()
    compiled = torch.compile(conv, fullgraph=True, backend=GRAPH)
    assert_same(conv, compiled, torch.randn(2, 6, 9, 12, dtype=torch.double), 1e-9)


@pytest.mark.parametrize('backend', ['auto', 'eager'])
@pytest.mark.parametrize('options', [dict(stride=2), dict(basis=dict(type='Legendre', degree=7))], ids=str)
def test_autocast_reaches_no_gradient(options: dict, backend: str) -> None:
    """torch.compile takes gradients as autocast would, which would round sums over all pixels."""
    conv = KANConv2d(6, backend=backend, **options)
    compiled, x = torch.compile(conv, fullgraph=True, backend=GRAPH), torch.randn(2, 6, 33, 40)

    def forward(leaf: torch.Tensor) -> torch.Tensor:
        with torch.autocast('cpu', dtype=torch.bfloat16):
            return compiled(leaf)

    assert_same(conv, forward, x, 1e-4)


def test_dynamic_shapes_are_compiled_once() -> None:
    conv = KANConv2d(4, stride=2)
    counter = torch._dynamo.testing.CompileCounterWithBackend('inductor')
    compiled = torch.compile(conv, fullgraph=True, dynamic=True, backend=counter)
    for size in ((8, 10), (13, 9), (20, 21)):
        assert_same(conv, compiled, torch.randn(2, 4, *size))
    assert counter.frame_count == 1


@pytest.mark.parametrize('options', [dict(), dict(aggregation='se', shortcut=True, with_cp=True)], ids=str)
def test_path(options: dict) -> None:
    path = ResidualPath(16, 32, stride=2, is_last=True, **options).train()
    compiled = torch.compile(path, fullgraph=True, backend=GRAPH)
    assert_same(path, compiled, torch.randn(2, 16, 12, 10), 1e-4)


def test_backbone() -> None:
    torch.manual_seed(0)
    model = RKANResNet(
        18, base_channels=16, stem_channels=16, norm_eval=False, stage_with_rkan=(False, False, True, True)
    )
    model.train()
    compiled = torch.compile(model, fullgraph=True, backend=GRAPH)
    assert_same(model, compiled, torch.randn(2, 3, 64, 64), 1e-3)


def test_export() -> None:
    model = RKANResNet(18, base_channels=16, stem_channels=16, frozen_stages=-1).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        for a, b in zip(program.module()(x), model(x)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_exported_op(options: dict) -> None:
    """Exported and traced alike: depthwise convolutions, for any size, without guards that plain convolutions lack."""
    conv = KANConv2d(6, **options).double()
    sizes = {2: torch.export.Dim('h', min=4, max=512), 3: torch.export.Dim('w', min=4, max=512)}
    x = torch.randn(2, 6, 8, 12, dtype=torch.double)
    program = torch.export.export(conv, (x,), dynamic_shapes=(sizes,)).module()
    traced = torch.jit.trace(conv, (x,), check_trace=False)
    graphs = [module.graph for module in program.modules() if isinstance(module, torch.fx.GraphModule)]
    assert torch.ops.aten.conv2d.default in {node.target for graph in graphs for node in graph.nodes}
    for size in ((8, 12), (9, 7), (33, 4)):
        x = torch.randn(2, 6, *size, dtype=torch.double)
        torch.testing.assert_close(program(x), conv(x), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(traced(x), conv(x), rtol=1e-9, atol=1e-12)


def test_traced_backbone(tmp_path: Path) -> None:
    model = RKANResNet(18, base_channels=16, stem_channels=16, rkan=dict(num_kernels=2)).eval()
    torch.jit.trace(model, (torch.randn(1, 3, 64, 96),), check_trace=False).save(tmp_path / 'traced.pt')
    traced, x = torch.jit.load(tmp_path / 'traced.pt'), torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        for a, b in zip(traced(x), model(x)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
