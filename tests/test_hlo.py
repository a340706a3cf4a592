"""Bytes and collectives read from scheduled HLO, with the numbers worked out by hand."""
# ruff: noqa: E501  (HLO as the compiler writes it)

import pytest

from posttrain.launch import hlo, roofline
from posttrain.launch.hlo import Collective
from posttrain.sharding import topology

LOOP = """HloModule jit_step, is_scheduled=true

%fused (p0: f32[8,128,128], p1: s32[]) -> f32[128,128] {
  %p0 = f32[8,128,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %slice.1 = f32[1,128,128]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,128,128}
  ROOT %bitcast.1 = f32[128,128]{1,0:T(8,128)} bitcast(%slice.1)
}

%condition (state: (s32[], f32[8,128,128], bf16[128,512])) -> pred[] {
  %state = (s32[]{:T(128)}, f32[8,128,128]{2,1,0:T(8,128)}, bf16[128,512]{1,0}) parameter(0)
  %end = s32[]{:T(128)} constant(8)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %end), direction=LT
}

%body (state.1: (s32[], f32[8,128,128], bf16[128,512])) -> (s32[], f32[8,128,128], bf16[128,512]) {
  %state.1 = (s32[]{:T(128)}, f32[8,128,128]{2,1,0:T(8,128)}, bf16[128,512]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %stack = f32[8,128,128]{2,1,0:T(8,128)} get-tuple-element(%state.1), index=1
  %shard = bf16[128,512]{1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=2
  %layer = f32[128,128]{1,0:T(8,128)} fusion(%stack, %i.1), kind=kLoop, calls=%fused
  %gathered = bf16[128,2048]{1,0:T(8,128)(2,1)} all-gather(%shard), channel_id=7, replica_groups=[4,4]<=[16], dimensions={1}
  %one = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} add(%i.1, %one)
  ROOT %out = (s32[]{:T(128)}, f32[8,128,128]{2,1,0:T(8,128)}, bf16[128,512]{1,0}) tuple(%next, %stack, %shard)
}

ENTRY %main (a: f32[8,128,128], b: bf16[128,512]) -> f32[8,128,128] {
  %a = f32[8,128,128]{2,1,0:T(8,128)} parameter(0)
  %b = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, f32[8,128,128]{2,1,0:T(8,128)}, bf16[128,512]{1,0}) tuple(%zero, %a, %b)
  %loop = (s32[]{:T(128)}, f32[8,128,128]{2,1,0:T(8,128)}, bf16[128,512]{1,0}) while(%init), condition=%condition, body=%body
  %fast = f32[128,128]{1,0:T(8,128)S(1)} constant({...})
  %copy = f32[128,128]{1,0:T(8,128)} copy(%fast)
  ROOT %result = f32[8,128,128]{2,1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""
LAYER, SHARD, COUNTER = 128 * 128 * 4, 128 * 512 * 2, 4


@pytest.mark.parametrize(("step", "turns"), [(1, 8), (2, 4), (3, 3)])
def test_a_loop_counts_as_often_as_it_turns(step, turns):
    module = hlo.parse(LOOP.replace("STEP", str(step)))
    (transfer,) = module.collectives()
    assert (transfer.kind, transfer.times, transfer.bytes) == ("all-gather", turns, SHARD)
    # A fusion that slices a stack reads one layer of it, with the index, and writes it.
    inside = 2 * LAYER + COUNTER + SHARD + 4 * SHARD + 3 * COUNTER
    assert module.bytes_accessed(hbm_only=False) == turns * inside + 2 * LAYER
    assert module.bytes_accessed(hbm_only=False, loops=False) == inside + 2 * LAYER


def test_what_lies_on_the_core_is_not_read_from_hbm():
    module = hlo.parse(LOOP.replace("STEP", "8"))
    assert module.bytes_accessed(hbm_only=False) - module.bytes_accessed(hbm_only=True) == LAYER


def test_a_loop_that_ends_when_the_data_say_so_turns_as_often_as_it_is_told():
    text = LOOP.replace("STEP", "1").replace("direction=LT", "direction=GT")
    assert [one.times for one in hlo.parse(text, trips=33).collectives()] == [33]


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[4,4]<=[16]", (0, 1, 2, 3)),
        ("replica_groups=[4,4]<=[4,4]T(1,0)", (0, 4, 8, 12)),
        ("replica_groups=[8,2]<=[2,2,4]T(2,1,0)", (0, 8)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", (0, 1)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0':(1)2}", (0, 4)),
        ("replica_groups={}", ()),
    ],
)
def test_the_group_of_a_collective_is_read_in_every_spelling(groups, first):
    text = LOOP.replace("STEP", "1").replace("replica_groups=[4,4]<=[16]", groups)
    assert [one.group for one in hlo.parse(text).collectives()] == [first]


FUSED = """HloModule jit_step, is_scheduled=true

%fused_start (p: bf16[128,512]) -> (bf16[128,512], bf16[128,2048]) {
  %p = bf16[128,512]{1,0} parameter(0)
  %g = bf16[128,2048]{1,0} all-gather(%p), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={1}
  ROOT %c = (bf16[128,512]{1,0:S(1)}, bf16[128,2048]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%fused_done (q: bf16[128,512]) -> bf16[128,2048] {
  %q = bf16[128,512]{1,0} parameter(0)
  %h = bf16[128,2048]{1,0} all-gather(%q), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={1}
  ROOT %d = bf16[128,2048]{1,0} custom-call(%h), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (r: f32[128,512]) -> f32[128,128] {
  %r = f32[128,512]{1,0} parameter(0)
  %s = f32[128,512]{1,0} all-reduce(%r), channel_id=4, replica_groups={{0,1,2,3}}, to_apply=%add
  %t = s32[] constant(0)
  ROOT %u = f32[128,128]{1,0} dynamic-slice(%s, %t, %t), dynamic_slice_sizes={128,128}
}

ENTRY %main (a: bf16[128,512], b: f32[128,512]) -> f32[128,128] {
  %a = bf16[128,512]{1,0} parameter(0)
  %b = f32[128,512]{1,0} parameter(1)
  %start = (bf16[128,512]{1,0:S(1)}, bf16[128,2048]{1,0}) fusion(%a), kind=kCustom, calls=%fused_start
  %done = bf16[128,2048]{1,0} fusion(%a), kind=kCustom, calls=%fused_done
  %token = token[] after-all()
  %send = (f32[128,512]{1,0}, u32[], token[]) send(%b, %token), channel_id=9, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=9
  ROOT %scattered = f32[128,128]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_the_parts_of_an_asynchronous_collective_are_one_hidden_transfer():
    gather, send, scatter = sorted(hlo.parse(FUSED).collectives(), key=lambda one: one.kind != "all-gather")
    assert (gather.kind, gather.hidden, gather.times, gather.bytes) == ("all-gather", True, 1, 128 * 512 * 2)
    assert (send.kind, send.hidden, send.across_slices, send.bytes) == ("all-reduce", False, True, 128 * 512 * 4)
    assert (scatter.kind, scatter.hidden, scatter.across_slices) == ("reduce-scatter", False, False)


def test_transfers_take_their_bytes_over_the_links_of_their_group():
    pod, link = topology.parse("v5p:4x4x4", slices=2), topology.GENERATIONS["v5p"].link
    coords = [(x, y, z) for z in range(4) for y in range(4) for x in range(4)]
    row = Collective("all-reduce", 1e9, 3, (0, 1, 2, 3), False, False, "")
    assert roofline.seconds(row, pod, coords) == pytest.approx(3 * 1e9 * 2 * 3 / 4 / (2 * link))
    everyone = row._replace(kind="all-gather", group=(), times=1)
    assert roofline.seconds(everyone, pod, coords) == pytest.approx(1e9 * 63 / (6 * link))
    between = row._replace(group=(), across_slices=True, times=1)
    assert roofline.seconds(between, pod, coords) == pytest.approx(1e9 * 2 * 1 / 2 / 6.25e9)


def test_the_longest_kind_bounds_and_exposed_transfers_come_on_top():
    pod = topology.parse("v5p:4x4x4")
    hidden = Collective("all-gather", 1e9, 1, (), True, False, "")
    coords = [(x, y, z) for z in range(4) for y in range(4) for x in range(4)]
    work = roofline.work(64 * 459e12, 2765e9 / 2, [hidden, hidden._replace(hidden=False)], pod, coords)
    times = roofline.roofline(work, pod)
    assert (times.compute, times.hbm, times.ici) == (1.0, 0.5, times.exposed)
    assert times.bound == "compute" and times.seconds == pytest.approx(1.0 + 1e9 * 63 / 540e9)
