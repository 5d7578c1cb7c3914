"""What the report shows is what the model does."""

import pytest
import torch
from torch import nn

from rkan_mmdet.backbones import ResidualPath, RKANResNet
from rkan_mmdet.ops import KANConv2d
from rkan_mmdet.plot import draw_functions
from rkan_mmdet.report import kan_convs, make_html, observe, png

PNG = b'\x89PNG\r\n\x1a\n'


def test_observe_sees_the_inputs_and_the_shares() -> None:
    model = RKANResNet(18, base_channels=8, stage_with_rkan=(False, False, True, True)).eval()
    batches = [torch.randn(2, 3, 64, 64) for _ in range(3)]
    seen = observe(model, model, batches, pictures=2)
    assert set(seen.inputs) == set(kan_convs(model)) == {
        'layer3.rkan.kan_conv1', 'layer4.rkan.kan_conv1', 'layer4.rkan.kan_conv2'
    }  # fmt: skip

    sums, values = torch.zeros(2, 64, dtype=torch.double), []
    with torch.no_grad():
        for x in batches:
            x = model.layer3(model.layer2(model.layer1(model.maxpool(model.relu(model.norm1(model.conv1(x)))))))
            path = model.layer4.rkan
            r = path(x)
            sums += torch.stack([t.double().square().sum((0, 2, 3)) for t in (model.layer4(x) - r, r)])
            values.append(path.act(path.conv_reduce(x)).flatten())
    torch.testing.assert_close(seen.shares['layer4'], (sums[1] / sums.sum(0)).float(), rtol=1e-3, atol=1e-6)
    assert [len(rows) for rows in seen.maps.values()] == [2, 2]
    assert seen.maps['layer4'][0]['with the path'].shape == (2, 2)
    assert torch.isin(seen.inputs['layer4.rkan.kan_conv1'], torch.cat(values)).all()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_path_of_zeros_has_no_share_and_gating_is_measured_too() -> None:
    class Stage(nn.Module):
        def __init__(self, **options: object) -> None:
            super().__init__()
            self.rkan = ResidualPath(8, 8, **options)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rkan.aggregate(x, self.rkan(x))

    x = [torch.randn(2, 8, 9, 9)]
    still = Stage(zero_init=True).eval()
    assert observe(still, still, x).shares[''].abs().max() == 0
    gate = Stage(aggregation='gating').eval()
    assert 0 < observe(gate, gate, x).shares[''].min() <= observe(gate, gate, x).shares[''].max() < 1


def test_hooks_go_also_when_the_model_fails() -> None:
    model = RKANResNet(18, base_channels=8)

    def fail(batch: object) -> None:
        raise RuntimeError('stop')

    with pytest.raises(RuntimeError, match='stop'):
        observe(model, fail, [0])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_functions_of_every_normalization_are_drawn() -> None:
    for options in (
        dict(), dict(num_kernels=2), dict(normalization='min-max'), dict(normalization='arctan'),
        dict(basis=dict(type='RBF')), dict(basis=dict(type='Linear')), dict(kernel_size=1, padding=0),
    ):  # fmt: skip
        conv = KANConv2d(4, **options)
        seen = observe(conv, conv, [torch.randn(2, 4, 8, 8)])
        (values,) = seen.inputs.values()
        if options.get('normalization'):
            assert values.abs().max() <= 1.001
        state = torch.get_rng_state()
        figure = draw_functions(conv, 'conv', values, initial=conv)
        assert torch.equal(state, torch.get_rng_state())
        taps = conv.kernel_size[0] * conv.kernel_size[1]
        assert len(figure.axes) == taps + 1
        learned = figure.axes[0].lines[conv.num_kernels]  # after the dashed ones
        x = torch.as_tensor(learned.get_xdata(), dtype=torch.double)
        expected = conv.double().functions(x)[0, 0]
        torch.testing.assert_close(torch.as_tensor(learned.get_ydata()), expected.detach())
        low, high = figure.axes[0].get_ylim()
        assert all(low < line.get_ydata().min() <= line.get_ydata().max() < high for line in figure.axes[-2].lines[:1])
        assert png(figure).startswith(PNG)


def test_html_is_escaped_and_stands_alone() -> None:
    page = make_html('<script>alert(1)</script>', [('A & B', 'x < y', {'"quoted"': PNG}, [['a', 'b'], ['1', '<2>']])])
    assert '<script>' not in page
    assert 'A &amp; B' in page
    assert '&lt;2&gt;' in page
    assert 'alt="&quot;quoted&quot;"' in page
    assert 'http' not in page
