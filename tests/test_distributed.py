"""Two processes give the gradients of one with the joint batch; what needs a GPU says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rkan_mmdet.backbones import RKANResNet

ROOT = Path(__file__).parents[1]

# Saves the gradients of the joint batch as DDP makes them of each process's part.
SCRIPT = """
import os, sys
import torch
from rkan_mmdet.backbones import RKANResNet

torch.manual_seed(0)
torch.set_num_threads(1)
options = dict(
    gn=dict(norm_cfg=dict(type='GN', num_groups=4), rkan=dict(norm_cfg=dict(type='GN', num_groups=4))),
    frozen_bn=dict(norm_eval=True, rkan=dict(norm_eval=True)),
    sync_bn=dict(norm_eval=False, norm_cfg=dict(type='SyncBN'), rkan=dict(norm_cfg=dict(type='SyncBN'))),
    frozen_stages=dict(norm_eval=True, frozen_stages=4, rkan=dict(norm_eval=True, adapter=True)),
)[sys.argv[1]]
model = RKANResNet(18, base_channels=8, stage_with_rkan=(False, False, True, True), **options).double().train()
x = torch.randn(4, 3, 64, 64, dtype=torch.double)
size, rank = (int(os.environ[name]) for name in ('WORLD_SIZE', 'RANK'))
if sys.argv[1] == 'sync_bn':
    model, x = model.cuda(rank), x.cuda(rank)
torch.distributed.init_process_group('nccl' if x.is_cuda else 'gloo')
module = torch.nn.parallel.DistributedDataParallel(model)
part = x[rank * 4 // size:(rank + 1) * 4 // size]
for _ in range(2):  # an unused parameter would stop the second step
    model.zero_grad()
    sum(f.square().mean() for f in module(part) if f.requires_grad).backward()
if rank == 0:
    torch.save({n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}, sys.argv[2])
torch.distributed.barrier()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    'norms',
    [
        'gn',
        'frozen_bn',
        'frozen_stages',
        pytest.param(
            'sync_bn',
            marks=pytest.mark.skipif(
                torch.cuda.device_count() < 2, reason='needs two GPUs: SyncBN works on CUDA alone'
            ),
        ),
    ],
)
def test_gradients_of_two_processes(norms: str, tmp_path: Path) -> None:
    script = tmp_path / 'gradients.py'
    script.write_text(SCRIPT)
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    for name, count in (('one', 1), ('two', 2)):
        launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={count}']
        command = [sys.executable, *launch, str(script), norms, str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / name) for name in ('one', 'two'))
    assert one.keys() == two.keys()
    assert any('rkan.kan_conv1.basis_weight' in name for name in one)
    if norms == 'frozen_stages':
        assert all('rkan' in name for name in one)
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


SHARDED = """
import os, sys
import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from rkan_mmdet.backbones import RKANResNet

torch.manual_seed(0)
torch.set_num_threads(1)
model = RKANResNet(18, base_channels=8, norm_eval=True, rkan=dict(norm_eval=True)).train()
x = torch.randn(4, 3, 64, 64)
size, rank = (int(os.environ[name]) for name in ('WORLD_SIZE', 'RANK'))
if size > 1:
    torch.distributed.init_process_group('gloo')
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device('cpu'))
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
for _ in range(3):
    optimizer.zero_grad()
    sum(f.square().mean() for f in model(x[rank * 4 // size:(rank + 1) * 4 // size])).backward()
    optimizer.step()
state = model.state_dict()  # gathered
if rank == 0:
    torch.save(state, sys.argv[1])
if size > 1:
    torch.distributed.barrier()
os._exit(0)
"""


@pytest.mark.slow
def test_sharded_over_two_processes(tmp_path: Path) -> None:
    script = tmp_path / 'sharded.py'
    script.write_text(SHARDED)
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    for name, count in (('one', 1), ('two', 2)):
        launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={count}']
        command = [sys.executable, *launch, str(script), str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ('one', 'two'))
    assert one.keys() == two.keys()
    start = RKANResNet(18, base_channels=8).state_dict()
    assert not torch.equal(one['layer4.rkan.kan_conv1.basis_weight'], start['layer4.rkan.kan_conv1.basis_weight'])
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)
