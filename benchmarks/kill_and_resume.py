"""Kill a training with SIGKILL at random moments, resume it each time, and compare it with an undisturbed one.

A small Mask R-CNN is trained by ``tools/train.py`` with deterministic settings. Some kills come at any moment, others
are aimed: while a checkpoint is being written, and just after. Each run is a process of its own, forked from one that
has imported everything. When a training has come to its end, its weights, its optimizer's state and every AP of every
epoch are compared, bit for bit, with those of a run that nobody disturbed; then the next training begins. After each
kill every checkpoint on the disk is read. Exit code 1 on the smallest difference.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.utils import register_all_modules
from rich.progress import Progress

from rkan_mmdet.checkpoint import CheckpointError, read_checkpoint
from rkan_mmdet.data.shapes import make_shapes
from rkan_mmdet.launch import UserError, run_tool
from rkan_mmdet.plot import read_scalars

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
_base_ = ['{root}/configs/demo/mask-rcnn_rkan-r18_fpn_shapes.py']
data_root = '{data}/'
{model}
train_dataloader = dict(batch_size=2, num_workers={workers}, persistent_workers={workers} > 0, dataset=dict(
    data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(
    ann_file=data_root + 'annotations/instances_val.json',
    # recall too: so small a detector finds objects, but orders them badly, and its AP is 0 in early epochs
    metric_items=[
        'mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l', 'AR@100', 'AR_s@1000', 'AR_m@1000', 'AR_l@1000'])
test_evaluator = val_evaluator
train_cfg = dict(max_epochs={epochs}, val_interval=1)
default_hooks = dict(logger=dict(interval=1))
randomness = dict(seed=3, deterministic=True)
"""
SMALL = """
model = dict(
    backbone=dict(base_channels=8, stem_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16)),
    train_cfg=dict(rpn_proposal=dict(nms_pre=50, max_per_img=20), rcnn=dict(sampler=dict(num=16))),
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=20)))
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=100, help='how many at least (default: %(default)s)')
    parser.add_argument('--epochs', type=int, default=6, help='of each training (default: %(default)s)')
    parser.add_argument('--workers', type=int, default=0, help='processes of the loader (default: %(default)s)')
    parser.add_argument(
        '--start', type=Path, metavar='CHECKPOINT', help="weights of the demo's detector, which is trained on, with an "
        'AP above 0, in place of a smaller one from nothing'
    )  # fmt: skip
    parser.add_argument('--seed', type=int, default=0, help='of the moments (default: %(default)s)')
    parser.add_argument('--work-dir', type=Path, help='a new directory that is kept (default: a temporary one)')
    args = parser.parse_args()
    for name, minimum in (('kills', 1), ('epochs', 2), ('workers', 0)):
        if getattr(args, name) < minimum:
            parser.error(f'--{name} must be at least {minimum}, but got {getattr(args, name)}')
    if args.start and not args.start.is_file():
        parser.error(f'--start {args.start} does not exist')
    if args.work_dir and args.work_dir.exists():
        parser.error(f'--work-dir {args.work_dir} exists')
    return args


def start(config: Path, work_dir: Path) -> int:
    """``tools/train.py config --work-dir work_dir --resume`` in a process of its own; gives its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        work_dir.mkdir(exist_ok=True)
        log = os.open(work_dir / 'output.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ['tools/train.py', str(config), '--work-dir', str(work_dir), '--resume']
        runpy.run_path(str(ROOT / 'tools/train.py'), run_name='__main__')
        code = 0
    except SystemExit as stop:
        print(stop.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(pid: int, work_dir: Path) -> None:
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        tail = (work_dir / 'output.txt').read_text()[-3000:]
        raise UserError(f'a training failed; the end of its output:\n{tail}')


class Moment:
    """When a run is killed: at any time, or at the n-th checkpoint, while it is written or when it is in its place."""

    def __init__(self, rng: random.Random, seconds: float, epochs: int) -> None:
        self.kind = rng.choice(['any', 'write', 'written'])
        self.delay = rng.uniform(0, seconds) if self.kind == 'any' else rng.choice([0, 0, rng.uniform(0, 0.02)])
        self.count = rng.randint(1, max(epochs // 2, 1))
        self.began = time.monotonic()
        self.reached: float | None = self.began if self.kind == 'any' else None
        self.seen: Any = None

    def has_come(self, work_dir: Path) -> bool:
        if self.reached is None:
            if self.kind == 'write':
                now = bool(list(work_dir.glob('.epoch_*.tmp')))
                step = now and not self.seen
            else:
                now = {(p.name, p.stat().st_mtime_ns) for p in work_dir.glob('epoch_*.pth') if p.exists()}
                step = self.seen is not None and bool(now - self.seen)
            self.seen = now
            self.count -= step
            if self.count:
                return False
            self.reached = time.monotonic()
        return time.monotonic() - self.reached >= self.delay


def where(work_dir: Path, before: set[str]) -> str:
    """What the kill cut off, by what it left on the disk."""
    if list(work_dir.glob('.*.tmp')):
        return 'while a file was being written'
    pointer = work_dir / 'last_checkpoint'
    named = Path(pointer.read_text()).name if pointer.exists() else ''
    files = {path.name for path in work_dir.glob('epoch_*.pth')}
    if files - before and named not in files - before:
        return 'between a checkpoint and last_checkpoint'
    if len(files) > 2:
        return 'before the outdated checkpoint was removed'
    done = work_dir / 'last_validation'
    if named and not (done.exists() and named == f'epoch_{done.read_text()}.pth'):
        return 'during a validation'
    return 'elsewhere (start, training)'


def result(work_dir: Path, epochs: int) -> dict[str, Any]:
    """Everything that must be equal: all that the last checkpoint holds but times, and all AP by epoch."""
    checkpoint = read_checkpoint(work_dir / f'epoch_{epochs}.pth')
    scalars = read_scalars(work_dir)
    return dict(
        state_dict=checkpoint['state_dict'],
        optimizer=checkpoint['optimizer'],
        param_schedulers=checkpoint['param_schedulers'],
        metrics={name: points for name, points in scalars.items() if name.startswith('coco/')},
        losses=scalars['loss'],
        files=sorted(path.name for path in work_dir.iterdir() if path.suffix in ('.pth', '.tmp')),
    )


def differences(a: Any, b: Any, name: str = '') -> list[str]:
    """Names of what is not the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [name]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f'{name}.{key}'.strip('.'))]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f'{name}[{i}]')]
    if isinstance(a, np.ndarray):
        return [] if np.array_equal(a, b) else [name]
    return [] if a == b or (a != a and b != b) else [name]


def study(args: argparse.Namespace, folder: Path) -> int:
    data = make_shapes(folder / 'shapes', num_train=8, num_val=4, quiet=True)
    config = folder / 'config.py'
    model = f'load_from = {str(args.start.resolve())!r}' if args.start else SMALL
    config.write_text(CONFIG.format(root=ROOT, data=data, model=model, workers=args.workers, epochs=args.epochs))
    reference, seconds = None, 0.0
    for i in range(2):
        began = time.monotonic()
        finish(start(config, folder / f'undisturbed{i}'), folder / f'undisturbed{i}')
        seconds = time.monotonic() - began
        found = result(folder / f'undisturbed{i}', args.epochs)
        if reference is not None and differences(reference, found):
            raise UserError(f'two undisturbed trainings differ in {", ".join(differences(reference, found)[:5])}')
        reference = found
    tensors = len(reference['state_dict'])
    values = [value for points in reference['metrics'].values() for _, value in points]
    print(f'Two undisturbed trainings of {args.epochs} epochs ({seconds:.1f} s) are the same bit for bit.')

    rng, places, faults = random.Random(args.seed), Counter(), []
    read = trainings = 0
    with Progress(transient=True) as progress:
        task = progress.add_task('killing', total=args.kills)
        while sum(places.values()) < args.kills:
            work_dir, killed = folder / f'killed{trainings}', 0
            while True:
                before = {path.name for path in work_dir.glob('epoch_*.pth')}
                moment = Moment(rng, seconds, args.epochs)
                pid, ended = start(config, work_dir), 0
                while not ended and not moment.has_come(work_dir):
                    time.sleep(0.0002)
                    ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    if os.waitstatus_to_exitcode(status):
                        tail = (work_dir / 'output.txt').read_text()[-3000:]
                        faults.append(f'{work_dir.name} did not resume:\n{tail}')
                    break
                os.kill(pid, signal.SIGKILL)
                if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGKILL:
                    continue  # it ended by itself in that moment
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # workers of the loader, which may take seconds to see it
                killed += 1
                places[where(work_dir, before)] += 1
                progress.advance(task)
                files = list(work_dir.glob('epoch_*.pth'))
                for path in files:
                    try:
                        read_checkpoint(path)
                        read += 1
                    except CheckpointError as error:
                        faults.append(str(error))
                if before and not files:
                    faults.append(f'{work_dir.name} lost its checkpoints {", ".join(sorted(before))}')
            trainings += 1
            if not faults:
                wrong = differences(reference, result(work_dir, args.epochs))
                faults += [f'{work_dir.name}, killed {killed} times, differs in {name}' for name in wrong[:5]]
            if faults:
                break
    print(f'{sum(places.values())} kills in {trainings} trainings, each resumed until it came to its end:')
    print('| the kill came | times |\n| --- | --- |')
    for place, times in places.most_common():
        print(f'| {place} | {times} |')
    print(f'{read} checkpoints were read after the kills.')
    for fault in faults:
        print(f'FAULT: {fault}')
    if not faults:
        print(
            f"Every training ended with the undisturbed one's {tensors} tensors of weights and buffers, its optimizer, "
            f'its {len(reference["losses"])} losses and its {len(values)} figures of AP and recall '
            f'({sum(value > 0 for value in values)} of them above 0), bit for bit.'
        )
    return int(bool(faults))


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    register_all_modules()  # imported once, before the forks
    if args.work_dir:
        args.work_dir.mkdir(parents=True)
        code = study(args, args.work_dir.resolve())
    else:
        with tempfile.TemporaryDirectory() as folder:
            code = study(args, Path(folder))
    sys.exit(code)


if __name__ == '__main__':
    run_tool(main)
