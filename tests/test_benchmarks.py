"""The benchmarks print their figures, each in a short form."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*arguments: str) -> str:
    command = [sys.executable, '-W', 'ignore', *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_kan_conv() -> None:
    out = run('benchmarks/kan_conv.py', '--cases', '0', '--rounds', '3')
    forward, both = out.splitlines()
    assert re.search(r'over tanh: channels_last [\d.]+  nchw [\d.]+; \d+ x faster than unfolding$', forward)
    assert float(re.search(r'keeps ([\d.]+) x the input', both)[1]) <= 1.1, 'more than its input is kept'


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
