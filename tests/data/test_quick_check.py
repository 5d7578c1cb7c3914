"""Annotation files that are not sound are refused with what is wrong in them."""

import json
from pathlib import Path
from typing import Any, Callable

import pytest

from rkan_mmdet.data.quick_check import check_coco


def sound() -> dict:
    return dict(
        images=[dict(id=1, file_name='a.jpg', height=4, width=4)],
        annotations=[dict(id=1, image_id=1, category_id=7, bbox=[0, 0, 2.5, 2], area=5)],
        categories=[dict(id=7, name='cat'), dict(id=9, name='dog')],
    )


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_sound_files_pass(tmp_path: Path, shapes_root: str) -> None:
    path = write(tmp_path / 'a.json', sound())
    for classes in (None, ('cat', 'dog'), ['cat'], ('cat', 'dog', 'never annotated')):
        check_coco(path, classes)
    with pytest.raises(ValueError, match=r'a\.json has no category never annotated, a prediction of which would stop'):
        check_coco(path, ('cat', 'dog', 'never annotated'), all_classes=True)
    check_coco(path, ('cat', 'dog'), all_classes=True)
    check_coco(f'{shapes_root}/annotations/instances_train.json', ('disc', 'box', 'triangle', 'star', 'ring'))
    check_coco(write(tmp_path / 'b.json', dict(sound(), annotations=[])))
    check_coco(write(tmp_path / 'c.json', dict(images=sound()['images'], categories=sound()['categories'])))


def test_a_few_strays_are_tolerated_as_by_the_check(tmp_path: Path) -> None:
    content = sound()
    content['annotations'] = [dict(content['annotations'][0], id=i) for i in range(200)]
    for key in ('image_id', 'category_id'):
        content['annotations'][7][key] = 77
    check_coco(write(tmp_path / 'a.json', content))
    for annotation in content['annotations'][:3]:
        annotation['image_id'] = 77
    with pytest.raises(ValueError, match=r'annotations\[0\] names image_id 77.*rkan_mmdet\.data\.check .*a\.json'):
        check_coco(write(tmp_path / 'a.json', content))


def without(entry: dict, key: str) -> dict:
    return {k: v for k, v in entry.items() if k != key}


CHANGES: dict[str, Callable[[dict], Any]] = {
    r'it holds a list': lambda c: [c],
    r"it has no list 'images'": lambda c: dict(c, images=None),
    r"it has no list 'categories'": lambda c: {k: v for k, v in c.items() if k != 'categories'},
    r"images\[0\] has no 'file_name'": lambda c: dict(c, images=[dict(id=1, height=4, width=4)]),
    r"it has no list 'annotations'": lambda c: dict(c, annotations=3),
    r"annotations\[0\] has no 'id'": lambda c: dict(c, annotations=['x']),
    r'names image_id 2, which is not an image': lambda c: dict(c, annotations=[dict(c['annotations'][0], image_id=2)]),
    r'names category_id 1, which is no category': lambda c: dict(
        c, annotations=[dict(c['annotations'][0], category_id=1)]
    ),
    r'bbox of annotations\[0\] .* \[1, 2, 3\]': lambda c: dict(
        c, annotations=[dict(c['annotations'][0], bbox=[1, 2, 3])]
    ),
    r"annotations\[0\] has no 'area'": lambda c: dict(c, annotations=[without(c['annotations'][0], 'area')]),
    r"area of annotations\[0\] .* 'x'": lambda c: dict(c, annotations=[dict(c['annotations'][0], area='x')]),
    r'file_name of images\[0\] .* 5': lambda c: dict(c, images=[dict(c['images'][0], file_name=5)]),
    r'width of images\[0\] must be at least 1, but is 0': lambda c: dict(c, images=[dict(c['images'][0], width=0)]),
    r"height of images\[0\] .* '4'": lambda c: dict(c, images=[dict(c['images'][0], height='4')]),
    r'area of annotations\[0\] must be a finite number, but is 1000': lambda c: dict(
        c, annotations=[dict(c['annotations'][0], area=10**400)]
    ),
    r'several images have the same id': lambda c: dict(c, images=c['images'] * 2),
    r'finite numbers .* nan': lambda c: dict(c, annotations=[dict(c['annotations'][0], bbox=[0, 0, 1, float('nan')])]),
}


@pytest.mark.parametrize('message', CHANGES)
def test_a_fault_is_named(message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf'annotation file .*a\.json is not .*{message}'):
        check_coco(write(tmp_path / 'a.json', CHANGES[message](sound())))


def test_what_an_evaluation_needs(tmp_path: Path) -> None:
    content = sound()
    with pytest.raises(ValueError, match=r"annotations\[0\] has no 'iscrowd'"):
        check_coco(write(tmp_path / 'a.json', content), needs=('iscrowd', 'segmentation'))
    for value in ('0', None):
        content['annotations'][0]['iscrowd'] = value
        with pytest.raises(ValueError, match=r'iscrowd of annotations\[0\] must be 0 or 1'):
            check_coco(write(tmp_path / 'a.json', content), needs=('iscrowd',))
    content['annotations'][0]['iscrowd'] = 0
    with pytest.raises(ValueError, match=r"annotations\[0\] has no 'segmentation'"):
        check_coco(write(tmp_path / 'a.json', content), needs=('iscrowd', 'segmentation'))
    check_coco(write(tmp_path / 'a.json', content), needs=('iscrowd',))
    needs = ('iscrowd', 'segmentation')
    for mask, is_sound in (
        ([[0, 0, 2, 2]], False),
        ([[0, 0, 2, 2, 1]], True),
        ([dict(counts=[0, 16], size=[4, 4])], True),
    ):
        content['annotations'][0]['segmentation'] = mask
        path = write(tmp_path / 'a.json', content)
        if is_sound:
            check_coco(path, needs=needs)
        else:
            with pytest.raises(ValueError, match='has no polygon'):
                check_coco(path, needs=needs)
            check_coco(path, ('dog',), needs)  # nor is a cat scored


def test_what_is_not_json_is_named(tmp_path: Path) -> None:
    for content in (b'', b'{"images": [', b'\xff\xfe\x00'):
        (tmp_path / 'a.json').write_bytes(content)
        with pytest.raises(ValueError, match=r'a\.json is not JSON'):
            check_coco(tmp_path / 'a.json')


@pytest.mark.parametrize(
    ('classes', 'message'),
    [
        (('disc', 'box'), 'has the categories cat, dog, of which none is a class of the config, which has disc, box'),
        (('dog', 'cat'), 'numbers classes by the order in the file'),
        (('cow', 'cat', 'dog'), 'so every class would get a wrong name'),
    ],
)
def test_classes_that_would_be_named_wrongly(classes: tuple, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        check_coco(write(tmp_path / 'a.json', sound()), classes)
