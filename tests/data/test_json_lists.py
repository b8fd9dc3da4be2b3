"""Laws of data/json_lists.py: it finds what Python's parser finds, wherever the blocks end."""

import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.json_lists import read_lists

NAMES = ("images", "annotations")
TEXTS = st.one_of(
    st.sampled_from(
        ['"', "\\", '\\"', "[{", "}], ", "é", '","annotations":['],
    ),
    st.text(max_size=4),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), TEXTS),
    lambda inside: st.one_of(st.lists(inside, max_size=3), st.dictionaries(TEXTS, inside, max_size=3)),
    max_leaves=6,
)
LISTS = st.lists(st.dictionaries(TEXTS, VALUES, max_size=3), max_size=6)


def parts(text, block, names=NAMES):
    lists = {name: [] for name in names}
    for name, part in read_lists(io.BytesIO(text), names, block):
        lists[name] += json.loads(part)
    return lists


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    before=st.dictionaries(TEXTS.filter(lambda key: key not in NAMES), VALUES, max_size=2),
    images=LISTS,
    annotations=LISTS,
    block=st.integers(1, 200),
    indent=st.sampled_from([None, 0, 2]),
    escaped=st.booleans(),
)
def test_parts_are_the_lists_wherever_the_blocks_end(before, images, annotations, block, indent, escaped):
    document = {**before, "annotations": annotations, "images": images, "more": before}
    text = json.dumps(document, indent=indent, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    assert parts(text, block) == {"images": images, "annotations": annotations}


def test_a_large_list_comes_in_parts():
    document = {"images": [{"id": number, "inside": [{}, [1]]} for number in range(1000)], "annotations": []}
    named_parts = list(read_lists(io.BytesIO(json.dumps(document).encode()), NAMES, 1024))
    assert max(len(part) for _, part in named_parts) < 2200 and len(named_parts) > 20


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"images": [], "annotations": []',
        '{"images": [], "annotations": []} {}',
        '{"images": [], "annotations": []} 5',
        '5 {"images": [], "annotations": []}',
        '{"images": [], "annotations": [], "images": []}',
        '{"images": [{}], "annotations": [{},]}',
        '{"images": [{} {}], "annotations": []}',
        '{"images": [,{}], "annotations": []}',
        '{"images": {}, "annotations": []}',
        '{"images": [{}]], "annotations": []}',
        '{"images": [], "annotations": ["]}',
        '{"images": [], "annot\\u0061tions": []}',
        '{"info": {x}, "images": [], "annotations": []}',
        '{"images": [] "annotations": []}',
        '{"images": [], "annotations": [],}',
        '{"images": [], "annotations": [}}',
    ],
)
@pytest.mark.parametrize("block", [1, 7, 4096])
def test_text_other_than_one_object_with_the_lists_is_a_value_error(text, block):
    with pytest.raises(ValueError):
        parts(text.encode(), block)


def test_other_encodings_are_a_value_error():
    text = '{"images": [{}], "annotations": [{}]}'
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        with pytest.raises(ValueError):
            parts(text.encode(encoding), 64)
