"""Our backbones with the authors' weights against outputs of the authors' own code."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from golden_case import Case, image

from rkan_mmdet.convert import from_authors

FOLDER = Path(os.environ.get('RKAN_GOLDEN') or Path(__file__).parent / 'data/golden')
CASES = sorted(FOLDER.glob('*.json'))


def test_there_are_golden_cases() -> None:
    assert CASES, f'{FOLDER} holds no golden case'


@pytest.mark.parametrize('path', CASES, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    case = Case(path)
    model = case.backbone()
    model.load_state_dict(from_authors(case.state_dict(), model))
    x, tolerance = image(case.about['input']), 1e-4
    if case.about['mode'] == 'train':  # batch statistics: float32 itself is noisy there
        model, x = model.double().train(), x.double()
        model.norm_eval = False
        model.train()
    else:
        model.eval()
    with torch.no_grad():
        outputs = model(x)
    for name, output in (('stage3', outputs[2]), ('stage4', outputs[3])):
        expected, pick = case.expected(name)
        output = pick(output).to(expected.dtype)
        error = (output - expected).abs().max() / expected.abs().max()
        assert output.shape == expected.shape
        assert error <= tolerance, f'{name}: relative error {error:.1e}'
