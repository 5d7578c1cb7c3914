"""The learning rate and the schedule of a base for another batch, another number of epochs, another set of images."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from mmengine.config import Config

from rkan_mmdet.launch import UserError, type_name


class Schedule(NamedTuple):
    """How a run takes its steps.

    Attributes:
        batch (int): Images on all GPUs at once.
        accumulate (int): Batches to one step of the optimiser.
        lr (float or None): The learning rate; None when the base has none.
        ratio (float): ``lr`` to the base's.
        stretch (float): Iterations here that see as many images as one of the base.
        why (str): The arithmetic, in one sentence.
    """

    batch: int
    accumulate: int
    lr: float | None
    ratio: float
    stretch: float
    why: str


def counted(count: int, what: str) -> str:
    """``counted(2, 'GPU')`` is ``'2 GPUs'``."""
    return f'{count} {what}{"s" * (count != 1)}'


def plan_schedule(cfg: Config, batch_size: int, gpus: int = 1, name: str = '') -> Schedule:
    """Keep the images that the base takes to one step of the optimiser, or else scale its learning rate with them.

    Args:
        cfg (Config): The base.
        batch_size (int): Images on each GPU at once.
        gpus (int): How many GPUs. Defaults to 1.
        name (str): The base's file name. MMDetection puts the batch into it (``8xb32``), which then counts more than
            ``auto_scale_lr``, as that is often inherited from elsewhere. Defaults to ``''``.

    Returns:
        Schedule: Accumulation where the base's batch is a multiple of this one; a linear change of the learning rate
        where it is not; neither, when the base does not say what batch its learning rate is meant for.

    Examples:
        >>> base = dict(optim_wrapper=dict(optimizer=dict(lr=0.02)), auto_scale_lr=dict(base_batch_size=16))
        >>> plan_schedule(Config(base), batch_size=2).accumulate
        8
        >>> plan_schedule(Config(base), batch_size=6).lr
        0.0075
    """
    wrapper = cfg.get('optim_wrapper') or {}
    lr = (wrapper.get('optimizer') or {}).get('lr')
    now = wrapper.get('accumulative_counts', 1)
    batch = batch_size * gpus
    here = f'{counted(gpus, "GPU")} x {counted(batch_size, "image")}'
    named = re.search(r'(?<![0-9a-z])(\d+)xb(\d+)(?![0-9a-z])', name)
    least = int(named[1]) * int(named[2]) if named else (cfg.get('auto_scale_lr') or {}).get('base_batch_size')
    if not least or lr is None:
        why = 'The base does not say for which batch its learning rate is meant: it is left as it is.'
        return Schedule(batch, now, lr, 1.0, 1.0, why)
    wanted = least * now
    said = f'The base takes {wanted} images to a step, with lr={lr:g}. Here: {here}'
    if wanted % batch == 0:
        count = wanted // batch
        more = f' x {count} batches a step' if count > 1 else ''
        return Schedule(batch, count, lr, 1.0, least / batch, f'{said}{more} = {wanted}, so lr={lr:g} holds.')
    ratio = batch / wanted
    new = float(f'{lr * ratio:.6g}')
    why = f'{said} = {batch}, no divisor of {wanted}, so one batch a step and lr={lr:g} x {batch} / {wanted} = {new:g}.'
    return Schedule(batch, 1, new, ratio, least / batch, why)


_EPOCHS = ('begin', 'end', 'T_max', 'milestones', 'step_size', 'total_steps')


def scaled(value: Any, factor: float, least: int) -> Any:
    """An epoch, or several, in a run of another length."""
    if isinstance(value, (list, tuple)):
        return sorted({scaled(v, factor, least) for v in value})
    return max(least, round(value * factor))


def plan_schedulers(cfg: Config, plan: Schedule, epochs: int, iterations: int) -> tuple[list[dict], str]:
    """The base's schedulers for this run.

    Those that count epochs are stretched with the number of epochs. Those that count iterations warm up: for as many
    images as the base, but for no more than a tenth of the run.

    Args:
        cfg (Config): The base.
        plan (Schedule): As of :func:`plan_schedule`.
        epochs (int): Of this run.
        iterations (int): Of an epoch of this run.

    Returns:
        tuple[list[dict], str]: The schedulers, and the arithmetic of the warm-up, empty when that stays as it was.

    Raises:
        UserError: A scheduler that is no warm-up counts iterations, or one can not be stretched.
    """
    factor = epochs / cfg.train_cfg.max_epochs
    given = cfg.get('param_scheduler') or []
    out, why = [], ''
    for scheduler in [given] if isinstance(given, dict) else given:
        new = dict(scheduler)
        name = type_name(new)
        if 'eta_min' in new:
            new['eta_min'] = float(f'{new["eta_min"] * plan.ratio:.6g}')
        if new.get('by_epoch', True):
            if factor != 1 and name.startswith('Exponential'):
                raise UserError(f'param_scheduler {name} of the base has no length to stretch: leave --epochs as it is')
            new.update({k: scaled(new[k], factor, int(k != 'begin')) for k in _EPOCHS if k in new})
            if 'end' in new:
                new['end'] = max(new['end'], new.get('begin', 0) + 1)
        elif not name.startswith(('Linear', 'Constant')) or 'end' not in new:
            raise UserError(
                f'param_scheduler {name} of the base counts iterations: only a warm-up may; choose another base'
            )
        else:
            same = round(new['end'] * plan.stretch)
            # of one iteration it would never reach the full learning rate
            tenth = max(2, epochs * iterations // 10)
            why = f'Warm-up: {new["end"]} iterations of the base see as many images as {same} here'
            why += '.' if same <= tenth else f'; a tenth of this run, {epochs} x {iterations} iterations, is {tenth}.'
            why = '' if min(same, tenth) == new['end'] else why
            new['end'] = max(min(same, tenth), 2)
        out.append(new)
    return out, why
