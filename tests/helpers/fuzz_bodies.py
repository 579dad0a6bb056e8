"""Random and hostile requests to the API: valid ones with something changed, damaged JSON, damaged films, odd URLs."""

import json
import random
import string

from api_bodies import BLANK, NOISE, data_url, film_url, png_bytes
from dicom_files import build
from films import draw_film

_FILM = film_url()
_FILES = {
    "image/png": png_bytes(draw_film(64, 60)),
    "image/jpeg": b"\xff\xd8\xff" + bytes(range(200)),
    "application/dicom": build(draw_film(64, 60).astype("uint16") * 16),
}
_URLS = (
    "http://127.0.0.1:1/x.png",
    "https://example.com/x.png",
    "file:///etc/passwd",
    "ftp://example.com/x",
    "data:image/svg+xml;base64,PHN2Zy8+",
    "data:text/html,<script>",
    "data:,",
    "data:image/png;base64,",
    "data:image/png;base64," + "A" * 5_000,
    "javascript:alert(1)",
    "//example.com/x.png",
    "C:\\film.png",
    "",
    "\x00",
    BLANK,
    NOISE,
    _FILM,
)
_FIELDS = (
    *(
        "model messages max_tokens max_completion_tokens temperature top_p top_k seed n stop stream".split()
    ),
    *(
        "stream_options logprobs top_logprobs response_format tools tool_choice logit_bias user".split()
    ),
    *("frequency_penalty presence_penalty reasoning_format include_reasoning read_anyway".split()),
    *(
        "image_roles store metadata functions modalities zebra \u202e \ud7ff __proto__ constructor".split()
    ),
)
_NUMBERS = (0, 1, -1, 2, 0.5, -0.0, 1e-300, 1e300, 2**31, 2**32, 2**63, 10**40, 512, 513, 4096)


def random_value(rng, depth=0):
    """Any JSON, small."""
    kind = rng.randrange(9 if depth < 4 else 6)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return rng.choice(_NUMBERS)
    if kind in (2, 3):
        return random_text(rng)
    if kind == 4:
        return rng.choice(_URLS)
    if kind == 5:
        return rng.choice(("user", "text", "image_url", "json_schema", "phantom", "split"))
    if kind == 6:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {
        rng.choice((*_FIELDS, "type", "text", "url", "role", "content")): random_value(
            rng, depth + 1
        )
        for _ in range(rng.randrange(4))
    }


def random_text(rng):
    """Letters, controls, marks of images, tags, text of other directions, nothing."""
    pieces = (
        *(
            "<image>",
            "<think>",
            "</answer>",
            "<|im_end|>",
            "<|image_pad|>",
            "<script>",
            "%s%n",
            "\r\n",
        ),
        *("\x00", "\u202e", "\u0000", "\ufffd", "🫁", "é", "{{7*7}}", "' OR 1=1", "../../etc", " "),
        "".join(rng.choices(string.printable, k=rng.randrange(30))),
    )
    return "".join(rng.choices(pieces, k=rng.randrange(6)))


def valid_body(rng):
    """A request that would be answered."""
    content = [{"type": "text", "text": rng.choice(("Find abnormalities.", "What is seen?"))}]
    if rng.random() < 0.2:
        content.insert(0, {"type": "image_url", "image_url": {"url": _FILM}})
    request = {
        "model": "phantom",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 4,
    }
    if rng.random() < 0.3:
        request["stream"] = True
    return request


def places_of(value, path=()):
    """Every place in a JSON value, as the keys that lead there."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from places_of(item, (*path, key))


def changed(rng, request):
    """A request with one to three places replaced, removed or added."""
    for _ in range(rng.randrange(1, 4)):
        path = rng.choice(list(places_of(request)))
        if not path:
            request[rng.choice(_FIELDS)] = random_value(rng)
            continue
        holder = request
        for key in path[:-1]:
            holder = holder[key]
        if rng.random() < 0.2:
            del holder[path[-1]]
        else:
            holder[path[-1]] = random_value(rng)
    return request


def damaged_film(rng):
    """A film's data URL with bytes changed, cut, or under another type."""
    kind = rng.choice(list(_FILES))
    content = bytearray(_FILES[kind])
    for _ in range(rng.randrange(1, 20)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    if rng.random() < 0.4:
        del content[rng.randrange(len(content)) :]
    if rng.random() < 0.2:
        kind = rng.choice(list(_FILES))
    url = data_url(bytes(content), kind)
    if rng.random() < 0.1:
        url = url[: rng.randrange(len(url))] + rng.choice(("=", " ", "\n", "é", "@"))
    request = valid_body(rng)
    request["messages"][0]["content"].insert(0, {"type": "image_url", "image_url": {"url": url}})
    request["read_anyway"] = rng.random() < 0.5
    return request


def damaged_json(rng):
    """Bytes that are nearly JSON."""
    content = bytearray(json.dumps(valid_body(rng)).encode())
    kind = rng.randrange(7)
    if kind == 0:
        del content[rng.randrange(len(content)) :]
    elif kind == 1:
        content[rng.randrange(len(content))] = rng.randrange(256)
    elif kind == 2:
        depth = rng.choice((10, 100, 3_000, 30_000))
        content[-1:] = b', "a": ' + b"[" * depth + b"]" * depth + b"}"
    elif kind == 3:
        odd = (
            b"NaN",
            b"-Infinity",
            b"1e999",
            b"9" * rng.choice((20, 5_000)),
            b'"\\ud800"',
            b'"\\udc00\\ud800"',
        )
        content[-1:] = b', "temperature": ' + rng.choice(odd) + b"}"
    elif kind == 4:
        content[-1:] = b', "model": "phantom"}'
    elif kind == 5:
        content[:0] = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b" " * 1_000))
    else:
        content = bytearray(rng.randbytes(rng.randrange(200)))
    return bytes(content)


def random_request(rng):
    """(content, headers) of one request."""
    kind = rng.random()
    if kind < 0.05:
        content = valid_body(rng)
    elif kind < 0.6:
        content = changed(rng, valid_body(rng))
    elif kind < 0.72:
        content = damaged_film(rng)
    else:
        content = damaged_json(rng)
    if not isinstance(content, bytes):
        content = json.dumps(content, ensure_ascii=rng.random() < 0.5).encode("utf-8", "replace")
    headers = {"content-type": "application/json", "host": "127.0.0.1"}
    if rng.random() < 0.05:
        headers["content-type"] = rng.choice(
            ("text/plain", "", "application/json; charset=utf-16", "multipart/form-data")
        )
    if rng.random() < 0.05:
        headers["authorization"] = rng.choice(
            ("Bearer", "Basic x", "Bearer " + "x" * 5_000, "Bearer \xff")
        )
    if rng.random() < 0.03:
        headers["host"] = rng.choice(("", "evil", "127.0.0.1:99999", "[::1", "127.0.0.1, evil"))
    if rng.random() < 0.03:
        headers["origin"] = rng.choice(("null", "http://evil", "http://[", "http://127.0.0.1"))
    return content, headers


def random_requests(seed, count):
    rng = random.Random(seed)
    for _ in range(count):
        yield random_request(rng)
