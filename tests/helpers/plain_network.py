"""The network once more, in plain numpy and float64: one row and one image at a time, masks instead of orders.

Written from the description of the families, and not from the code that it checks: nothing is shared with it but the
names of parameters and of the config's fields.
"""

import math

import numpy as np


def _f64(tree):
    if isinstance(tree, dict):
        return {name: _f64(leaf) for name, leaf in tree.items()}
    return np.asarray(tree, np.float64)


def _layer(stack, index):
    if isinstance(stack, dict):
        return {name: _layer(leaf, index) for name, leaf in stack.items()}
    return stack[index]


# ---- Pieces


def linear(p, x):
    y = x @ p["kernel"]
    return y + p["bias"] if "bias" in p else y


def rms(p, x, eps, plus=0.0):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * (plus + p["scale"])


def layer_norm(p, x, eps):
    middle = x.mean(-1, keepdims=True)
    return (x - middle) / np.sqrt(x.var(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


gelu_erf = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))), otypes=[float])


def rotate(x, angles):
    """x [T, heads, d], angles [T, d / 2]."""
    cosines, sines = np.cos(angles)[:, None], np.sin(angles)[:, None]
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], -1)


def attend(q, k, v, sees, scale):
    """q [T, H, d], k and v [S, K, d], sees bool [T, S]."""
    out = np.empty_like(q)
    shared = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        scores = np.where(sees, q[:, head] @ k[:, head // shared].T * scale, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, head // shared]
    return out


# ---- The tower


def patch_places(c, rows, columns):
    """(row, column) of each patch in the processor's order."""
    m = c.spatial_merge_size
    return np.array(
        [
            (block_row * m + row, block_column * m + column)
            for block_row in range(rows // m)
            for block_column in range(columns // m)
            for row in range(m)
            for column in range(m)
        ]
    )


def table_at(c, table, rows, columns):
    """Learned positions [rows, columns, D]."""
    if not c.interpolates_table:
        return table[: rows * columns].reshape(rows, columns, -1)
    side = math.isqrt(len(table))
    square = table[: side * side].reshape(side, side, -1)
    result = np.empty((rows, columns, table.shape[1]))
    for i in range(rows):
        y = i * (side - 1) / max(rows - 1, 1)
        top, bottom = int(y), min(int(y) + 1, side - 1)
        for j in range(columns):
            x = j * (side - 1) / max(columns - 1, 1)
            left, right = int(x), min(int(x) + 1, side - 1)
            above = square[top, left] * (1 - x % 1) + square[top, right] * (x % 1)
            below = square[bottom, left] * (1 - x % 1) + square[bottom, right] * (x % 1)
            result[i, j] = above * (1 - y % 1) + below * (y % 1)
    return result


def encode(c, params, pixels, grid):
    """Tokens [I, D], and taps alike in a list, of one image, whose frames do not see each other."""
    params = _f64(params)
    frames = np.split(np.asarray(pixels, np.float64), grid[0])
    encoded = [_encode_frame(c, params, frame, *grid[1:]) for frame in frames]
    return (
        np.concatenate([tokens for tokens, _ in encoded]),
        [np.concatenate(parts) for parts in zip(*[taps for _, taps in encoded], strict=True)],
    )


def _encode_frame(c, params, pixels, rows, columns):
    places = patch_places(c, rows, columns)
    norm = rms if c.norm == "rms" else layer_norm
    x = linear(params["patch_embed"]["proj"], pixels)
    if c.position_table:
        table = table_at(c, params["pos_embed"]["embedding"], rows, columns)
        x = x + table[places[:, 0], places[:, 1]]
    angles = None
    d = c.hidden_size // c.num_heads
    if c.rotary:
        frequency = c.rope_theta ** (-2 * np.arange(d // 4) / (d / 2))
        angles = np.concatenate([places[:, axis, None] * frequency for axis in (0, 1)], -1)
    everything = np.ones((len(x), len(x)), bool)
    in_window = everything
    if c.fullatt_block_indexes is not None:
        tokens = c.window_size // c.spatial_merge_size // c.patch_size
        window = places // (tokens * c.spatial_merge_size)
        in_window = (window[:, None] == window[None]).all(-1)

    tapped = {}
    for block in range(c.depth):
        p = _layer(params["blocks"], block)
        h = norm(p["norm1"], x, c.norm_eps)
        if c.split_qkv:
            qkv = [linear(p["attn"][name], h) for name in "qkv"]
        else:
            qkv = np.split(linear(p["attn"]["qkv"], h), 3, -1)
        q, k, v = (part.reshape(len(x), c.num_heads, d) for part in qkv)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        is_full = c.fullatt_block_indexes is None or block in c.fullatt_block_indexes
        seen = attend(q, k, v, everything if is_full else in_window, d**-0.5)
        x = x + linear(p["attn"]["proj"], seen.reshape(len(x), -1))
        h = norm(p["norm2"], x, c.norm_eps)
        if c.mlp == "gelu":
            x = x + linear(p["mlp"]["fc2"], gelu_tanh(linear(p["mlp"]["fc1"], h)))
        else:
            gated = silu(linear(p["mlp"]["gate"], h)) * linear(p["mlp"]["up"], h)
            x = x + linear(p["mlp"]["down"], gated)
        if block in c.tap_blocks:
            tapped[block] = x

    unit = c.spatial_merge_size**2
    taps = []
    for block in sorted(tapped):
        p = _layer(params["taps"], c.tap_blocks.index(block))
        joined = norm(p["norm"], tapped[block].reshape(len(x) // unit, -1), c.norm_eps)
        taps.append(linear(p["fc2"], gelu_erf(linear(p["fc1"], joined))))
    if c.final_norm:
        x = norm(params["final"]["norm"], x, c.norm_eps)
    p = params["merger"]
    if c.merger == "mean":
        mean = x.reshape(len(x) // unit, unit, -1).mean(1)
        return rms(p["norm"], mean, c.norm_eps, 1.0) @ p["proj"]["kernel"], taps
    joined = norm(p["norm"], x, c.norm_eps).reshape(len(x) // unit, -1)
    return linear(p["fc2"], gelu_erf(linear(p["fc1"], joined))), taps


# ---- The decoder


def image_runs(c, ids):
    """The number of each token's image, from 1; 0 for text."""
    runs, count = [], 0
    for index, token in enumerate(ids):
        if token == c.image_token_id and (index == 0 or ids[index - 1] != token):
            count += 1
        runs.append(count if token == c.image_token_id else 0)
    return np.array(runs)


def place_tokens(c, ids, grids):
    """Positions [T, axes] of one row."""
    runs, m = image_runs(c, ids), c.vision.spatial_merge_size
    if not c.text.mrope_section:
        return np.arange(len(ids))[:, None]
    places, following, index = [], 0, 0
    while index < len(ids):
        if not runs[index]:
            places.append((following,) * 3)
            following, index = following + 1, index + 1
            continue
        t, h, w = grids[runs[index] - 1]
        here = [
            (following + i, following + j, following + k)
            for i in range(t)
            for j in range(h // m)
            for k in range(w // m)
        ]
        places += here
        following, index = following + max(h, w) // m, index + len(here)
    return np.array(places)


def text_angles(c, places, is_sliding):
    d = c.head_dim
    frequency = (c.sliding_rope_theta if is_sliding else c.rope_theta) ** (-np.arange(0, d, 2) / d)
    if not is_sliding:
        frequency = frequency / c.rope_factor
    follows = np.zeros(d // 2, int)
    if c.mrope_section:
        t, h, w = c.mrope_section
        for j in range(d // 2):
            if c.mrope_interleaved:
                follows[j] = j % 3 if j % 3 and j < 3 * c.mrope_section[j % 3] else 0
            else:
                follows[j] = 0 if j < t else 1 if j < t + h else 2
    return places[:, follows] * frequency


def logits(c, params, ids, images=()):
    """[T, V] of one row without padding; images: (pixels, grid) of each, in reading order."""
    text, ids = c.text, np.asarray(ids)
    encoded = [encode(c.vision, params["vision"], *image) for image in images]
    params = _f64(params["text"])
    runs = image_runs(c, ids)
    x = params["embed"]["embedding"][ids]
    if text.scales_embedding:
        x = x * math.sqrt(text.hidden_size)
    adds = []
    if encoded:
        x[runs > 0] = np.concatenate([tokens for tokens, _ in encoded])
        for taps in zip(*[taps for _, taps in encoded], strict=True):
            adds.append(np.zeros_like(x))
            adds[-1][runs > 0] = np.concatenate(taps)
    places = place_tokens(c, ids, [grid for _, grid in images])
    index = np.arange(len(ids))
    sees_before = index[None] <= index[:, None]
    if text.image_sees_itself:
        sees_before = sees_before | ((runs[:, None] == runs[None]) & (runs > 0))
    is_near = index[None] > index[:, None] - text.sliding_window

    def norm(p, x):
        return rms(p, x, text.rms_norm_eps, 1.0 if text.norm == "one_plus" else 0.0)

    d, H, K = text.head_dim, text.num_attention_heads, text.num_key_value_heads
    scale = d**-0.5 if text.query_scale is None else text.query_scale
    act = {"silu": silu, "gelu_tanh": gelu_tanh}[text.activation]
    for layer in range(text.num_hidden_layers):
        p = _layer(params["layers"], layer)
        is_sliding = layer in text.sliding_layers
        h = norm(p["norm1"], x)
        q, k, v = (linear(p["attn"][name], h) for name in "qkv")
        q, k, v = q.reshape(-1, H, d), k.reshape(-1, K, d), v.reshape(-1, K, d)
        if text.qk_norm:
            q, k = norm(p["attn"]["q_norm"], q), norm(p["attn"]["k_norm"], k)
        angles = text_angles(text, places, is_sliding)
        sees = sees_before & is_near if is_sliding else sees_before
        seen = attend(rotate(q, angles), rotate(k, angles), v, sees, scale)
        added = linear(p["attn"]["o"], seen.reshape(len(x), -1))
        x = x + (norm(p["post_norm1"], added) if text.post_norms else added)
        h = norm(p["norm2"], x)
        added = linear(
            p["mlp"]["down"], act(linear(p["mlp"]["gate"], h)) * linear(p["mlp"]["up"], h)
        )
        x = x + (norm(p["post_norm2"], added) if text.post_norms else added)
        if layer < len(adds):
            x = x + adds[layer]
    x = norm(params["final"]["norm"], x)
    return x @ (
        params["embed"]["embedding"].T if c.tie_word_embeddings else params["head"]["kernel"]
    )
