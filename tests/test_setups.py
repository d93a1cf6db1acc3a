"""Set-ups that users reported: what the toolboxes' own tools take, ours take.

Each is trained, tested, and resumed by tools/train.py and tools/test.py, on small data that
are made here.
"""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

# Configs, some of files that users sent; one is the base of others.
SETUPS = Path(__file__).with_name('setups')
NAMES = sorted({path.stem for path in SETUPS.glob('*.py')} - {'classifier', 'modules'})
ITERATIONS = ('semi', 'binary', 'one_class')
ONLY_TRAINED = ('tif', 'npy', 'video', 'simclr')


def write_images(folder):
    """Eight images as PNG, TIFF and .npy, in classes and with masks; one beyond Pillow's limit."""
    for name in ('img', 'large', 'binary', 'classes/a', 'classes/b'):
        (folder / name).mkdir(parents=True)
    for i in range(8):
        image = np.full((64, 96, 3), 20 * i, np.uint8)
        for path in (f'img/{i}.png', f'classes/{"ab"[i % 2]}/{i}.png'):
            cv2.imwrite(str(folder / path), image)
        cv2.imwrite(str(folder / f'binary/{i}.png'), np.eye(64, 96, dtype=np.uint8))
        cv2.imwrite(str(folder / f'img/{i}.tif'), np.ones((64, 96, 4), np.float32))
        np.save(folder / f'img/{i}.npy', np.ones((64, 96, 4), np.float32))
    cv2.imwrite(str(folder / 'large/0.png'), np.zeros((13_400, 13_400), np.uint8))


def write_annotations(folder):
    """Files as COCO has them, and one of two clips of two frames."""
    images = [dict(id=i + 1, file_name=f'{i}.png', width=96, height=64) for i in range(8)]
    box = dict(bbox=[8, 8, 28, 24], area=672, iscrowd=0, segmentation=[[8, 8, 36, 8, 36, 32]])
    boxes = [dict(id=i + 1, image_id=i + 1, category_id=1 + i % 2, **box) for i in range(8)]
    data = dict(
        images=images, annotations=boxes, categories=[dict(id=1, name='a'), dict(id=2, name='b')]
    )

    def renamed(suffix):
        return [{**i, 'file_name': i['file_name'].replace('png', suffix)} for i in images]

    frames = [{**x, 'video_id': i // 2, 'frame_id': i % 2} for i, x in enumerate(images[:4])]
    tracked = [{**b, 'instance_id': i // 2, 'video_id': i // 2} for i, b in enumerate(boxes[:4])]
    large = [dict(id=1, file_name='0.png', width=13_400, height=13_400)]
    big = {**boxes[0], 'bbox': [80, 80, 6000, 6000], 'area': 36_000_000}
    variants = dict(
        ann={},
        none=dict(annotations=[]),
        tif=dict(images=renamed('tif')),
        npy=dict(images=renamed('npy')),
        large=dict(images=large, annotations=[big]),
        clips=dict(images=frames, annotations=tracked, videos=[dict(id=0), dict(id=1)]),
    )
    for name, change in variants.items():
        (folder / f'{name}.json').write_text(json.dumps({**data, **change}))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('setups')
    write_images(folder)
    write_annotations(folder)
    assert len(NAMES) == 18
    for path in SETUPS.glob('*.py'):
        shutil.copy(path, folder)
    return folder


def last_lines(printed):
    return [line for line in printed.splitlines() if re.search(r'Epoch\(|Iter\(|resumed', line)]


@pytest.mark.parametrize('name', NAMES)
def test_trains_tests_and_resumes(name, folder, run):
    config, work_dir = f'{name}.py', f'work_dirs/{name}'
    environ = dict(cwd=folder, PYTHONPATH=str(folder), OMP_NUM_THREADS='1')
    tools = Path(__file__).parents[1] / 'tools'
    train = ('python', tools / 'train.py', config, '--work-dir', work_dir)
    lines = [last_lines(run(*train, **environ))[-1]]
    checkpoint = (folder / work_dir / 'last_checkpoint').read_text()
    if name not in ONLY_TRAINED:
        # As MMEngine's dump of a training that was resumed has it.
        printed = run(
            'python', tools / 'test.py', config, checkpoint, '--work-dir', f'{work_dir}/test',
            '--cfg-options', 'resume=True', **environ,
        )  # fmt: skip
        lines.append(last_lines(printed)[-1])
    longer = 'train_cfg.max_iters=8' if name in ITERATIONS else 'train_cfg.max_epochs=2'
    again = last_lines(run(*train, '--resume', '--cfg-options', longer, **environ))
    assert any('resumed epoch: ' in line for line in again)
    lines.append(again[-1])
    assert (folder / work_dir / 'last_checkpoint').read_text() != checkpoint
    print('\n'.join(f'{name}: {line.partition("INFO - ")[2]}' for line in lines))
