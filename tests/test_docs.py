"""The code blocks of the docs run."""

import re
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

ROOT = Path(__file__).parents[1]


def blocks(name: str) -> list:
    return re.findall(r'```python\n(.*?)```', (ROOT / name).read_text(), re.DOTALL)


def test_a_basis_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rkan_mmdet.ops import BASES

    code, config = blocks('docs/bases.md')
    (tmp_path / 'my_bases.py').write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    scope: dict = {}
    exec(config, scope)
    (tmp_path / 'mine.py').write_text(scope['config'])
    cfg = Config.fromfile(str(tmp_path / 'mine.py'))
    try:
        backbone = MODELS.build(dict(cfg.model.backbone, depth=18))
        assert backbone.layer4.rkan.kan_conv1.basis_weight.shape == (1, 9, 4)
        backbone.layer4(torch.randn(1, 256, 8, 8)).sum().backward()
        assert backbone.layer4.rkan.kan_conv1.basis_weight.grad.abs().sum() > 0
    finally:
        BASES.pop('Sines', None)
        sys.modules.pop('my_bases', None)
