"""Rows of JSON: lines or an array, read whole or refused row by row."""

import gzip
import json

import pytest

from cxr_jax.data import json_rows
from cxr_jax.errors import UserError

ONE, TWO = {"id": "1", "text": "é"}, {"id": "2", "more": [1, {"a": None}]}


def read(tmp_path, content, name="rows.json"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [
        (row.place, row.record if isinstance(row.record, dict) else str(row.record))
        for row in json_rows.read_rows(path)
    ]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


WHOLE = {
    "lines": lines(ONE, TWO),
    "no end of line at the end": lines(ONE, TWO).rstrip(),
    "byte order mark": "\ufeff" + lines(ONE, TWO),
    "CR LF": lines(ONE, TWO).replace("\n", "\r\n"),
    "array": json.dumps([ONE, TWO]),
    "array over lines": " \n" + json.dumps([ONE, TWO], indent=2) + "\n",
    "array with a byte order mark": "\ufeff\r\n" + json.dumps([ONE, TWO], ensure_ascii=False),
    "gzip": gzip.compress(lines(ONE, TWO).encode()),
    "gzip in two parts": gzip.compress(lines(ONE).encode()) + gzip.compress(lines(TWO).encode()),
    "array in gzip": gzip.compress(json.dumps([ONE, TWO]).encode()),
}


@pytest.mark.parametrize("name", WHOLE)
def test_every_container_gives_the_same_rows(tmp_path, name):
    rows = read(tmp_path, WHOLE[name])
    assert [record for _, record in rows] == [ONE, TWO]
    assert [place for place, _ in rows] == [
        f"{'row' if 'array' in name else 'line'} {i}" for i in (1, 2)
    ]


def test_blank_lines_count_as_lines_and_are_no_rows(tmp_path):
    rows = read(tmp_path, "\n" + lines(ONE) + " \t\r\n" + lines(TWO) + "\n\n")
    assert rows == [("line 2", ONE), ("line 4", TWO)]


REFUSED = {
    # A torn row names itself; what stands before it is read.
    "last line cut off": (
        lines(ONE, TWO)[:-4],
        ["line 2", "not valid JSON: the last line is cut off"],
    ),
    "line cut off": (lines(ONE, TWO)[3:], ["line 1", "not valid JSON"]),
    "two rows on a line": (lines(ONE).strip() + lines(TWO), ["line 1", "not valid JSON"]),
    "not UTF-8": (b'{"a": "\xff"}\n', ["line 1", "not UTF-8 text"]),
    "no object": ('{"a": 1}\n"b"\n', ["line 2", "not a JSON object"]),
    "key twice": ('{"a": 1, "a": 2}\n', ["line 1", "a key occurs twice in one object"]),
    "key twice below": (
        '{"a": [[{"b": 1, "b": 1}]]}\n',
        ["line 1", "a key occurs twice in one object"],
    ),
    "number of too many digits": ('{"a": ' + "1" * 5000 + "}\n", ["line 1", "not valid JSON"]),
    "nested too deeply": ('{"a": ' + "[" * 100_000 + "\n", ["line 1", "not valid JSON"]),
    "object over lines": (
        json.dumps(ONE, indent=1),
        ["line 1", "rows go one a line, or into an array"],
    ),
    "array not closed": (json.dumps([ONE, TWO])[:-1], ["row 3", "the array is cut off"]),
    "array cut in a row": (
        json.dumps([ONE, TWO])[:-9],
        ["row 2", "nothing after this row was read"],
    ),
    "comma at the end": ("[{}, ]", ["row 2", "not valid JSON"]),
    "no comma": ("[{} {}]", ["row 2", "not valid JSON"]),
    "more after the array": ("[{}]\n[{}]", ["row 2", "not valid JSON"]),
    "array of arrays": ("[{}, [1]]", ["row 2", "not a JSON object"]),
    "key twice in an array": (
        '[{"a": 1, "a": 2}, {}]',
        ["row 1", "a key occurs twice in one object"],
    ),
    "array that is not UTF-8": (b'[{"a": "\xff"}]', ["row 1", "not UTF-8 text"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_is_none_says_which_and_why(tmp_path, name):
    content, (place, reason) = REFUSED[name]
    refused = [
        (where, record) for where, record in read(tmp_path, content) if isinstance(record, str)
    ]
    assert refused[0][0] == place and reason in refused[0][1], refused


def test_rows_beside_a_refused_one_are_read(tmp_path):
    assert [place for place, _ in read(tmp_path, '[{"a": 1, "a": 2}, {}]')] == ["row 1", "row 2"]
    assert read(tmp_path, '{"a": \n{}\n')[1] == ("line 2", {})
    assert read(tmp_path, "[ ]") == [] and read(tmp_path, "\n \n") == []


def test_files_that_cannot_be_used_as_a_whole(tmp_path):
    packed = gzip.compress(lines(ONE).encode())
    for content, reason in (
        (lines(ONE).encode("utf-16"), "UTF-16"),
        (packed[:-9], "cut off"),
        (packed[:12] + b"\xff\xff" + packed[14:], "damaged|cut off"),
        (packed + b"left over", "damaged"),
        (b"", "empty"),
    ):
        with pytest.raises(UserError, match=reason):
            read(tmp_path, content)


def test_what_gzip_unpacks_to_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows.radiograph, "MAX_FILE_BYTES", 1000)
    with pytest.raises(UserError, match="above the limit"):
        read(tmp_path, gzip.compress(b" " * 5000))
