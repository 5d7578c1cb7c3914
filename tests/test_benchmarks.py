"""The benchmarks print their figures, each in a short form."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rkan_mmdet.ops import KANConv2d

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*arguments: str) -> str:
    command = [sys.executable, '-W', 'ignore', *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_kan_conv() -> None:
    out = run('benchmarks/kan_conv.py', '--cases', '0', '--rounds', '3')
    _, forward, both = out.splitlines()
    assert re.search(
        r'over tanh: channels_last [\d.]+  nchw [\d.]+  eager [\d.]+; \d+ x faster than unfolding$', forward
    )
    assert float(re.search(r'keeps ([\d.]+) x the input', both)[1]) <= 1.1, 'more than its input is kept'


@pytest.mark.parametrize('backend', ['auto', 'eager'])
def test_kan_conv_checks_first(backend: str) -> None:
    spec = importlib.util.spec_from_file_location('kan_conv', ROOT / 'benchmarks' / 'kan_conv.py')
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    fast, slow = (KANConv2d(3, stride=2, backend=backend) for backend in (backend, 'reference'))
    slow.load_state_dict(fast.state_dict())
    x = torch.randn(2, 3, 9, 8)
    benchmark.check(fast, slow, x)
    with torch.no_grad():
        fast.basis_weight[0, 4, 3] += 1e-3
    with pytest.raises(SystemExit, match='differs from the reference'):
        benchmark.check(fast, slow, x)


def test_growth(tmp_path: Path) -> None:
    out = run(
        'benchmarks/growth.py',
        '--rounds',
        '1',
        '--sweeps',
        'kernels',
        'L factor',
        '--out',
        str(tmp_path / 'growth.png'),
    )
    assert re.search(r'kernels; time grows with the power [\d.]+, memory with [\d.]+', out)
    assert len(re.findall(r'^\| (\d+|none) \| [\d.]+ \| [\d.]+ \|$', out, re.MULTILINE)) == 8
    assert (tmp_path / 'growth.png').stat().st_size > 5_000
