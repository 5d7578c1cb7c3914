"""Make the study's bccd set of a checkout of github.com/Shenggan/BCCD_Dataset (MIT): COCO format, 292 + 72 images.

Boxes with a side below 2 px are left out. Images are copied as they are.
"""

import argparse
import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from rkan_mmdet.launch import UserError, run_tool

CLASSES = ('RBC', 'WBC', 'Platelets')
SPLITS = {'train': ('trainval', 1), 'val': ('test', 1001)}  # the source's list, and the first image's id


def read_split(source: Path, split: str) -> dict:
    listed, first = SPLITS[split]
    content = dict(categories=[dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)], images=[], annotations=[])
    names = (source / 'ImageSets' / 'Main' / f'{listed}.txt').read_text().split()
    for image_id, name in enumerate(sorted(names), first):
        root = ElementTree.parse(source / 'Annotations' / f'{name}.xml').getroot()
        width, height = (int(root.findtext(f'size/{side}')) for side in ('width', 'height'))
        content['images'].append(dict(id=image_id, file_name=f'{name}.jpg', width=width, height=height))
        for i, item in enumerate(root.iter('object')):
            left, top, right, bottom = (float(item.findtext(f'bndbox/{k}')) for k in ('xmin', 'ymin', 'xmax', 'ymax'))
            box = [left, top, right - left, bottom - top]
            if min(box[2:]) < 2:
                continue
            annotation = dict(id=100 * image_id + i, image_id=image_id, iscrowd=0, area=box[2] * box[3], bbox=box)
            content['annotations'].append(dict(annotation, category_id=CLASSES.index(item.findtext('name')) + 1))
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', type=Path, help='the checkout, or its folder BCCD')
    parser.add_argument('out', type=Path, help='the folder to make, e.g. data/bccd')
    args = parser.parse_args()
    source = args.source / 'BCCD' if (args.source / 'BCCD').is_dir() else args.source
    if args.out.exists():
        raise UserError(f'{args.out} exists already; name another folder')
    try:
        splits = {split: read_split(source, split) for split in SPLITS}
    except FileNotFoundError as error:
        raise UserError(f'{args.source} is no checkout of BCCD_Dataset: {error}') from None
    part = args.out.with_name(f'{args.out.name}.part')
    for split, content in splits.items():
        (part / split).mkdir(parents=True, exist_ok=True)
        (part / 'annotations').mkdir(exist_ok=True)
        for image in content['images']:
            shutil.copy(source / 'JPEGImages' / image['file_name'], part / split)
        (part / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
        print(f'{split}: {len(content["images"])} images, {len(content["annotations"])} boxes')
    part.rename(args.out)


if __name__ == '__main__':
    run_tool(main)
