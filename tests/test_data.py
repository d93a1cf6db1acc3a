"""Data that is wrong: handled as the toolboxes document, or an error that names the file."""

import json
import shutil

import cv2
import numpy as np
import pytest
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from PIL import Image

from lska_mm.data import DataError, GuardedDataset
from lska_mm.launch import guard_data
from trainings import classifier, detector, segmentor, train

TASKS = (detector, segmentor, classifier)


@pytest.fixture(params=TASKS, ids=lambda task: task.__name__)
def task(request, nuclei, tmp_path):
    """A config, and one of the images that it trains on."""
    folder = tmp_path / 'data'
    if request.param is not classifier:
        shutil.copytree(nuclei, folder)
    cfg = request.param(folder, tmp_path / 'work')
    image = dict(
        detector='coco/train/nuclei.png',
        segmentor='ade/images/training/nuclei.png',
        classifier='train/1/1.png',
    )
    return cfg, folder / image[request.param.__name__]


def loader_of(cfg):
    """The dataloader as `build_runner` leaves it to the Runner."""
    init_default_scope(cfg.default_scope)
    loader = cfg.train_dataloader
    loader.update(num_workers=0, persistent_workers=False)
    if 'data_preprocessor' in cfg:  # mmpretrain's collates
        loader.collate_fn = dict(type='default_collate')
    guard_data(dict(train=loader))
    return Runner.build_dataloader(loader, seed=0)


def load(cfg):
    return [batch for _, batch in zip(range(4), loader_of(cfg))]


BROKEN = {
    'corrupt': lambda path: path.write_bytes(b'\x89PNG' + b'0' * 99),
    'truncated': lambda path: path.write_bytes(path.read_bytes()[:20]),
    'empty': lambda path: path.write_bytes(b''),
}
UNUSUAL = {
    'CMYK': lambda image: ('JPEG', image.convert('CMYK')),
    'alpha': lambda image: ('PNG', image.convert('RGBA')),
    '16 bit': lambda image: ('PNG', Image.fromarray(np.asarray(image, np.uint16) * 257)),
    'palette': lambda image: ('PNG', image.convert('P')),
}


@pytest.mark.parametrize('how', BROKEN)
def test_a_broken_image_is_named(task, how):
    cfg, path = task
    BROKEN[how](path)
    with pytest.raises(DataError, match=rf'{path}.*max_bad_images=N'):
        load(cfg)


@pytest.mark.parametrize('how', UNUSUAL)
def test_other_kinds_of_images_are_read_as_colours(task, how):
    cfg, path = task
    kind, image = UNUSUAL[how](Image.open(path).convert('L'))
    image.save(path, kind)
    inputs = load(cfg)[0]['inputs']
    assert all(image.shape[0] == 3 and image.float().std() > 0 for image in inputs)


def test_a_missing_image(task):
    """Named where a file lists it; otherwise the folder has one image less, here none."""
    cfg, path = task
    path.unlink()
    if path.parts[-2] == '1':
        assert len(loader_of(cfg).dataset) == 29
        return
    with pytest.raises(
        DataError, match=r'nuclei\.png|No dataset from BaseSegDataset with .*train'
    ):
        load(cfg)


@pytest.mark.parametrize('size', [(2, 2), (2, 10000), (10000, 2), (1, 1), (1, 10000), (10000, 1)])
def test_extreme_sizes(size, task):
    cfg, path = task
    cv2.imwrite(str(path), np.zeros((*size, 3), np.uint8))
    if 'ade' not in path.parts:
        annotations = path.parents[1] / 'annotations/train.json'
        if annotations.exists():
            with pytest.raises(DataError, match=rf'{path}: ValueError: \({size[1]}, {size[0]}\) '):
                load(cfg.copy())
            cover(annotations, *size)
        if not annotations.exists() or max(size) < 9:
            assert load(cfg)
        else:  # resized, one side is of no pixel
            with pytest.raises(DataError, match=f'{path}: '):
                load(cfg)
        return
    labels = path.parents[2] / 'annotations/training' / path.name
    cv2.imwrite(str(labels), np.ones(size, np.uint8))
    if min(size) > 1:
        assert load(cfg)
    else:  # mmseg squeezes sides of one pixel out of label maps
        with pytest.raises(DataError, match=f'{path} with {labels}: '):
            load(cfg)


def cover(annotations, height, width):
    """Make the only image of a file so large, and an annotation of it."""
    content = json.loads(annotations.read_text())
    content['images'][0].update(height=height, width=width)
    corners = [0, 0, width, 0, width, height, 0, height]
    first(content).update(bbox=[0, 0, width, height], area=width * height, segmentation=[corners])
    annotations.write_text(json.dumps(content))


def test_a_run_survives_bad_images_if_asked(nuclei, tmp_path, capfd):
    cfg = classifier(tmp_path, tmp_path / 'work')
    for number in (1, 2):
        (tmp_path / f'train/{number}/{number}.png').write_bytes(b'')
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.max_bad_images = 2
    train(cfg)
    printed = capfd.readouterr()
    printed = printed.out + printed.err
    assert printed.count('Cannot be used') == 2
    assert f'{tmp_path}/train/2/2.png' in printed
    assert '2 of 30 images could not be used and were replaced by others' in printed
    cfg.max_bad_images = 1
    with pytest.raises(DataError):
        train(cfg)


def test_an_image_that_is_drawn_often_is_bad_once(tmp_path):
    cfg = classifier(tmp_path, tmp_path / 'work')
    (tmp_path / 'train/1/1.png').write_bytes(b'')
    once = cfg.train_dataloader.dataset
    twice = dict(type='ClassBalancedDataset', oversample_thr=0.5, dataset=once)
    thrice = dict(type='RepeatDataset', times=3, dataset=once)
    init_default_scope(cfg.default_scope)
    dataset = GuardedDataset(dict(type='ConcatDataset', datasets=[twice, thrice]), 1)
    assert len(dataset) > 5 * 30
    assert len(set(dataset.images)) == 60  # the same folder twice
    half = len(dataset.datasets[0])
    samples = [dataset[i] for i in range(half, len(dataset))]
    assert [dataset.file_of(i) for i in dataset.bad.nonzero()] == [f'{tmp_path}/train/1/1.png']
    assert len(samples) == 3 * 30
    with pytest.raises(DataError, match=r'1/1\.png'):
        [dataset[i] for i in range(half)]


@pytest.mark.parametrize('number', [-1, 'many', 0.5])
def test_max_bad_images_is_a_number_of_images(number):
    with pytest.raises(ValueError, match=f'max_bad_images={number!r} is no number of images'):
        GuardedDataset({}, number)


def test_a_broken_image_stops_a_validation(nuclei, tmp_path):
    """Never replaced: the metric would be of other images."""
    cfg = segmentor(shutil.copytree(nuclei, tmp_path / 'data'), tmp_path / 'work')
    cfg.max_bad_images = 9
    cfg.train_cfg.val_interval = 1
    path = tmp_path / 'data/ade/images/validation/nuclei.png'
    path.write_bytes(b'')
    with pytest.raises(DataError, match=f'{path} with .*annotations/validation/nuclei.png'):
        train(cfg)


# --- Annotations -----------------------------------------------------------------


def changed(nuclei, tmp_path, change):
    """The detector's config with another annotation file, and that file."""
    cfg = detector(shutil.copytree(nuclei, tmp_path / 'data'), tmp_path / 'work')
    path = tmp_path / 'data/coco/annotations/train.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return cfg, path


def first(content):
    return content['annotations'][0]


@pytest.mark.parametrize(
    'change',
    [
        lambda content: first(content).update(bbox=[-500, -500, 20, 20]),
        lambda content: first(content).update(bbox=[10, 10, 0.5, 9]),
        lambda content: first(content).update(category_id=99),
        lambda content: (
            content['categories'].append(dict(id=2, name='cell')),
            first(content).update(category_id=2),
        ),
    ],
    ids=[
        'outside the image',
        'thinner than a pixel',
        'unknown category',
        'category not in config',
    ],
)
def test_an_annotation_that_cannot_be_used_is_left_out(nuclei, tmp_path, change):
    def count(cfg):
        return len(loader_of(cfg).dataset.get_data_info(0)['instances'])

    cfg, _ = changed(nuclei, tmp_path / 'changed', change)
    assert count(cfg) == count(changed(nuclei, tmp_path / 'whole', lambda content: None)[0]) - 1


def test_an_invalid_mask_is_ignored(nuclei, tmp_path):
    cfg, _ = changed(
        nuclei, tmp_path, lambda content: first(content).update(segmentation=[[1, 2]])
    )
    cfg.train_pipeline = cfg.train_dataloader.dataset.pipeline[:2]
    assert load(cfg)


WRAPPERS = {
    'bare': lambda dataset: dataset,
    'repeated': lambda dataset: dict(type='RepeatDataset', times=3, dataset=dataset),
    'joined': lambda dataset: dict(type='ConcatDataset', datasets=[dataset]),
}


@pytest.mark.parametrize('wrap', WRAPPERS)
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda content: first(content).update(segmentation=[]), r"nuclei\.png: KeyError: 'mask'"),
        (lambda content: content['annotations'].append(first(content)), 'are not unique'),
        (
            lambda content: content.update(annotations=[]),
            'No annotation in .*none of its 1 images',
        ),
        (lambda content: content.update(images=[]), 'No dataset from .*train.json'),
        (
            lambda content: content['categories'][0].update(name='cell'),
            'knows 0 of the 1 classes of the config',
        ),
    ],
    ids=['empty mask', 'duplicate id', 'no annotation', 'no image', 'class not in file'],
)
def test_annotations_that_stop_a_training(nuclei, tmp_path, change, message, wrap):
    cfg, path = changed(nuclei, tmp_path, change)
    cfg.train_dataloader.dataset = WRAPPERS[wrap](cfg.train_dataloader.dataset)
    with pytest.raises(DataError, match=message) as error:
        load(cfg)
    named = 'annotations/train.json', str(path.parents[1])
    assert all(name in str(error.value) for name in named) or 'nuclei.png' in str(error.value)


def test_images_without_annotations_alone(nuclei, tmp_path):
    """As mmdet's COCO configs leave them out of training."""
    cfg, _ = changed(nuclei, tmp_path, lambda content: content.update(annotations=[]))
    cfg.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=True)
    with pytest.raises(DataError, match=r'No .*annotations/train\.json'):
        load(cfg)


def test_a_label_map_without_a_label(nuclei, tmp_path):
    """Trains, and the loss is a number."""
    cfg = segmentor(shutil.copytree(nuclei, tmp_path / 'data'), tmp_path / 'work')
    cfg.train_cfg.max_iters = 1
    path = tmp_path / 'data/ade/annotations/training/nuclei.png'
    cv2.imwrite(str(path), np.zeros_like(cv2.imread(str(path), -1)))
    train(cfg)
