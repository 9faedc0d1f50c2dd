"""What arithmetic, comparisons, conversions, lane exchange and control flow become."""

from __future__ import annotations

from .assembler import Assembler, Unsupported, lowers
from .ptx import Instruction, Pair, Vector, parse_immediate

INTEGER_WIDTH = {"16": "16", "32": "32", "64": "64"}
ROUNDING = {"rn": 0, "rz": 1, "rm": 2, "rp": 3, "rna": 4}
FTZ, SAT, WIDE_PAIR = 4, 8, 16  # `sub` of the general float forms; rounding is its low two bits


def split_type(opcode: tuple[str, ...]) -> tuple[str, str]:
    """The last type suffix as (letter class, bits): s32 -> ("s", "32"), bf16x2 -> ("bf", "16x2")."""
    kind = opcode[-1]
    for letters in ("bf", "tf", "b", "u", "s", "f"):
        if kind.startswith(letters) and kind[len(letters) :][:1].isdigit():
            return letters, kind[len(letters) :]
    return kind, ""


def _simple(a: Assembler, i: Instruction, op: str, width: int, **how) -> None:
    a.emit(op, [a.reg(operand, width) for operand in i.operands], **how)


def _float_flags(i: Instruction) -> int:
    flags = 0
    for part in i.opcode[1:]:
        flags |= ROUNDING.get(part, 0) & 3
        flags |= {"ftz": FTZ, "sat": SAT}.get(part, 0)
    return flags


HALF = {"add": 0, "sub": 1, "mul": 2, "fma": 3, "min": 4, "max": 5, "neg": 6, "abs": 7, "ex2": 8, "tanh": 9}


def _half(a: Assembler, i: Instruction) -> None:
    """16-bit floats, one or two to a register."""
    letters, bits = split_type(i.opcode)
    sub = HALF[i.opcode[0]] | (letters == "bf") << 8 | bits.endswith("x2") << 9
    for part, bit in (("ftz", 10), ("sat", 11), ("relu", 12), ("NaN", 13), ("xorsign", 14)):
        sub |= (part in i.opcode) << bit
    _simple(a, i, "half", 1, sub=sub)


def _is_half(letters: str, bits: str) -> bool:
    return letters in ("f", "bf") and bits.startswith("16")


@lowers("add", "sub", "mul", "fma")
def arithmetic(a: Assembler, i: Instruction) -> None:
    root = i.opcode[0]
    letters, bits = split_type(i.opcode)
    if _is_half(letters, bits):
        if len(i.opcode) > 2 and i.opcode[-2] == "f32":  # fma.rn.f32.bf16, add.f32.f16: a 16-bit operand, a float sum
            flags = _float_flags(i) | (letters == "bf") << 8
            if root == "fma":
                _simple(a, i, "fma_f32_mixed", 1, sub=flags)
            elif root in ("add", "sub"):
                _simple(a, i, "add_f32_mixed", 1, sub=flags | (root == "sub") << 9)
            else:
                raise Unsupported("mixed precision")
            return
        _half(a, i)
    elif letters == "f":
        flags = _float_flags(i)
        if bits == "32":
            _simple(a, i, f"{root}_f32_general" if flags else f"{root}_f32", 1, sub=flags)
        elif bits == "32x2":
            general = f"{root}_f32_general" if flags else f"{root}_f32x2"
            _simple(a, i, general, 2, sub=flags | WIDE_PAIR if flags else 0)
        else:
            _simple(a, i, f"{root}_f64", 2, sub=flags & 3)
    else:
        _integer(a, i, root, letters, bits)


def _integer(a: Assembler, i: Instruction, root: str, letters: str, bits: str) -> None:
    width = 2 if bits == "64" else 1
    if "cc" in i.opcode:
        a.emit("add_carry", [a.reg(x, width) for x in i.operands], sub=(root == "sub") | 4 | (bits == "64") << 3)
    elif root in ("add", "sub") and "sat" in i.opcode:
        _simple(a, i, "addsub_sat_s32", 1, sub=int(root == "sub"))
    elif root == "mul":
        if "wide" in i.opcode:
            d, x, y = i.operands
            a.emit(f"mul_wide_{letters}{bits}", [a.reg(d, 2), a.reg(x), a.reg(y)])
        elif "hi" in i.opcode:
            _simple(a, i, f"mul_hi_{letters}{bits}", width)
        else:
            _simple(a, i, f"mul_lo_b{bits}", width)
    elif bits in ("16", "32", "64"):
        _simple(a, i, f"{root}_b{bits}", width)
    else:
        raise Unsupported("")


@lowers("addc", "subc")
def with_carry(a: Assembler, i: Instruction) -> None:
    wide = split_type(i.opcode)[1] == "64"
    sub = (i.opcode[0] == "subc") | 2 | ("cc" in i.opcode) << 2 | wide << 3
    a.emit("add_carry", [a.reg(x, 1 + wide) for x in i.operands], sub=sub)


@lowers("mul24")
def mul24(a: Assembler, i: Instruction) -> None:
    if "lo" not in i.opcode:
        raise Unsupported("")
    _simple(a, i, f"mul24_lo_{i.opcode[-1]}", 1)


@lowers("mad", "madc")
def mad(a: Assembler, i: Instruction) -> None:
    letters, bits = split_type(i.opcode)
    width = 2 if bits == "64" else 1
    d, x, y, z = i.operands
    if letters == "f":
        arithmetic(a, Instruction(i.line, ("fma", *i.opcode[1:]), i.operands, i.guard, i.negated, i.scope))
    elif "wide" in i.opcode:
        wide = 1 if bits == "16" else 2
        a.emit(f"mad_wide_{letters}{bits}", [a.reg(d, wide), a.reg(x), a.reg(y), a.reg(z, wide)])
    elif "cc" in i.opcode or i.opcode[0] == "madc":
        sub = (i.opcode[0] == "madc") << 1 | ("cc" in i.opcode) << 2 | (bits == "64") << 3
        sub |= ("hi" in i.opcode) << 4 | (letters == "s") << 5
        _simple(a, i, "mad_carry", width, sub=sub)
    elif "hi" in i.opcode:
        if bits != "32":
            raise Unsupported("")
        _simple(a, i, f"mad_hi_{letters}32", 1)
    elif bits == "16":
        product = a.new_slot()
        a.emit("mul_lo_b16", [product, a.reg(x), a.reg(y)])
        a.emit("add_b16", [a.reg(d), product, a.reg(z)])
    else:
        _simple(a, i, f"mad_lo_b{bits}", width)


@lowers("div", "rem")
def division(a: Assembler, i: Instruction) -> None:
    letters, bits = split_type(i.opcode)
    if letters == "f" and bits == "32":
        approximate = "approx" in i.opcode or "full" in i.opcode
        _simple(a, i, "div_approx_f32" if approximate else "div_f32", 1, sub=_float_flags(i))
    elif letters == "f":
        _simple(a, i, "div_f64", 2, sub=_float_flags(i) & 3)
    else:
        _simple(a, i, f"{i.opcode[0]}_{letters}{bits}", 2 if bits == "64" else 1)


@lowers("min", "max")
def minmax(a: Assembler, i: Instruction) -> None:
    root = i.opcode[0]
    letters, bits = split_type(i.opcode)
    if _is_half(letters, bits):
        _half(a, i)
    elif letters == "f" and bits == "32":
        sub = (root == "max") << 7
        for part, bit in (("ftz", 4), ("NaN", 32), ("xorsign", 64), ("abs", 256)):
            sub |= bit if part in i.opcode else 0
        plain = sub in (0, 128) and len(i.operands) == 3
        _simple(a, i, f"{root}_f32" if plain else "minmax_f32", 1, sub=sub)
    elif letters == "f":
        _simple(a, i, f"{root}_f64", 2)
    elif "relu" in i.opcode:
        _simple(a, i, f"{root}_relu_s32", 1)
    else:
        _simple(a, i, f"{root}_{letters}{bits}", 2 if bits == "64" else 1)


@lowers("and", "or", "xor", "not", "cnot")
def logic(a: Assembler, i: Instruction) -> None:
    kind = i.opcode[-1]
    if kind == "pred":
        a.emit(f"{i.opcode[0]}_b32", [a.pred(x) for x in i.operands])
        return
    bits = split_type(i.opcode)[1]
    narrow = bits == "16" and i.opcode[0] != "not"
    _simple(a, i, f"{i.opcode[0]}_b{'32' if narrow else bits}", 2 if bits == "64" else 1)


@lowers("shl", "shr")
def shift(a: Assembler, i: Instruction) -> None:
    letters, bits = split_type(i.opcode)
    d, x, n = i.operands
    width = 2 if bits == "64" else 1
    kind = "b" if i.opcode[0] == "shl" else "s" if letters == "s" else "u"
    a.emit(f"{i.opcode[0]}_{kind}{bits}", [a.reg(d, width), a.reg(x, width), a.reg(n)])


@lowers("neg", "abs")
def sign(a: Assembler, i: Instruction) -> None:
    letters, bits = split_type(i.opcode)
    root = i.opcode[0]
    if _is_half(letters, bits):
        _half(a, i)
    elif letters == "f":
        _simple(a, i, f"{root}_f{bits}", 2 if bits == "64" else 1, sub=int("ftz" in i.opcode))
    else:
        kind = "b" if root == "neg" else "s"
        _simple(a, i, f"{root}_{kind}{bits}", 2 if bits == "64" else 1)


@lowers("popc", "clz", "brev", "bfind")
def bits_of(a: Assembler, i: Instruction) -> None:
    letters, bits = split_type(i.opcode)
    d, x = i.operands
    width = 2 if bits == "64" else 1
    sub = (letters == "s") | ("shiftamt" in i.opcode) << 1 if i.opcode[0] == "bfind" else 0
    a.emit(f"{i.opcode[0]}_b{bits}", [a.reg(d, width if i.opcode[0] == "brev" else 1), a.reg(x, width)], sub=sub)


@lowers("bfe", "bfi")
def bit_field(a: Assembler, i: Instruction) -> None:
    letters, bits = split_type(i.opcode)
    width = 2 if bits == "64" else 1
    wide = 2 if i.opcode[0] == "bfe" else 3
    slots = [a.reg(x, width if k < wide else 1) for k, x in enumerate(i.operands)]
    a.emit(f"{i.opcode[0]}_b{bits}", slots, sub=int(letters == "s"))


@lowers("bmsk")
def bit_mask(a: Assembler, i: Instruction) -> None:
    _simple(a, i, "bmsk_b32", 1, sub=int("wrap" in i.opcode))


@lowers("lop3")
def lop3(a: Assembler, i: Instruction) -> None:
    if len(i.opcode) > 2:
        raise Unsupported("a predicate result")
    a.emit("lop3_b32", [a.reg(x) for x in i.operands[:4]], imm=parse_immediate(i.operands[4]))


@lowers("prmt")
def prmt(a: Assembler, i: Instruction) -> None:
    modes = ("", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    mode = i.opcode[2] if len(i.opcode) > 2 else ""
    _simple(a, i, "prmt_b32", 1, sub=modes.index(mode))


@lowers("shf")
def funnel_shift(a: Assembler, i: Instruction) -> None:
    _simple(a, i, "shf_b32", 1, sub=("r" in i.opcode) | ("wrap" in i.opcode) << 1)


@lowers("sad")
def sad(a: Assembler, i: Instruction) -> None:
    _simple(a, i, f"sad_{i.opcode[-1]}", 1)


@lowers("dp4a", "dp2a")
def dot(a: Assembler, i: Instruction) -> None:
    pair = i.opcode[0] == "dp2a"
    sub = (i.opcode[-2][0] == "s") | (i.opcode[-1][0] == "s") << 1 | pair << 2 | ("hi" in i.opcode) << 3
    _simple(a, i, "dot", 1, sub=sub)


@lowers("ex2", "lg2", "sin", "cos", "tanh", "rcp", "rsqrt", "sqrt")
def special_function(a: Assembler, i: Instruction) -> None:
    root = i.opcode[0]
    letters, bits = split_type(i.opcode)
    if _is_half(letters, bits):
        _half(a, i)
    elif bits == "64":
        _simple(a, i, f"{root}_f64", 2, sub=_float_flags(i) & 3)
    elif root in ("rcp", "sqrt") and "approx" not in i.opcode:
        _simple(a, i, f"{root}_f32", 1, sub=_float_flags(i))
    else:
        name = {"rcp": "rcp_approx", "sqrt": "sqrt_approx"}.get(root, root)
        _simple(a, i, f"{name}_f32", 1, sub=int("ftz" in i.opcode))


@lowers("copysign")
def copysign(a: Assembler, i: Instruction) -> None:
    if i.opcode[-1] != "f32":
        raise Unsupported("")
    _simple(a, i, "copysign_f32", 1)


@lowers("testp")
def testp(a: Assembler, i: Instruction) -> None:
    what = ("finite", "infinite", "number", "notanumber", "normal", "subnormal").index(i.opcode[1])
    wide = i.opcode[-1] == "f64"
    a.emit("testp", [a.reg(i.operands[0]), a.reg(i.operands[1], 1 + wide)], sub=what | wide << 8)


# -- moves and selections ----------------------------------------------------------------------------------------------


@lowers("mov")
def mov(a: Assembler, i: Instruction) -> None:
    d, s = i.operands
    kind = i.opcode[-1]
    bits = {"pred": 32}.get(kind) or int(split_type(i.opcode)[1].removesuffix("x2") or 32)
    if kind.endswith("x2"):
        bits *= 2
    if isinstance(s, Vector):
        _pack(a, d, s, bits)
    elif isinstance(d, Vector):
        _unpack(a, d, s, bits)
    elif kind == "pred":
        a.emit("mov_b32", [a.reg(d), a.pred(s)])
    elif bits == 128:
        to, source = a.reg(d, 4), a.reg(s, 4)
        a.emit("mov_b64", [to, source])
        a.emit("mov_b64", [to + 2, source + 2])
    else:
        width = 2 if bits == 64 else 1
        a.emit("mov_b64" if width == 2 else "mov_b32", [a.reg(d, width), a.reg(s, width)])


def _pack(a: Assembler, d, s: Vector, bits: int) -> None:
    count = len(s.items)
    if bits == 128:
        to = a.reg(d, 4)
        if count == 2:
            for half, item in enumerate(s.items):
                a.emit("mov_b64", [to + 2 * half, a.reg(item, 2)])
        else:
            for half in range(2):
                a.emit("pack_b64_b32", [to + 2 * half, a.reg(s.items[2 * half]), a.reg(s.items[2 * half + 1])])
        return
    slots = [a.reg(d, 2 if bits == 64 else 1), *a.vector(s)]
    if bits == 64 and count == 2:
        a.emit("pack_b64_b32", slots)
    elif bits == 32 and count == 2:
        a.emit("pack_b32_b16", slots)
    else:
        a.emit("pack", slots, sub=count, imm=bits // count)


def _unpack(a: Assembler, d: Vector, s, bits: int) -> None:
    count = len(d.items)
    if bits == 128:
        source = a.reg(s, 4)
        if count == 2:
            for half, item in enumerate(d.items):
                a.emit("mov_b64", [a.reg(item, 2), source + 2 * half])
        else:
            for half in range(2):
                pair = [a.reg(item) for item in d.items[2 * half : 2 * half + 2]]
                a.emit("unpack_b64_b32", [*pair, -1, -1, source + 2 * half])
        return
    source = a.reg(s, 2 if bits == 64 else 1)
    slots = a.vector(d) + [-1] * (4 - count) + [source]
    if bits == 64 and count == 2:
        a.emit("unpack_b64_b32", slots)
    elif bits == 32 and count == 2:
        a.emit("unpack_b32_b16", slots)
    else:
        a.emit("unpack", slots, sub=count, imm=bits // count)


@lowers("selp")
def selp(a: Assembler, i: Instruction) -> None:
    bits = split_type(i.opcode)[1]
    width = 2 if bits == "64" else 1
    d, x, y, p = i.operands
    a.emit("selp_b64" if width == 2 else "selp_b32", [a.reg(d, width), a.reg(x, width), a.reg(y, width), a.pred(p)])


@lowers("slct")
def slct(a: Assembler, i: Instruction) -> None:
    if split_type(i.opcode[:-1])[1] != "32":
        raise Unsupported("")
    _simple(a, i, "slct_b32", 1, sub=int(i.opcode[-1] == "f32"))


COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
UNSIGNED_COMPARISONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
COMBINING = {"and": 1, "or": 2, "xor": 3}


@lowers("setp", "set")
def setp(a: Assembler, i: Instruction) -> None:
    if i.opcode[0] == "set":
        _set(a, i)
        return
    letters, bits = split_type(i.opcode)
    comparison = i.opcode[1]
    combining = next((COMBINING[part] for part in i.opcode[2:-1] if part in COMBINING), 0)
    d, x, y, *rest = i.operands
    if isinstance(d, Pair):
        p, q = (a.reg(d.first), a.reg(d.second) if d.second != "_" else -1)
    else:
        p, q = a.reg(d), -1
    if bits == "16x2":
        raise Unsupported("packed comparison")
    kind = ("s" if letters == "s" else letters if letters in ("f", "bf") else "u") + bits
    width = 2 if bits == "64" else 1
    slots = [p, q, a.reg(x, width), a.reg(y, width), a.pred(rest[0]) if rest else -1]
    code = COMPARISONS.index(UNSIGNED_COMPARISONS.get(comparison, comparison))
    if "ftz" in i.opcode and kind == "f32":
        zero = a.constant(0)
        for k in (2, 3):  # a flushed operand is what adding zero with ftz gives
            slot = a.new_slot()
            a.emit("add_f32_general", [slot, slots[k], zero], sub=FTZ)
            slots[k] = slot
    a.emit(f"setp_{kind}", slots, sub=code | combining << 8)


def _set(a: Assembler, i: Instruction) -> None:
    """set: as setp, with all ones or 1.0 for true."""
    to = i.opcode[-2]
    predicate = a.new_slot()
    letters, bits = split_type(i.opcode)
    width = 2 if bits == "64" else 1
    kind = ("s" if letters == "s" else letters if letters in ("f", "bf") else "u") + bits
    d, x, y, *rest = i.operands
    if rest or to not in ("f32", "u32", "s32"):
        raise Unsupported("")
    code = COMPARISONS.index(UNSIGNED_COMPARISONS.get(i.opcode[1], i.opcode[1]))
    a.emit(f"setp_{kind}", [predicate, -1, a.reg(x, width), a.reg(y, width)], sub=code)
    true = a.constant(0x3F800000 if to == "f32" else 0xFFFFFFFF)
    a.emit("selp_b32", [a.reg(d), true, a.constant(0), predicate])


# -- conversions -------------------------------------------------------------------------------------------------------

INTEGER_KINDS = {"u8": 0, "b8": 0, "u16": 1, "b16": 1, "u32": 2, "b32": 2, "u64": 3, "b64": 3}
INTEGER_KINDS |= {"s8": 4, "s16": 5, "s32": 6, "s64": 7}
FLOAT_KINDS = {"f16": 0, "bf16": 1, "f32": 2, "f64": 3, "tf32": 4}
FORMATS = {"f16": 0, "bf16": 1, "e4m3": 3, "e5m2": 4, "e2m3": 7, "e3m2": 8, "e2m1": 9}
CVT_FTZ, CVT_SAT, CVT_INTEGRAL, CVT_RELU, CVT_SATFINITE = 1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 16


@lowers("cvt")
def cvt(a: Assembler, i: Instruction) -> None:
    to, source = i.opcode[-2], i.opcode[-1]
    if to == "scaled::n2::ue8m0":
        raise Unsupported("")
    flags, rounding = 0, None
    for part in i.opcode[1:-2]:
        if part in ("rni", "rzi", "rmi", "rpi"):
            rounding = ROUNDING[part[:2]]
            flags |= CVT_INTEGRAL
        elif part in ROUNDING:
            rounding = ROUNDING[part]
        else:
            known = {"ftz": CVT_FTZ, "sat": CVT_SAT, "relu": CVT_RELU, "satfinite": CVT_SATFINITE}
            if part not in known:
                raise Unsupported(f".{part}")
            flags |= known[part]
    if to.endswith("x2") or source.endswith("x2"):
        _packed(a, i, to, source, rounding or 0, flags)
        return
    width = {"64": 2}.get(to[-2:], 1)
    d, s = i.operands
    source_width = 2 if source.endswith("64") else 1
    slots = [a.reg(d, width), a.reg(s, source_width)]
    if source_width == 1:
        slots[1] = a.low_word(s, slots[1])
    register_bytes = {"b16": 2, "b32": 4, "b64": 8}[a.kind(d)]
    if to in INTEGER_KINDS and source in INTEGER_KINDS:
        quick = {("s64", "s32"): "cvt_s64_s32", ("u64", "u32"): "cvt_u64_u32", ("u32", "u64"): "cvt_u32_u64"}
        if (to, source) in quick and not flags and register_bytes == 4 * width:
            a.emit(quick[to, source], slots)
        else:
            sub = INTEGER_KINDS[source] | INTEGER_KINDS[to] << 4 | bool(flags & CVT_SAT) << 8
            a.emit("cvt_int", slots, sub=sub, imm=register_bytes)
    elif to in INTEGER_KINDS and source in FLOAT_KINDS:
        sub = FLOAT_KINDS[source] | INTEGER_KINDS[to] << 4 | (rounding or 0) << 8 | flags
        a.emit("cvt_float_int", slots, sub=sub, imm=register_bytes)
    elif to in FLOAT_KINDS and source in INTEGER_KINDS:
        a.emit("cvt_int_float", slots, sub=INTEGER_KINDS[source] | FLOAT_KINDS[to] << 4 | (rounding or 0) << 8)
    elif to in FLOAT_KINDS and source in FLOAT_KINDS:
        a.emit("cvt_float_float", slots, sub=FLOAT_KINDS[source] | FLOAT_KINDS[to] << 4 | (rounding or 0) << 8 | flags)
    else:
        raise Unsupported("")


def _packed(a: Assembler, i: Instruction, to: str, source: str, rounding: int, flags: int) -> None:
    slots = [a.reg(x) for x in i.operands]
    if (to, source) == ("ue8m0x2", "f32"):
        a.emit("cvt_ue8m0x2_f32", slots, sub=rounding)
    elif (to, source) == ("bf16x2", "ue8m0x2"):
        a.emit("cvt_bf16x2_ue8m0x2", slots)
    elif source == "f32" and to.removesuffix("x2") in FORMATS:
        if to == "bf16x2" and rounding == 0 and not flags:
            a.emit("cvt_bf16x2_f32", slots)
        else:
            a.emit("cvt_pack_f32", slots, sub=FORMATS[to.removesuffix("x2")] | rounding << 8 | flags)
    elif source.removesuffix("x2") in FORMATS and to.removesuffix("x2") in FORMATS:
        sub = FORMATS[source.removesuffix("x2")] | FORMATS[to.removesuffix("x2")] << 4 | rounding << 8 | flags
        a.emit("cvt_packed", slots, sub=sub)
    else:
        raise Unsupported("")


# -- lanes -------------------------------------------------------------------------------------------------------------


@lowers("shfl.sync")
def shfl(a: Assembler, i: Instruction) -> None:
    d, x, b, c, members = i.operands
    slots = [a.reg(d.first), a.reg(d.second)] if isinstance(d, Pair) else [a.reg(d), -1]
    mode = ("up", "down", "bfly", "idx").index(i.opcode[2])
    a.emit("shfl", [*slots, a.reg(x), a.reg(b), a.reg(c), a.reg(members)], sub=mode)


@lowers("vote.sync")
def vote(a: Assembler, i: Instruction) -> None:
    d, p, members = i.operands
    a.emit("vote", [a.reg(d), a.pred(p), a.reg(members)], sub=("all", "any", "uni", "ballot").index(i.opcode[2]))


@lowers("match")
def match(a: Assembler, i: Instruction) -> None:
    d, x, members = i.operands
    wide = i.opcode[-1] == "b64"
    slots = [a.reg(d.first), a.reg(d.second)] if isinstance(d, Pair) else [a.reg(d), -1]
    a.emit("match", [*slots, a.reg(x, 1 + wide), a.reg(members)], sub=("all" in i.opcode) | wide << 8)


@lowers("redux.sync")
def redux(a: Assembler, i: Instruction) -> None:
    what = ("add", "min", "max", "and", "or", "xor").index(i.opcode[2])
    sub = what | (i.opcode[-1] == "s32") << 8 | (i.opcode[-1] == "f32") << 9
    _simple(a, i, "redux", 1, sub=sub | ("NaN" in i.opcode) << 10 | ("abs" in i.opcode) << 11)


@lowers("elect")
def elect(a: Assembler, i: Instruction) -> None:
    d, members = i.operands
    a.emit("elect", [a.reg(d.first), a.reg(d.second), a.reg(members)])


@lowers("activemask")
def activemask(a: Assembler, i: Instruction) -> None:
    _simple(a, i, "activemask", 1)


# -- control -----------------------------------------------------------------------------------------------------------


@lowers("bra")
def bra(a: Assembler, i: Instruction) -> None:
    a.branch(a.emit("bra"), i.operands[0])


@lowers("brx")
def brx(a: Assembler, i: Instruction) -> None:
    index, table = i.operands
    labels = a.body.branch_targets[table]
    first = len(a.pool)
    a.emit("brx", [a.reg(index)], pool=[0] * len(labels), sub=len(labels))
    a.pool_branches.extend((first + k, a.body.name, i.scope, label) for k, label in enumerate(labels))


@lowers("exit")
def leave(a: Assembler, i: Instruction) -> None:
    a.emit("exit")


@lowers("trap", "brkpt")
def trap(a: Assembler, i: Instruction) -> None:
    a.emit("trap")


@lowers("nanosleep")
def nanosleep(a: Assembler, i: Instruction) -> None:
    a.emit("nanosleep")


@lowers("bar.warp.sync")
def warp_barrier(a: Assembler, i: Instruction) -> None:
    a.emit("bar_warp_sync", [a.reg(i.operands[0])])


@lowers(
    "prefetch",
    "prefetchu",
    "griddepcontrol",
    "discard",
    "applypriority",
    "cp.async.bulk.prefetch",
    "createpolicy",
    "pmevent",
)
def nothing(a: Assembler, i: Instruction) -> None:
    """Hints."""
    if i.opcode[0] == "createpolicy":
        a.emit("mov_b64", [a.reg(i.operands[0], 2), a.constant(0, 2)])
    elif "prefetch" in i.opcode or i.opcode[0] in ("prefetchu", "discard", "applypriority"):
        a.emit("nop", cls="memory")
    else:
        a.emit("nop")
