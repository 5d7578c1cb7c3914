"""The prediction tool: its COCO results against MMDetection's own, odd images, videos, and what it refuses."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.models.dense_heads import RPNHead
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rkan_mmdet import detector, predict
from rkan_mmdet.launch import UserError, read_config

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / 'configs' / 'demo' / 'mask-rcnn_rkan-r18_fpn_shapes.py')
CLASSES = ('disc', 'box', 'triangle', 'star', 'ring')


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights of the demo's detector, with class names, as a run of MMEngine saves them."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(read_config(CONFIG).model)
    path = tmp_path_factory.mktemp('weights') / 'random.pth'
    torch.save(dict(meta=dict(dataset_meta=dict(classes=CLASSES)), state_dict=model.state_dict()), path)
    return str(path)


@pytest.fixture
def tool(checkpoint: str, shapes_root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Runs the tool here; returns its exit message (empty when all was well), and what it printed."""

    def run(*arguments: object, weights: object = checkpoint, data_root: str = shapes_root) -> tuple[str, str]:
        argv = ['predict.py', CONFIG, weights, *arguments, '--device', 'cpu', '--cfg-options', f'data_root={data_root}']
        monkeypatch.setattr(sys, 'argv', [str(a) for a in argv])
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / 'tools' / 'predict.py'), run_name='__main__')
            message = ''
        except SystemExit as error:
            message = str(error)
        return message, ''.join(capsys.readouterr())

    return run


def read(folder: Path, name: str = 'predictions.json') -> list | dict:
    return json.loads((folder / name).read_text())


def test_folder_of_the_test_set(tool: Callable, shapes_root: str, tmp_path: Path) -> None:
    out, val = tmp_path / 'new' / 'out', Path(shapes_root, 'val')
    message, printed = tool(val, '--out', out, '--score-thr', 0.01, '--batch-size', 3)
    assert message == ''
    rows = read(out)
    annotations = COCO(f'{shapes_root}/annotations/instances_val.json')
    loaded = annotations.loadRes(str(out / 'predictions.json'))
    assert set(loaded.getImgIds()) == {row['image_id'] for row in rows} == {1, 2, 3, 4}
    assert f'{len(rows)} detections in 4 images' in printed
    for row in rows:
        assert set(row) == {'image_id', 'category_id', 'bbox', 'score', 'segmentation'}
        assert row['category_id'] in annotations.getCatIds()
        x, y, width, height = row['bbox']
        assert min(x, y) >= 0
        assert max(x + width, y + height) <= 192
        assert isinstance(row['segmentation']['counts'], str)
        assert mask_utils.decode(row['segmentation']).shape == (192, 192)
    assert sorted(p.name for p in out.iterdir()) == ['images.json', 'predictions.json', 'vis']
    for file in val.iterdir():
        drawn, original = cv2.imread(str(out / 'vis' / file.name)), cv2.imread(str(file))
        assert drawn.shape == original.shape
        assert np.abs(drawn.astype(int) - original).max() > 100  # frames and labels


def test_linked_folders_are_read_once(shapes_root: str, tmp_path: Path) -> None:
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in/linked').symlink_to(Path(shapes_root, 'val'))
    (tmp_path / 'in/linked-again').symlink_to(tmp_path / 'in/linked')
    (tmp_path / 'in/round').symlink_to(tmp_path / 'in')
    (tmp_path / 'in/.latest').symlink_to(tmp_path / 'in/linked')  # hidden, and so no place to see it in
    names = [item.name for item in predict.Images(tmp_path / 'in')]
    assert len(names) == len(list(Path(shapes_root, 'val').iterdir()))
    assert all(name.startswith('linked/') for name in names)
    shutil.copytree(Path(shapes_root, 'val'), tmp_path / 'in/real')
    (tmp_path / 'in/a-link').symlink_to(tmp_path / 'in/real')
    assert {item.name.split('/')[0] for item in predict.Images(tmp_path / 'in')} == {'linked', 'real'}


def test_nothing_is_drawn_below_the_threshold_but_json_has_it(tool: Callable, shapes_root: str, tmp_path: Path) -> None:
    image = cv2.imread(f'{shapes_root}/val/000000.jpg')
    cv2.imwrite(str(tmp_path / 'a.png'), image)
    assert tool(tmp_path / 'a.png', '--out', tmp_path / 'out', '--score-thr', 1)[0] == ''
    assert (cv2.imread(str(tmp_path / 'out' / 'vis' / 'a.png')) == image).all()
    assert read(tmp_path / 'out')
    assert tool(tmp_path / 'a.png', '--out', tmp_path / 'json', '--no-draw')[0] == ''
    assert read(tmp_path / 'json') == read(tmp_path / 'out')
    assert not (tmp_path / 'json' / 'vis').exists()


def test_images_from_elsewhere_bear_their_names(tool: Callable, shapes_root: str, tmp_path: Path) -> None:
    # same file names as in the test set, other pictures
    shutil.copytree(f'{shapes_root}/train', tmp_path / 'in' / 'deeper')
    message, printed = tool(tmp_path / 'in', '--out', tmp_path / 'out', '--no-draw')
    assert message == ''
    assert 'image_id: the file name' in printed
    assert {row['image_id'] for row in read(tmp_path / 'out')} == {f'deeper/{i:06d}.jpg' for i in range(8)}
    loaded = COCO(str(tmp_path / 'out' / 'images.json')).loadRes(str(tmp_path / 'out' / 'predictions.json'))
    assert len(loaded.getImgIds()) == 8
    assert [c['name'] for c in loaded.loadCats(loaded.getCatIds())] == list(CLASSES)


def test_category_ids(tool: Callable, shapes_root: str, tmp_path: Path) -> None:
    """Those of the annotation file by name; from 1 where there is none; a file that does not fit is refused."""
    data = tmp_path / 'data'
    shutil.copytree(shapes_root, data)
    file = data / 'annotations' / 'instances_val.json'
    document = json.loads(file.read_text())
    document['categories'] = [dict(id=99, name='unused'), *(dict(c, id=c['id'] * 10) for c in document['categories'])]
    file.write_text(json.dumps(document))
    assert tool(data / 'val', '--out', tmp_path / 'tens', '--no-draw', data_root=data)[0] == ''
    tens = read(tmp_path / 'tens')

    document['categories'].reverse()
    file.write_text(json.dumps(document))
    message, printed = tool(data / 'val', '--out', tmp_path / 'turned', '--no-draw', data_root=data)
    assert (message, 'in another order' in printed) == ('', True)
    assert [row['category_id'] for row in read(tmp_path / 'turned')] == [60 - row['category_id'] for row in tens]

    document['categories'] = document['categories'][2:]
    file.write_text(json.dumps(document))
    message, _ = tool(data / 'val', '--out', tmp_path / 'few', data_root=data)
    assert "does not fit the detector's 5 classes" in message
    assert 'ring' in message

    file.write_text('[]')
    assert 'is not of the COCO format' in tool(data / 'val', '--out', tmp_path / 'few', data_root=data)[0]

    file.unlink()
    message, printed = tool(data / 'val', '--out', tmp_path / 'ones', '--no-draw', data_root=data)
    assert message == ''
    assert 'category_id: from 1 in the order of the classes' in printed
    assert [row['category_id'] * 10 for row in read(tmp_path / 'ones')] == [row['category_id'] for row in tens]
    assert read(tmp_path / 'ones')[0]['image_id'] == '000000.jpg'
    assert not (tmp_path / 'few').exists()


def test_odd_images(tool: Callable, shapes_root: str, tmp_path: Path) -> None:
    folder, out = tmp_path / 'in', tmp_path / 'out'
    (folder / 'sub [1]').mkdir(parents=True)
    image = cv2.imread(f'{shapes_root}/val/000000.jpg')[:96]
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    cv2.imwrite(str(folder / 'plain.png'), image)
    cv2.imwrite(str(folder / 'sub [1]' / 'é.png'), image)
    cv2.imwrite(str(folder / 'rgba.png'), np.dstack([image, np.full_like(grey, 9)]))
    cv2.imwrite(str(folder / 'deep.png'), image.astype(np.uint16) * 257)
    cv2.imwrite(str(folder / 'grey.png'), grey)
    cv2.imwrite(str(folder / 'grey.pgm'), grey)
    cv2.imwrite(str(folder / 'dot.bmp'), image[:1, :1])
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(image[..., ::-1])))  # with its EXIF data it is upright
    exif = turned.getexif()
    exif[274] = 6
    turned.save(folder / 'turned.PNG', exif=exif)
    (folder / 'notes.txt').write_text('no image')
    (folder / '.hidden.png').write_text('no image')
    message, printed = tool(folder, '--out', out, '--score-thr', 0.1)
    assert message == ''
    assert 'not of images (1): notes.txt' in printed

    sizes = {i['file_name']: (i['height'], i['width']) for i in read(out, 'images.json')['images']}
    assert list(sizes) == sorted(sizes)
    assert sizes.pop('dot.bmp') == (1, 1)
    names = {'plain.png', 'sub [1]/é.png', 'rgba.png', 'deep.png', 'grey.png', 'grey.pgm', 'turned.PNG'}
    assert sizes == dict.fromkeys(names, (96, 192))
    found = {name: [] for name in sizes}
    for row in read(out):
        found.get(row.pop('image_id'), []).append(row)
    assert found['plain.png']
    for same in ('sub [1]/é.png', 'rgba.png', 'deep.png', 'turned.PNG'):
        assert found[same] == found['plain.png'], same
    assert found['grey.pgm'] == found['grey.png'] != found['plain.png']
    for name in sizes:
        drawn = cv2.imread(str(out / 'vis' / (name if not name.endswith('pgm') else f'{name}.png')))
        assert drawn.shape == (96, 192, 3)
    drawn = {name: cv2.imread(str(out / 'vis' / f'{name}')) for name in ('plain.png', 'turned.PNG')}
    assert np.abs(drawn['plain.png'].astype(int) - drawn['turned.PNG']).mean() < 3  # masks have a random tint


def test_broken_images(tool: Callable, shapes_root: str, tmp_path: Path) -> None:
    folder = tmp_path / 'in'
    folder.mkdir()
    whole = Path(shapes_root, 'val', '000000.jpg').read_bytes()
    (folder / 'a.jpg').write_bytes(whole)
    (folder / 'cut.jpg').write_bytes(whole[: len(whole) // 2])
    (folder / 'empty.png').write_bytes(b'')
    (folder / 'text.jpg').write_text('no image')
    cv2.imwrite(str(folder / 'strip.png'), np.zeros((1, 900, 3), np.uint8))
    message, printed = tool(folder, '--out', tmp_path / 'out', '--batch-size', 2)
    assert message.startswith('error: 4 images could not be read and are left out: cut.jpg, empty.png, strip.png, text')
    assert 'cut.jpg can not be read and is left out: image file is truncated' in printed
    assert {row['image_id'] for row in read(tmp_path / 'out')} == {'a.jpg'}

    for name in ('cut.jpg', 'empty.png', 'text.jpg', 'strip.png'):
        message, _ = tool(folder / name, '--out', tmp_path / 'none')
        assert message.startswith(f'error: {name} can not be read: ')
        assert '\n' not in message
    (folder / 'a.jpg').unlink()
    assert 'no image could be read' in tool(folder, '--out', tmp_path / 'none')[0]
    assert not (tmp_path / 'none').exists()


@pytest.fixture
def video(shapes_root: str, tmp_path: Path) -> Path:
    image = cv2.imread(f'{shapes_root}/val/000001.jpg')
    path = tmp_path / 'clip.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 12, (192, 128))
    if not writer.isOpened():
        pytest.skip('this OpenCV writes no video')
    for shift in range(5):
        writer.write(np.roll(image, 8 * shift, 1)[:128])
    writer.release()
    return path


def test_video(tool: Callable, video: Path, tmp_path: Path) -> None:
    out = tmp_path / 'out'
    message, printed = tool(video, '--out', out, '--score-thr', 0.1, '--batch-size', 2)
    assert message == ''
    assert '5 frames (12 a second)' in printed
    assert {row['image_id'] for row in read(out)} == {0, 1, 2, 3, 4}
    images = read(out, 'images.json')
    assert images['info']['fps'] == 12
    assert [(i['width'], i['height']) for i in images['images']] == [(192, 128)] * 5
    COCO(str(out / 'images.json')).loadRes(str(out / 'predictions.json'))
    drawn = cv2.VideoCapture(str(out / 'vis' / 'clip.mp4'))
    assert drawn.get(cv2.CAP_PROP_FPS) == 12
    frames = []
    while (got := drawn.read())[0]:
        frames.append(got[1])
    assert [frame.shape for frame in frames] == [(128, 192, 3)] * 5

    half = tmp_path / 'half.avi'
    half.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    assert '5 frames are said to be there, ' in tool(half, '--out', tmp_path / 'half')[1]
    text = tmp_path / 'list.txt'
    text.write_text('a.jpg\nb.jpg\n' * 500)
    assert 'list.txt is a text, neither an image nor a video' in tool(text, '--out', tmp_path / 'none')[0]
    broken = tmp_path / 'broken.mp4'
    broken.write_bytes(b'no video' * 100)
    assert 'neither an image nor a video' in tool(broken, '--out', tmp_path / 'none')[0]


def test_a_rate_that_mpeg_4_has_not(tmp_path: Path) -> None:
    writer = predict._Pictures(tmp_path / 'vis', 239.213)
    for _ in range(3):
        writer.write('slow.avi', np.zeros((64, 64, 3), np.uint8))
    writer.close()
    assert cv2.VideoCapture(str(tmp_path / 'vis' / 'slow.mp4')).get(cv2.CAP_PROP_FPS) == 239


def test_a_video_on_a_full_disk(tool: Callable, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV says nothing when its file is cut off."""
    release = predict._Pictures.close

    def cut(self: predict._Pictures) -> None:
        self._writer.release()
        self._file.write_bytes(self._file.read_bytes()[:1000])
        release(self)

    monkeypatch.setattr(predict._Pictures, 'close', cut)
    message, _ = tool(video, '--out', tmp_path / 'out')
    assert 'the video can not be written whole' in message
    assert not (tmp_path / 'out').exists()


def test_no_picture_takes_the_place_of_another(tool: Callable, shapes_root: str, tmp_path: Path) -> None:
    folder = tmp_path / 'images'
    folder.mkdir()
    with Image.open(Path(shapes_root, 'val', '000000.jpg')) as image:
        for name in ('a.bmp', 'a.bmp.png'):
            image.save(folder / name)
    message, _ = tool(folder, '--out', tmp_path / 'out')
    assert message == ''
    assert len(list((tmp_path / 'out' / 'vis').iterdir())) == 2


@pytest.mark.parametrize('classes', [5, 'cat', [1, 2], [], {'cat': 1}])
def test_class_names_of_the_wrong_kind(classes: object) -> None:
    with pytest.raises(UserError, match=r'a\.pth must name the classes in a tuple, but gives'):
        detector._check_classes(torch.nn.Identity(), classes, 'a.pth')


def test_heads_with_classes_of_their_own() -> None:
    head = RPNHead(in_channels=8, feat_channels=8)  # num_classes=1; a plain RPN has it as its bbox_head
    for name in ('bbox_head', 'rpn_head'):
        assert detector._check_classes(torch.nn.ModuleDict({name: head}), ('a', 'b'), 'a.pth') == ('a', 'b')
    stages = torch.nn.ModuleDict(dict(rpn_head=torch.nn.ModuleDict(dict(stage=torch.nn.Identity()))))
    stages.rpn_head.stage.num_classes = 1
    detector._check_classes(stages, ('a', 'b'), 'a.pth')


def test_nothing_is_overwritten_or_left_half_written(
    tool: Callable, shapes_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, out = Path(shapes_root, 'val', '000000.jpg'), tmp_path / 'out'
    out.mkdir()
    (out / 'mine.txt').write_text('kept')
    from rkan_mmdet.detector import Detector

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Detector, 'draw', fail)
        for folder in (out, tmp_path / 'new'):
            with pytest.raises(KeyboardInterrupt):
                tool(image, '--out', folder)
    replace, moves = os.replace, []

    def fail_at_the_second(source: Path, target: Path) -> None:
        moves.append(target)
        if len(moves) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    for folder in (out, tmp_path / 'new'):
        moves.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, 'replace', fail_at_the_second)
            with pytest.raises(KeyboardInterrupt):
                tool(image, '--out', folder)
    assert [p.name for p in out.iterdir()] == ['mine.txt']
    assert not (tmp_path / 'new').exists()

    assert tool(image, '--out', out)[0] == ''
    before = {p: p.stat().st_mtime_ns for p in out.rglob('*')}
    assert 'holds vis already' in tool(image, '--out', out)[0]
    shutil.rmtree(out / 'vis')
    assert 'holds images.json already' in tool(image, '--out', out)[0]
    assert {p: p.stat().st_mtime_ns for p in out.glob('*.json')}.items() <= before.items()
    assert 'is a file' in tool(image, '--out', out / 'mine.txt')[0]


def test_default_output_folder(
    tool: Callable, shapes_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tool(f'{shapes_root}/val/000002.jpg', '--no-draw')[0] == ''
    assert {row['image_id'] for row in read(tmp_path / 'predictions' / '000002')} == {3}


class _Hostile:
    def __reduce__(self) -> tuple:
        return (print, ('this must not run',))


@pytest.mark.slow
def test_checkpoints_that_do_not_fit(tool: Callable, checkpoint: str, shapes_root: str, tmp_path: Path) -> None:
    image, saved = Path(shapes_root, 'val', '000000.jpg'), torch.load(checkpoint)

    def refused(content: object) -> str:
        torch.save(content, tmp_path / 'x.pth')
        message, printed = tool(image, '--out', tmp_path / 'out', weights=tmp_path / 'x.pth')
        assert message.startswith('error: ')
        assert '\n' not in message
        assert 'this must not run' not in printed
        assert not (tmp_path / 'out').exists()
        return message

    state = saved['state_dict']
    plain = {name: value for name, value in state.items() if '.rkan.' not in name}
    lost = [name for name in state if '.rkan.' in name and not name.endswith('num_batches_tracked')]  # torch's default
    message = refused(dict(state_dict=plain))
    assert f'{len(lost)} weights of the detector are not in it (backbone.layer4.rkan.' in message
    more = refused(dict(state_dict=dict(state, **{'backbone.layer5.weight': torch.ones(1)})))
    assert '1 weights in it are not of the detector (backbone.layer5.weight)' in more
    name = 'roi_head.bbox_head.fc_cls.bias'
    assert f'1 weights are of another shape ({name})' in refused(dict(state_dict=dict(state, **{name: torch.ones(81)})))
    assert 'names 2 classes, but roi_head.bbox_head of the detector has 5' in refused(
        dict(state_dict=state, meta=dict(dataset_meta=dict(classes=('a', 'b'))))
    )
    assert 'in a tuple' in refused(dict(state_dict=state, meta=dict(dataset_meta=dict(classes='disc'))))
    for empty in ([1, 2], dict(state_dict={}), dict(epoch=3)):
        assert 'holds no weights' in refused(empty)
    assert 'can not be read safely: ' in refused(dict(state_dict=state, evil=_Hostile()))
    (tmp_path / 'y.pth').write_text('no checkpoint')
    assert 'can not be read safely: ' in tool(image, weights=tmp_path / 'y.pth')[0]


def test_other_forms_of_checkpoints(tool: Callable, checkpoint: str, shapes_root: str, tmp_path: Path) -> None:
    """A bare state dict takes the config's names; DDP's prefix and old capital keys are understood."""
    image, saved = Path(shapes_root, 'val', '000000.jpg'), torch.load(checkpoint)
    wrapped = {f'module.{name}': value for name, value in saved['state_dict'].items()}
    torch.save(saved['state_dict'], tmp_path / 'bare.pth')
    torch.save(dict(state_dict=wrapped, meta=dict(CLASSES=CLASSES)), tmp_path / 'old.pth')
    results = []
    for name, weights in dict(usual=checkpoint, bare=tmp_path / 'bare.pth', old=tmp_path / 'old.pth').items():
        assert tool(image, '--out', tmp_path / name, '--no-draw', weights=weights)[0] == ''
        results.append(read(tmp_path / name))
    assert results[0] == results[1] == results[2] != []


def test_detectors_without_masks(shapes_root: str) -> None:
    from rkan_mmdet.detector import Detector
    from rkan_mmdet.predict import coco_results

    cfg = read_config(CONFIG, dict(data_root=shapes_root))
    cfg.model.roi_head.pop('mask_head')
    cfg.model.roi_head.pop('mask_roi_extractor')
    init_default_scope('mmdet')
    path = Path(shapes_root).with_name('boxes.pth')
    torch.save(MODELS.build(cfg.model).state_dict(), path)
    detector = Detector(cfg, str(path))
    image = detector.read(f'{shapes_root}/val/000000.jpg')
    instances = detector([detector.prepare(image)])[0]
    rows = coco_results(instances, 7, [dict(id=i) for i in range(5)])
    assert rows
    assert all(set(row) == {'image_id', 'category_id', 'bbox', 'score'} for row in rows)
    assert (detector.draw(image, instances, 0) != image).any()
    assert (detector.draw(image, instances, 1) == image).all()
    cfg.model = dict(type='mmdet.ResNet', depth=18)
    with pytest.raises(UserError, match='is of ResNet, which is no detector'):
        Detector(cfg, str(path))


def test_refusals(tool: Callable, shapes_root: str, tmp_path: Path) -> None:
    image = Path(shapes_root, 'val', '000000.jpg')
    (tmp_path / 'empty').mkdir()
    for arguments, message in (
        ((tmp_path / 'none.jpg',), f'INPUT {tmp_path}/none.jpg does not exist'),
        ((tmp_path / 'empty',), 'holds no image'),
        ((__file__,), 'neither an image nor a video'),
        ((image, '--score-thr', 1.5), '--score-thr must be from 0 to 1, but got 1.5'),
        ((image, '--batch-size', 0), '--batch-size must be at least 1, but got 0'),
    ):
        assert message in tool(*arguments)[0]
    assert 'checkpoint none.pth does not exist' in tool(image, weights='none.pth')[0]


@pytest.mark.slow
def test_scores_as_the_test_tool_does(tool: Callable, checkpoint: str, shapes_root: str, tmp_path: Path) -> None:
    """Against the results that CocoMetric dumps, one by one; and the same COCO figures, on truths that are met."""
    data = tmp_path / 'data'
    shutil.copytree(shapes_root, data)
    file = data / 'annotations' / 'instances_val.json'
    assert tool(data / 'val', '--out', tmp_path / 'first', '--no-draw', data_root=data)[0] == ''
    truths = []  # every third detection, its box a little moved, so that the figures are neither 0 nor 1
    for row in read(tmp_path / 'first')[::3]:
        x, y, width, height = row['bbox']
        area = float(mask_utils.area(row['segmentation']))
        truths.append(dict(row, id=len(truths) + 1, bbox=[x + 2, y, width, height], area=area, iscrowd=0))
    file.write_text(json.dumps(dict(json.loads(file.read_text()), annotations=truths)))
    assert tool(data / 'val', '--out', tmp_path / 'ours', '--no-draw', data_root=data)[0] == ''

    dumped = tmp_path / 'theirs'
    done = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'test.py', CONFIG, checkpoint, '--work-dir', tmp_path / 'work',
         '--cfg-options', f'data_root={data}', f'test_evaluator.outfile_prefix={dumped}'],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours, boxes, masks = read(tmp_path / 'ours'), read(tmp_path, 'theirs.bbox.json'), read(tmp_path, 'theirs.segm.json')
    assert len(ours) == len(boxes) == len(masks) > 50
    for mine, box, mask in zip(ours, boxes, masks):
        for key in ('image_id', 'category_id'):
            assert mine[key] == box[key] == mask[key]
        assert mine['segmentation'] == mask['segmentation']
        assert mine['bbox'] == pytest.approx(box['bbox'], abs=1e-3)
        assert mine['score'] == pytest.approx(box['score'], abs=1e-6)
    figures = json.loads(next((tmp_path / 'work').glob('*/*.json')).read_text().splitlines()[-1])
    annotations = COCO(str(file))
    for kind in ('bbox', 'segm'):
        score = COCOeval(annotations, annotations.loadRes(str(tmp_path / 'ours' / 'predictions.json')), kind)
        score.evaluate()
        score.accumulate()
        score.summarize()
        assert 0.05 < score.stats[0] < 0.95
        assert score.stats[0] == pytest.approx(figures[f'coco/{kind}_mAP'], abs=5.1e-4)  # printed to three digits
