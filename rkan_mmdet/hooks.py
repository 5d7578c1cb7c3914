"""Hooks that let a killed training go on as if nothing had been, and end one that computes nonsense."""

from __future__ import annotations

import hashlib
import itertools
import random
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import worker_init_fn
from mmengine.dist import broadcast_object_list, get_rank, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS

from .checkpoint import write_whole
from .checks import check_int


def reseed(seed: int, step: int, rank: int = 0) -> None:
    """Seed Python, NumPy and torch (every device) from a hash of three numbers.

    Args:
        seed (int): The run's seed.
        step (int): The epoch or the iteration.
        rank (int): The process of a distributed run. Defaults to 0.

    Examples:
        >>> reseed(1, 0)
        >>> first = torch.rand(2)
        >>> reseed(1, 0)
        >>> bool((torch.rand(2) == first).all())
        True
    """
    digest = hashlib.sha256(f'{seed} {step} {rank}'.encode()).digest()
    number = int.from_bytes(digest[:4], 'little')  # NumPy takes 32 bits
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 (the generator that MMDetection's transforms use)
    torch.manual_seed(number)


def _quiet_worker(worker_id: int) -> None:
    if worker_id:
        warnings.simplefilter('ignore')


class _Reseeding:
    """The batches of an iteration-based training, each fetched from random numbers that depend on its number alone."""

    def __init__(self, batches: Iterator[Any], seed: int, rank: int) -> None:
        self.batches, self.seed, self.rank, self.count = batches, seed, rank, 0

    def __iter__(self) -> _Reseeding:
        return self

    def __next__(self) -> Any:
        reseed(self.seed, self.count, self.rank)
        self.count += 1
        return next(self.batches)

    def skip_iter(self, num_iters: int) -> None:
        """What MMEngine's fork calls where upstream runs through the batches that it has had.

        The fork would move the sampler alone, and its workers would then draw other augmentations.
        """
        for _ in range(num_iters):
            next(self)


@HOOKS.register_module()
class ReseedHook(Hook):
    """Seed everything anew at each epoch, so that a resumed training is the undisturbed one, bit for bit.

    MMEngine's checkpoints hold no random state. With this hook random numbers follow from the run's seed, the epoch and
    the rank: those of the model and of the data pipeline, in this process and in the loader's workers, which are
    started anew at each epoch. In a training by iterations they follow from the iteration; resuming it, MMEngine runs
    through the data that it has had. A run without a seed in its config has a random one, which its checkpoints name.

    Examples:
        >>> custom_hooks = [dict(type='ReseedHook')]
    """

    priority = 'VERY_HIGH'  # other hooks may draw random numbers

    def before_train_epoch(self, runner: Any) -> None:
        loop, rank = runner.train_loop, get_rank()
        if hasattr(loop, 'dataloader_iterator'):
            # MMEngine seeds its workers alike in every run, and has started them
            loop.dataloader_iterator = _Reseeding(loop.dataloader_iterator, runner.seed, rank)
            return
        reseed(runner.seed, runner.epoch, rank)
        loader = loop.dataloader
        init = loader.worker_init_fn
        if getattr(init, 'func', None) is worker_init_fn:
            # It gives the workers of every epoch the same numbers. Without it torch seeds them from its own generator.
            loader.worker_init_fn = _quiet_worker if init.keywords.get('disable_subprocess_warning') else None
        if getattr(loader, '_iterator', None) is not None:
            loader._iterator = None  # ends persistent workers, whose state no checkpoint has


@HOOKS.register_module()
class FiniteHook(Hook):
    """End a training whose loss or weights are NaN or infinite, before such weights replace a checkpoint.

    MMEngine goes on and saves them. With a loss scaler (``AmpOptimWrapper``), which leaves out such steps, ten losses
    in a row end it.

    Raises:
        FloatingPointError: Names the losses and the images of the batch, or the weights.

    Examples:
        >>> custom_hooks = [dict(type='FiniteHook')]
    """

    priority = 'HIGH'  # before anything is written

    def __init__(self) -> None:
        self.in_a_row = 0

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        values = outputs.items() if isinstance(outputs, dict) else ()
        # loggers read every value too, so on a GPU nothing waits that would not
        wrong = [name for name, value in values if isinstance(value, torch.Tensor) and not bool(value.isfinite().all())]
        self.in_a_row = self.in_a_row + 1 if wrong else 0
        if self.in_a_row >= (10 if hasattr(runner.optim_wrapper, 'loss_scaler') else 1):
            samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
            images = [str(getattr(sample, 'img_path', '?')) for sample in samples or ()]
            raise FloatingPointError(
                f'{", ".join(wrong)} of iteration {runner.iter + 1} is NaN or infinite, images {", ".join(images)}: '
                'lower the learning rate, clip gradients (optim_wrapper.clip_grad), or look at these images; '
                '--resume goes on from the last checkpoint'
            )

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        wrong = [
            name
            for name, value in checkpoint['state_dict'].items()
            if value.is_floating_point() and not bool(value.isfinite().all())
        ]
        if wrong:
            raise FloatingPointError(
                f'{len(wrong)} weights are NaN or infinite after iteration {runner.iter + 1}, such as {wrong[0]}: '
                'nothing is saved; --resume goes on from the last checkpoint'
            )


class _WholeFiles(LocalBackend):
    """A local disk on which a file is replaced whole or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        write_whole(filepath, obj)


register_backend('rkan_whole', _WholeFiles, force=True)


def _plain(value: Any) -> Any:
    """Without classes of configs, which no checkpoint may ask for."""
    if isinstance(value, ConfigDict):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _plain(item)) for key, item in value.items())
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


class _RemovesLater:
    """A file backend whose removals wait until they are asked for."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.waiting = backend, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        self.waiting.append(str(path))

    rmtree = remove


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """MMEngine's ``CheckpointHook``, with every option of it, whose files survive a kill at any moment.

    A checkpoint is written under a temporary name and put in its place in one step, and so is ``last_checkpoint``. The
    outdated one is removed after that, not before. Elsewhere than on a local disk the backend decides. A resumed
    training first validates, if the run that was killed did not come to it. The best checkpoint of a run in another
    directory, which a resumed one knows of, is left alone.

    Raises:
        TypeError: ``interval`` or ``max_keep_ckpts`` is no int.

    Examples:
        >>> default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook', interval=1, max_keep_ckpts=3))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ('interval', 'max_keep_ckpts'):
            check_int(name, getattr(self, name), -1)

    def before_train(self, runner: Any) -> None:
        super().before_train(runner)
        if type(self.file_backend) is LocalBackend and not (self.file_client_args or self.backend_args):
            self.backend_args = dict(backend='rkan_whole')
        if getattr(self, 'best_ckpt_path', None):
            self.best_ckpt_path = self._in_own_directory(self.best_ckpt_path)
        for key, path in getattr(self, 'best_ckpt_path_dict', {}).items():
            self.best_ckpt_path_dict[key] = path and self._in_own_directory(path)
        self._validate_what_was_cut_off(runner)

    def _in_own_directory(self, path: str) -> str | None:
        """The file of this name here, or None: what lies elsewhere is of another run, or of where this one was."""
        own = self.file_backend.join_path(self.out_dir, Path(path).name)
        return own if self.file_backend.exists(own) else None

    def _validate_what_was_cut_off(self, runner: Any) -> None:
        loop = runner.train_loop
        step = self._step(runner)
        done = Path(runner.work_dir, 'last_validation')
        if not step and is_main_process():
            done.unlink(missing_ok=True)  # of an earlier run
        if not step or runner.val_loop is None:
            return
        # so that a new best score gets into the checkpoint that the run goes on from, as it would have
        self.last_ckpt = runner.message_hub.get_info('last_ckpt')
        if runner.message_hub.get_info('last_validation') == step:
            return  # it came before that checkpoint
        loop._decide_current_val_interval()
        end = loop.max_iters if hasattr(loop, 'dataloader_iterator') else loop.max_epochs
        if step < loop.val_begin or (step % loop.val_interval and step != end):
            return
        schedulers = runner.param_schedulers or []
        if isinstance(schedulers, dict):
            schedulers = itertools.chain(*schedulers.values())
        # such as ReduceOnPlateauLR: what they learned of it is not in a checkpoint that was written before it
        needed = any(getattr(scheduler, 'need_val_args', False) for scheduler in schedulers)
        wanted = [needed or not (done.is_file() and done.read_text().strip() == str(step))]
        broadcast_object_list(wanted)  # all processes do as the first, whatever they see of its disk
        if wanted[0]:
            runner.logger.info(f'The validation after step {step} was cut off or is not known of: it is made now')
            runner.val_loop.run()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        for name in ('meta', 'message_hub'):  # a config's metainfo gets into both
            checkpoint[name] = _plain(checkpoint.get(name))

    @staticmethod
    def _step(runner: Any) -> int:
        """What validation counts: epochs, or iterations."""
        return runner.iter if hasattr(runner.train_loop, 'dataloader_iterator') else runner.epoch

    def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
        if not hasattr(self, 'file_backend'):  # runner.val() by itself: nothing is trained, and nothing to be saved
            return
        runner.message_hub.update_info('last_validation', self._step(runner))
        super().after_val_epoch(runner, metrics)
        if is_main_process():
            write_whole(Path(runner.work_dir, 'last_validation'), str(self._step(runner)).encode())

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        outdated = []
        if self.max_keep_ckpts > 0 and (not self.keep_ckpt_ids or self.keep_ckpt_ids[-1] != step):
            kept = [*self.keep_ckpt_ids, step]
            outdated = kept[: -self.max_keep_ckpts]
            self.keep_ckpt_ids.append(step)  # a deque, which drops what is outdated
            # the outdated ones are named in the file, so that a resumed run removes what a killed one left
            runner.message_hub.update_info('keep_ckpt_ids', kept)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if outdated:
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        if not is_main_process():
            return
        write_whole(Path(runner.work_dir, 'last_checkpoint'), str(self.last_ckpt).encode())
        for old in outdated:
            self._remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old)))

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, Any]) -> None:
        backend = self.file_backend
        self.file_backend = later = _RemovesLater(backend)
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        new = [getattr(self, 'best_ckpt_path', None), *getattr(self, 'best_ckpt_path_dict', {}).values()]
        for path in later.waiting:
            if path not in new:
                self._remove(path)

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):  # of deepspeed
            self.file_backend.rmtree(path)
