"""What a check of data finds: one finding, and lists of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from rkan_mmdet.data.quick_check import TOLERATED


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        severity (str): ``'error'``: a run would crash, or would learn or be scored on something else than the data
            says; ``'warning'``: it would be worse than it could be; ``'note'``: good to know.
        name (str): What it is, for programs.
        text (str): What it is, for people.
        count (int): How many images, annotations, classes.
        examples (tuple[str]): Up to three of them.
        mend (str): The lines of config that mend it, or what to do to the file; empty for most notes.
        split (str): ``'train'``, ``'val'``, ``'test'``, or empty.
    """

    severity: str
    name: str
    text: str
    count: int = 1
    examples: tuple[str, ...] = ()
    mend: str = ''
    split: str = ''


class Report(list):
    """Findings, with the frequent form of adding one."""

    def add(self, severity: str, name: str, text: str, bad: Iterable, show: Callable = str, mend: str = '') -> None:
        """Nothing, when ``bad`` is empty."""
        bad = list(bad)
        if bad:
            self.append(Finding(severity, name, text, len(bad), tuple(show(b) for b in bad[:3]), mend))


def lost(count: int, total: int) -> str:
    """The severity of ``count`` boxes of ``total`` that no training would see."""
    return 'error' if count > TOLERATED * total else 'warning'


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """The worst first."""
    return sorted(findings, key=lambda f: ('error', 'warning', 'note').index(f.severity))
