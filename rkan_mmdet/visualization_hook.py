"""The pictures of ``tools/plot_kan.py`` while a detector trains; off unless a config asks for it."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop
from torch import nn

from .checks import check_bool, check_fraction, check_int


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Give back random numbers and modes as they were, so that the training is the one without pictures."""
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 (what data pipelines draw from)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        for module, training in modes:
            module.training = training


@HOOKS.register_module()
class RKANVisualizationHook(Hook):
    """Hands the visualizer what the residual paths learned and do: as files, or to TensorBoard.

    Pictures as of ``tools/plot_kan.py``: the functions of each KAN convolution over what reaches it (dashed: how they
    started, but not in a run that was resumed, which does not know), the path's share of its stage's output, feature
    maps with and without the path, and predictions beside ground truth. They are made on images of the validation set
    in eval mode, before the validation, with the weights at hand (not those that an ``EMAHook`` averages); a run
    without validation shows the functions alone. Nothing of the training changes, and what fails here does not end it.

    Args:
        interval (int): Epochs, or iterations, between pictures, at least 1. Defaults to 1.
        by_epoch (bool): Whether ``interval`` counts epochs. Defaults to True.
        images (int): The first so many images of the validation set are looked at, and at most three of them are
            shown; 0: the functions alone. Defaults to 4.
        score_thr (float): No prediction below is drawn, in [0, 1]. Defaults to 0.3.
        against (Sequence[str], optional): Config and checkpoint of another detector, a plain one say, whose
            predictions on the same images stand beside. Defaults to None.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A value is out of range; or training counts iterations and ``by_epoch`` is True.
        UserError: ``against`` can not be built.

    Examples:
        >>> # in a config; vis_backends may list TensorboardVisBackend
        >>> custom_hooks = [dict(type='RKANVisualizationHook', interval=1)]
        >>> HOOKS.build(custom_hooks[0]).interval
        1
    """

    priority = 'LOW'

    def __init__(
        self,
        interval: int = 1,
        by_epoch: bool = True,
        images: int = 4,
        score_thr: float = 0.3,
        against: Sequence[str] | None = None,
    ) -> None:
        self.interval = check_int('interval', interval, 1)
        self.by_epoch = check_bool('by_epoch', by_epoch)
        self.images = check_int('images', images, 0)
        self.score_thr = check_fraction('score_thr', score_thr)
        if against is not None and (
            not isinstance(against, (list, tuple)) or [type(part) for part in against] != [str, str]
        ):
            raise TypeError(f'against must be (config, checkpoint) or None, but got {against!r}')
        self.against = against
        self._initial: dict[str, nn.Module] = {}
        self._baseline: nn.Module | None = None

    def _model(self, runner: Any) -> nn.Module:
        return runner.model.module if is_model_wrapper(runner.model) else runner.model

    def before_train(self, runner: Any) -> None:
        from .report import kan_convs

        if self.by_epoch and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ValueError(
                'by_epoch of RKANVisualizationHook must be False where training counts iterations, but got True'
            )
        model = self._model(runner)
        if runner.iter == 0:
            self._initial = copy.deepcopy(kan_convs(model))
        if self.against:  # in every process: where the checkpoint is an address, they wait for each other
            from .launch import read_config
            from .speed import build_detector

            with _as_it_was(model):
                device = str(next(model.parameters()).device)
                baseline = build_detector(read_config(self.against[0]), self.against[1], device)
            self._baseline = baseline if is_main_process() else None

    def after_train_epoch(self, runner: Any) -> None:
        if self.by_epoch and self.every_n_epochs(runner, self.interval):
            self._show(runner, runner.epoch + 1)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if not self.by_epoch and self.every_n_train_iters(runner, self.interval):
            self._show(runner, runner.iter + 1)

    def _show(self, runner: Any, step: int) -> None:
        if not is_main_process():
            return
        try:
            for name, picture in self._draw(runner).items():
                runner.visualizer.add_image(name.replace(' ', '_'), picture, step=step)
        except Exception as error:  # pictures are not worth an end to the training
            runner.logger.warning(f'no pictures of this step: {type(error).__name__}: {error}')

    def _draw(self, runner: Any) -> dict[str, np.ndarray]:
        from .plot import draw_figures, draw_predictions, plt  # matplotlib is asked for only where pictures are
        from .report import NOTHING, look

        model = self._model(runner)
        with _as_it_was(model):
            model.eval()
            dataset = runner.val_loop.dataloader.dataset if self.images and runner.val_loop is not None else None
            seen, shown = look(model, dataset, self.images) if dataset is not None else (NOTHING, [])
            pictures = {}
            for name, figure in draw_figures(model, seen, shown, self._initial):
                figure.canvas.draw()
                pictures[name] = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
                plt.close(figure)
            if dataset is not None:
                models = [model] if self._baseline is None else [self._baseline, model]
                detectors = [(m, dataset) for m in models]
                pictures['predictions'] = draw_predictions(detectors, len(shown), self.score_thr)
        return pictures
