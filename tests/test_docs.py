"""The code blocks of the docs run, their commands are such as the tools take, and the pages build."""

import argparse
import importlib
import importlib.util
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

ROOT = Path(__file__).parents[1]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in [
        ROOT / 'README.md',
        ROOT / 'CONTRIBUTING.md',
        *(ROOT / 'docs').glob('*.md'),
        *ROOT.glob('configs/*/*.md'),
    ]
]


def blocks(name: str, language: str = 'python') -> list:
    return re.findall(rf'```{language}\n(.*?)```', (ROOT / name).read_text(), re.DOTALL)


def test_a_basis_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rkan_mmdet.ops import BASES

    code, config = blocks('docs/bases.md')
    (tmp_path / 'my_bases.py').write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    scope: dict = {}
    exec(config, scope)
    (tmp_path / 'mine.py').write_text(scope['config'])
    cfg = Config.fromfile(str(tmp_path / 'mine.py'))
    try:
        backbone = MODELS.build(dict(cfg.model.backbone, depth=18))
        assert backbone.layer4.rkan.kan_conv1.basis_weight.shape == (1, 9, 4)
        backbone.layer4(torch.randn(1, 256, 8, 8)).sum().backward()
        assert backbone.layer4.rkan.kan_conv1.basis_weight.grad.abs().sum() > 0
    finally:
        BASES.pop('Sines', None)
        sys.modules.pop('my_bases', None)


@pytest.mark.parametrize('page', ['docs/plug_in.md', 'docs/backends.md', 'docs/deploy.md'])
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.chdir(tmp_path)
    code = [block for block in blocks(page) if 'import ' in block]
    assert code
    if 'prefer_deferred_runtime_asserts_over_guards' not in inspect.signature(torch.export.export).parameters:
        code = [block for block in code if 'export' not in block]
    for block in code:
        exec(compile(block, page, 'exec'), {})


def test_the_plugged_in_configs_build(tmp_path: Path) -> None:
    configs = [block for block in blocks('docs/plug_in.md') if re.match(r'# my_\w+\.py', block)]
    assert len(configs) == 3
    for text in configs:
        (tmp_path / text.split()[1]).write_text(text)
    expected = {'my_detector': 0, 'my_rkan_detector': 2, 'my_rtmdet': 2}
    for name, count in expected.items():
        cfg = Config.fromfile(str(tmp_path / f'{name}.py'))
        if 'init_cfg' in cfg.model.backbone:  # weights from the network
            cfg.model.backbone.init_cfg = None
        init_default_scope('mmdet')
        model = MODELS.build(cfg.model)
        assert sum('kan_conv' in key and key.endswith('basis_weight') for key in model.state_dict()) == count, name


def commands() -> list:
    """(page, words) of every command in a bash block; variables that the page sets are put in."""
    found = []
    for page in PAGES:
        variables: dict = {}
        for block in blocks(page, 'bash'):
            for line in block.replace('\\\n', ' ').splitlines():
                for command in line.split(' && '):
                    words = shlex.split(command, comments=True)
                    while words and re.fullmatch(r'[A-Z_]+=.*', words[0]):
                        name, value = words.pop(0).split('=', 1)
                        variables[name] = value
                    for name, value in variables.items():
                        words = [re.sub(rf'\${name}\b', value, word) for word in words]
                    if words:
                        found.append((page, words))
    return found


# What runs each command that the pages show, as it stands there or on data and counts that are small enough for here.
RUN_BY = {
    r'git clone|cd rkan_mmdet|make (test|lint|env|demo)\b(?!.*STACK)': '.ci/run',  # in a clean clone
    r'apt-get |make quick': 'parsed alone',
    r'\. \.venv/bin/activate': 'tests/test_readme.py',
    r'pip install': 'tests/test_mim.py',  # a wheel of it, in an environment of its own
    r'make docs': 'tests/test_docs.py',
    r'.*\bSTACK=': 'tests/test_pretrain.py',
    r'python tools/\w+\.py (mine|cells|configs/demo|work_dirs/(mine|demo))': 'tests/test_readme.py',
    r'python tools/(train|test)\.py configs/rkan/mask-rcnn_rkan-r50_fpn_1x': 'tests/test_readme.py',
    r'tools/(dist_train|dist_test|slurm_train)\.sh': 'tests/tools/test_launchers.py',
    r'python \$\(python': 'tests/test_readme.py',
    r'python tools/train\.py configs/lowdata': 'tests/test_readme.py',
    r'python tools/benchmark\.py configs/rkan': 'tests/test_readme.py',
    r'python tools/benchmark\.py ARM': 'tests/tools/test_benchmark.py',
    # its config is built above; such detectors are trained a step in tests/test_detectors.py
    r'python tools/train\.py my_rkan_detector': 'parsed alone',
    r'python tools/train\.py configs/(pretrain|rkan/\S+authors)': 'tests/test_pretrain.py',
    r'python -m rkan_mmdet\.data\.check': 'tests/data/test_check.py',
    r'python -m rkan_mmdet\.doctor': 'tests/test_doctor.py',
    r'python tools/convert_checkpoint\.py': 'tests/tools/test_convert_checkpoint.py',
    r'python tools/download_coco\.py': 'tests/tools/test_download_coco.py',
    r'python tools/make_table\.py': 'tests/tools/test_make_table.py',
    r'python tools/page\.py': 'tests/tools/test_page.py',
    r'tools/reproduce\.sh': 'tests/tools/test_reproduce.py',
    r'mim ': 'tests/test_mim.py',
    r'python benchmarks/(kan_conv|growth)': 'tests/test_benchmarks.py',
    r'python benchmarks/(study|convert_bccd)': 'tests/test_study.py',
    r'python benchmarks/kill_and_resume': 'tests/tools/test_faults.py',
    r'pytest ': 'the suite itself',
}


class _ParsedError(Exception):
    pass


def parse_only(monkeypatch: pytest.MonkeyPatch, module: object, arguments: list) -> None:
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *rest: object) -> None:
        parse(self, *rest)
        raise _ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', stop)
    monkeypatch.setattr('sys.argv', ['tool', *arguments])
    with pytest.raises(_ParsedError):
        module.main()


@pytest.mark.parametrize(
    ('page', 'words'), commands(), ids=lambda value: value if isinstance(value, str) else ' '.join(value)
)
def test_commands_are_taken(page: str, words: list, monkeypatch: pytest.MonkeyPatch) -> None:
    for word in words:
        if word.startswith(('configs/', 'tools/', 'benchmarks/', 'tests/', 'docs/')):
            assert list(ROOT.glob(word)), f'{page} names {word}'
    if words[0] == 'make':
        targets = [word for word in words[1:] if '=' not in word]
        assert all(re.search(rf'^{target}:', (ROOT / 'Makefile').read_text(), re.MULTILINE) for target in targets)
    elif words[:2] == ['python', '-m']:
        parse_only(monkeypatch, importlib.import_module(words[2]), words[3:])
    elif words[0] == 'python' and not words[1].startswith('$('):  # a tool of MMDetection's
        spec = importlib.util.spec_from_file_location(f'documented_{Path(words[1]).stem}', ROOT / words[1])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        parse_only(monkeypatch, module, words[2:])
    else:
        assert (
            words[0] in ('.', 'git', 'cd', 'pip', 'apt-get', 'mim', 'pytest', 'python') or (ROOT / words[0]).is_file()
        ), f'{page}: {words}'


def inline_commands() -> list:
    """(page, text) of every command that stands in a line of a page."""
    found = []
    for page in PAGES:
        text = re.sub(r'```.*?```', '', (ROOT / page).read_text(), flags=re.DOTALL)
        starts = r'`((?:python |make |pytest |tools/\S+\.sh |pip |mim |[A-Z]+=\S+ tools/)[^`]+)`'
        found += [(page, ' '.join(command.split())) for command in re.findall(starts, text)]
    return found


def test_every_command_is_run_by_something() -> None:
    shown = [(page, ' '.join(words)) for page, words in commands()] + inline_commands()
    assert len(shown) > 80
    for page, shown_command in shown:
        command = re.sub(r'^([A-Z]+=\S+ )+', '', shown_command)
        runners = [by for pattern, by in RUN_BY.items() if re.match(pattern, command)]
        assert runners, f'{page} shows `{command}`, which nothing runs'
        tool = re.search(r'\b(?:tools|benchmarks)/(\w+)\.(?:py|sh)', command)
        for by in set(runners) - {'the suite itself', '.ci/run', 'parsed alone'}:
            # the pages' own blocks are run there, by their place
            named = (
                tool is None or by == 'tests/test_readme.py' or re.search(rf'\b{tool[1]}\b', (ROOT / by).read_text())
            )
            assert named, f'{by} does not run `{command}` of {page}'


@pytest.mark.slow
def test_the_pages_build(tmp_path: Path) -> None:
    build = pytest.importorskip('sphinx.cmd.build').build_main
    assert build(['-q', '-W', '--keep-going', '-b', 'html', str(ROOT / 'docs'), str(tmp_path)]) == 0
    text = (tmp_path / 'api.html').read_text()
    assert all(name in text for name in ('RKANResNet', 'kan_conv2d_reference', 'KANConv2d', 'basis_weight'))
