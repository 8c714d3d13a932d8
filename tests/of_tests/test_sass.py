"""What counts instructions: it finds loops, and the ways through them that the counts are of."""

import textwrap

import instruction_table
import instructions
import nvcc
import pytest
import sass
import whole_kernel
from instruction_table import Counts
from instructions import Step
from sass import Kernel

PLAIN = "pointwise_dense<SumAndGrad, bf16, L1<float>>"

# A loop that handles two vectors, and leaves after one where there is no second. What looks at `P2` is for one vector
# in a thousand, and one instruction's predicate never holds. Behind it a loop for scalars.
LOOP = """
        S2R R0, SR_TID.X ;
    @P0 BRA `(.L_x_3) ;
.L_x_1:
        LDG.E.128 R4, desc[UR4][R2.64] ;
    @P1 LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x10] ;
    @!PT FADD R9, R9, R9 ;
        MUFU.EX2 R4, R4 ;
    @P2 BRA `(.L_x_4) ;
.L_x_5:
        STG.E.EF.128 desc[UR4][R2.64], R4 ;
    @P1 BRA `(.L_x_2) ;
        MUFU.EX2 R8, R8 ;
        STG.E.EF.128 desc[UR4][R2.64+0x10], R8 ;
.L_x_2:
    @P3 BRA `(.L_x_1) ;
.L_x_3:
        LDG.E.U16 R4, desc[UR4][R2.64] ;
        FADD R4, R4, R4 ;
        FADD R4, R4, R4 ;
        FADD R4, R4, R4 ;
        FADD R4, R4, R4 ;
        FADD R4, R4, R4 ;
        FADD R4, R4, R4 ;
        FADD R4, R4, R4 ;
        FADD R4, R4, R4 ;
        STG.E.U16 desc[UR4][R2.64], R4 ;
    @P4 BRA `(.L_x_3) ;
        EXIT ;
.L_x_4:
        FADD R4, R4, R4 ;
        CALL.REL.NOINC `($slow) ;
        BRA `(.L_x_5) ;
$slow:
        RET.REL.NODEC R2 `(kernel) ;
.L_x_6:
        BRA `(.L_x_6) ;
        NOP ;
"""
NESTED = """
        MOV R1, RZ ;
.L_x_1:
        LDG.E.64 R2, desc[UR4][R2.64] ;
.L_x_2:
        LDG.E.128 R4, desc[UR4][R2.64] ;
        BRA.DIV UR4, `(.L_x_9) ;
        FADD R1, R4, R5 ;
    @P0 BRA `(.L_x_2) ;
        STG.E desc[UR4][R2.64], R1 ;
        BRA.U UP0, `(.L_x_1) ;
        EXIT ;
.L_x_9:
        SHFL.BFLY PT, R1, R1, R2, 0x1f ;
        BRA `(.L_x_2) ;
"""
# A gradient whose rows are set up in a block that a branch goes around, in front of a loop of two classes a pass.
SET_UP = """
    @P0 BRA `(.L_x_1) ;
        MUFU.EX2 R6, R6 ;
        MUFU.RCP R6, R6 ;
.L_x_1:
        LDG.E.64 R4, desc[UR4][R2.64] ;
.L_x_2:
        MUFU.EX2 R4, R4 ;
        STG.E.64 desc[UR4][R2.64], R4 ;
    @P1 BRA `(.L_x_3) ;
        MUFU.EX2 R4, R4 ;
        STG.E.64 desc[UR4][R2.64+0x8], R4 ;
.L_x_3:
    @P2 BRA `(.L_x_2) ;
        EXIT ;
"""
SWITCH = """
        BRX R28 -0x3130          (*"BRANCH_TARGETS .L_x_1,.L_x_2"*);
.L_x_1:
        STG.E.U16 desc[UR4][R2.64], R1 ;
        EXIT ;
.L_x_2:
        MOV R1, R1 ;
    @P0 EXIT ;
        STG.E.U16 desc[UR4][R2.64], R1 ;
        EXIT ;
"""


def kernel(code: str, name: str = "kernel") -> Kernel:
    return Kernel(dict(sass.read(disassembly(code, name)))[name])


def disassembly(code: str, name: str = "kernel") -> str:
    """As nvdisasm writes it, with an address before each instruction."""
    lines = [
        line if line.endswith(":") else f"        /*{16 * n:04x}*/       {line.strip()}"
        for n, line in enumerate(textwrap.dedent(code).strip().splitlines())
    ]
    head = (
        f'\t.target\tsm_90\n\t.section\t.text.{name},"ax",@progbits\n.text.{name}:\n        .size {name},(x - {name})\n'
    )
    return "\n".join([head, *lines]) + "\n"


def test_the_shortest_way_of_the_most_pieces_is_counted():
    # Two loads, two stores, two exponentials, the addition that never happens, and three branches; not the detour.
    step = Step("STG", 16, 8)
    loop = step.loop(kernel(LOOP))
    assert loop and step.of_pass(loop) == (16, 10) and loop.count(lambda i: True) == 13
    assert instructions.count(PLAIN, kernel(LOOP)) == round(10 / 16, 2)


def test_a_pass_of_fewer_elements_is_shorter():
    step = Step("STG", 16, 8)
    loop = step.loop(kernel(LOOP))
    assert loop and step.of_part(loop, 1) == step.of_part(loop, 8) == 8 and step.of_part(loop, 9) == 10


def test_an_instruction_more_in_the_loop_is_counted_wherever_every_pass_takes_it():
    more = LOOP.replace("MUFU.EX2 R8, R8 ;", "MUFU.EX2 R8, R8 ;\n        FMUL R8, R8, R8 ;")
    detour = LOOP.replace("CALL.REL", "FMUL R8, R8, R8 ;\n        CALL.REL")
    outside = LOOP.replace("S2R R0", "FMUL R8, R8, R8 ;\n        S2R R0")
    assert instructions.count(PLAIN, kernel(more)) == round(11 / 16, 2)
    assert instructions.count(PLAIN, kernel(detour)) == instructions.count(PLAIN, kernel(outside)) == round(10 / 16, 2)


def test_without_special_functions_the_way_of_the_most_arithmetic_is_counted():
    # The detour and its way back too: else the work itself could be what a branch goes around.
    assert instructions.count(PLAIN, kernel(LOOP.replace("MUFU.EX2 R8, R8", "FMUL R8, R8, R8"))) == round(10 / 16, 2)
    assert instructions.count(PLAIN, kernel(LOOP.replace("MUFU.EX2", "FMUL"))) == round(13 / 16, 2)


def test_of_several_loops_one_with_products_is_hot():
    # As where a grid adds up sums of 8 bytes by a loop that is unrolled.
    adds = (
        ".L_x_2:\n"
        + "        LDG.E.64 R4, desc[UR4][R2.64] ;\n        DADD R6, R6, R4 ;\n" * 8
        + "    @P0 BRA `(.L_x_2) ;\n"
    )
    hot = ".L_x_1:\n        LDG.E.64 R4, desc[UR4][R2.64] ;\n        DMUL R6, R6, R4 ;\n    @P0 BRA `(.L_x_1) ;\n"
    for code in (hot + adds, adds + hot):
        of = kernel(code + "        EXIT ;")
        loop = Step("LDG", 8).loop(of)
        assert len(of.innermost) == 2 and loop and loop.count(lambda i: i.name == "DMUL") == 1


def test_a_loop_within_a_loop_is_found_and_the_outer_one_goes_through_it_once():
    of = kernel(NESTED)
    inner, outer = sorted(of.loops, key=lambda loop: len(loop.body))
    assert of.innermost == [inner] and inner.body < outer.body
    step = Step("LDG", 16, 8)
    assert step.loop(of) == inner and step.of_pass(inner) == (8, 4)
    assert list(outer.ways(lambda n: 0).values()) == [7]
    assert list(outer.ways(lambda n: 0, free=inner.body).values()) == [3]


def test_a_kernel_without_a_loop_is_counted_as_a_whole():
    of = kernel(SWITCH)
    assert of.loops == [] and Step("STG", 2).loop(of) is None
    assert instructions.count("backward_targets<bf16, Nll<float>>", of) == 3
    with pytest.raises(AssertionError, match="expected a loop of tiles"):
        instructions.count("tiles<bf16, Focal<float>, true, false>", of)


def test_what_cannot_be_reached_is_left_out():
    opcodes = [i.opcode for block in kernel(LOOP).blocks for i in block.instructions]
    assert "NOP" not in opcodes and "RET.REL.NODEC" not in opcodes and opcodes.count("EXIT") == 1


def test_a_branch_to_nowhere_and_an_unknown_kernel_are_refused():
    with pytest.raises(AssertionError, match="expected a branch that says where to"):
        kernel("    BRX R28 -0x3130 ;\n    EXIT ;")
    with pytest.raises(AssertionError, match="expected a kernel whose hot loops are told, got other<bf16>"):
        instructions.count("other<bf16>", kernel(LOOP))


def test_a_whole_kernel_is_counted_by_what_its_rows_need():
    # Rows of 4: 5 instructions beside the loop, 6 for two classes of 4 rows each, and 4 where one class is left.
    name = "backward_columns<bf16, bf16, LogProbs<float>, 4>"
    assert [whole_kernel.columns(name, kernel(SET_UP), classes) for classes in (2, 5)] == [11 / 8, 21 / 20]
    more = SET_UP.replace("MUFU.RCP R6, R6 ;", "MUFU.RCP R6, R6 ;\n        FMUL R6, R6, R6 ;")
    assert whole_kernel.columns(name, kernel(more), 2) == 12 / 8


def test_counts_of_a_run_have_the_kernels_names():
    run = nvcc.Run([], 0, "")
    nvcc.count(run, "sm_90", disassembly(LOOP, "_Z12scale_kernelIfEvPT_"))
    nvcc.count(run, "sm_80", disassembly(SWITCH, "_Z12scale_kernelIfEvPT_"))
    assert run.loops["sm_90"] == {"scale_kernel<float>": 10 / 8}
    assert [message.split(": expected")[0] for message in run.uncounted] == ["scale_kernel<float> on sm_80"]


def test_the_table_tells_what_a_kernel_takes_more():
    wholes = {name: float(most + n) for n, (name, most) in enumerate(instruction_table.targets().items())}
    counts = Counts({PLAIN: (15.0, 16.25, 17.0), "indexed_divisor": (9.0, 9.0, 9.0)}, wholes)
    first, second, *_ = wholes
    counts.binds = {first: "nothing: it is met", second: "what stands in the way"}
    text = instruction_table.table(counts, nvcc.ARCHITECTURES)
    read = instruction_table.read(text)
    assert (read.loops, read.wholes) == (counts.loops, counts.wholes)
    assert read.binds[first] == "-" and read.binds[second] == "what stands in the way"
    assert len(instruction_table.unexplained(read)) == len(wholes) - 2
    assert instruction_table.table(read, nvcc.ARCHITECTURES) == text

    read.loops[PLAIN], read.wholes[second] = (15.0, 17.25, 17.0), 100.0
    flattened = instruction_table.flattened
    message = nvcc.differences(flattened(counts), flattened(read))
    assert f"{PLAIN}: (15.0, 16.25, 17.0) in the table, (15.0, 17.25, 17.0) now" in message
    assert f"whole kernel, {second}: {wholes[second]} in the table, 100.0 now" in message


def test_a_share_is_what_the_instructions_leave_of_the_memorys_speed():
    # 6 bytes an element: input, target and gradient.
    assert instructions.moved(PLAIN) == 6
    budget = instruction_table.budget(6, "H100")
    assert budget == pytest.approx(132 * 128 * 1.98e9 / (3.0e12 / 6))
    assert instruction_table.of_memory(PLAIN, budget / 2)[3] == instruction_table.of_memory(PLAIN, budget)[3] == "100%"
    assert instruction_table.of_memory(PLAIN, 2 * budget)[3] == "50%"
    assert set(instruction_table.of_memory("indexed_divisor", 9.0)) == {"-"}


def test_the_committed_tables_are_of_the_same_kernels_and_say_what_binds():
    *_, registers = nvcc.read_table(nvcc.TABLE.read_text())
    committed = instruction_table.read(instruction_table.TABLE.read_text())
    assert committed.loops.keys() == registers.keys()
    assert committed.wholes.keys() == instruction_table.targets().keys()
    assert not instruction_table.unexplained(committed)
    assert instruction_table.table(committed, nvcc.ARCHITECTURES) == instruction_table.TABLE.read_text()
