"""tools/download_coco.py against a server of ours: resume, checksums, disk, what is there already."""

import functools
import hashlib
import http.server
import importlib.util
import shutil
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from rkan_mmdet.launch import UserError

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location('download_coco', ROOT / 'tools' / 'download_coco.py')
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Knows ranges, and cuts the line after ``limit`` bytes once."""

    ranges, limit, requests = True, None, []

    def do_GET(self) -> None:
        data = (Path(self.directory) / self.path[1:]).read_bytes()
        start = 0
        wanted = self.headers.get('Range')
        Handler.requests.append((self.path, wanted))
        if wanted and self.ranges:
            start = int(wanted[len('bytes=') : -1])
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(data) - start))
        self.end_headers()
        end = len(data) if Handler.limit is None else start + Handler.limit
        Handler.limit = None
        self.wfile.write(data[start:end])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    files = tmp_path / 'server'
    archives = {}
    for part, folder, names in (('val', 'val2017', ['a.jpg', 'b.jpg']), ('train', 'train2017', ['c.jpg'])):
        (files / 'zips').mkdir(parents=True, exist_ok=True)
        path = files / 'zips' / f'{folder}.zip'
        with zipfile.ZipFile(path, 'w') as file:
            for name in names:
                file.writestr(f'{folder}/{name}', hashlib.sha512(name.encode()).digest() * 100)
            file.writestr('../outside.txt', 'must not be unpacked')
        data = path.read_bytes()
        digest = hashlib.md5(data).hexdigest()
        archives[part] = tool.Archive(f'zips/{folder}.zip', digest, len(data), folder, '*.jpg', len(names))
    monkeypatch.setattr(tool, 'ARCHIVES', archives)
    Handler.ranges, Handler.limit, Handler.requests = True, None, []
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=str(files)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}'
    httpd.shutdown()
    httpd.server_close()


def call(monkeypatch: pytest.MonkeyPatch, root: Path, url: str, *more: str) -> None:
    monkeypatch.setattr('sys.argv', ['download_coco.py', '--root', str(root), '--url', url, *more])
    tool.main()


def test_fetch_and_then_nothing(server: str, tmp_path: Path, monkeypatch, capsys) -> None:
    root = tmp_path / 'coco'
    call(monkeypatch, root, server)
    assert sorted(p.relative_to(root).as_posix() for p in root.rglob('*.*')) == [
        'train2017/c.jpg', 'val2017/a.jpg', 'val2017/b.jpg'
    ]  # fmt: skip
    assert (root / 'val2017/a.jpg').read_bytes() == hashlib.sha512(b'a.jpg').digest() * 100
    assert not (tmp_path / 'outside.txt').exists()
    assert f'data_root={root}/' in capsys.readouterr().out
    before = len(Handler.requests)
    call(monkeypatch, root, server)
    assert len(Handler.requests) == before


@pytest.mark.parametrize('ranges', [True, False])
def test_a_cut_line_goes_on(ranges: bool, server: str, tmp_path: Path, monkeypatch) -> None:
    root = tmp_path / 'coco'
    Handler.ranges, Handler.limit = ranges, 5000
    with pytest.raises(UserError, match='the same call goes on'):
        call(monkeypatch, root, server, '--parts', 'val')
    assert (root / 'val2017.zip.part').stat().st_size == 5000
    call(monkeypatch, root, server, '--parts', 'val')
    assert Handler.requests[-1][1] == 'bytes=5000-'
    assert (root / 'val2017/b.jpg').exists()
    assert not list(root.glob('*.part'))


def test_unpacking_goes_on(server: str, tmp_path: Path, monkeypatch) -> None:
    root = tmp_path / 'coco'
    (root / 'val2017').mkdir(parents=True)
    (root / 'val2017/a.jpg').write_bytes(b'half')
    shutil.copy(tmp_path / 'server/zips/val2017.zip', root / 'val2017.zip.part')
    call(monkeypatch, root, server, '--parts', 'val')
    assert Handler.requests == []
    assert (root / 'val2017/a.jpg').stat().st_size == 6400
    shutil.copy(tmp_path / 'server/zips/val2017.zip', root / 'val2017.zip.part')
    (root / 'val2017/b.jpg').write_bytes(b'cut')  # killed within the last file: all names are there
    call(monkeypatch, root, server, '--parts', 'val')
    assert (root / 'val2017/b.jpg').stat().st_size > 3
    assert not list(root.glob('*.part'))


def test_a_wrong_checksum(server: str, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / 'server/zips/val2017.zip'
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match='has the MD5'):
        call(monkeypatch, tmp_path / 'coco', server, '--parts', 'val')
    assert list((tmp_path / 'coco').iterdir()) == []


def test_no_server_and_no_room(tmp_path: Path, server: str, monkeypatch) -> None:
    with pytest.raises(UserError, match='the same call goes on'):
        call(monkeypatch, tmp_path / 'coco', 'http://127.0.0.1:9')
    with pytest.raises(UserError, match='goes on'):
        call(monkeypatch, tmp_path / 'coco', f'{server}/nowhere')
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(UserError, match='GiB are free under'):
        call(monkeypatch, tmp_path / 'coco', server)


def test_the_real_list_is_whole() -> None:
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert set(fresh.ARCHIVES) == {'annotations', 'val', 'train'}
    assert all(len(archive.md5) == 32 and archive.size > 10**8 for archive in fresh.ARCHIVES.values())


def test_other_annotations_are_not_those_of_coco(tmp_path: Path) -> None:
    (tmp_path / 'annotations').mkdir()
    for i in range(6):
        (tmp_path / f'annotations/panoptic_{i}.json').touch()
    assert not tool.is_unpacked(tool.ARCHIVES['annotations'], tmp_path)
    for part in ('train', 'val'):
        (tmp_path / f'annotations/instances_{part}2017.json').touch()
    assert tool.is_unpacked(tool.ARCHIVES['annotations'], tmp_path)


def test_what_is_unpacked_needs_no_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tool.Archive('zips/val2017.zip', '', 1000, 'val2017', '*.jpg', 2)
    monkeypatch.setattr(tool.shutil, 'disk_usage', lambda _: SimpleNamespace(free=1200))
    with pytest.raises(UserError, match='GiB are needed'):
        tool.check_disk([archive], tmp_path)
    (tmp_path / 'val2017.zip.part').write_bytes(bytes(500))
    (tmp_path / 'val2017').mkdir()
    (tmp_path / 'val2017/a.jpg').write_bytes(bytes(300))
    tool.check_disk([archive], tmp_path)
