"""The examples in the docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import rkan_mmdet
from rkan_mmdet.ops import can_run

MODULES = ['rkan_mmdet', *(module.name for module in pkgutil.walk_packages(rkan_mmdet.__path__, 'rkan_mmdet.'))]


@pytest.mark.parametrize('name', MODULES)
def test_examples(name: str) -> None:
    if name.endswith('.triton_kan_conv') and can_run('triton'):
        pytest.skip(can_run('triton'))
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_they_are_found() -> None:
    finder = doctest.DocTestFinder()
    for name, public in (('ops.kan_conv', 'kan_conv2d'), ('backbones.rkan', 'RKANResNet'), ('hooks', 'ReseedHook')):
        module = importlib.import_module(f'rkan_mmdet.{name}')
        assert any(test.name.endswith(public) and test.examples for test in finder.find(module)), public
