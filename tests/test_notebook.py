"""The notebook of the docs runs from top to bottom."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_demo_notebook(tmp_path: Path) -> None:
    nbformat = pytest.importorskip('nbformat')
    nbclient = pytest.importorskip('nbclient')
    notebook = nbformat.read(ROOT / 'docs' / 'demo.ipynb', as_version=4)
    assert not any(cell.get('outputs') for cell in notebook.cells), 'commit the notebook without outputs'
    for name in ('configs', 'rkan_mmdet'):  # it writes to work_dirs of where it runs
        os.symlink(ROOT / name, tmp_path / name)
    nbclient.NotebookClient(
        notebook, timeout=900, kernel_name='python3', resources=dict(metadata=dict(path=str(tmp_path)))
    ).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    pictures = [o for cell in code for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})]
    assert pictures
    shares = eval(code[-1].outputs[-1].data['text/plain'])
    assert list(shares) == ['backbone.layer4']
    assert 0 < shares['backbone.layer4'] < 1
