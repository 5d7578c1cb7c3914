"""A resumed training is the undisturbed one, bit for bit, and no checkpoint is lost on the way. With a toy model."""

import random
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from rkan_mmdet import hooks
from rkan_mmdet.checkpoint import CheckpointError, read_checkpoint
from rkan_mmdet.hooks import AtomicCheckpointHook


class Noisy(torch.utils.data.Dataset):
    """Items that depend on all three generators, as the transforms of a pipeline do."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict:
        noise = [random.random(), np.random.rand(), float(torch.rand(1))]  # noqa: NPY002
        return dict(inputs=torch.tensor([float(i), *noise]))


class Toy(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))

    def forward(self, inputs: Any, mode: str = 'tensor') -> Any:
        y = self.layers(torch.stack(list(inputs)))
        return dict(loss=y.square().mean()) if mode == 'loss' else list(y)


class Mean(BaseMetric):
    calls = 0

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [float(sample) for sample in data_samples]

    def compute_metrics(self, results: list) -> dict:
        type(self).calls += 1
        return dict(score=float(np.mean(results)))


class Stop(BaseException):
    """A kill."""


class StopHook(hooks.Hook):
    priority = 'LOWEST'

    def __init__(self, at: Optional[int]) -> None:
        self.at = at

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        if runner.iter + 1 == self.at:
            raise Stop


@pytest.fixture
def train(tmp_path: Path) -> Callable:
    def run(
        name: str, epochs: int = 4, workers: int = 0, stop: Optional[int] = None, resume: Any = False,
        reseed: bool = True, by_epoch: bool = True, val: bool = False, scheduler: Optional[dict] = None, **saving: Any,
    ) -> Runner:  # fmt: skip
        random.seed(), np.random.seed(), torch.seed()  # noqa: NPY002 (whatever ran before in this process)
        sampler = dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=True)
        loader = dict(dataset=Noisy(), batch_size=2, num_workers=workers, persistent_workers=workers > 0)
        loop = dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=1)
        if not by_epoch:
            loop = dict(type='IterBasedTrainLoop', max_iters=epochs, val_interval=1)
        saving = dict(dict(type='AtomicCheckpointHook', interval=1, by_epoch=by_epoch), **saving)
        if val:
            loader_of_val = dict(loader, sampler=dict(type='DefaultSampler', shuffle=False), num_workers=0)
            loader_of_val['persistent_workers'] = False
            options = dict(val_dataloader=loader_of_val, val_cfg=dict(), val_evaluator=dict(type=Mean))
        else:
            options, _ = {}, loop.pop('val_interval')
        runner = Runner(
            model=Toy(), work_dir=str(tmp_path / name), experiment_name=f'{name}{random.random()}',
            train_dataloader=dict(loader, sampler=sampler), train_cfg=loop,
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
            param_scheduler=scheduler or dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=10),
            default_hooks=dict(checkpoint=saving), randomness=dict(seed=5, deterministic=True),
            custom_hooks=[StopHook(stop), *([dict(type='ReseedHook')] if reseed else [])],
            resume=bool(resume), load_from=resume if isinstance(resume, str) else None, log_level='ERROR', **options,
        )  # fmt: skip
        # the same start for all: MMEngine seeds when the runner is built, after the model was
        torch.manual_seed(0)
        for module in runner.model.modules():
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()
        if stop is None:
            runner.train()
        else:
            with pytest.raises(Stop):
                runner.train()
        # the workers end here; several loaders that are collected at once wait for each other's for seconds
        runner.train_loop.dataloader_iterator = runner.train_loop.dataloader._iterator = None
        return runner

    yield run
    torch.use_deterministic_algorithms(False)


def same(a: Runner, b: Runner) -> bool:
    left, right = a.model.state_dict(), b.model.state_dict()
    return all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('stop', [5, 8, 14])
def test_resumed_by_epochs_is_undisturbed(workers: int, stop: int, train: Callable) -> None:
    undisturbed = train('a', workers=workers)
    train('b', workers=workers, stop=stop)
    assert same(undisturbed, train('b', workers=workers, resume=True))


@pytest.mark.parametrize('workers', [0, 2])
def test_resumed_by_iterations_is_undisturbed(workers: int, train: Callable) -> None:
    undisturbed = train('a', 12, workers, by_epoch=False)
    train('b', 12, workers, by_epoch=False, stop=7)
    assert same(undisturbed, train('b', 12, workers, by_epoch=False, resume=True))


@pytest.mark.parametrize('workers', [0, 2])
def test_without_the_hook_it_is_not(workers: int, train: Callable) -> None:
    """So the tests above can fail."""
    undisturbed = train('a', workers=workers, reseed=False)
    train('b', workers=workers, reseed=False, stop=9)
    assert not same(undisturbed, train('b', workers=workers, reseed=False, resume=True))


def test_epochs_differ_from_each_other(train: Callable) -> None:
    """Reseeding must not give every epoch the same augmentation."""
    seen: list = []

    class Recorder(Toy):
        def forward(self, inputs: Any, mode: str = 'tensor') -> Any:
            seen.extend(float(x[2]) for x in inputs)
            return super().forward(inputs, mode)

    for workers in (0, 2):
        seen.clear()
        globals()['Toy'], kept = Recorder, Toy
        try:
            train(f'a{workers}', epochs=3, workers=workers)
        finally:
            globals()['Toy'] = kept
        assert len(seen) == 24
        assert len(set(seen)) == 24


def steps(folder: Path) -> list:
    return sorted(int(path.stem.split('_')[1]) for path in folder.glob('epoch_*.pth'))


def test_the_outdated_checkpoint_goes_last(train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MMEngine removes it first: with max_keep_ckpts=1 a kill while saving then leaves nothing."""
    train('a', epochs=2, max_keep_ckpts=1)
    assert steps(tmp_path / 'a') == [2]
    write = hooks.write_whole

    def full(path: Any, content: bytes) -> None:
        if str(path).endswith('epoch_3.pth'):
            raise CheckpointError(f'{path} can not be written')
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(hooks, 'write_whole', full)
        with pytest.raises(CheckpointError):
            train('a', epochs=3, max_keep_ckpts=1, resume=True)
    assert steps(tmp_path / 'a') == [2]
    assert (tmp_path / 'a' / 'last_checkpoint').read_text().endswith('epoch_2.pth')
    read_checkpoint(tmp_path / 'a' / 'epoch_2.pth')
    train('a', epochs=3, max_keep_ckpts=1, resume=True)
    assert steps(tmp_path / 'a') == [3]
    assert not list((tmp_path / 'a').glob('.*'))


def test_what_a_kill_left_is_removed_on_resume(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Any, path: str) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpointHook, '_remove', killed)
        with pytest.raises(Stop):
            train('a', epochs=4, max_keep_ckpts=2)
    assert steps(tmp_path / 'a') == [1, 2, 3]
    train('a', epochs=4, max_keep_ckpts=2, resume=True)
    assert steps(tmp_path / 'a') == [3, 4]


def test_files_are_what_mmengine_leaves(train: Callable, tmp_path: Path) -> None:
    """The same names and contents, by every option that has to do with files."""
    options = dict(
        epochs=5, val=True, max_keep_ckpts=2, save_best='score', rule='greater', published_keys=['state_dict']
    )
    train('ours', **options)
    train('theirs', type='CheckpointHook', **options)
    ours, theirs = ({path.name for path in (tmp_path / name).glob('*.pth')} for name in ('ours', 'theirs'))
    assert {name.split('-')[0] for name in ours} == {name.split('-')[0] for name in theirs}
    assert len([name for name in ours if name.startswith('best_score')]) == 2  # one is published
    assert (tmp_path / 'ours/last_checkpoint').read_text().endswith('ours/epoch_5.pth')
    hub = read_checkpoint(tmp_path / 'ours/epoch_5.pth')['message_hub']['runtime_info']
    assert hub['last_ckpt'].endswith('epoch_5.pth')
    assert 'best_ckpt' in hub


def test_the_best_goes_after_the_better(train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed, scores = [], iter([1.0, 2.0, 3.0])

    def remove(self: Any, path: str) -> None:
        if 'best' in Path(path).name:
            assert len(list(Path(path).parent.glob('best_*.pth'))) == 2
            removed.append(path)
        Path(path).unlink()

    monkeypatch.setattr(AtomicCheckpointHook, '_remove', remove)
    monkeypatch.setattr(Mean, 'compute_metrics', lambda self, results: dict(score=next(scores)))
    train('a', epochs=3, val=True, save_best='score', rule='greater')
    assert len(removed) == 2
    assert [path.name for path in (tmp_path / 'a').glob('best_*')] == ['best_score_epoch_3.pth']


def test_what_a_config_names_of_its_data_can_be_read_again(train: Callable, tmp_path: Path) -> None:
    runner = train('a', epochs=1)
    meta = Config(dict(metainfo=dict(classes=('cat',), weights=dict(cat=[dict(a=1.0)])))).metainfo
    checkpoint = dict(meta=dict(dataset_meta=meta), message_hub=dict(runtime_info=OrderedDict(meta=[meta])))
    hook = next(hook for hook in runner.hooks if isinstance(hook, AtomicCheckpointHook))
    hook.before_save_checkpoint(runner, checkpoint)
    torch.save(dict(checkpoint, state_dict={}), tmp_path / 'a.pth')
    found = read_checkpoint(tmp_path / 'a.pth')
    assert found['meta']['dataset_meta'] == dict(classes=('cat',), weights=dict(cat=[dict(a=1.0)]))
    assert found['message_hub']['runtime_info']['meta'] == [found['meta']['dataset_meta']]


def test_a_validation_by_itself_needs_no_training_set(train: Callable, tmp_path: Path) -> None:
    class Absent(Noisy):
        def __init__(self) -> None:
            raise FileNotFoundError('no training set')

    runner = train('a', epochs=1, val=True)
    other = Runner(
        model=runner.model, work_dir=str(tmp_path / 'b'), experiment_name='by itself', log_level='ERROR',
        train_dataloader=dict(dataset=Absent, batch_size=1, sampler=dict(type='DefaultSampler')),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=1), optim_wrapper=dict(optimizer=dict(type='SGD', lr=1)),
        val_dataloader=runner.val_dataloader, val_cfg=dict(), val_evaluator=dict(type=Mean),
        default_hooks=dict(checkpoint=dict(type='AtomicCheckpointHook', interval=1)),
    )  # fmt: skip
    assert other.val()


def test_a_validation_that_was_cut_off_is_made_up_for(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Any, results: list) -> dict:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Mean, 'compute_metrics', killed)
        with pytest.raises(Stop):
            train('a', epochs=1, val=True)
    Mean.calls = 0
    train('a', epochs=1, val=True, resume=True)  # MMEngine has nothing to do here
    assert Mean.calls == 1
    train('a', epochs=1, val=True, resume=True)
    assert Mean.calls == 1, 'made once'
    train('a', epochs=2, val=True, resume=True)
    assert Mean.calls == 2


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Validations whose score depends on the epoch alone."""

    def by_epoch(*scores: float) -> None:
        def compute(self: Any, results: list) -> dict:
            type(self).calls += 1
            done = MessageHub.get_current_instance().get_info('iter')
            score = scores[-(-done // 4) - 1]  # epochs of 4 iterations; one more is done when it is made up for
            return dict(score=score, other=-score)

        monkeypatch.setattr(Mean, 'compute_metrics', compute)

    return by_epoch


@pytest.mark.parametrize('stop', [9, 14, 15, 19])
def test_a_schedule_by_scores_is_resumed(stop: int, train: Callable, scored: Callable) -> None:
    """Its step comes after the checkpoint of its epoch was written."""
    scored(3.0, 2.0, 2.5, 1.0, 1.0, 1.0)
    options = dict(epochs=6, val=True, save_best='score', rule='greater', scheduler=dict(
        type='ReduceOnPlateauLR', monitor='score', rule='greater', factor=0.1, patience=1))  # fmt: skip
    undisturbed = train('a', **options)
    train('b', stop=stop, **options)
    resumed = train('b', resume=True, **options)
    assert undisturbed.optim_wrapper.get_lr() == resumed.optim_wrapper.get_lr() != dict(lr=[0.01])
    assert same(undisturbed, resumed)


def test_the_best_after_two_kills(
    train: Callable, scored: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best score of a validation that was made up for is in the checkpoint from which the next run goes on."""
    scored(1.0, 9.0, 3.0, 2.0)
    compute = Mean.compute_metrics
    options = dict(epochs=4, val=True, save_best='score', rule='greater')
    train('a', **options)

    def killed(self: Any, results: list) -> dict:
        if MessageHub.get_current_instance().get_info('iter') > 4:
            raise Stop
        return compute(self, results)

    with monkeypatch.context() as patch:
        patch.setattr(Mean, 'compute_metrics', killed)
        with pytest.raises(Stop):
            train('b', **options)
    train('b', stop=10, resume=True, **options)
    train('b', resume=True, **options)
    for name in ('a', 'b'):
        hub = read_checkpoint(tmp_path / name / 'epoch_4.pth')['message_hub']['runtime_info']
        assert (hub['best_score'], Path(hub['best_ckpt']).name) == (9.0, 'best_score_epoch_2.pth')
        assert [path.name for path in (tmp_path / name).glob('best_*')] == ['best_score_epoch_2.pth']


def test_the_best_of_another_directory_is_left_alone(train: Callable, scored: Callable, tmp_path: Path) -> None:
    scored(1.0, 2.0, 3.0)
    for keys in ('score', ['score', 'other']):
        options = dict(val=True, save_best=keys, rule='greater')
        shutil.rmtree(tmp_path / 'a', ignore_errors=True)
        train('a', epochs=2, **options)
        train('b', epochs=3, resume=str(tmp_path / 'a/epoch_2.pth'), **options)
        assert (tmp_path / 'a/best_score_epoch_2.pth').is_file()
        assert (tmp_path / 'b/best_score_epoch_3.pth').is_file()


def test_what_an_earlier_run_validated_does_not_count(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    train('a', epochs=1, val=True)
    test_a_validation_that_was_cut_off_is_made_up_for(train, monkeypatch)


@pytest.mark.parametrize('name', ['interval', 'max_keep_ckpts'])
def test_options_of_the_wrong_kind(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an int >= -1, but got 'x'"):
        AtomicCheckpointHook(**{name: 'x'})


def test_by_iterations_too(train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Mean.calls = 0
    train('a', 3, by_epoch=False, val=True, stop=2)
    assert Mean.calls == 1
    train('a', 3, by_epoch=False, val=True, resume=True)
    assert Mean.calls == 3
    assert (tmp_path / 'a/last_validation').read_text() == '3'


def test_another_backend_is_left_alone(tmp_path: Path) -> None:
    hook = AtomicCheckpointHook(backend_args=dict(backend='local'))
    runner = type('R', (), {})()
    runner.work_dir, runner.train_loop, runner.val_loop, runner.epoch = str(tmp_path), object(), None, 0
    runner.logger = type('L', (), dict(info=lambda *_: None))()
    hook.before_train(runner)
    assert hook.backend_args == dict(backend='local')
    hook = AtomicCheckpointHook()
    hook.before_train(runner)
    assert hook.backend_args == dict(backend='rkan_whole')
