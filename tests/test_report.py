"""What the report shows is what the model does."""

from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from mmdet.registry import DATASETS
from mmdet.structures.bbox import get_box_tensor
from mmdet.visualization import DetLocalVisualizer
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import nn

from rkan_mmdet.backbones import ResidualPath, RKANResNet
from rkan_mmdet.launch import UserError, read_config
from rkan_mmdet.ops import KANConv2d
from rkan_mmdet.plot import draw_functions, draw_predictions
from rkan_mmdet.report import kan_convs, make_html, observe, png

DEMO = Path(__file__).parents[1] / 'configs/demo/mask-rcnn_rkan-r18_fpn_shapes.py'
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
        conv, before = KANConv2d(4, **options), KANConv2d(4, **options)
        seen = observe(conv, conv, [torch.randn(2, 4, 8, 8)])
        (values,) = seen.inputs.values()
        if options.get('normalization'):
            assert values.abs().max() <= 1.001
        state = torch.get_rng_state()
        figure = draw_functions(conv, 'conv', values, initial=before)
        assert torch.equal(state, torch.get_rng_state())
        taps = conv.kernel_size[0] * conv.kernel_size[1]
        assert len(figure.axes) == taps + 1
        lines = figure.axes[0].lines
        for line, module, style in ((lines[0], before, '--'), (lines[conv.num_kernels], conv, '-')):
            x = torch.as_tensor(line.get_xdata(), dtype=torch.double)
            expected = module.double().functions(x)[0, 0]
            torch.testing.assert_close(torch.as_tensor(line.get_ydata()), expected.detach())
            assert line.get_linestyle() == style
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


class Finds(nn.Module):
    """A detector that finds one object of a class."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.label = label

    def test_step(self, batch: dict) -> list:
        for sample in batch['data_samples']:
            found = dict(bboxes=torch.tensor([[5.0, 6, 50, 60]]), labels=torch.tensor([self.label]))
            sample.pred_instances = InstanceData(scores=torch.ones(1), **found)
        return batch['data_samples']


@pytest.fixture
def dataset_of(shapes_root: str) -> Callable:
    def build(annotations_first: bool) -> Any:
        cfg = read_config(str(DEMO), dict(data_root=f'{shapes_root}/')).val_dataloader.dataset
        load, *_, pack = cfg.pipeline
        two = [dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
        two.insert(annotations_first, dict(type='Resize', scale=(96, 128), keep_ratio=False))
        cfg.pipeline = [load, *two, pack]
        init_default_scope('mmdet')
        return DATASETS.build(cfg)

    return build


@pytest.mark.parametrize('annotations_first', [True, False])
def test_ground_truth_is_drawn_where_it_is(
    annotations_first: bool, dataset_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    draw = DetLocalVisualizer.add_datasample

    def record(self: Any, name: str, image: Any, sample: Any, **options: Any) -> None:
        drawn.append((image.shape[:2], sample.gt_instances))
        draw(self, name, image, sample, **options)

    monkeypatch.setattr(DetLocalVisualizer, 'add_datasample', record)
    dataset = dataset_of(annotations_first)
    dataset._metainfo['palette'] = [(1, 2, 3)]  # fewer than classes
    sheet = draw_predictions([(Finds(2), dataset)], count=2)
    assert sheet.shape == (384, 1536, 3)
    for i, (size, truth) in enumerate(drawn):
        expected = torch.tensor([instance['bbox'] for instance in dataset.get_data_info(i)['instances']])
        torch.testing.assert_close(
            torch.as_tensor(get_box_tensor(truth.bboxes)).reshape(-1, 4), expected.reshape(-1, 4)
        )
        assert (truth.masks.height, truth.masks.width) == size == (192, 192)


def test_a_class_that_the_set_has_not(dataset_of: Callable) -> None:
    with pytest.raises(UserError, match='finds more classes than the 5'):
        draw_predictions([(Finds(5), dataset_of(False))], count=1)
