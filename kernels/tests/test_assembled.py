"""What assembled.py finds in machine code of a few lines."""

from pathlib import Path

import pytest


@pytest.fixture
def touched(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "emulator"))
    from assembled import touched

    return touched


SASS = """
 /*0010*/ WARPGROUP.ARRIVE ;
 /*0020*/ HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR40].tnspB, R24, gsb0 ;
MIDDLE
 /*0050*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
 /*0060*/ ST.E.64 desc[UR60][R4.64+0x20], R24 ;
 /*0070*/ IMAD.MOV.U32 R58, RZ, RZ, 0x3f803f80 ;
"""


@pytest.mark.parametrize(
    ("middle", "told"),
    [
        ("IMAD.MOV.U32 R60, RZ, RZ, 0x3f803f80", []),
        ("@!P0 IMAD.MOV.U32 R58, RZ, RZ, 0x3f803f80", ["a left operand, 1 instructions late"]),
        ("LDL.LU.64 R58, [R1+0x118]", ["a left operand"]),
        ("SHFL.BFLY PT, R58, R3, 0x1, 0x1f", ["a left operand"]),
        ("LOP3.LUT P0, R57, R5, R3, RZ, 0xc0, !PT", ["a left operand"]),
        ("FADD.FTZ R2, -R24.reuse, |R3|", ["sums of a product that is under way"]),
        ("@P0 WARPGROUP.DEPBAR.LE gsb0, 0x0", []),
        ("RET.REL.NODEC R58, 0x0", []),
        ("R2UR UR10, R14", []),
        ("IMAD.WIDE.U32 R54, R9, 0x6000, R6", ["sums of a product that is under way"]),
        ("IADD3 R2, P0, R24, R3, RZ", ["sums of a product that is under way"]),
        ("ST.E.64 desc[UR60][R4.64], R30", ["sums of a product that is under way"]),
        ("STS [R24], R3", ["sums of a product that is under way"]),
        ("HGMMA.64x64x16.F32.BF16 R24, R60, gdesc[UR8], R24, gsb0", []),  # they add up one after the other
        ("HGMMA.64x64x16.F32.BF16 R32, R80, gdesc[UR8], R32, gsb0", ["sums of another product"]),
        ("HGMMA.64x64x16.F32.BF16 R88, R24, gdesc[UR8], RZ, !UPT, gsb0", ["sums that are not there yet"]),
    ],
)
def test_registers_of_a_product_under_way(touched, middle, told):
    lines = SASS.replace("MIDDLE", f" /*0030*/ {middle} ;").strip().splitlines()
    faults = list(touched(lines))
    assert len(faults) == len(told)
    for fault, expected in zip(faults, told):
        assert expected in fault


@pytest.mark.parametrize("name", ["QGMMA.64x64x32.F32.E4M3.E4M3", "HGMMA.64x64x16.F16", "HGMMA.SP.F32"])
def test_products_of_other_kinds_are_refused(touched, name):
    from errors import Refused

    with pytest.raises(Refused, match="not known here"):
        list(touched([f"/*0010*/ {name} R24, gdesc[UR4], RZ, !UPT, gsb0 ;"]))


def test_products_of_earlier_groups_are_done_with_after_a_wait(touched):
    lines = [
        "/*0010*/ HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR4], R24, gsb0 ;",
        "/*0020*/ HGMMA.64x32x16.F32.BF16 R88, R60, gdesc[UR8], RZ, !UPT, gsb0 ;",
        "/*0030*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;",
        "/*0040*/ MOV R56, R24 ;",
        "/*0050*/ MOV R103, R55 ;",
        "/*0060*/ MOV R104, R55 ;",
    ]
    assert list(touched(lines)) == ["sums of a product that is under way: /*0050*/ MOV R103, R55 ;"]
