"""Shared by all tests: quiet third parties, and one generated data set."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')  # read when triton is imported: its kernels then run in Python

import rkan_mmdet  # noqa: F401  (registers the backbones)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A shapes set of 8 + 4 images."""
    from rkan_mmdet.data.shapes import make_shapes

    return str(make_shapes(tmp_path_factory.mktemp('data') / 'shapes', num_train=8, num_val=4, quiet=True))
