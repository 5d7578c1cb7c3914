"""Pictures of the learned KAN functions while a detector trains; off unless a config asks for it."""

from __future__ import annotations

import copy
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop

from .checks import check_bool, check_int


@HOOKS.register_module()
class KANFunctionsHook(Hook):
    """Hands a picture of each KAN convolution's functions to the visualizer: as files, or to TensorBoard.

    Below the functions stands what reached the convolution in the latest batch, and dashed how they started (not in a
    run that was resumed, which does not know). Nothing of the training changes.

    Args:
        interval (int): Epochs, or iterations, between pictures, at least 1; there is one after the last epoch that it
            divides. Defaults to 1.
        by_epoch (bool): Whether ``interval`` counts epochs. Defaults to True.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: ``interval`` is below 1; or training counts iterations and ``by_epoch`` is True.

    Examples:
        >>> # in a config; vis_backends may list TensorboardVisBackend
        >>> custom_hooks = [dict(type='KANFunctionsHook', interval=1)]
        >>> HOOKS.build(custom_hooks[0]).interval
        1
    """

    priority = 'LOW'

    def __init__(self, interval: int = 1, by_epoch: bool = True) -> None:
        self.interval = check_int('interval', interval, 1)
        self.by_epoch = check_bool('by_epoch', by_epoch)
        self._initial: dict[str, Any] = {}
        self._samples: dict[str, Any] = {}
        self._handles: list[Any] = []

    def _model(self, runner: Any) -> Any:
        return runner.model.module if is_model_wrapper(runner.model) else runner.model

    def _is_due(self, runner: Any, batch_idx: int) -> bool:
        if not self.by_epoch:
            return self.every_n_train_iters(runner, self.interval)
        return self.end_of_epoch(runner.train_dataloader, batch_idx) and self.every_n_epochs(runner, self.interval)

    def before_train(self, runner: Any) -> None:
        from .report import kan_convs

        if self.by_epoch and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ValueError(
                'by_epoch of KANFunctionsHook must be False where training counts iterations, but got True'
            )
        if runner.iter == 0:
            self._initial = copy.deepcopy(kan_convs(self._model(runner)))

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        from .report import watch_inputs

        if is_main_process() and self._is_due(runner, batch_idx):
            self._samples, self._handles = watch_inputs(self._model(runner))

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if not self._handles:
            return
        import numpy as np
        import torch

        from .plot import draw_functions, plt  # matplotlib is asked for only where pictures are
        from .report import kan_convs

        while self._handles:
            self._handles.pop().remove()
        step = runner.epoch + 1 if self.by_epoch else runner.iter + 1
        for name, conv in kan_convs(self._model(runner)).items():
            figure = draw_functions(conv, name, torch.cat(self._samples[name]), self._initial.get(name))
            figure.canvas.draw()
            runner.visualizer.add_image(name, np.asarray(figure.canvas.buffer_rgba())[..., :3].copy(), step=step)
            plt.close(figure)
