"""Convert weights: the authors' to ours and back, a plain detector's to one with residual KAN paths.

The config says what the weights are for: a detector, of which ``from-authors`` and ``to-authors`` take the backbone.
"""

import argparse
import io
from pathlib import Path

import torch

from rkan_mmdet.checkpoint import write_whole
from rkan_mmdet.convert import from_authors, from_plain, to_authors
from rkan_mmdet.launch import UserError, build_model, check_checkpoint, read_config, run_tool, with_dot


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('direction', choices=['from-authors', 'to-authors', 'from-plain'])
    parser.add_argument('src', help='the checkpoint to read')
    parser.add_argument('dst', type=Path, help='the checkpoint to write')
    parser.add_argument('--config', required=True, help='config of the detector (or of a classifier) with the paths')
    parser.add_argument('--dry-run', action='store_true', help='say what would be written, and write nothing')
    parser.add_argument('--overwrite', action='store_true', help='replace dst if it exists')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    state, meta = check_checkpoint(args.src)
    if args.dst.exists() and not (args.overwrite or args.dry_run):
        raise UserError(f'{args.dst} exists; name another file, or say --overwrite')
    if args.dst.is_dir():
        raise UserError(f'{args.dst} is a folder; name a file')
    cfg = read_config(args.config)
    if 'backbone' not in (cfg.get('model') or {}):
        raise UserError(f'{args.config} has no model.backbone: name the config of the detector within')
    model = build_model(cfg, None if args.direction == 'from-plain' else cfg.model.backbone)
    try:
        if args.direction == 'from-authors':
            state = from_authors(
                {key[7:] if key.startswith('module.') else key: value for key, value in state.items()}, model
            )
            init = cfg.model.backbone.get('init_cfg')
            prefix = with_dot(init.get('prefix')) if isinstance(init, dict) else ''  # of what the config starts from
            state = {f'{prefix}{key}': value for key, value in state.items()}
        elif args.direction == 'to-authors':
            inside = {k[len('backbone.') :]: v for k, v in state.items() if k.startswith('backbone.')}
            state = to_authors(inside or state, model)
        else:
            state = from_plain(state, model)
    except ValueError as error:
        raise UserError(str(error)) from error
    result = state if args.direction == 'to-authors' else dict(meta=meta, state_dict=state)
    paths = [key for key in state if '.rkan.' in key]
    numbers = sum(value.numel() for value in state.values())
    print(f'{args.src} -> {args.dst}: {len(state)} tensors, {numbers / 1e6:.2f} M values, {len(paths)} of a path')
    if args.dry_run:
        return
    content = io.BytesIO()
    torch.save(result, content)
    write_whole(args.dst, content.getvalue())


if __name__ == '__main__':
    run_tool(main)
