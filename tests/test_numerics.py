"""The same numbers every time, in every precision within stated bounds, and from one version to the next."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS

from rkan_mmdet.ops import KANConv2d

STATE_DICT = Path(__file__).parent / 'data' / 'state_dict_v1.npz'
POLYNOMIALS = ('Chebyshev', 'Legendre', 'Jacobi', 'Hermite')


def stored_model() -> torch.nn.Module:
    """The backbone of the stored state dict: every kind of path and parameter is in it."""
    paths = [
        dict(basis=dict(type='RBF', grid_size=4), aggregation='gating'),
        dict(basis=dict(type='BSpline', grid_size=3, order=2), expand_factor=1, shortcut=True),
        dict(basis=dict(type='Jacobi', degree=6, alpha=0.25), aggregation=dict(type='se', ratio=4), num_kernels=2),
        dict(basis=dict(type='Chebyshev', degree=(3, 2)), normalization='arctan'),
    ]
    cfg = dict(type='RKANResNet', depth=18, base_channels=2, stem_channels=4, rkan=paths, stage_with_rkan=(True,) * 4)
    return MODELS.build(cfg)


def make_stored(path: Path = STATE_DICT) -> None:
    """Write the fixture. Run once for a version whose files the next must read: its numbers are not to change."""
    torch.manual_seed(0)
    model = stored_model()
    model.init_weights()
    for name, value in model.named_buffers():
        if name.endswith('running_mean'):
            torch.nn.init.normal_(value, std=0.1)
        elif name.endswith('running_var'):
            torch.nn.init.uniform_(value, 0.5, 2.0)
    model.eval()
    x = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        outputs = model(x)
    arrays = {f'state/{name}': value.numpy() for name, value in model.state_dict().items()}
    arrays.update({f'output/{i}': y.numpy() for i, y in enumerate(outputs)}, input=x.numpy())
    np.savez_compressed(path, **arrays)


def test_a_state_dict_of_the_first_version_gives_its_outputs() -> None:
    stored = np.load(STATE_DICT)
    state = {name[6:]: torch.tensor(stored[name]) for name in stored.files if name.startswith('state/')}
    assert sum('.rkan.' in name for name in state) > 60
    for backend in ('auto', 'reference'):
        model = stored_model()
        model.load_state_dict(state)
        for module in model.modules():
            if isinstance(module, KANConv2d):
                module.backend = backend
        model.eval()
        with torch.no_grad():
            outputs = model(torch.tensor(stored['input']))
        for i, y in enumerate(outputs):
            torch.testing.assert_close(y, torch.tensor(stored[f'output/{i}']), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', POLYNOMIALS)
@pytest.mark.parametrize('degree', [1, 2, 3, 5, 6, 8, 10])
@pytest.mark.parametrize('backend', ['eager', 'reference'])
def test_finite_up_to_degree_10_and_inputs_of_1e4(name: str, degree: int, backend: str) -> None:
    conv = KANConv2d(2, basis=dict(type=name, degree=degree), backend=backend)
    for scale in (0.0, 1e-30, 1.0, 20.0, 1e4):
        x = (torch.randn(2, 2, 7, 9).sign() * scale * torch.rand(2, 2, 7, 9)).requires_grad_()
        conv.zero_grad()
        y = conv(x)
        y.square().mean().backward()
        assert y.isfinite().all()
        for grad in (x.grad, *(p.grad for p in conv.parameters())):
            assert grad.isfinite().all()
    extreme = torch.full((1, 2, 5, 5), 1e4, requires_grad=True)
    (conv(extreme) + conv(-extreme)).sum().backward()
    assert extreme.grad.isfinite().all()


@pytest.mark.parametrize('name', ['RBF', 'BSpline', 'Linear'])
def test_other_bases_are_finite_too(name: str) -> None:
    conv = KANConv2d(2, basis=dict(type=name))
    for scale in (0.0, 1.0, 1e4):
        x = (torch.randn(2, 2, 7, 9) * scale).requires_grad_()
        y = conv(x)
        y.mean().backward()
        assert y.isfinite().all()
        assert x.grad.isfinite().all()


BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the largest output: one rounding each of input and output


@pytest.mark.parametrize('dtype', BOUNDS)
@pytest.mark.parametrize(
    'basis', [dict(type=name) for name in (*POLYNOMIALS, 'RBF', 'BSpline')], ids=lambda b: b['type']
)
def test_half_precision_agrees_with_single(dtype: torch.dtype, basis: dict) -> None:
    conv = KANConv2d(8, stride=2, basis=basis)
    x = torch.randn(2, 8, 17, 19)
    low = x.to(dtype)

    def run(inputs: torch.Tensor) -> tuple:
        leaf = inputs.clone().requires_grad_()
        conv.zero_grad()
        y = conv(leaf)
        y.float().square().mean().backward()
        return y, leaf.grad, *(p.grad.clone() for p in conv.parameters())

    # the same rounded input: computed in fp32, rounded once
    exact, rounded = run(low.float()), run(low)
    assert rounded[0].dtype == dtype
    eps = torch.finfo(dtype).eps
    assert torch.equal(rounded[0], exact[0].to(dtype))
    for a, b in zip(exact[1:], rounded[1:]):
        assert (a - b.float()).abs().max() <= 4 * eps * a.abs().max()
    # against the single precision of the whole
    y = run(x)[0]
    assert (y - rounded[0].float()).abs().max() <= 8 * BOUNDS[dtype] * y.abs().max()


@pytest.mark.parametrize('dtype', BOUNDS)
def test_half_precision_of_a_backbone(dtype: torch.dtype) -> None:
    """Under autocast, as mixed precision training runs it: within 3 % of the largest feature (fp16), 15 % (bf16)."""
    if dtype == torch.float16 and tuple(map(int, torch.__version__.split('.')[:2])) < (2, 4):
        pytest.skip('this torch has no fp16 autocast on a CPU')
    model = MODELS.build(dict(type='RKANResNet', depth=18, base_channels=16, stem_channels=16))
    model.eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast('cpu', dtype=dtype):
            low = model(x)
    for a, b in zip(exact, low):
        assert b.isfinite().all()
        assert (a - b.float()).abs().max() <= {torch.float16: 0.03, torch.bfloat16: 0.15}[dtype] * a.abs().max()


def losses(deterministic: bool, cfg: dict) -> list:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(deterministic)
    try:
        model = MODELS.build(cfg)
        model.init_weights()
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        curve = []
        for _ in range(5):
            loss = sum(y.square().mean() for y in model(torch.randn(2, 3, 32, 40)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
        return [*curve, *(p.detach().clone() for p in model.parameters())]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('deterministic', [True, False])
@pytest.mark.parametrize('basis', ['Chebyshev', 'RBF', 'BSpline'])
def test_the_same_seed_gives_the_same_curve_twice(deterministic: bool, basis: str) -> None:
    cfg = dict(type='RKANResNet', depth=18, base_channels=8, stem_channels=8, rkan=dict(basis=dict(type=basis)),
               stage_with_rkan=(False, False, True, True))  # fmt: skip
    first, second = losses(deterministic, cfg), losses(deterministic, cfg)
    assert first[:5] == second[:5]
    assert first[0] != first[4]
    assert all(torch.equal(a, b) for a, b in zip(first[5:], second[5:]))
