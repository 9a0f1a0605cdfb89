"""The emulator of Hopper kernels on PTX of a few lines."""

from pathlib import Path

import numpy as np
import pytest

THREADS = 64

KERNEL = """
.version 8.0
.target sm_90a
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(
    .param .u64 .ptr .align 16 kernel_param_0
)
{
    .reg .pred %p<9>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [kernel_param_0];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mad.lo.s32 %r3, %r2, 64, %r1;
    mul.wide.u32 %rd2, %r3, 4;
    add.s64 %rd3, %rd1, %rd2;
    shl.b32 %r4, %r1, 2;
    mov.b32 %r5, memory;
    add.s32 %r5, %r5, %r4;  // the thread's place in shared memory
    setp.eq.u32 %p1, %r1, 0;
BODY
    st.b32 [%rd3], %r8;
    ret;
}
.file 1 "folder/kernel.py"
"""

SUM_BELOW_THREAD = """
    mov.b32 %r7, 0;
    mov.b32 %r8, 0;
$loop:
    setp.ge.u32 %p2, %r7, %r1;
    @%p2 bra $done;
    add.s32 %r8, %r8, %r7;
    add.s32 %r7, %r7, 1;
    bra.uni $loop;
$done:
"""

OTHER_WARPS_NUMBER = """
    .loc 1 10 0
    st.shared.b32 [%r5], %r1;
    BARRIER
    xor.b32 %r6, %r5, 128;
    .loc 1 11 0
    ld.shared.b32 %r8, [%r6];
"""

AS_MANY_STEPS_AS_BLOCKS_BEFORE = """
    mov.b32 %r8, 0;
$loop:
    bar.sync 0;
    setp.eq.u32 %p2, %r8, %r2;
    @%p2 bra $done;
    add.s32 %r8, %r8, 1;
    bra.uni $loop;
$done:
"""

WAIT = """
    @%p1 mbarrier.init.shared.b64 [memory], 1;
    bar.sync 0;
    @%p1 mbarrier.arrive.release.cta.shared::cta.b64 _, [memory], 1;
    .loc 1 12 0
    { .reg .pred P1; AGAIN: mbarrier.try_wait.parity.shared.b64 P1, [memory], PARITY, 1000;
    @P1 bra.uni DONE; bra.uni AGAIN; DONE: }
    mov.b32 %r8, 1;
"""


@pytest.fixture(scope="module")
def emulator():
    """Runs a body in two blocks of two warps: (results [blocks,threads], faults)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "emulator"))
        from launch import Launch
        from machine import Schedule, emulate
        from program import Program
    launch = Launch(grid=(2, 1, 1), threads=THREADS, shared_bytes=1024, arguments=(0,), descriptors={})

    def run(body, **schedule):
        results = [np.empty((2, THREADS), np.uint32)]
        outcome = emulate(Program(KERNEL.replace("BODY", body)), launch, [], results, Schedule(**schedule))
        return outcome.results[0], list(outcome.faults)

    return run


@pytest.mark.parametrize("schedule", [{}, {"seed": 0}, {"reverse": True}], ids=str)
def test_threads_leave_a_loop_one_by_one(emulator, schedule):
    numbers, faults = emulator(SUM_BELOW_THREAD, **schedule)
    thread = np.arange(THREADS)
    np.testing.assert_array_equal(numbers, np.stack([thread * (thread - 1) // 2] * 2))
    assert not faults


def test_race(emulator):
    _, faults = emulator(OTHER_WARPS_NUMBER.replace("BARRIER", ""))
    read = "kernel.py:11 ld.shared.b32"
    assert f"read after write: {read}, before it kernel.py:10 st.shared.b32" in faults
    numbers, faults = emulator(OTHER_WARPS_NUMBER.replace("BARRIER", "bar.sync 0;"))
    np.testing.assert_array_equal(numbers, np.stack([np.arange(THREADS) ^ 32] * 2))
    assert not faults


def test_blocks_with_unequal_steps(emulator):
    numbers, faults = emulator(AS_MANY_STEPS_AS_BLOCKS_BEFORE)
    np.testing.assert_array_equal(numbers, [[0] * THREADS, [1] * THREADS])
    assert not faults


def test_deadlock(emulator):
    numbers, faults = emulator(WAIT.replace("PARITY", "0"))
    assert (numbers == 1).all()
    assert not faults
    with pytest.raises(RuntimeError, match=r"deadlock: warps \[0\] at kernel\.py:12 mbarrier\.try_wait"):
        emulator(WAIT.replace("PARITY", "1"))


def test_unknown_instruction(emulator):
    with pytest.raises(NotImplementedError, match=r"kernel\.py:13 sin\.approx\.f32"):
        emulator(".loc 1 13 0\n sin.approx.f32 %r8, %r1;")
