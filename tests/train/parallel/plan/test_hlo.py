"""Exchanges counted in HLO text whose numbers are known by hand, and in a program of this process."""

import pytest

from diffjax.train.parallel.plan.hlo import Collective, collectives

TEXT = """
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner (p: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %p = (s32[], bf16[16,8]{1,0}) parameter(0)
  %w = bf16[2,8]{1,0} slice(%p), slice={[0:2], [0:8]}
  %gather.1 = bf16[16,8]{1,0} all-gather(%w), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %permuted = bf16[16,8]{1,0} collective-permute(%gather.1), channel_id=2, source_target_pairs={{0,1},{1,2},{7,0}}
  ROOT %t = (s32[], bf16[16,8]{1,0}) tuple(%i, %permuted)
}

%inner_condition (p: (s32[], bf16[16,8])) -> pred[] {
  %p = (s32[], bf16[16,8]{1,0}) parameter(0)
  %n = s32[] constant(3)
  ROOT %more = pred[] compare(%i, %n), direction=LT
}

%outer (p: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %p = (s32[], bf16[16,8]{1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[16,8]{1,0}) while(%p), condition=%inner_condition, body=%inner
}

ENTRY %main (a: f32[32], b: f32[64]) -> f32[32] {
  %a = f32[32]{0} parameter(0)
  %b = f32[64]{0} parameter(1)
  %twice = (s32[], bf16[16,8]{1,0}) while(%t), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"2"}}
  %all = (f32[32]{0}, /*index=1*/f32[64]{0}) all-reduce(%a, %b), channel_id=3, replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %sum.2 = f32[32]{0} all-reduce(%a), channel_id=4, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %own = f32[8]{0} dynamic-slice(%sum.2, %i), dynamic_slice_sizes={8}
  %meshed = f32[8]{0} all-reduce(%own), replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y':(2)2}
  %start = (f32[4]{0}, f32[32]{0}) all-gather-start(%c), channel_id=6, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %done = f32[32]{0} all-gather-done(%start)
}
"""


def test_exchanges_of_known_text():
    gathered, permuted = 16 * 8 * 2, 16 * 8 * 2
    assert set(collectives(TEXT, 8)) == {
        # Twice around a loop of three.
        Collective("all-gather", "bf16", 8, 8, 6, 6.0 * gathered),
        Collective("collective-permute", "bf16", 2, 8, 6, 6.0 * permuted),
        Collective("all-reduce", "f32", 2, 2, 1, 4.0 * (32 + 64)),
        # Every device keeps a quarter of it. The groups are 0 2 4 6 and 1 3 5 7.
        Collective("reduce-scatter", "f32", 4, 7, 1, 4.0 * 32),
        # y counts in fours through 0 2 4 6, of which the second half of the index is the inner factor: 0 2, 4 6, ...
        Collective("all-reduce", "f32", 2, 3, 1, 4.0 * 8),
        Collective("all-gather", "f32", 8, 8, 1, 4.0 * 32),
    }


@pytest.mark.parametrize(
    "kind, factor",
    # A ring of four: a reduction is a scatter and a gather, each of which passes on three quarters.
    [
        ("all-reduce", 1.5),
        ("all-gather", 0.75),
        ("reduce-scatter", 0.75),
        ("all-to-all", 0.75),
        ("collective-permute", 1),
    ],
)
def test_what_a_device_sends(kind, factor):
    assert Collective(kind, "f32", 4, 4, 1, 100.0).sent() == 100.0 * factor


def test_a_group_that_is_not_named_is_all_devices():
    text = "ENTRY %main (a: f32[32]) -> f32[32] {\n  ROOT %r = f32[32]{0} all-reduce(%a), replica_groups={}\n}\n"
    assert collectives(text, 16) == [Collective("all-reduce", "f32", 16, 16, 1, 128.0)]
