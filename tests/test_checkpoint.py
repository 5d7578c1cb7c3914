"""What MMEngine writes can be read under weights_only=True, and nothing else runs."""

import pickle
from pathlib import Path

import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from packaging.version import Version

pytestmark = pytest.mark.skipif(
    Version(torch.__version__) < Version('2.6'), reason='torch.load has no default weights_only=True before 2.6'
)


def test_a_message_hub_survives(tmp_path: Path) -> None:
    hub = MessageHub.get_instance('test_checkpoint')
    for value in (3.0, 1.0, 2.0):
        hub.update_scalar('train/loss', value)
    path = tmp_path / 'checkpoint.pth'
    torch.save(dict(message_hub=hub.state_dict(), optimizer=torch.optim.SGD([torch.zeros(1)], 0.1).state_dict()), path)
    history = torch.load(path, weights_only=True)['message_hub']['log_scalars']['train/loss']
    assert isinstance(history, HistoryBuffer)
    assert (history.min(), history.max(), history.current()) == (1.0, 3.0, 2.0)
    assert history.statistics('mean') == pytest.approx(2.0)


class Payload:
    """Would touch a file when unpickled."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize('place', ['plain', 'meta', 'optimizer'])
@pytest.mark.parametrize('zip_format', [True, False])
def test_a_hostile_file_is_refused(place: str, zip_format: bool, tmp_path: Path) -> None:
    from mmengine.runner.checkpoint import load_checkpoint

    touched = tmp_path / 'touched'
    payload = Payload(Path.touch, touched)
    checkpoint = payload if place == 'plain' else {'state_dict': {}, place: dict(deep=[payload])}
    torch.save(checkpoint, tmp_path / 'bad.pth', _use_new_zipfile_serialization=zip_format)
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(torch.nn.Linear(1, 1), str(tmp_path / 'bad.pth'))
    assert not touched.exists()


@pytest.mark.parametrize(
    'arguments', [(HistoryBuffer, '__init__'), (HistoryBuffer, '_set_default_statistics'), (dict, 'mean')]
)
def test_getattr_answers_for_the_statistics_alone(arguments: tuple, tmp_path: Path) -> None:
    torch.save(Payload(getattr, *arguments), tmp_path / 'bad.pth')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'bad.pth', weights_only=True)
