"""A page in the browser: upload an image, see what one detector finds, or two side by side. It needs gradio."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdet.apis.det_inferencer import IMG_EXTENSIONS

from .detector import Detector, UnreadableImage
from .launch import UserError

if TYPE_CHECKING:
    import gradio

CSS = """
.picture img {width: 100%; height: 100%; object-fit: contain}
.count {text-align: center}
"""


def import_gradio() -> Any:
    """The module ``gradio``, which is an optional extra; it tells nobody of its use.

    Raises:
        UserError: It is not installed.
    """
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
    try:
        import gradio
    except ImportError as error:
        raise UserError(f'the page needs gradio (`pip install "rkan-mmdet[page]"`): {error}') from error
    return gradio


def check_address(host: str, port: int) -> None:
    """Refuse an address that nothing can listen on.

    Raises:
        UserError: It is in use, or none of this machine.
    """
    if not 0 < port < 65536:
        raise UserError(f'--port must be from 1 to 65535, but got {port}')
    try:
        # a port whose last user has just gone counts as free, as it does for the page's server
        socket.create_server((host, port)).close()
    except OSError as error:
        raise UserError(f'--host {host} --port {port} can not be listened on: {error}') from error


def examples_of(detector: Detector, count: int = 6) -> list[str]:
    """The first images in the folder of the detector's test set; none where it is not here."""
    folder = (getattr(detector.dataset, 'data_prefix', None) or {}).get('img')
    if not folder or not os.path.isdir(folder):
        return []
    return sorted(str(file) for file in Path(folder).iterdir() if file.suffix.lower() in IMG_EXTENSIONS)[:count]


def build_page(detectors: dict[str, Detector], examples: list[str] | None = None) -> gradio.Blocks:
    """Lay out the page.

    An image is shown to each detector once; the slider only draws again.

    Args:
        detectors (dict[str, Detector]): By their headings; their pictures stand side by side in this order.
        examples (list[str], optional): Image files to choose from. Defaults to None.

    Returns:
        gradio.Blocks: The page; :func:`serve` shows it.

    Raises:
        UserError: gradio is not installed.
    """
    gr = import_gradio()

    def detect(path: str | None, score_thr: float) -> list[Any]:
        found = []
        try:
            for detector in detectors.values() if path else ():
                image = detector.read(path)
                found.append((image, detector([detector.prepare(image)])[0]))
        except UnreadableImage as error:
            gr.Warning(f'The image can not be read: {error}')
            found = []
        return [found, *draw(found, score_thr)]

    def draw(found: list, score_thr: float) -> list[Any]:
        if not found:
            return [None] * len(detectors) + [''] * len(detectors)
        pictures, counts = [], []
        for detector, (image, instances) in zip(detectors.values(), found):
            pictures.append(detector.draw(image, instances, score_thr)[..., ::-1])
            shown = int((instances.scores >= score_thr).sum())
            counts.append(f'**{shown}** detections with a score of {score_thr:.2f} or more')
        return pictures + counts

    # uploads are deleted after an hour
    with gr.Blocks(title='Detections', fill_width=True, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        found = gr.State([])
        with gr.Row():
            # image_mode=None hands the file on as it is, so that it is read as tools/predict.py reads it
            options = dict(type='filepath', image_mode=None, sources=['upload', 'clipboard'], height=280)
            image = gr.Image(label='Image', elem_id='image', **options)
            with gr.Column():
                slider = gr.Slider(0, 1, 0.3, step=0.01, label='Least score that is drawn', elem_id='threshold')
                if examples:
                    gr.Examples(examples, image, label='Images of the test set')
        pictures, counts = [], []
        with gr.Row():
            for i, name in enumerate(detectors):
                with gr.Column():
                    counts.append(gr.Markdown(elem_id=f'count-{i}', elem_classes='count'))
                    options = dict(interactive=False, height=500, buttons=['download', 'fullscreen'])
                    pictures.append(gr.Image(label=name, elem_id=f'picture-{i}', elem_classes='picture', **options))
        # one at a time: neither a detector nor its visualizer is made for two threads
        shared = dict(concurrency_limit=1, concurrency_id='detectors', api_visibility='private')
        outputs = [*pictures, *counts]
        image.change(detect, [image, slider], [found, *outputs], **shared)
        slider.change(draw, [found, slider], outputs, trigger_mode='always_last', show_progress='hidden', **shared)
    return page


def serve(page: gradio.Blocks, host: str, port: int, files: list[str]) -> None:
    """Show the page until Ctrl-C.

    Args:
        page (gradio.Blocks): From :func:`build_page`.
        host (str): Address to listen on.
        port (int): Port to listen on.
        files (list[str]): What it may show besides: the examples.
    """
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # a page of another site could give its own name this address
    own = ['127.0.0.1', 'localhost'] if host in ('127.0.0.1', 'localhost') else ['*']
    guard = [Middleware(TrustedHostMiddleware, allowed_hosts=own)]
    options = dict(server_name=host, server_port=port, quiet=True, share=False, ssr_mode=False, footer_links=[])
    options.update(max_file_size='100mb', app_kwargs=dict(middleware=guard))
    _, url, _ = page.launch(prevent_thread_lock=True, allowed_paths=files, css=CSS, **options)
    print(f'the page is at {url} (Ctrl-C ends it)', flush=True)
    page.block_thread()
