"""What a trained RKAN learned: watch a detector at work on images, and put what was seen into one HTML file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbones import ResidualPath
from .launch import UserError
from .ops import KANConv2d
from .ops.reference import normalize_windows

_SAMPLES = 4096  # input values kept of each KAN convolution and batch


class Observations(NamedTuple):
    """What :func:`observe` saw."""

    inputs: dict[str, Tensor]
    """For each KAN convolution by name, values that reached it: the normalized ones where the normalization is over
    windows."""
    shares: dict[str, Tensor]
    """For each stage with a path, ``Tensor[C]``: the path's share of the stage's output in each channel,
    ``E[d^2] / (E[F^2] + E[d^2])`` over all images and pixels, with F the blocks' output and d what the path changes."""
    maps: dict[str, list[dict[str, Tensor]]]
    """For each stage with a path and each of the first images: mean absolute values over channels, ``Tensor[h, w]``, of
    the stage without the path, of what the path changes, and of the stage with the path."""


NOTHING = Observations({}, {}, {})


def kan_convs(model: nn.Module) -> dict[str, KANConv2d]:
    """The KAN convolutions of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, KANConv2d)}


def _seen_values(conv: KANConv2d, x: Tensor) -> Tensor:
    if conv.normalization == 'tanh':
        return x.flatten()
    sizes = dict(kernel_size=conv.kernel_size, stride=conv.stride, padding=conv.padding, dilation=conv.dilation)
    windows = F.unfold(x[:1, :16].float(), **sizes)  # a few channels of one image say enough
    windows = windows.reshape(1, -1, conv.kernel_size[0] * conv.kernel_size[1], windows.shape[-1])
    scale = None if conv.arctan_scale is None else conv.arctan_scale[0]
    return normalize_windows(windows, conv.normalization, scale).flatten()


def watch_inputs(model: nn.Module) -> tuple[dict[str, list[Tensor]], list[Any]]:
    """Keep a sample of the values that reach each KAN convolution, batch by batch.

    Args:
        model (nn.Module): Holds KAN convolutions.

    Returns:
        tuple: The samples by name, which grow while the model runs, and the handles whose ``remove()`` ends that.
    """
    samples: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)  # the global one must not move: training would differ

    def watch(name: str) -> Callable:
        def hook(conv: KANConv2d, arguments: tuple) -> None:
            values = _seen_values(conv, arguments[0].detach()).float().cpu()
            chosen = torch.randint(len(values), (min(_SAMPLES, len(values)),), generator=generator)
            samples.setdefault(name, []).append(values[chosen])

        return hook

    return samples, [conv.register_forward_pre_hook(watch(name)) for name, conv in kan_convs(model).items()]


@torch.no_grad()
def observe(model: nn.Module, run: Callable[[Any], Any], batches: Iterable[Any], pictures: int = 3) -> Observations:
    """Run a model over batches and watch its KAN convolutions and residual paths.

    Args:
        model (nn.Module): Holds residual paths.
        run (Callable): Called with each batch; must run the model once.
        batches (Iterable): The batches, of one image each where maps are wanted.
        pictures (int): For how many batches the feature maps of the first image are kept. Defaults to 3.

    Returns:
        Observations: What was seen.

    Examples:
        >>> path = ResidualPath(8, 8)
        >>> class Stage(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.rkan = path
        ...     def forward(self, x):
        ...         return self.rkan.aggregate(x, self.rkan(x))
        >>> stage = Stage()
        >>> seen = observe(stage, stage, [torch.randn(1, 8, 16, 16)])
        >>> {name: tuple(share.shape) for name, share in seen.shares.items()}
        {'': (8,)}
    """
    squares: dict[str, Tensor] = {}
    maps: dict[str, list[dict[str, Tensor]]] = {}
    inputs, handles = watch_inputs(model)

    def watch_stage(stage: str) -> Callable:
        def hook(module: nn.Module, arguments: tuple, output: Tensor) -> None:
            features = arguments[0]
            change = output - features
            sums = torch.stack([t.double().square().sum((0, 2, 3)).cpu() for t in (features, change)])
            squares[stage] = squares.get(stage, 0) + sums
            maps.setdefault(stage, [])
            if len(maps[stage]) < pictures:
                named = {'without the path': features, 'what the path changes': change, 'with the path': output}
                maps[stage].append({name: t[0].float().abs().mean(0).cpu() for name, t in named.items()})

        return hook

    for name, module in model.named_modules():
        if isinstance(module, ResidualPath):
            stage = name.rpartition('.')[0]  # a path is the child `rkan` of its stage
            handles.append(module.aggregation.register_forward_hook(watch_stage(stage)))
    try:
        for batch in batches:
            run(batch)
    finally:
        for handle in handles:
            handle.remove()
    shares = {stage: (s[1] / s.sum(0).clamp_min(1e-30)).float() for stage, s in squares.items()}
    return Observations({name: torch.cat(values) for name, values in inputs.items()}, shares, maps)


def look(
    model: nn.Module, dataset: Any, images: int, track: Callable[[list], Iterable] = iter
) -> tuple[Observations, list[np.ndarray]]:
    """Observe a detector on the first images of a data set.

    Args:
        model (nn.Module): The detector, in eval mode.
        dataset (Dataset): The data set, with the pipeline of a test.
        images (int): How many; fewer where the set holds fewer.
        track (Callable): Shows the progress through a list. Defaults to ``iter``.

    Returns:
        tuple: What was seen, and the images of its maps: RGB, (H, W, 3) of uint8.

    Raises:
        UserError: The set is empty.
    """
    from .detector import to_bgr

    batches = [
        {key: [value] for key, value in dataset[i].items() if key in ('inputs', 'data_samples')}
        for i in range(min(images, len(dataset)))
    ]
    if not batches:
        raise UserError('the data set holds no image')
    seen = observe(model, model.test_step, track(batches))
    shown = [to_bgr(batch['inputs'][0].permute(1, 2, 0).numpy())[..., ::-1] for batch in batches[:3]]
    return seen, shown


def png(figure: Any) -> bytes:
    """A figure as PNG; the figure is closed."""
    from matplotlib import pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format='png')
    plt.close(figure)
    return buffer.getvalue()


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
img {{ max-width: 100%; height: auto }}
table {{ border-collapse: collapse }}
th, td {{ padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def make_html(title: str, sections: Iterable[tuple[str, str, dict[str, bytes], list[list[str]]]]) -> str:
    """One HTML file that needs nothing beside it.

    Args:
        title (str): The heading.
        sections (Iterable[tuple]): For each: heading, text, pictures (PNG by caption), rows of a table, head first
            (no rows: no table).

    Returns:
        str: The page.
    """
    body = []
    for heading, text, pictures, rows in sections:
        body += [f'<h2>{html.escape(heading)}</h2>', f'<p>{html.escape(text)}</p>']
        if rows:
            body.append('<table>')
            for i, row in enumerate(rows):
                tag = 'td' if i else 'th'
                body.append('<tr>' + ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row) + '</tr>')
            body.append('</table>')
        for caption, picture in pictures.items():
            data = base64.b64encode(picture).decode()
            body.append(f'<p><img alt="{html.escape(caption, quote=True)}" src="data:image/png;base64,{data}"></p>')
    return _PAGE.format(title=html.escape(title), body='\n'.join(body))
