"""How often branches of a compiled TPU program are taken, from a listing in the compiler's form."""

from pathlib import Path

import pytest

LISTING = """
  %s1_s0 = inlined_call_operand.vmem [shape: s32[8], index: 0]
  loop: start=0, step=1, limit=10
  $region1: #{kernel.1} parent=0 // loop_pre_header
    %s2_s1 = smov.u32 0 /* copy for cssa */
    %s3_s2 = smov.u32 0
  $region2: #{kernel.1} parent=0 // loop_body
    %s4_s1 = sphi %s2_s1, %s12_s1 /* iteration index, stage = 0 */
    %s5_s2 = sphi %s3_s2, %s13_s2 /* iteration index, stage = 1 */
    %40 = sst [smem:[#allocation7_spill]] %s5_s2
    %s6_s3 = sadd.s32 4294967295, %s4_s1
    %p7_p0 = scmp.ge.s32.totalorder %s6_s3, 0
    %p8_p1 = scmp.lt.s32.totalorder %s4_s1, 9
    %p9_p2 = pnand %p7_p0, %p8_p1
    %30 = sbr.rel (%p9_p2) target = $region6
  $region3: #{kernel.1} parent=2 // pred_region
    %s14_s4 = sld [smem:[#allocation7_spill]]
    %p15_p3 = scmp.ne.s32.totalorder %s14_s4, 0
    %31 = sbr.rel (%p15_p3) target = $region4
    %v20_v0 = vld [vmem:[%s1_s0] sm:$0xff]
  $region4: #{kernel.1} parent=2 // pred_fallthru
    %s16_s5 = sld [smem:[%s1_s0]]
    %p17_p4 = scmp.eq.s32.totalorder %s16_s5, 0
    %p18_p5 = por %p17_p4, %p15_p3
    %32 = sbr.rel (!%p18_p5) target = $region6
  $region6: #{kernel.1} parent=2 // pred_fallthru
    %s12_s1 = sadd.s32 1, %s4_s1
    %s19_s6 = sadd.s32 1, %s5_s2
    %p21_p6 = scmp.ge.s32.totalorder %s19_s6, 4
    %s13_s2 = smov.u32 (%p21_p6, %s19_s6), 0
    %p22_p7 = scmp.ge.s32.totalorder %s12_s1, 10
    %33 = sbr.rel (!%p22_p7) target = $region2
"""


@pytest.fixture(scope="module")
def count_branches():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        from tpu_branches import count_branches
    return count_branches


def test_counts(count_branches):
    branches = count_branches(LISTING)
    counts = {name: (branch.met, branch.taken, branch.known) for name, branch in branches.items()}
    # The pipeline's body runs at iterations 1 to 8, in which the second index is 1, 2, 3, 0, 1, 2, 3, 0.
    assert counts["30"] == (10, 2, True)
    assert counts["31"] == (8, 6, True)
    assert counts["32"] == (8, 0, False)  # where the second index is 0, memory decides
    assert counts["33"] == (10, 9, True)


def test_a_loop_that_memory_ends_is_unknown(count_branches):
    branches = count_branches(
        LISTING.replace("scmp.ge.s32.totalorder %s12_s1, 10", "scmp.ge.s32.totalorder %s16_s5, 10")
    )
    assert (branches["33"].met, branches["33"].known) == (1, False)
