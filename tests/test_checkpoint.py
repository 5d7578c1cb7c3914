"""What MMEngine writes can be read, nothing else runs, and a torn file is told from a whole one."""

import builtins
import errno
import os
import pickle
import random
import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import CheckpointLoader, load_checkpoint

from rkan_mmdet import checkpoint as module
from rkan_mmdet.checkpoint import (
    CheckpointError,
    TornCheckpointError,
    UnsafeCheckpointError,
    dataset_meta_of,
    find_training_state,
    read_checkpoint,
    read_training_state,
    weights_of,
    write_whole,
)
from rkan_mmdet.detector import load_weights


@pytest.fixture(params=['of this torch', 'for torch before 2.6'])
def read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """``read_checkpoint`` in both its ways; Python's own unpickler with a list serves where torch has none."""
    monkeypatch.setattr(module, '_HAS_SAFE_LOAD', request.param == 'of this torch' and module._HAS_SAFE_LOAD)
    return read_checkpoint


def training_state(epoch: int = 1) -> dict:
    hub = MessageHub.get_instance('test_checkpoint')
    for value in (3.0, 1.0, 2.0):
        hub.update_scalar('train/loss', value)
    hub.update_info('best_score', np.float64(0.5))
    weight = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], 0.1)
    weight.sum().backward()
    optimizer.step()
    return dict(
        meta=dict(epoch=epoch, iter=epoch * 4, seed=1, dataset_meta=dict(classes=('a',), palette=[(1, 2, 3)])),
        state_dict=dict(weight=weight.detach(), half=torch.ones(2).half()),
        message_hub=hub.state_dict(),
        optimizer=optimizer.state_dict(),
        param_schedulers=[],
    )


def test_a_training_state_survives(read: Callable, tmp_path: Path) -> None:
    torch.save(training_state(), tmp_path / 'a.pth')
    found = read(tmp_path / 'a.pth')
    history = found['message_hub']['log_scalars']['train/loss']
    assert isinstance(history, HistoryBuffer)
    assert (history.min(), history.max(), history.current()) == (1.0, 3.0, 2.0)
    assert history.statistics('mean') == pytest.approx(2.0)
    assert torch.equal(found['state_dict']['weight'], training_state()['state_dict']['weight'])
    assert found['message_hub']['runtime_info']['best_score'] == 0.5
    assert found['optimizer']['state'][0]['step'] == 1


SCHEDULERS = dict(
    ConstantLR={}, CosineAnnealingLR=dict(T_max=5, eta_min=0), ExponentialLR=dict(gamma=0.5), LinearLR={}, PolyLR={},
    MultiStepLR=dict(milestones=[1]), StepLR=dict(step_size=1), OneCycleLR=dict(eta_max=0.1, total_steps=10),
    CosineRestartLR=dict(periods=[1, 2], restart_weights=[1, 1], eta_min=0), ReduceOnPlateauLR={},
)  # fmt: skip


@pytest.mark.parametrize('name', SCHEDULERS)
def test_every_scheduler_survives(name: str, read: Callable, tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1, momentum=0.9)
    scheduler = PARAM_SCHEDULERS.get(name)(optimizer, **SCHEDULERS[name])
    torch.save(scheduler.state_dict(), tmp_path / 'a.pth')
    found = read(tmp_path / 'a.pth')
    assert found.keys() == scheduler.state_dict().keys()
    if name == 'OneCycleLR':
        assert found['anneal_func'](0.0, 1.0, 0.5) == pytest.approx(0.5)


class Payload:
    """Would touch a file when unpickled."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def hostile(place: str, payload: Payload) -> Any:
    state = training_state()
    if place == 'plain':
        return payload
    if place == 'state_dict':
        state['state_dict']['evil'] = payload
    elif place == 'optimizer':
        state['optimizer']['state'][0]['exp_avg'] = [payload]
    elif place == 'meta':
        state['meta']['dataset_meta']['palette'] = ((payload,),)
    elif place == 'nested':
        state['message_hub']['runtime_info']['a'] = [dict(b=(1, [dict(c=payload)]))]
    return state


@pytest.mark.parametrize('place', ['plain', 'nested', 'state_dict', 'meta', 'optimizer'])
@pytest.mark.parametrize('zip_format', [True, False])
@pytest.mark.parametrize('how', ['touch', 'system', 'exec'])
def test_a_hostile_file_is_refused(place: str, zip_format: bool, how: str, read: Callable, tmp_path: Path) -> None:
    from mmengine.runner.checkpoint import load_checkpoint

    touched, file = tmp_path / 'touched', tmp_path / 'bad.pth'
    payload, asked = {
        'touch': (Payload(Path.touch, touched), 'pathlib'),
        'system': (Payload(os.system, f'touch {touched}'), f'{os.name}.system'),
        'exec': (Payload(builtins.exec, f'open({str(touched)!r}, "w")'), 'exec'),
    }[how]
    torch.save(hostile(place, payload), file, _use_new_zipfile_serialization=zip_format)
    with pytest.raises(UnsafeCheckpointError, match=f'bad.pth can not be read safely: .*{asked}') as caught:
        read(file)
    assert '\n' not in str(caught.value)
    with pytest.raises(pickle.UnpicklingError):  # MMEngine's own function
        load_checkpoint(torch.nn.Linear(1, 1), str(file))
    assert not touched.exists()


def test_no_setting_of_torch_lets_a_hostile_file_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a fork of MMEngine that asks for weights_only=False, or a user who followed the advice in torch's message."""
    from mmengine.runner.checkpoint import load_checkpoint

    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', raising=False)  # a tool of ours has run in this process
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    torch.save(Payload(Path.touch, tmp_path / 'touched'), tmp_path / 'bad.pth')
    with pytest.raises(UnsafeCheckpointError):
        load_checkpoint(torch.nn.Linear(1, 1), str(tmp_path / 'bad.pth'))
    assert not (tmp_path / 'touched').exists()


def test_the_old_way_refuses_torchscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, '_HAS_SAFE_LOAD', False)
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / 'script.pth')
    with pytest.raises(UnsafeCheckpointError, match='TorchScript'):
        read_checkpoint(tmp_path / 'script.pth')


@pytest.mark.parametrize(
    'arguments', [(HistoryBuffer, '__init__'), (HistoryBuffer, '_set_default_statistics'), (dict, 'mean')]
)
def test_getattr_answers_for_the_statistics_alone(arguments: tuple, read: Callable, tmp_path: Path) -> None:
    torch.save(Payload(getattr, *arguments), tmp_path / 'bad.pth')
    with pytest.raises(UnsafeCheckpointError):
        read(tmp_path / 'bad.pth')


@pytest.mark.parametrize('zip_format', [True, False])
def test_a_cut_file_is_torn(zip_format: bool, read: Callable, tmp_path: Path) -> None:
    torch.save(training_state(), tmp_path / 'whole.pth', _use_new_zipfile_serialization=zip_format)
    whole = (tmp_path / 'whole.pth').read_bytes()
    torn = tmp_path / 'torn.pth'
    for length in [0, 1, 100, *range(0, len(whole), max(len(whole) // 40, 1)), len(whole) - 1]:
        torn.write_bytes(whole[:length])
        # the old format, cut within a name, asks for something odd
        with pytest.raises(TornCheckpointError if zip_format else CheckpointError, match=r'torn\.pth can not be read'):
            read(torn)
        zeros = whole[:length] + bytes(len(whole) - length)  # the size is there and the rest never came
        # the old format has no checksums, and some of zip's last 22 bytes (where its list is) can be done without
        if zip_format and length < len(whole) - 22:
            torn.write_bytes(zeros)
            with pytest.raises(TornCheckpointError, match=r'torn\.pth'):
                read(torn)


def test_a_changed_byte_is_seen(read: Callable, tmp_path: Path) -> None:
    """The weights can not be changed unseen; bytes that mean nothing (padding, names in headers) may be."""
    torch.save(dict(state_dict=dict(a=torch.randn(5000))), tmp_path / 'a.pth')
    whole, rng, seen = (tmp_path / 'a.pth').read_bytes(), random.Random(0), 0
    before = read(tmp_path / 'a.pth')['state_dict']['a']
    for _ in range(200):
        content = bytearray(whole)
        content[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (tmp_path / 'b.pth').write_bytes(content)
        try:
            assert torch.equal(read(tmp_path / 'b.pth')['state_dict']['a'], before)
        except CheckpointError:
            seen += 1
    assert seen > 150


def test_without_checksums_a_file_is_read(tmp_path: Path) -> None:
    if not hasattr(torch.serialization, 'set_crc32_options'):
        pytest.skip('this torch always writes checksums')
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(dict(a=torch.ones(3)), tmp_path / 'a.pth')
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / 'a.pth')['a'].sum() == 3


@pytest.mark.parametrize('content', [b'', b'_base_ = []\n', b'{"a": 1}', b'\x89PNG\r\n\x1a\n' + bytes(50)])
def test_what_is_no_checkpoint(content: bytes, read: Callable, tmp_path: Path) -> None:
    (tmp_path / 'a.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match=r'a\.pth can not be read safely'):
        read(tmp_path / 'a.pth')


def test_weights_and_training_states_are_told_apart(tmp_path: Path) -> None:
    torch.save(dict(state_dict=dict(a=torch.ones(1))), tmp_path / 'weights.pth')
    assert weights_of(read_checkpoint(tmp_path / 'weights.pth'), 'weights.pth')[0].keys() == {'a'}
    with pytest.raises(
        CheckpointError, match=r'can not be resumed, since it lacks message_hub, optimizer, meta\.epoch, meta\.iter'
    ):
        read_training_state(tmp_path / 'weights.pth')
    for content in ([1, 2], dict(epoch=3), dict(state_dict={})):
        torch.save(content, tmp_path / 'none.pth')
        with pytest.raises(CheckpointError, match='holds no weights'):
            weights_of(read_checkpoint(tmp_path / 'none.pth'), 'none.pth')


def test_a_config_in_a_checkpoint_is_not_run(read: Callable, tmp_path: Path) -> None:
    """MMEngine's Runner.resume would run it as Python."""
    state = training_state()
    state['meta']['config'] = f'open({str(tmp_path / "touched")!r}, "w")\n'
    torch.save(state, tmp_path / 'epoch_1.pth')
    for loaded in (read(tmp_path / 'epoch_1.pth'), CheckpointLoader.load_checkpoint(str(tmp_path / 'epoch_1.pth'))):
        assert 'config' not in loaded['meta']
        assert loaded['meta']['epoch'] == 1


@pytest.mark.parametrize('part', [
    dict(meta='x'), dict(meta={3: 4}), dict(meta=dict(dataset_meta=['a'])), dict(state_dict={3: torch.ones(1)}),
])  # fmt: skip
def test_weights_of_no_known_form(part: dict, tmp_path: Path) -> None:
    torch.save(dict(dict(state_dict=dict(a=torch.ones(1))), **part), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=r'a\.pth is of no known form: .* must be a dict whose keys are names'):
        weights_of(read_checkpoint(tmp_path / 'a.pth'), tmp_path / 'a.pth')


def test_what_joined_sets_leave() -> None:
    metas = [dict(classes=('a',)), dict(classes=('a',), palette=[(1, 2, 3)])]
    _, meta = weights_of(dict(state_dict=dict(a=torch.ones(1)), meta=dict(dataset_meta=metas)), 'a.pth')
    assert meta['dataset_meta'] == metas
    assert dataset_meta_of(meta) == metas[0]


@pytest.mark.parametrize(('name', 'value'), [
    ('epoch', 'x'), ('epoch', 1.5), ('epoch', True), ('iter', -3), ('message_hub', 5), ('optimizer', None),
    ('seed', 'x'),
])  # fmt: skip
def test_a_training_state_of_no_known_form(name: str, value: Any, tmp_path: Path) -> None:
    state = training_state()
    (state if name in state else state['meta'])[name] = value
    torch.save(state, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=rf'a\.pth can not be resumed.* (meta\.)?{name}'):
        read_training_state(tmp_path / 'a.pth')


def test_checkpoints_in_another_directory_are_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As with the hook's out_dir; and a link to nothing is no checkpoint."""
    work, out = tmp_path / 'work', tmp_path / 'out'
    work.mkdir(), out.mkdir()
    for epoch in (1, 2):
        save(out / f'epoch_{epoch}.pth', epoch)
    (work / 'last_checkpoint').write_text(str(out / 'epoch_2.pth'))
    (out / 'last_checkpoint').unlink()
    (work / 'latest.pth').symlink_to(tmp_path / 'nowhere.pth')
    assert find_training_state(work)[1]['meta']['epoch'] == 2
    (out / 'epoch_2.pth').write_bytes(b'')
    assert find_training_state(work)[1]['meta']['epoch'] == 1
    assert 'epoch_2.pth can not be read safely' in capsys.readouterr().err


def test_a_moved_directory_goes_on_with_its_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / 'a').mkdir()
    for epoch in (4, 5):
        save(tmp_path / 'a' / f'epoch_{epoch}.pth', epoch)
    (tmp_path / 'a').rename(tmp_path / 'kept')
    (tmp_path / 'a').mkdir()
    save(tmp_path / 'a' / 'epoch_5.pth', 105)  # of another training, where the pointer of the moved one still points
    assert find_training_state(tmp_path / 'kept')[1]['meta']['epoch'] == 5
    (tmp_path / 'kept' / 'epoch_5.pth').write_bytes(b'')
    assert find_training_state(tmp_path / 'kept')[1]['meta']['epoch'] == 4


def test_a_copied_directory_takes_no_checkpoint_of_the_first(tmp_path: Path) -> None:
    first, copy = tmp_path / 'a', tmp_path / 'b'
    first.mkdir()
    for epoch in (2, 9, 10):
        save(first / f'epoch_{epoch}.pth', epoch)
    (first / 'last_checkpoint').write_text(str(first / 'epoch_10.pth'))
    shutil.copytree(first, copy)
    for i, epoch in enumerate((10, 9, 2)):  # in the order in which they were copied
        os.utime(copy / f'epoch_{epoch}.pth', (i, i))
    (copy / 'epoch_10.pth').unlink()
    path, state = find_training_state(copy)
    assert (Path(path).parent, state['meta']['epoch']) == (copy, 9)
    save(copy / 'epoch_11.pth', 11)  # from which the run went back
    (copy / 'last_checkpoint').write_text(str(copy / 'epoch_9.pth'))
    (copy / 'epoch_9.pth').write_bytes(b'')
    assert find_training_state(copy)[1]['meta']['epoch'] == 2


def test_a_template_without_a_number(tmp_path: Path) -> None:
    save(tmp_path / 'last.pth', 3)
    assert find_training_state(tmp_path, 'last.pth')[1]['meta']['epoch'] == 3


def test_what_says_nothing_of_the_file_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / 'epoch_1.pth', 1)
    for error in (
        PermissionError(errno.EACCES, 'Permission denied'),
        torch.cuda.OutOfMemoryError('CUDA out of memory'),
    ):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(torch, 'load', fail)
        with pytest.raises(type(error)):
            read_checkpoint(tmp_path / 'epoch_1.pth')


def save(path: Path, epoch: int) -> None:
    torch.save(training_state(epoch), path)
    os.utime(path, (epoch, epoch))
    (path.parent / 'last_checkpoint').write_text(str(path))


def test_the_last_whole_checkpoint_is_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert find_training_state(tmp_path) is None
    assert find_training_state(tmp_path / 'nowhere') is None
    for epoch in (8, 9, 10):
        save(tmp_path / f'epoch_{epoch}.pth', epoch)
    (tmp_path / '.epoch_11.pth.tmp').write_bytes(b'half')
    torch.save(dict(state_dict=dict(a=torch.ones(1))), tmp_path / 'pretrained.pth')
    torch.save(training_state(99), tmp_path / 'best_coco_epoch_9.pth')

    def epoch() -> int:
        path, state = find_training_state(tmp_path)
        assert Path(path).name == f'epoch_{state["meta"]["epoch"]}.pth'
        return state['meta']['epoch']

    assert epoch() == 10
    assert capsys.readouterr().err == ''
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_9.pth'))  # killed before it was written anew
    assert epoch() == 9
    for pointer in ('', '/elsewhere/epoch_10.pth', 'nowhere.pth'):
        (tmp_path / 'last_checkpoint').write_text(pointer)
        assert epoch() == 10
    (tmp_path / 'last_checkpoint').unlink()
    assert epoch() == 10

    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_10.pth'))
    (tmp_path / 'epoch_10.pth').write_bytes((tmp_path / 'epoch_10.pth').read_bytes()[:3000])
    assert epoch() == 9
    warned = capsys.readouterr().err
    assert 'epoch_10.pth can not be read safely: it is torn' in warned
    assert 'the one before it' in warned
    for path in tmp_path.glob('epoch_*.pth'):
        path.write_bytes(b'')
    with pytest.raises(TornCheckpointError, match=r'no checkpoint in .* is whole \(epoch_.*train anew'):
        find_training_state(tmp_path)
    torch.save(hostile('meta', Payload(Path.touch, tmp_path / 'touched')), tmp_path / 'epoch_10.pth')
    with pytest.raises(UnsafeCheckpointError, match=r'epoch_10\.pth'):
        find_training_state(tmp_path)
    assert not (tmp_path / 'touched').exists()


def test_an_address_without_a_file() -> None:
    with pytest.raises(CheckpointError, match=r'http://127.0.0.1/ can not be fetched: the address names no file'):
        load_checkpoint(torch.nn.Linear(1, 1), 'http://127.0.0.1/')


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / 'deep' / 'a', b'first')
    assert (tmp_path / 'deep' / 'a').read_bytes() == b'first'
    for name in ('fsync', 'replace'):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'No space left on device')))
            with pytest.raises(CheckpointError, match=r'a can not be written \(No space left on device\)'):
                write_whole(tmp_path / 'deep' / 'a', b'second')
        assert [path.name for path in (tmp_path / 'deep').iterdir()] == ['a']
        assert (tmp_path / 'deep' / 'a').read_bytes() == b'first'
    write_whole(tmp_path / 'deep' / 'a', b'third')
    assert (tmp_path / 'deep' / 'a').read_bytes() == b'third'


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple]:
    """A folder, and the address under which its files are served."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'hub'))
    folder = tmp_path / 'served'
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize('load', [load_checkpoint, load_weights], ids=['MMEngine', 'rkan_mmdet'])
def test_an_address_is_read_as_a_file_is(load: Callable, served: tuple, tmp_path: Path) -> None:
    folder, address = served
    model = torch.nn.Linear(2, 1)
    torch.save(dict(state_dict=torch.nn.Linear(2, 1).state_dict()), folder / 'good.pth')
    load(model, f'{address}/good.pth')
    assert torch.equal(model.weight, torch.load(folder / 'good.pth', weights_only=True)['state_dict']['weight'])
    torch.save(dict(state_dict=Payload(os.system, f'touch {tmp_path}/touched')), folder / 'bad.pth')
    with pytest.raises(UnsafeCheckpointError, match='system'):
        load(model, f'{address}/bad.pth')
    assert not (tmp_path / 'touched').exists()
    with pytest.raises(CheckpointError, match=r'none\.pth can not be fetched: HTTP Error 404'):
        load(model, f'{address}/none.pth')


def test_torchvision_is_not_needed_for_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(module, 'load_from_http', lambda address, location: asked.append(address) or dict(a=location))
    assert CheckpointLoader.load_checkpoint('torchvision://resnet50', 'cpu') == dict(a='cpu')
    assert re.fullmatch(r'https://download\.pytorch\.org/models/resnet50-\w+\.pth', asked[0])
