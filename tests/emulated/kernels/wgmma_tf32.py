"""The tf32 product of a warpgroup, for which the DSL has no operation of its own."""

from cutlass import Boolean, Float32, TFloat32
from cutlass._mlir.dialects import cute_nvgpu
from cutlass.cute.atom import make_atom
from cutlass.cute.core import _pack_shape
from cutlass.cute.nvgpu import OperandMajorMode
from cutlass.cute.nvgpu.warpgroup.mma import MmaF16BF16Trait, MmaOp


class MmaTF32Op(MmaOp):
    """wgmma.mma_async of .tf32 operands, which are K-major. An extension in the manner of the DSL's own operations."""

    descriptive_name = "warpgroup TF32 MMA Operation"

    def __init__(self, shape_mnk, a_source):
        super().__init__(TFloat32, TFloat32, Float32, shape_mnk, a_source, OperandMajorMode.K, OperandMajorMode.K)

    def _make_trait(self, *, loc=None, ip=None, **kwargs):
        shape = _pack_shape(self.shape_mnk, loc=loc, ip=ip)
        atom_type = cute_nvgpu.MmaAtomSM90Type.get(
            shape.type.attribute,
            self.a_major_mode._to_ir(),
            self.b_major_mode._to_ir(),
            self.a_dtype.mlir_type,
            self.b_dtype.mlir_type,
            self.acc_dtype.mlir_type,
            self.a_src._to_ir(),
        )
        return MmaF16BF16Trait(make_atom(atom_type, [Boolean(False).ir_value(loc=loc, ip=ip)], loc=loc, ip=ip))
