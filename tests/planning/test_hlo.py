"""hlo.py, costs.collectives on what the compiler of TPUs writes: counts against hand arithmetic."""

import itertools
import random

import pytest

from cxr_jax.planning import costs, hlo, slice_needs

# In the spelling of libtpu 0.0.42: an all-gather cut up over fusions, an all-reduce of which each device keeps a part,
# a loop that adds twice 1 to its counter a turn, and one of the decode loop, whose end nobody knows.
TPU = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[]{:T(128)} add(%a, %b)
}

%fused_start (p: bf16[1,48,64]) -> (bf16[1,48,64], bf16[1,192,64]) {
  %g0 = bf16[1,192,64]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, dimensions={1}
  ROOT %c0 = (bf16[1,48,64]{2,1,0}, bf16[1,192,64]{2,1,0}) custom-call(%g0), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.4 (p: bf16[1,48,64]) -> bf16[1,192,64] {
  ROOT %g1 = bf16[1,192,64]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, dimensions={1}
}

%fused_done (p: bf16[1,48,64]) -> bf16[1,192,64] {
  %g2 = bf16[1,192,64]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, dimensions={1}
  ROOT %c2 = bf16[1,192,64]{2,1,0} custom-call(%g2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.3 (p: f32[64,128]) -> f32[16,128] {
  %r = f32[64,128]{1,0:T(8,128)} all-reduce(%p), channel_id=8, to_apply=%add
  ROOT %d = f32[16,128]{1,0:T(8,128)S(1)} dynamic-slice(%r, %i, %z), dynamic_slice_sizes={16,128}
}

%body (t: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %t = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %n = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %ps = (bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %pd = bf16[8,16]{1,0:T(8,128)(2,1)} collective-permute-done(%ps)
  %n1 = s32[]{:T(128)} add(%n, %one)
  %n2 = s32[]{:T(128)} add(%one, %n1)
  ROOT %u = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%n2, %pd)
}

%below (t: (s32[], bf16[8,16])) -> pred[] {
  %most = s32[]{:T(128)} constant(7)
  %t2 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %m = s32[]{:T(128)} get-tuple-element(%t2), index=0
  ROOT %lt = pred[]{:T(512)} compare(%m, %most), direction=LT
}

%until (t: (s32[], bf16[8,16])) -> pred[] {
  %t3 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %sum = f32[]{:T(128)} get-tuple-element(%t3), index=1
  %all = f32[]{:T(128)} all-reduce(%sum), to_apply=%add
  ROOT %yes = pred[]{:T(512)} and(%m, %all)
}

ENTRY %main (q: bf16[3,299,80], k: s8[5]) -> f32[16,128] {
  %q = bf16[3,299,80]{2,1,0:T(8,128)(2,1)} parameter(0)
  %k = s8[5]{0:T(512)(128)(4,1)} parameter(1)
  %fs = (bf16[1,48,64]{2,1,0}, bf16[1,192,64]{2,1,0}) fusion(%q), kind=kCustom, calls=%fused_start
  %f1 = bf16[1,192,64]{2,1,0:T(8,128)(2,1)S(1)} fusion(%fs), kind=kOutput, calls=%async_collective_fusion.4
  %fd = bf16[1,192,64]{2,1,0:T(8,128)(2,1)S(1)} fusion(%f1), kind=kCustom, calls=%fused_done
  %w = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) while(%q), condition=%below, body=%body
  %v = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) while(%w), condition=%until, body=%body
  %wide = f32[10,80]{1,0:T(8,128)} copy(%q)
  ROOT %o = f32[16,128]{1,0:T(8,128)} fusion(%v), kind=kCustom, calls=%all-reduce-scatter.3
}
"""  # noqa: E501


def test_collectives_of_a_tpu_program_are_counted_once_and_as_often_as_they_run():
    traffic = costs.collectives(TPU, 4, while_trips=100)
    turns = 4 + 100  # 0, 2, 4, 6 of the first loop
    moved, calls = traffic.used()
    assert moved == {
        "all-gather": 192 * 64 * 2,
        "reduce-scatter": 64 * 128 * 4,
        "collective-permute": turns * 8 * 16 * 2,
        "all-reduce": 100 * 2 * 4,
    }
    assert calls == {
        "all-gather": 1,
        "reduce-scatter": 1,
        "collective-permute": turns,
        "all-reduce": 100,
    }


def test_turns_of_loops():
    program = hlo.parse(TPU)
    loops = {
        operation.name: hlo.loop_turns(program, operation.line)
        for operation in program.operations("main")
        if operation.kind == "while"
    }
    assert loops == {"w": 4, "v": None}
    line = 'while(%q), condition=%until, body=%b, backend_config={"known_trip_count":{"n":"36"}}'
    assert hlo.loop_turns(program, line) == 36
    assert hlo.loop_turns(program, "while(%q)") is None


def test_results_of_what_is_begun_are_found_in_its_type():
    one = "(f32[4,8]{1,0:T(8,128)}, f32[16,8]{1,0:T(8,128)S(1)})"
    several = "((f32[4,8]{1,0}, bf16[2]{0}), (f32[16,8]{1,0}, /*index=1*/bf16[8]{0}), u32[], u32[]{:S(2)})"
    for start_type, byte_count in ((one, 512), (several, 512 + 16)):
        line = f"  %s = {start_type} all-gather-start(%x), dimensions={{0}}"
        text = "ENTRY %main (a: f32[4]) -> f32[4] {\n" + line + "\n}\n"
        assert costs.collectives(text, 4).used()[0] == {"all-gather": byte_count}


def test_what_slices_say_to_each_other_goes_by_way_of_their_hosts():
    sent = "(f32[16,8,128]{2,1,0:T(8,128)}, u32[], token[])"
    lines = [
        f"  %s = {sent} send(%x, %t), channel_id=2, is_host_transfer=true",
        "  %d = token[] send-done(%s), channel_id=2, is_host_transfer=true",
        f"  %r = {sent} recv(%t), channel_id=1, is_host_transfer=true",
    ]
    text = "\n".join(["ENTRY %main (a: f32[4]) -> f32[4] {", *lines, "}\n"])
    assert costs.collectives(text, 8).used() == (
        {"between-slices": 16 * 8 * 128 * 4},
        {"between-slices": 1},
    )


def filled(lengths, order, tile):
    """Elements of an array in tiles, by walking over the tiles that its elements lie in."""
    physical = [lengths[axis] for axis in reversed(order)]  # the outermost axis first
    tile = [1] * (len(physical) - len(tile)) + tile[-len(physical) :]
    tiles = {
        tuple(index // side for index, side in zip(place, tile, strict=True))
        for place in itertools.product(*map(range, physical))
    }
    elements = len(tiles)
    for side in tile:
        elements *= side
    return elements


def test_padding_is_that_of_the_tiles_that_elements_lie_in():
    draw = random.Random(0)
    for _ in range(200):
        lengths = [draw.randint(1, 9) for _ in range(draw.randint(1, 3))]
        order = draw.sample(range(len(lengths)), len(lengths))
        tile = [draw.randint(1, 8) for _ in range(draw.randint(1, 2))]
        name, size = draw.choice([("f32", 4), ("bf16", 2), ("pred", 1)])
        layout = f"{','.join(map(str, order))}:T({','.join(map(str, tile))})(2,1)"
        text = f"{name}[{','.join(map(str, lengths))}]{{{layout}}}"
        elements = size
        for length in lengths:
            elements *= length
        padded = size * filled(lengths, order, tile)
        assert hlo.sizes_of(text) == (elements, padded), text
        assert hlo.sizes_of(text.replace("}", "S(1)}")) == (0, 0)  # not in HBM
        assert hlo.bytes_of(text) == elements


def test_padding_of_a_program():
    """In tiles of 8 x 128, 3 x 299 x 80 take 3 x 304 x 128; nothing inside a fusion counts, nor what is named again."""
    padding = hlo.padding(hlo.parse(TPU))
    assert padding.arguments == (3 * 299 * 80 * 2 + 5, 3 * 304 * 128 * 2 + 512)
    copied, result = 10 * 80 * 4, 16 * 128 * 4
    # What the first fusion gives; of the loops the permuted array, two sums, two answers and one sum over devices.
    assert padding.made.elements == copied + result + (48 + 192) * 64 * 2 + 256 + 2 * 4 + 2 + 4
    assert padding.worst == "bf16[3,299,80]{2,1,0:T(8,128)(2,1)}"
    assert "1.7 times its 0.00 GiB" in slice_needs.describe(padding)
    assert slice_needs.describe(hlo.padding(hlo.parse(""))) == "0% of what it writes"


@pytest.mark.parametrize(
    "said, short",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.68G of 15.75G hbm.\n\n"
            "Largest program allocations in hbm:\n  1. Size: 2G",
            "Ran out of memory in memory space hbm. Used 17.68G of 15.75G hbm.",
        ),
        ("RESOURCE_EXHAUSTED: " + 400 * "x", 300 * "x" + " .."),
    ],
)
def test_refusals_are_one_short_line(said, short):
    assert slice_needs.first_sentences(" ".join(said.split())) == short
