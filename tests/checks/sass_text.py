"""Machine code by hand, as `nvdisasm -c -ndf -hex -gi` prints it, with the control bits that a test asks for."""

from prefixmem_fast.checks.pointers import Pointers
from prefixmem_fast.checks.sass import parse

_NONE = 7


def instruction(text, stall=1, sets=None, reads=None, waits=(), line=None):
    """One instruction; addresses are given when they are put together."""
    mask = sum(1 << board for board in waits)
    control = stall | (_NONE if sets is None else sets) << 5 | (_NONE if reads is None else reads) << 8 | mask << 11
    source = [] if line is None else [f'\t//## File "/kernels/some.py", line {line}']
    return source, text, control << 41


def program(*parts):
    """A Program of instructions and of labels, which are given as text."""
    lines, address = [], 0
    for part in parts:
        if isinstance(part, str):
            lines.append(f".{part}:")
            continue
        source, text, second = part
        lines += [*source, f"        /*{address:04x}*/    {text} ;    /* 0x{0:016x} */", f"    /* 0x{second:016x} */"]
        address += 16
    return parse("\n".join(lines))


def load(register, sets, line=None, width=".128", base="R2", **more):
    return instruction(f"LDG.E{width} R{register}, desc[UR4][{base}.64]", sets=sets, line=line, **more)


def use(*waits, stall=1):
    return instruction("FADD R8, R8, R4", waits=waits, stall=stall)


EXIT = instruction("EXIT")
PTX = """
.visible .entry some_kernel(
\t.param .u64 .ptr .global .align 1 some_kernel_param_0,
\t.param .u64 .ptr .global .align 1 some_kernel_param_1,
\t.param .u32 some_kernel_param_2
)
\tld.param.b64 \t%rd1, [some_kernel_param_0];
\tld.param.b64 \t%rd2, [some_kernel_param_1];
\tld.param.b32 \t%r1, [some_kernel_param_2];
\t.loc\t1 10 5
\tmul.wide.s32 \t%rd3, %r1, 8;
\tadd.s64 \t%rd4, %rd1, %rd3;
\t@%p1 ld.global.b64 { %rd5 }, [ %rd4 + 0 ];
\t.loc\t1 20 5
\tshl.b64 \t%rd6, %rd5, 7;
\tadd.s64 \t%rd7, %rd2, %rd6;
\t@%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd7 + 0 ];
\t.loc\t1 30 5
\t@%p1 st.global.v4.b32 [ %rd7 + 0 ], { %r2, %r3, %r4, %r5 };
\t.file\t1 "/kernels/some.py"
"""
ORDER, ROW, STORE = 10, 20, 30  # lines of the PTX


def pointers():
    return Pointers(PTX, {"p_order": "*i64", "W": "constexpr", "p_weight": "*bf16", "E": "i32"})
