"""The names of tensors: from any published layout to ours."""

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lska_mm.weights.names import CheckpointError, convert_state_dict, get_state_dict


def test_a_name_that_is_not_text_is_refused():
    with pytest.raises(CheckpointError, match='The name of a tensor is 5, not text'):
        convert_state_dict({'block1.0.x': 1, 5: 2})


def test_two_layouts_in_one_file_are_refused():
    with pytest.raises(CheckpointError, match=r'block1.0.x and backbone.blocks1.0.x are both'):
        convert_state_dict({'block1.0.x': 1, 'backbone.blocks1.0.x': 2})


@pytest.mark.parametrize('content', [[1], 'weights', None, dict(state_dict=[1])])
def test_content_without_weights(content):
    assert get_state_dict(content) == {}


SYLLABLES = st.sampled_from(
    ['module.', 'backbone.', 'block', 'blocks', 'patch_embed', 'norm', 'head.', '1', '2', '.0',
     '.', '.weight', 'weight', 'projection.', '.projection.', '.dwconv', '.DW_conv', '.DW_conv_',
     'h', '.DW_D_conv', '_h', 'attn.', 'fc.', '\n']
)  # fmt: skip
STEMS = st.sampled_from(['patch_embed1', 'block2.0', 'blocks1.0.attn', 'norm3', 'head', 'neck'])
PARTS = st.lists(SYLLABLES, max_size=4).map(''.join)
KEYS = st.one_of(st.text(), PARTS, st.tuples(PARTS, STEMS, PARTS).map(''.join))
SHORT = settings(max_examples=300, deadline=None, derandomize=True, database=None)
LONG = settings(max_examples=10_000, deadline=None, database=None)


@pytest.mark.parametrize('how', [SHORT, pytest.param(LONG, marks=pytest.mark.soak)])
def test_any_name_is_converted_once_and_no_tensor_is_lost(how):
    counts = collections.Counter()

    @how
    @given(st.lists(KEYS, unique=True, max_size=6))
    def check(keys):
        state = {key: object() for key in keys}
        try:
            converted = convert_state_dict(state)
        except CheckpointError as error:
            counts['refused'] += 1
            assert 'are both' in str(error)  # noqa: PT017
            return
        counts['converted'] += 1
        counts['renamed'] += list(converted) != keys
        assert list(converted.values()) == list(state.values())
        assert convert_state_dict(converted) == converted

    check()
    print(f'state dicts of random names: {dict(counts)}')
    assert min(counts['converted'], counts['renamed']) > 20
