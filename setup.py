"""A wheel carries configs and tools as ``rkan_mmdet/.mim``, where MMEngine (``rkan_mmdet::``) and mim look for them."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    def run(self) -> None:
        # what an earlier build left there, and is deleted since, would be in the wheel
        shutil.rmtree(Path(self.build_lib, 'rkan_mmdet'), ignore_errors=True)
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, 'rkan_mmdet', '.mim')
        for folder in ('configs', 'tools'):
            shutil.copytree(folder, target / folder, ignore=shutil.ignore_patterns('__pycache__'), dirs_exist_ok=True)
        shutil.copy('model-index.yml', target)


setup(cmdclass=dict(build_py=BuildWithConfigs))
