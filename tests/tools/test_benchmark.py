"""The speed tool: what it counts against arithmetic by hand, and what it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmcv.cnn import build_conv_layer
from mmdet.models import CSPDarknet

from rkan_mmdet.launch import read_config
from rkan_mmdet.ops import KANConv2d
from rkan_mmdet.speed import (
    build_detector,
    count_channels,
    count_multiply_adds,
    peak_memory,
    predict,
    random_batch,
    share_weights,
    time_in_turn,
)

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'configs' / 'demo' / 'mask-rcnn_rkan-r18_fpn_shapes.py'


def test_multiply_adds_count_the_kan_convolution() -> None:
    conv = KANConv2d(8, stride=2)
    x = torch.randn(1, 8, 32, 32)
    # x, u, u^2, u^3 through 9 taps each, for 8 channels of 16 x 16
    assert count_multiply_adds(lambda: torch.no_grad()(conv)(x)) == 4 * 9 * 8 * 16 * 16
    dense = torch.nn.Conv2d(8, 5, 3, padding=1)
    assert count_multiply_adds(lambda: dense(x)) == 9 * 8 * 5 * 32 * 32


def test_multiply_adds_of_gradients_count_groups() -> None:
    x = torch.randn(2, 8, 32, 32, requires_grad=True)
    grouped = torch.nn.Conv2d(8, 16, 3, padding=1, groups=4)
    assert count_multiply_adds(lambda: grouped(x).sum().backward()) == 3 * 9 * 2 * 16 * 2 * 32 * 32
    transposed = torch.nn.ConvTranspose2d(8, 16, 2, stride=2, groups=4)
    assert count_multiply_adds(lambda: transposed(x).sum().backward()) == 3 * 4 * 4 * 8 * 2 * 32 * 32
    conv = KANConv2d(8, stride=2)
    assert count_multiply_adds(lambda: conv(x).sum().backward()) == 3 * 4 * 9 * 8 * 2 * 16 * 16


def test_multiply_adds_of_attention_and_deformable_convolutions() -> None:
    q = torch.randn(2, 4, 50, 8, requires_grad=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert count_multiply_adds(lambda: attend(q, q, q)) == 2 * 2 * 4 * 50 * 50 * 8
    x = torch.randn(1, 8, 10, 10)
    plain = 9 * 8 * 16 * 100
    for kind, offsets in (('DCN', 18), ('DCNv2', 27)):
        conv = build_conv_layer(dict(type=kind), 8, 16, 3, padding=1)
        assert count_multiply_adds(lambda: torch.no_grad()(conv)(x)) == plain + 9 * 8 * offsets * 100  # noqa: B023
        forward_and_weights = 2 * (plain + 9 * 8 * offsets * 100)
        assert count_multiply_adds(lambda: conv(x).sum().backward()) == forward_and_weights  # noqa: B023


def test_peak_memory_counts_live_tensors() -> None:
    def function() -> None:
        a = torch.ones(1 << 20)  # 4 MiB
        b = a + 1
        del a
        b += torch.ones(1 << 20)

    assert 8 << 20 <= peak_memory(function, cuda=False) < 9 << 20


def test_functions_are_called_in_turn() -> None:
    calls = []
    functions = {name: lambda i, name=name: calls.append((name, i)) for name in 'ab'}
    seconds = time_in_turn(functions, rounds=2, warmup=1)
    assert calls == [('a', 0), ('b', 0), ('a', 0), ('b', 0), ('a', 1), ('b', 1)]
    assert [len(s) for s in seconds.values()] == [2, 2]


def test_two_with_the_same_weights_find_the_same() -> None:
    cfg = read_config(str(CONFIG), {'model.test_cfg.rcnn.score_thr': 0.0})
    model = build_detector(cfg)
    for options, shared in (([False] * 4, True), ([False, True, True, False], True), (dict(depth=34), False)):
        change = options if isinstance(options, dict) else dict(stage_with_rkan=options)
        cfg.model.backbone.update(change)
        other = build_detector(cfg)
        assert share_weights(model, other) is shared
    cfg.model.backbone.update(depth=18, stage_with_rkan=[False] * 4)
    plain, batch = build_detector(cfg), random_batch((96, 128), 1)
    assert share_weights(model, plain)
    ours, theirs = (predict(m, batch)[0].pred_instances for m in (model, plain))
    assert len(ours) == len(theirs) > 0
    torch.testing.assert_close(ours.bboxes, theirs.bboxes)
    cfg.model.backbone.update(stage_with_rkan=[False] * 3 + [True], rkan=dict(aggregation='gating'))
    assert not share_weights(build_detector(cfg), plain)


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / 'tools' / 'benchmark.py'), *map(str, arguments)], capture_output=True, text=True
    )


@pytest.mark.slow
def test_two_detectors(tmp_path: Path) -> None:
    plain = tmp_path / 'plain.py'
    plain.write_text(f"_base_ = ['{CONFIG}']\nmodel = dict(backbone=dict(stage_with_rkan=[False] * 4))\n")
    out = tmp_path / 'speed.json'
    options = ('--size', 96, 128, '--rounds', 3, '--warmup', 1, '--batch-size', 2)
    done = run(CONFIG, '--against', plain, *options, '--json', out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    ours, theirs = result['models'].values()
    assert ours['parameters'] > theirs['parameters']
    assert ours['multiply_adds'] > theirs['multiply_adds'] > 0
    assert ours['peak_memory'] > 2 * 3 * 96 * 128 * 4
    assert ours['fps'] == pytest.approx(2e3 / ours['ms']['median'])
    assert 0.2 < result['speed_ratio']['median'] < 2
    assert 'of the speed of plain' in done.stdout
    assert 'they find the same' in done.stdout
    assert len(re.findall(r'^  \d+ detections an image', done.stdout, re.MULTILINE)) == 2

    nothing = run(CONFIG, *options, '--cfg-options', 'model.test_cfg.rcnn.score_thr=0.9999')
    assert '  0 detections an image: what follows the proposals did nothing' in nothing.stdout
    one_class = [f'model.roi_head.{head}_head.num_classes=1' for head in ('bbox', 'mask')]
    done = run(CONFIG, *options, '--train', '--cfg-options', *one_class)
    assert done.returncode == 0, done.stderr
    frozen = run(CONFIG, *options, '--train', '--backbone', '--cfg-options', 'model.backbone.frozen_stages=4')
    assert frozen.stderr.endswith('error: nothing of the backbone is trained: it is frozen\n')

    assert 'exists' in run(CONFIG, *options, '--json', out).stderr
    backbone = run(CONFIG, *options, '--backbone', '--fuse')
    assert backbone.returncode == 0, backbone.stderr


@pytest.mark.slow
def test_images_of_the_test_set(shapes_root: str) -> None:
    options = ('--rounds', 3, '--warmup', 0, '--cfg-options', f'data_root={shapes_root}')
    done = run(CONFIG, '--dataset', *options, 'model.test_cfg.rcnn.score_thr=0')
    assert done.returncode == 0, done.stderr
    assert 'batch 1, images of the test set' in done.stdout
    assert done.stdout.count(' (the last two: of the first batch)') == 1
    assert 0 < float(re.search(r'^  ([\d.]+) detections an image$', done.stdout, re.MULTILINE)[1]) <= 100


def test_random_images_have_the_channels_of_the_model() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3))
    assert random_batch((32, 40), 2, count_channels(model))['inputs'][1].shape == (1, 32, 40)
    assert count_channels(CSPDarknet(widen_factor=0.125)) == 3  # whose first convolution takes four pixels as one


@pytest.mark.slow
def test_refusals(tmp_path: Path) -> None:
    for arguments, message in (
        ((CONFIG, tmp_path / 'none.pth'), 'does not exist'),
        ((CONFIG, '--against-checkpoint', 'x.pth'), 'needs --against'),
        ((CONFIG, '--size', 8, 8), '--size must be at least 32 32'),
        ((CONFIG, '--rounds', 0), '--rounds must be at least 1'),
        ((CONFIG, '--device', 'cuda:77'), '--device cuda:77'),
    ):
        done = run(*arguments)
        assert done.returncode != 0
        assert message in done.stderr
        assert 'Traceback' not in done.stderr
