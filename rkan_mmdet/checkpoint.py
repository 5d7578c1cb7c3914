"""Checkpoints: nothing that a file holds is run, a torn file is recognised, and files are replaced whole."""

from __future__ import annotations

import _codecs
import _compat_pickle
import contextlib
import errno
import json
import os
import pickle
import re
import sys
import types
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import mmengine
import numpy as np
import torch
from mmengine.dist import barrier, get_rank
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint

try:
    from numpy._core import multiarray
except ImportError:  # numpy below 1.26
    from numpy.core import multiarray

_STATISTICS = ('min', 'max', 'current', 'mean')
_ONE_CYCLE = object()  # stands in for the class, so that a file can not make one
# torch.load(weights_only=True) holds what it promises since 2.6, and its list can name a stand-in since then
_HAS_SAFE_LOAD = tuple(int(part) for part in torch.__version__.split('.')[:2]) >= (2, 6)


class CheckpointError(Exception):
    """A checkpoint that can not be read or written; the message names the file and the reason."""


class UnsafeCheckpointError(CheckpointError, pickle.UnpicklingError):
    """The file asks for something that no checkpoint needs; nothing of it was run."""


class TornCheckpointError(CheckpointError, RuntimeError):
    """The file is cut off, or damaged, or no checkpoint."""


def _guarded_getattr(owner: object, name: str) -> object:
    """Stands in for ``getattr`` while unpickling: MMEngine's files hold functions as ``getattr(cls, name)``."""
    if owner is HistoryBuffer and name in _STATISTICS:
        return getattr(owner, name)
    if owner is _ONE_CYCLE and name in ('_annealing_cos', '_annealing_linear'):
        return getattr(OneCycleParamScheduler, name)
    raise pickle.UnpicklingError(f'refused: GLOBAL builtins.getattr for {name!r} of {owner!r}')


def _allowed() -> dict[str, Any]:
    """What MMEngine's checkpoints need besides tensors, by the name in the file."""
    dtypes = {type(np.dtype(kind)) for kind in ('f8', 'f4', 'f2', 'i8', 'i4', 'i2', 'i1', 'u8', 'u4', 'u2', 'u1', '?')}
    functions = (multiarray._reconstruct, multiarray.scalar)
    classes = (HistoryBuffer, np.ndarray, np.dtype, *dtypes)
    return {
        **{f'{cls.__module__}.{cls.__qualname__}': cls for cls in classes},
        # checkpoints written under either numpy name these two by another path
        **{f'numpy.{core}.multiarray.{f.__name__}': f for f in functions for core in ('core', '_core')},
        f'{OneCycleParamScheduler.__module__}.{OneCycleParamScheduler.__qualname__}': _ONE_CYCLE,
        'builtins.getattr': _guarded_getattr,
    }


def allow_checkpoint_globals() -> None:
    """Let MMEngine read its own checkpoints, and nothing else, on every version of torch and MMEngine.

    Called when :mod:`rkan_mmdet` is imported. ``torch.load(weights_only=True)`` comes to know what MMEngine writes
    besides tensors: the log history (``HistoryBuffer``), the numpy arrays in it, and the two curves of ``OneCycleLR``.
    MMEngine's loaders of local files and of addresses end in :func:`read_checkpoint`, since forks of MMEngine load with
    ``weights_only=False`` and torch before 2.6 does so unasked.
    """
    if _HAS_SAFE_LOAD:
        torch.serialization.add_safe_globals([(value, name) for name, value in _allowed().items()])
    CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)
    CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), loader=load_from_http, force=True)
    CheckpointLoader.register_scheme(('modelzoo://', 'torchvision://'), loader=load_from_torchvision, force=True)
    mmengine_checkpoint.load_from_http = load_from_http  # its other loaders of addresses call it by this name


# What torch's own list has had since 2.6; the first is how bytes are written, as in numpy's arrays.
_PLAIN = {
    '_codecs.encode': _codecs.encode,
    'collections.Counter': Counter,
    'builtins.bytearray': bytearray,
    'builtins.complex': complex,
    'builtins.set': set,
}


class _Unpickler(pickle.Unpickler):
    """For torch before 2.6: Python's own, which finds what is allowed and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        # files name Python 2's modules, for which Python's own find_class has this table
        module, name = _compat_pickle.NAME_MAPPING.get(
            (module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
        )
        known = {**torch._weights_only_unpickler._get_allowed_globals(), **_PLAIN, **_allowed()}
        if f'{module}.{name}' not in known:
            raise pickle.UnpicklingError(f'refused: GLOBAL {module}.{name}')
        return known[f'{module}.{name}']


def _load_guarded(path: str, map_location: Any) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if any(name.endswith('/constants.pkl') for name in file.namelist()):
                raise pickle.UnpicklingError('refused: a TorchScript archive holds code')
    module = types.ModuleType('guarded_pickle')
    module.Unpickler = _Unpickler
    module.load = lambda file, **options: _Unpickler(file, **options).load()
    forced = os.environ.pop('TORCH_FORCE_WEIGHTS_ONLY_LOAD', None)  # would refuse a module of one's own
    try:
        return torch.load(path, map_location=map_location, pickle_module=module, weights_only=False)
    finally:
        if forced is not None:
            os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = forced


def read_checkpoint(path: str | Path, map_location: Any = 'cpu') -> Any:
    """Read a checkpoint without running anything that it holds, and without trusting that it is whole.

    Args:
        path (str or Path): A local file.
        map_location (Any): As in ``torch.load``. Defaults to ``'cpu'``.

    Returns:
        Any: What was saved; of MMEngine a dict with ``state_dict`` and ``meta``. A text ``meta['config']``, which
        MMEngine no longer writes, is left out: on resuming it would be run.

    Raises:
        FileNotFoundError: There is no such file.
        UnsafeCheckpointError: It asks for something else than tensors and MMEngine's log; the message names it.
        TornCheckpointError: It is cut off or damaged, or no checkpoint.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), 'a.pth')
        >>> torch.save(dict(state_dict=dict(a=torch.zeros(2))), path)
        >>> read_checkpoint(path)
        {'state_dict': {'a': tensor([0., 0.])}}
    """
    path = os.path.expanduser(str(path))
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path} can not be found.')
    try:
        _check_sums(path)
        if _HAS_SAFE_LOAD:
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        else:
            checkpoint = _load_guarded(path, map_location)
    except Exception as error:  # a damaged file fails in many ways
        of_the_disk = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if of_the_disk or isinstance(error, torch.cuda.OutOfMemoryError):
            raise  # says nothing of the file
        raise _explain(path, error) from error
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    if isinstance(meta, dict):
        meta.pop('config', None)
    return checkpoint


def _check_sums(path: str) -> None:
    """torch does not look at the checksums of a zip file, and reads some that are cut off."""
    with open(path, 'rb') as file:
        if file.read(4) != b'PK\3\4':  # the format before torch 1.6 has no checksums
            return
    with zipfile.ZipFile(path) as archive:
        sums = [member.CRC for member in archive.infolist()]
        bad = archive.testzip() if any(sums) else None  # without torch's option to write them, all are 0
    if bad or not sums:
        raise zipfile.BadZipFile(f'the checksum of {bad} is wrong' if bad else 'it lists no content')


def _explain(path: str, error: Exception) -> CheckpointError:
    text = str(error).partition('WeightsUnpickler error: ')[2] or str(error)
    found = re.search(r'GLOBAL (\S+)', text)
    if found:
        return UnsafeCheckpointError(
            f'checkpoint {path} can not be read safely: it asks for {found[1]}, which no checkpoint of MMEngine '
            'needs; nothing of it was run'
        )
    reason = (text.strip() or type(error).__name__).splitlines()[0]
    damage = (
        'Unsupported operand',
        'truncated',
        'invalid load key',
        'stack underflow',
        'persistent',
        'unexpected MARK',
    )
    if isinstance(error, pickle.UnpicklingError) and not any(word in text for word in damage):
        return UnsafeCheckpointError(f'checkpoint {path} can not be read safely: {reason}; nothing of it was run')
    return TornCheckpointError(f'checkpoint {path} can not be read safely: it is torn, or no checkpoint ({reason})')


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """MMEngine's loader of local files; see :func:`read_checkpoint`. MMEngine logs the end of its name."""
    return read_checkpoint(filename, map_location)


def load_from_http(filename: str, map_location: Any = None, model_dir: str | None = None, **_: Any) -> Any:
    """MMEngine's loader of addresses: fetched by one process, to where torch keeps them; then as a local file."""
    name = Path(urlparse(filename).path).name
    if not name:
        raise CheckpointError(f'checkpoint {filename} can not be fetched: the address names no file')
    path = Path(model_dir or Path(torch.hub.get_dir(), 'checkpoints'), name)

    def fetch() -> None:
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(filename, str(path), progress=sys.stderr.isatty())
        except OSError as error:
            raise CheckpointError(f'checkpoint {filename} can not be fetched: {error}') from error

    if get_rank() == 0:
        fetch()
    barrier()
    fetch()  # on another machine, whose disk is another
    return read_checkpoint(path, map_location)


def torchvision_addresses() -> dict[str, str]:
    """The addresses of torchvision's weights by name, which MMEngine ships."""
    return json.loads(Path(mmengine.__path__[0], 'hub', 'torchvision_0.12.json').read_text())


def load_from_torchvision(filename: str, map_location: Any = None) -> Any:
    """MMEngine's loader of ``torchvision://NAME``, without torchvision where MMEngine knows the address."""
    address = torchvision_addresses().get(filename.partition('://')[2])
    if address is None:
        return mmengine_checkpoint.load_from_torchvision(filename, map_location)
    return load_from_http(address, map_location)


def weights_of(checkpoint: Any, path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State dict and ``meta`` (empty where there is none) of what a checkpoint holds.

    Raises:
        CheckpointError: It holds no weights; ``path`` is its name in the message.
    """
    state = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f'checkpoint {path} holds no weights')
    meta = checkpoint.get('meta') or {}
    for what, part in (('its weights', state), ('meta', meta), ('dataset_meta', dataset_meta_of(meta))):
        if not isinstance(part, dict) or not all(isinstance(key, str) for key in part):
            raise CheckpointError(f'checkpoint {path} is of no known form: {what} must be a dict whose keys are names')
    return state, meta


def dataset_meta_of(meta: Any) -> Any:
    """What a checkpoint's ``meta`` says of the data set; of sets that were joined and differ, of the first."""
    found = (meta.get('dataset_meta') if isinstance(meta, dict) else None) or {}
    return found[0] if isinstance(found, list) else found


def unsaved_buffers(model: torch.nn.Module) -> set[str]:
    """Names of buffers that checkpoints no longer hold (older MMEngines saved the mean and std of images)."""
    return {name for name, _ in model.named_buffers()} - set(model.state_dict())


def read_training_state(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint that a training can go on from.

    Raises:
        CheckpointError: It can not be read, or holds weights alone.
    """
    checkpoint = read_checkpoint(path)
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    lacks = [
        name
        for name in ('state_dict', 'message_hub', 'optimizer')
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(name), dict)
    ]
    counts = meta if isinstance(meta, dict) else {}
    lacks += [
        f'meta.{name}'
        for name in ('epoch', 'iter')
        if type(counts.get(name)) is not int or counts[name] < 0  # True is no number of epochs
    ]
    if lacks:
        raise CheckpointError(
            f'checkpoint {path} can not be resumed, since it lacks {", ".join(lacks)}; to start from its weights, name '
            'it with --cfg-options load_from=FILE'
        )
    if type(counts.get('seed', 0)) is not int and counts['seed'] is not None:
        raise CheckpointError(f'checkpoint {path} can not be resumed: its seed is {counts["seed"]!r}')
    return checkpoint


def is_of_training(name: str, template: str = 'epoch_{}.pth') -> bool:
    """Whether a file's name is one that a training gives: MMEngine's own, or by a ``CheckpointHook``'s template."""
    own = r'\d+'.join(re.escape(part) for part in re.split(r'\{.*?\}', template))
    return re.fullmatch(rf'(epoch|iter)_\d+\.pth|{own}', name) is not None


def _pattern(name: str) -> str:
    return re.sub(r'\d+', '#', name)


def _number(name: str) -> int:
    return int((re.findall(r'\d+', name) or [-1])[-1])


def list_checkpoints(work_dir: str | Path, template: str = 'epoch_{}.pth') -> list[Path]:
    """The checkpoints of a training, the last first.

    Args:
        work_dir (str or Path): Where MMEngine's ``last_checkpoint`` and checkpoints are.
        template (str): The ``filename_tmpl`` of the hook that saves them. Defaults to MMEngine's.

    Returns:
        list[Path]: Without the best ones that hooks have kept.
    """
    work_dir = Path(work_dir)
    pointer = work_dir / 'last_checkpoint'
    name = pointer.read_text(errors='replace').strip() if pointer.is_file() else ''
    own = work_dir / Path(name).name  # first: of a directory that was moved or copied, the pointer names another's
    # of a hook's out_dir; where a pointer lies too is another run, of which this one is a copy
    elsewhere = [] if not name or own.is_file() else [Path(name).resolve().parent]
    elsewhere = [folder for folder in elsewhere if not (folder / 'last_checkpoint').is_file()]
    files = [
        path
        for folder in dict.fromkeys([work_dir.resolve(), *elsewhere])  # with the hook's out_dir they are in two
        for path in folder.glob('*.pth')
        if path.is_file() and is_of_training(path.name, template)  # others may be what it started from
    ]
    last = Path(name).name

    def age(path: Path) -> tuple:
        if _pattern(path.name) != _pattern(last):
            return False, -1, path.stat().st_mtime_ns
        # copying a run makes all files anew; those beyond the last are of a run from which it went back
        return _number(path.name) <= _number(last), _number(path.name), path.stat().st_mtime_ns

    files.sort(key=age, reverse=True)
    if name and (own.is_file() or elsewhere):
        files = [own if own.is_file() else Path(name), *files]
    return list(dict.fromkeys(path.resolve() for path in files if path.is_file()))


def find_training_state(work_dir: str | Path, template: str = 'epoch_{}.pth') -> tuple[str, dict[str, Any]] | None:
    """The last checkpoint in a work directory that is whole; each that is torn is named on stderr.

    Args:
        work_dir (str or Path): Where MMEngine's ``last_checkpoint`` and checkpoints are.
        template (str): The ``filename_tmpl`` of the hook that saves them. Defaults to MMEngine's.

    Returns:
        tuple[str, dict] or None: Its path and what it holds; None if there is no checkpoint.

    Raises:
        TornCheckpointError: There are checkpoints, and none is whole.
        UnsafeCheckpointError: The one that would be used asks for code.
    """
    torn = []
    for path in list_checkpoints(work_dir, template):
        try:
            checkpoint = read_training_state(path)
        except TornCheckpointError as error:
            torn.append(path.name)
            print(f'warning: {error}; the one before it is looked for', file=sys.stderr)
        except UnsafeCheckpointError:
            raise
        except CheckpointError:
            continue  # weights alone
        else:
            return str(path), checkpoint
    if torn:
        raise TornCheckpointError(
            f'no checkpoint in {work_dir} is whole ({", ".join(torn)}); move them away to train anew'
        )
    return None


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to the disk, and put it in its place in one step.

    Raises:
        CheckpointError: It can not be written (the disk is full, say); what was there before is unchanged.
    """
    path = Path(path)
    partial = path.with_name(f'.{path.name}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise CheckpointError(
            f'{path} can not be written ({error.strerror or error}): what was there before is whole, and of a training '
            '--resume goes on from the last checkpoint'
        ) from error
    with contextlib.suppress(OSError):  # not every system can flush a directory
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
