"""What RKAN is worth on small data: arms x data x seeds, each run by tools/train.py, its figures kept as JSON.

Does what is missing, one run at a time, in the order of the plan; ``--plan`` says how long that takes; ``--report``
makes tables and a plot from the JSON alone. ``--data-root`` names the folder that holds ``bccd`` (see docs/study.md);
the shapes are drawn.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint

from rkan_mmdet.convert import from_plain
from rkan_mmdet.data.shapes import make_shapes
from rkan_mmdet.launch import UserError, read_config, run_tool
from rkan_mmdet.plot import read_scalars
from rkan_mmdet.speed import count_parameters

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks' / 'study_results'
STAGE_4, STAGES_34 = (False, False, False, True), (False, False, True, True)
# What each arm changes in the plain backbone. Nothing was tuned for any arm: the demo's recipe, made with an RKAN path.
ARMS = {
    'plain': {},
    'rkan': dict(stage_with_rkan=STAGE_4),
    'linear': dict(stage_with_rkan=STAGE_4, rkan=dict(basis=dict(type='Linear'))),
    'conv': dict(stage_with_rkan=STAGE_4, rkan=dict(conv_cfg=dict(type='Conv2d'))),
    'rkan-e': dict(stage_with_rkan=STAGES_34),
    'zero-init': dict(stage_with_rkan=STAGE_4, rkan=dict(zero_init=True)),
    'plain-tuned': {},
    'rkan-tuned': dict(stage_with_rkan=STAGE_4, rkan=dict(zero_init=True)),
    'adapter': dict(stage_with_rkan=STAGE_4, frozen_stages=4, rkan=dict(zero_init=True, adapter=True)),
}
# Degree, basis (with the authors' options) and stage, at half the iterations (`shapes-short`), compared with `rkan`.
ABLATION = {
    'plain': {},
    'rkan': dict(stage_with_rkan=STAGE_4),
    **{f'degree-{d}': dict(stage_with_rkan=STAGE_4, rkan=dict(basis=dict(type='Chebyshev', degree=d))) for d in (1, 5)},
    **{
        name.lower(): dict(stage_with_rkan=STAGE_4, rkan=dict(basis=dict(type=name, **options)))
        for name, options in dict(
            Legendre=dict(degree=(3, 2)),
            Jacobi=dict(degree=(3, 2)),
            Hermite=dict(degree=(3, 2)),
            RBF=dict(grid_size=(3, 2)),
            BSpline=dict(grid_size=(3, 2), order=(3, 2)),
        ).items()
    },
    **{f'stage-{i + 1}': dict(stage_with_rkan=tuple(j == i for j in range(4))) for i in range(3)},
}
# What the ablation hints at, on seeds that did not suggest it: where the path stands, and how it starts.
AGAIN = {
    **{arm: {**ARMS, **ABLATION}[arm] for arm in ('plain', 'rkan', 'stage-2', 'zero-init')},
    'linear-zero': dict(stage_with_rkan=STAGE_4, rkan=dict(basis=dict(type='Linear'), zero_init=True)),
}
# Compared with each other, besides with the plain detector.
PAIRS = (
    ('The polynomial alone', 'rkan', 'linear'),
    ('The polynomial alone', 'zero-init', 'linear-zero'),
    ('The start alone', 'zero-init', 'rkan'),
    ('The place alone', 'stage-2', 'rkan'),
)
TUNED = ('plain-tuned', 'rkan-tuned', 'adapter')  # start from the plain run of the same seed, and run as long again
MAIN = {arm: ARMS[arm] for arm in ('plain', 'rkan', 'linear')}
# Arms and seeds of each data set, in the order of priority. '-quarter': the first quarter of the training images, four
# times an epoch; '-short': half the iterations.
MATRIX = {
    'shapes': (ARMS, (1, 2, 3, 4, 5)),
    'bccd': (MAIN, (1, 2, 3)),
    'shapes-quarter': (MAIN, (1, 2, 3)),
    'bccd-quarter': (MAIN, (1, 2, 3)),
    'shapes-short': (ABLATION, (1, 2)),
    'shapes-again-short': (AGAIN, (3, 4, 5, 6, 7)),
    'large': (MAIN, (1, 2)),
}
CONFIGS = dict(
    shapes='mask-rcnn_r18_fpn_shapes.py', bccd='faster-rcnn_r18_fpn_bccd.py', large='mask-rcnn_r50_fpn_shapes-large.py'
)
SHAPES = dict(shapes={}, large=dict(num_train=3000, size=384))  # besides 200 validation images of seed 3


class Run(NamedTuple):
    data: str  # a key of MATRIX
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f'{self.data}/{self.arm}/{self.seed}'

    @property
    def base(self) -> str:
        return self.data.split('-')[0]

    @property
    def backbone(self) -> dict:
        """What the arm changes in the plain backbone."""
        return MATRIX[self.data][0][self.arm]

    @property
    def result(self) -> Path:
        return RESULTS / f'{self.name}.json'

    def lacks_data(self, data_root: Path) -> bool:
        return self.base == 'bccd' and not (data_root / 'bccd').is_dir()


def plan() -> Iterator[Run]:
    """Every run, in the order of priority; seeds outermost, so that a cut leaves whole comparisons."""
    for data, (arms, seeds) in MATRIX.items():
        for seed in seeds:
            for arm in arms:
                yield Run(data, arm, seed)


def make_config(run: Run, work_dir: Path, data_root: Path) -> Config:
    cfg = read_config(str(ROOT / 'configs' / 'study' / CONFIGS[run.base]))
    if run.base == 'bccd':
        cfg = read_config(cfg.filename, dict(data_root=str(data_root / 'bccd')))
    else:
        try:
            make_shapes(cfg.data_root.rstrip('/'), num_val=200, val_seed=3, **SHAPES[run.base])
        except FileExistsError as error:
            raise UserError(str(error)) from error
    cfg.model.backbone.update(run.backbone)
    cfg.randomness = dict(seed=run.seed)
    cfg.work_dir = str(work_dir)
    if run.data.endswith('-short'):
        cfg.merge_from_dict(dict(train_cfg=dict(max_epochs=cfg.train_cfg.max_epochs // 2)))
        for scheduler in cfg.param_scheduler:
            if 'T_max' in scheduler:
                scheduler.T_max = scheduler.end = cfg.train_cfg.max_epochs
    if run.data.endswith('-quarter'):
        dataset = cfg.train_dataloader.dataset
        dataset.indices = 300 if run.base == 'shapes' else 73
        cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=4, dataset=dataset)
    return cfg


def start_from_plain(run: Run, cfg: Config, args: argparse.Namespace) -> None:
    plain = run._replace(arm='plain')
    source = args.work_dirs / plain.name / f'epoch_{cfg.train_cfg.max_epochs}.pth'
    if not source.exists():  # its result is kept, its weights were not
        print(f'{run.name} starts from {source}, which is not there; {plain.name} is trained again', flush=True)
        train(make_config(plain, new_work_dir(plain, args), args.data_root))
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model)
    cfg.load_from = str(source)
    if run.arm != 'plain-tuned':
        cfg.load_from = str(Path(cfg.work_dir) / 'start.pth')
        state = torch.load(source, weights_only=True)['state_dict']
        torch.save(dict(meta={}, state_dict=from_plain(state, model)), cfg.load_from)
    load_checkpoint(model, cfg.load_from, strict=True)


def new_work_dir(run: Run, args: argparse.Namespace) -> Path:
    work_dir = args.work_dirs / run.name
    if work_dir.exists():  # of a run that was cut: it starts again, so that every time is of one sitting
        work_dir.rename(work_dir.with_name(f'{work_dir.name}-cut-{time.strftime("%Y%m%d-%H%M%S")}'))
    work_dir.mkdir(parents=True)
    return work_dir


def train(cfg: Config) -> tuple[float, int]:
    """Run tools/train.py in ``cfg.work_dir``; its seconds and peak memory in MiB."""
    config, started = Path(cfg.work_dir, 'run.py'), time.monotonic()
    cfg.dump(str(config))
    with open(config.with_name('output.txt'), 'w') as output:
        command = [sys.executable, str(ROOT / 'tools' / 'train.py'), str(config)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)  # the peak memory of this very process
        if status:
            raise UserError(f'{config} failed; see {output.name}')
    return time.monotonic() - started, usage.ru_maxrss // 1024


def execute(run: Run, args: argparse.Namespace) -> None:
    work_dir = new_work_dir(run, args)
    cfg = make_config(run, work_dir, args.data_root)
    if run.arm in TUNED:
        start_from_plain(run, cfg, args)
    seconds, peak_memory = train(cfg)
    curves = read_scalars(work_dir)
    if 'memory' in curves:  # on a GPU its own counts
        peak_memory = round(max(value for _, value in curves['memory']))
    an_iteration = None if args.untimed else round(statistics.median(v for _, v in curves['time']), 4)
    init_default_scope('mmdet')
    run.result.parent.mkdir(parents=True, exist_ok=True)
    result = dict(
        data=run.data, arm=run.arm, seed=run.seed, config=f'configs/study/{CONFIGS[run.base]}',
        backbone=run.backbone, epochs=cfg.train_cfg.max_epochs, parameters=count_parameters(MODELS.build(cfg.model)),
        seconds=round(seconds, 1), seconds_an_iteration=an_iteration, peak_memory_mib=peak_memory,
        torch=torch.__version__, device=device_name(),
        coco={key[5:]: points[-1][1] for key, points in curves.items() if key.startswith('coco/')},
        loss=[[round(epoch, 3), round(value, 4)] for epoch, value in curves['loss']],
    )  # fmt: skip
    run.result.write_text(json.dumps(result, indent=1) + '\n')


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'


def read_results() -> list:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob('*/*/*.json'))]


def estimate(runs: list) -> float:
    """Seconds that the runs will take: the median of those like them, else of all, else four minutes."""
    done = read_results()
    everything = [row['seconds'] for row in done] or [240]
    total = 0.0
    for run in runs:
        like = [r['seconds'] for r in done if r['data'].split('-')[0] == run.base] or everything
        total += statistics.median(like) / (2 if run.data.endswith('-short') else 1)
    return total


def interval(differences: list) -> str:
    """Mean and 95 % interval by Student's t; of two seeds none, since COCO's rounded figures can agree by chance."""
    from scipy.stats import t

    mean = statistics.mean(differences)
    if len(differences) < 3:
        return f'{mean:+.2f}'
    half = t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return f'{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]'


def differ(results: dict, data: str, arm: str, base: str, metric: str) -> list:
    """Differences of an arm to another in AP, of the seeds that both have."""
    return [
        100 * (row['coco'][metric] - results[data, base, seed]['coco'][metric])
        for (of_data, of_arm, seed), row in results.items()
        if (of_data, of_arm) == (data, arm) and (data, base, seed) in results
    ]


def report() -> str:
    results = {(r['data'], r['arm'], r['seed']): r for r in read_results()}
    lines = []
    for data, (arms, _) in MATRIX.items():
        devices = {row.get('device', 'cpu') for key, row in results.items() if key[0] == data}
        if len(devices) > 1:
            raise UserError(
                f'the results of {data} are of {" and ".join(sorted(devices))}: keep them apart by --results'
            )
        metrics = ['bbox_mAP', 'segm_mAP'] if not data.startswith('bccd') else ['bbox_mAP']
        head = ['arm', 'seeds']
        for metric in metrics:
            name = 'box' if metric == 'bbox_mAP' else 'mask'
            head += [f'{name} AP (std)', f'difference in {name} AP [95 % interval]']
        head += ['s an iteration', 'peak MiB', 'parameters']
        lines += [f'### {data}', '', '| ' + ' | '.join(head) + ' |', '| --- ' * len(head) + '|']
        for arm in arms:
            rows = [row for key, row in results.items() if key[:2] == (data, arm)]
            base = 'plain-tuned' if arm in TUNED else 'plain'
            if data == 'shapes-short' and arm not in MAIN:
                base = 'rkan'
            cells = [arm if arm in (base, 'plain') else f'{arm} (to {base})', str(len(rows)) if rows else '']
            for metric in metrics:
                values = [100 * row['coco'][metric] for row in rows]
                differences = differ(results, data, arm, base, metric)
                spread = f' ({statistics.stdev(values):.2f})' if len(values) > 1 else ''
                cells.append(f'{statistics.mean(values):.2f}{spread}' if rows else '')
                cells.append(interval(differences) if differences and arm != base else '')
            for key in ('seconds_an_iteration', 'peak_memory_mib', 'parameters'):
                known = [row[key] for row in rows if row[key] is not None]
                cells.append(f'{statistics.median(known):.4g}' if known else '')
            lines.append('| ' + ' | '.join(cells) + ' |')
        for what, arm, base in PAIRS if data != 'shapes-short' else ():
            found = {metric: differ(results, data, arm, base, metric) for metric in metrics}
            if any(found.values()):
                text = ', '.join(f'{"box" if m == "bbox_mAP" else "mask"} AP {interval(d)}' for m, d in found.items())
                lines += ['', f'{what}, `{arm}` to `{base}`: {text}.']
        lines.append('')
    return '\n'.join(lines)


def plot(out: Path) -> None:
    from rkan_mmdet.plot import plt

    rows = read_results()
    sets = [data for data in MATRIX if any(r['data'] == data for r in rows)]
    figure, axes = plt.subplots(1, len(sets), figsize=(1 + 4 * len(sets), 3.6), squeeze=False, layout='constrained')
    for axis, data in zip(axes[0], sets):
        arms = [arm for arm in MATRIX[data][0] if any(r['data'] == data and r['arm'] == arm for r in rows)]
        for i, arm in enumerate(arms):
            values = [100 * r['coco']['bbox_mAP'] for r in rows if r['data'] == data and r['arm'] == arm]
            axis.plot([i] * len(values), values, 'o', color='tab:blue', alpha=0.6)
            axis.plot([i - 0.25, i + 0.25], [statistics.mean(values)] * 2, color='black')
        axis.set_xticks(range(len(arms)), arms, rotation=45, ha='right')
        axis.set_title(data)
        axis.set_ylabel('box AP: each seed, and the mean')
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    global RESULTS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument('--plan', action='store_true', help='say what is left and how long it takes; run nothing')
    instead.add_argument('--report', action='store_true', help='print the tables and draw the plot; run nothing')
    parser.add_argument('--work-dirs', type=Path, default=Path('work_dirs/study'), help='default: %(default)s')
    parser.add_argument('--data-root', type=Path, default=Path('data'), help='holds bccd; default: %(default)s')
    parser.add_argument('--results', type=Path, help='where figures are kept; default: those of the repository, go on')
    parser.add_argument('--only', nargs='+', metavar='DATA', help='only these data sets')
    parser.add_argument('--arms', nargs='+', metavar='ARM', help='only these arms')
    parser.add_argument('--seeds', type=int, nargs='+', metavar='N', help='only these seeds')
    parser.add_argument('--minutes', type=float, default=float('inf'), help='begin no run after so many minutes')
    parser.add_argument('--untimed', action='store_true', help='other work runs beside: keep no time an iteration')
    args = parser.parse_args()
    os.environ.pop('MMDET_DATASETS', None)  # the study names its data itself
    picture = ROOT / 'docs' / 'images' / 'study.png'
    if args.results:
        RESULTS, picture = args.results, args.results / 'study.png'
    if args.report:
        if args.only or args.arms or args.seeds:
            raise UserError('--report takes all results: leave out --only, --arms and --seeds')
        print(report())
        plot(picture)
        return
    for name, given, known in (
        ('only', args.only, set(MATRIX)),
        ('arms', args.arms, {run.arm for run in plan()}),
    ):
        for value in set(given or ()) - known:
            raise UserError(f'--{name} must be of {", ".join(sorted(known))}, but got {value}')
    chosen = [
        r
        for r in plan()
        if (r.data in args.only if args.only else r.data != 'large' or torch.cuda.is_available())
        and (not args.arms or r.arm in args.arms)
        and (not args.seeds or r.seed in args.seeds)
    ]
    if not chosen:
        raise UserError('no run of the plan is of these data sets, arms and seeds')
    runs = [r for r in chosen if not r.result.exists()]
    if not args.plan and any(r.lacks_data(args.data_root) for r in runs):
        raise UserError(f'{args.data_root / "bccd"} does not exist; docs/study.md says where the data is')
    print(f'{len(runs)} runs are left, about {estimate(runs) / 3600:.1f} hours', flush=True)
    if args.plan:
        for run in runs:
            print(run.name)
        return
    started = time.monotonic()
    for i, run in enumerate(runs):
        if time.monotonic() - started > 60 * args.minutes:
            return
        print(f'[{i + 1}/{len(runs)}] {run.name}; about {estimate(runs[i:]) / 60:.0f} min left', flush=True)
        execute(run, args)


if __name__ == '__main__':
    run_tool(main)
