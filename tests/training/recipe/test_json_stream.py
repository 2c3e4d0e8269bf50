# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.recipe.json_stream import stream_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("json") / "file.json"


@given(
    document=st.lists(VALUES) | st.dictionaries(st.text(max_size=3), VALUES),
    chunk=st.integers(1, 9),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_entries_are_those_of_the_file(path, document, chunk, indent, ascii_only):
    path.write_text(json.dumps(document, indent=indent, ensure_ascii=ascii_only), encoding="utf-8", newline="")
    entries = list(stream_json(str(path), chunk=chunk))
    assert entries == (document if isinstance(document, list) else list(document.items()))


@given(
    before=st.dictionaries(st.text(max_size=3), VALUES, max_size=3), wanted=st.lists(VALUES), chunk=st.integers(1, 9)
)
def test_a_member_of_the_file(path, before, wanted, chunk):
    path.write_text(json.dumps({**before, "wanted": wanted, "behind": [1]}), encoding="utf-8")
    assert list(stream_json(str(path), "wanted", chunk)) == wanted


@pytest.mark.parametrize("text", ['[{"a": 1}, {"b"', "[1, 2", "[1 2]", '{"a" 1}', "", "7"])
def test_a_file_that_is_cut_short_names_itself(path, text):
    path.write_text(text)
    with pytest.raises(ValueError, match="file.json"):
        list(stream_json(str(path), chunk=2))


def test_a_missing_member_is_named_with_those_that_are_there(path):
    path.write_text('{"info": {"a": [1]}, "rows": []}')
    with pytest.raises(ValueError, match="no member 'questions'; it has info, rows"):
        list(stream_json(str(path), "questions"))
