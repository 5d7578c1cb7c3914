"""Show a page in the browser: upload an image, see what a detector finds, or two side by side."""

import argparse
from pathlib import Path

from rkan_mmdet.detector import Detector, choose_device
from rkan_mmdet.launch import add_cfg_options, read_config, run_tool
from rkan_mmdet.page import build_page, check_address, examples_of, import_gradio, serve


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the detector')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('--against', nargs=2, metavar=('CONFIG', 'CHECKPOINT'), help='a second detector beside it')
    parser.add_argument('--device', default='auto', help='auto (a GPU where there is one), cpu, cuda, cuda:1')
    parser.add_argument('--host', default='127.0.0.1', help='0.0.0.0 shows it to the network (default: %(default)s)')
    parser.add_argument('--port', type=int, default=7860, help='default: %(default)s')
    add_cfg_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    import_gradio()
    check_address(args.host, args.port)
    device = choose_device(args.device)
    pairs = [(args.config, args.checkpoint), *([args.against] if args.against else [])]
    configs = [read_config(config, args.cfg_options) for config, _ in pairs]
    detectors = {}
    for cfg, (config, checkpoint) in zip(configs, pairs):
        name = Path(config).stem
        name = name if name not in detectors else f'{name}, {checkpoint}'
        detectors[name] = Detector(cfg, checkpoint, device)
    examples = examples_of(next(iter(detectors.values())))
    serve(build_page(detectors, examples), args.host, args.port, examples)


if __name__ == '__main__':
    run_tool(main)
