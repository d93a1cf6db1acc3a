"""Checkpoint files, as MMEngine asks for them."""

import pytest
import torch
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

from conftest import Bomb, published_state, small
from lska_mm import LSKAVAN, load_from_local
from lska_mm.weights.names import CheckpointError, convert_state_dict
from pickles import checkpoint, refused, same, save

PUBLISHED = published_state()


# --- What comes back -----------------------------------------------------------


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize(
    'content',
    [
        dict(
            meta=dict(config='x = 1', dataset_meta=dict(classes=('a',))),
            state_dict={'module.layer1.0.bn1.weight': torch.ones(1), 'head.weight': torch.ones(1)},
        ),
        {'backbone.block1.0.attn.proj_1.weight': torch.ones(1), 'norm1.weight': torch.ones(1)},
        dict(state_dict={f'backbone.{key}': v for key, v in small().state_dict().items()}),
        dict(state_dict={5: torch.ones(1)}, state=None),
        {5: torch.ones(1)},
        [torch.ones(1)],
        torch.ones(1),
    ],
)
def test_files_of_others_come_back_as_they_are(content, zipped, tmp_path):
    path = save(content, tmp_path / 'others.pth', zipped)
    expected = torch.load(path, weights_only=False)
    assert same(load_from_local(str(path)), expected)
    assert same(CheckpointLoader.load_checkpoint(str(path), 'cpu'), expected)


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_published_weights_come_back_under_our_names(prefix, tmp_path):
    content = checkpoint()
    state = {prefix + key: value for key, value in content['state_dict'].items()}
    content.update(state_dict=state, meta=dict(config='x = 1'), state_dict_ema=dict(state))
    path = save(content, tmp_path / 'published.pth')
    renamed = {prefix + key: value for key, value in convert_state_dict(state).items()}
    expected = {**torch.load(path, weights_only=False), 'state_dict': renamed}
    assert same(load_from_local(str(path)), expected)
    save(state, path)
    assert same(load_from_local(str(path)), renamed)


def test_what_is_known_of_a_file_is_not_saved_again(tmp_path):
    """A training that saves what it has loaded writes an ordinary file."""
    expected = nn.ModuleDict(dict(backbone=small())).state_dict()
    content = load_from_local(str(save(expected, tmp_path / 'a.pth')))
    assert content._metadata.get('backbone')['file'] == str(tmp_path / 'a.pth')
    found = torch.load(save(content, tmp_path / 'b.pth'), weights_only=True)
    assert type(found._metadata) is type(expected._metadata)
    assert found._metadata == expected._metadata


def test_a_path_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    save([1], tmp_path / 'file.pth')
    assert load_from_local('~/file.pth') == [1]


# --- What is no checkpoint -----------------------------------------------------


def test_missing_file_says_what_to_change():
    with pytest.raises(FileNotFoundError, match=r'nowhere.pth.*init_cfg.checkpoint.*LSKA_PRETRA'):
        load_from_local('nowhere.pth')


def test_folder(tmp_path):
    with pytest.raises(IsADirectoryError, match=f'{tmp_path} is a folder; name a checkpoint'):
        load_from_local(str(tmp_path))


@pytest.mark.parametrize(
    'content', [b'<!DOCTYPE html>', b'\x80\x02]q\x00.', b'0' * 100, b'PK\3\4' + bytes(100)]
)
def test_file_of_something_else(tmp_path, content):
    path = tmp_path / 'download.pth'
    path.write_bytes(content)
    assert 'download.pth is damaged, or not a checkpoint of torch.save (' in refused(path)


# --- Code ----------------------------------------------------------------------


def test_torch_can_be_told_to_run_code(tmp_path, monkeypatch):
    save(dict(state_dict=PUBLISHED, args=Bomb(tmp_path / 'ran')), tmp_path / 'bomb.pth')
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    load_checkpoint(LSKAVAN(), str(tmp_path / 'bomb.pth'))
    assert (tmp_path / 'ran').exists()


def test_torch_can_be_told_to_read_weights_only(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')
    save(dict(state_dict=PUBLISHED), tmp_path / 'tensors.pth')
    save(dict(state_dict=PUBLISHED, args=Bomb(tmp_path / 'ran')), tmp_path / 'bomb.pth')
    load_checkpoint(LSKAVAN(), str(tmp_path / 'tensors.pth'))
    with pytest.raises(CheckpointError, match=r'bomb\.pth was refused'):
        load_checkpoint(LSKAVAN(), str(tmp_path / 'bomb.pth'))
    assert not (tmp_path / 'ran').exists()
