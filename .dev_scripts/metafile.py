"""Count parameters and multiply-adds of every config, and write them down.

    python .dev_scripts/metafile.py [--check]

writes configs/*/metafile.yml and the tables of docs/model_zoo.md; with --check
it changes nothing and fails if they are out of date.

Multiply-adds are those of convolutions and matrix products, for one image of
the size that the table names, counted from shapes without computing. A
two-stage detector is counted with 1000 proposals and 100 masks. Accuracies
stay empty until they are measured with these configs.
"""

import argparse
import re
import sys
from pathlib import Path

import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lska_mm.cli import markdown, report_errors

ROOT = Path(__file__).resolve().parents[1]
TASKS = dict(
    classification=dict(
        task='Image Classification', dataset='ImageNet-1k', metrics=['Top 1 Accuracy'],
        size=(224, 224),
    ),
    detection=dict(
        task='Object Detection', dataset='COCO', metrics=['box AP', 'mask AP'], size=(800, 1280)
    ),
    segmentation=dict(
        task='Semantic Segmentation', dataset='ADE20K', metrics=['mIoU'], size=(512, 512)
    ),
)  # fmt: skip
PAPER = dict(
    Title='Large Separable Kernel Attention: Rethinking the Large Kernel Attention Design in CNN',
    URL='https://arxiv.org/abs/2309.01439',
)
LSKA = 'Large Separable Kernel Attention'
# By the type of the backbone: what a model is a case of.
COLLECTIONS = {
    'LSKAVAN': dict(
        Name='LSKA-VAN', Metadata=dict(Architecture=['Visual Attention Network', LSKA])
    ),
    'ResNet': dict(Name='LSKA-ResNet', Metadata=dict(Architecture=['ResNet', LSKA])),
}
PROPOSALS, MASKS = 1000, 100


def forward(model: nn.Module, image: torch.Tensor) -> None:
    """Run all convolutions and matrix products of a test on one image."""
    if not hasattr(model, 'predict') or not hasattr(model, 'extract_feat'):
        raise TypeError(f'{type(model).__name__} is no detector, segmentor or classifier.')
    roi_head = getattr(model, 'roi_head', None)
    if roi_head is None:
        model.forward(image)
        return
    feats = model.extract_feat(image)
    model.rpn_head(feats)
    # A cascade has a list of heads, one for each stage.
    for part, number in (('bbox', PROPOSALS), ('mask', MASKS)):
        heads = getattr(roi_head, f'{part}_head')
        extractors = getattr(roi_head, f'{part}_roi_extractor')
        for head, extractor in (
            zip(heads, extractors) if isinstance(heads, nn.ModuleList) else [(heads, extractors)]
        ):
            side = extractor.roi_layers[0].output_size
            head(image.new_zeros(number, extractor.out_channels, *side))


def count(cfg: Config, size: tuple[int, int]) -> tuple[int | None, int | None]:
    """Parameters, and multiply-adds for an image of ``size``, of a config's model.

    None for a DETR: its parameters depend on mmdet's version, its multiply-adds
    on masks that only real images have.
    """
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model).eval()
    if hasattr(model, 'encoder'):
        return None, None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    counter = FlopCounterMode(display=False)
    # With gradients: oneDNN's fused operators are not counted.
    with FakeTensorMode(allow_non_fake_inputs=True), counter:
        forward(model, torch.zeros(1, 3, *size))
    return parameters, counter.get_total_flops() // 2


def order(config: Path) -> tuple[str, int, int]:
    """By head, then size, then kernel."""
    match = re.search(r'-(tiny|small|base)(?:-k(\d+))?_', config.stem)
    if match is None:
        return config.stem, 0, 23
    rest = config.stem.replace(match[0], '_')
    return rest, ('tiny', 'small', 'base').index(match[1]), int(match[2] or 23)


def make_metafile(task: str) -> dict:
    """What configs/TASK/metafile.yml holds."""
    about = TASKS[task]
    models, collections = [], {}
    for config in sorted((ROOT / 'configs' / task).glob('*.py'), key=order):
        if 'dota' in config.stem:  # of mmrotate, which is not everywhere
            continue
        cfg = Config.fromfile(config)
        collection = COLLECTIONS[cfg.model.backbone.type]
        collections[collection['Name']] = dict(collection, Paper=dict(PAPER), README='README.md')
        parameters, multiply_adds = count(cfg, about['size'])
        print(f'counted: {config.relative_to(ROOT)}', flush=True)
        models.append(
            dict(
                Name=config.stem,
                Config=str(config.relative_to(ROOT)),
                Metadata=dict(Parameters=parameters, FLOPs=multiply_adds),
                Results=[dict(Task=about['task'], Dataset=about['dataset'], Metrics={})],
            )
        )
        models[-1]['In Collection'] = collection['Name']
    return dict(Collections=list(collections.values()), Models=models)


def make_table(task: str, metafile: dict) -> str:
    """Markdown: a row for each config."""
    about = TASKS[task]
    height, width = about['size']
    head = ['config', 'parameters (M)', f'multiply-adds at {width} x {height} (G)']
    rows = [[*head, *about['metrics']]]
    for model in metafile['Models']:
        metadata = model['Metadata']
        link = f'[{model["Name"]}](../{model["Config"]})'
        numbers = [(metadata['Parameters'], 1e6), (metadata['FLOPs'], 1e9)]
        cells = ['' if number is None else f'{number / unit:.2f}' for number, unit in numbers]
        empty = [''] * len(about['metrics'])
        rows.append([link, *cells, *empty])
    return markdown(rows)


def make_files() -> dict[Path, str]:
    """The text of every file that this tool writes."""
    zoo = ROOT / 'docs/model_zoo.md'
    text, files = zoo.read_text(), {}
    for task in TASKS:
        metafile = make_metafile(task)
        files[ROOT / f'configs/{task}/metafile.yml'] = yaml.safe_dump(metafile, sort_keys=False)
        table = make_table(task, metafile)
        pattern = rf'(<!-- {task} -->\n).*?(<!-- end -->)'
        text = re.sub(
            pattern, lambda match, t=table: f'{match[1]}{t}\n{match[2]}', text, flags=re.S
        )
    return {**files, zoo: text}


class OutOfDateError(Exception):
    """Files hold other numbers than the configs have."""


@report_errors(OutOfDateError)
def main() -> None:
    parser = argparse.ArgumentParser(description='Count parameters and multiply-adds')
    parser.add_argument('--check', action='store_true', help='only compare with the files')
    args = parser.parse_args()
    stale = []
    for path, text in make_files().items():
        if path.exists() and path.read_text() == text:
            continue
        if args.check:
            stale.append(str(path.relative_to(ROOT)))
        else:
            path.write_text(text)
            print(f'written: {path.relative_to(ROOT)}')
    if stale:
        raise OutOfDateError(f'out of date: {", ".join(stale)}; run it without --check.')


if __name__ == '__main__':
    sys.exit(main())
