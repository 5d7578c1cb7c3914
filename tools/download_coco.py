"""Fetch COCO 2017, check it and unpack it to where the configs expect it.

An interrupted download goes on where it stopped, and what is there already is not fetched again. An archive is removed
once its files are unpacked; no other file is touched.
"""

import argparse
import hashlib
import http.client
import shutil
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from rkan_mmdet.launch import UserError, run_tool


class Archive(NamedTuple):
    path: str  # below the URL
    md5: str
    size: int
    folder: str  # what it unpacks to
    pattern: str  # of the files there that detectors need
    files: int  # how many those are


ARCHIVES = {
    'annotations': Archive(
        'annotations/annotations_trainval2017.zip',
        'f4bbac642086de4f52a3fdda2de5fa2c',
        252907541,
        'annotations',
        'instances_*2017.json',
        2,
    ),
    'val': Archive('zips/val2017.zip', '442b8da7639aecaf257c1dceb8ba8c80', 815585330, 'val2017', '*.jpg', 5000),
    'train': Archive(
        'zips/train2017.zip', 'cced6f7f71b7629ddf16f17bbcfab6b2', 19336861798, 'train2017', '*.jpg', 118287
    ),
}
CHUNK = 1 << 20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--root', type=Path, default=Path('data/coco'), help='where to (default: %(default)s)')
    parser.add_argument(
        '--parts', nargs='+', choices=list(ARCHIVES), default=list(ARCHIVES), help='only these (default: all)'
    )
    parser.add_argument('--url', default='http://images.cocodataset.org', help='a mirror (default: %(default)s)')
    args = parser.parse_args()
    if not args.url.startswith(('http://', 'https://')):
        parser.error(f'--url must begin with http:// or https://, but got {args.url}')
    return args


def is_unpacked(archive: Archive, root: Path) -> bool:
    folder = root / archive.folder
    # the archive goes when all is unpacked: beside it the last file may be cut
    return (
        not part_of(archive, root).exists()
        and folder.is_dir()
        and len(list(folder.glob(archive.pattern))) >= archive.files
    )


def part_of(archive: Archive, root: Path) -> Path:
    return root / f'{Path(archive.path).name}.part'


def check_disk(archives: list, root: Path) -> None:
    """Each archive lies there beside its files until it is unpacked, and the files are about as large."""
    files = [*root.glob('*.zip.part'), *(file for a in archives for file in (root / a.folder).glob('*'))]
    there = sum(file.stat().st_size for file in files)
    needed = sum(a.size for a in archives) + max(a.size for a in archives) - there
    free = shutil.disk_usage(root).free
    if free < needed:
        raise UserError(f'{free / 2**30:.1f} GiB are free under {root}, {needed / 2**30:.1f} GiB are needed')


def download(archive: Archive, url: str, target: Path, progress: Progress) -> None:
    """Fetch to ``target``, from where a former call stopped; the checksum is taken on the way."""
    digest, done = hashlib.md5(), 0
    bar = progress.add_task(target.name, total=archive.size)
    with open(target, 'ab+') as file:
        file.seek(0)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress.update(bar, completed=done)
        if done < archive.size:
            request = urllib.request.Request(
                f'{url}/{archive.path}', headers={'Range': f'bytes={done}-'} if done else {}
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                if done and response.status != 206:  # the server sends all of it again
                    digest, done = hashlib.md5(), 0
                    file.truncate(0)
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    progress.update(bar, completed=done)
    if done < archive.size:
        raise UserError(f'the connection ended after {done} of {archive.size} bytes of {target}; the same call goes on')
    if digest.hexdigest() != archive.md5:
        target.unlink()
        raise UserError(f'{url}/{archive.path} has the MD5 {digest.hexdigest()}, not {archive.md5}: removed, try again')


def unpack(archive: Archive, source: Path, root: Path, progress: Progress) -> None:
    with zipfile.ZipFile(source) as file:
        members = [m for m in file.infolist() if not m.is_dir() and Path(m.filename).parts[0] == archive.folder]
        for member in progress.track(members, description=f'unpacking {archive.folder}'):
            target = root / member.filename
            if not target.exists() or target.stat().st_size != member.file_size:  # of a call that was cut
                file.extract(member, root)
    if len(members) < archive.files:
        raise UserError(f'{source} holds {len(members)} files of {archive.folder}, not {archive.files}')


def main() -> None:
    args = parse_args()
    args.root.mkdir(parents=True, exist_ok=True)
    missing = [ARCHIVES[part] for part in args.parts if not is_unpacked(ARCHIVES[part], args.root)]
    if missing:
        check_disk(missing, args.root)
    columns = [TextColumn('{task.description}'), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    for archive in missing:
        part = part_of(archive, args.root)
        try:
            with Progress(*columns, TimeRemainingColumn()) as progress:
                download(archive, args.url.rstrip('/'), part, progress)
            with Progress() as progress:
                unpack(archive, part, args.root, progress)
        except (urllib.error.URLError, http.client.HTTPException, OSError, zipfile.BadZipFile) as error:
            raise UserError(f'{args.url}/{archive.path} to {part}: {error}; the same call goes on') from error
        part.unlink()
    print(f'{", ".join(ARCHIVES[part].folder for part in args.parts)} are in {args.root}')
    if args.root != Path('data/coco'):
        print(f'tell the tools with --cfg-options data_root={args.root}/ or MMDET_DATASETS={args.root}/')


if __name__ == '__main__':
    run_tool(main)
