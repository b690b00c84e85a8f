"""What is counted of a compiled program's text."""

from experiments.latency.compiled_traffic import Kernel, kernels_of

PROGRAM = """
HloModule jit_f, is_scheduled=true

%fused_slice (param_0: f32[8,16]) -> bf16[8,4] {
  %param_0 = f32[8,16]{1,0} parameter(0)
  %bitcast.1 = f32[1,8,16]{2,1,0} bitcast(%param_0)
  %convert.1 = bf16[1,8,16]{2,1,0} convert(%bitcast.1)
  %slice.1 = bf16[1,8,4]{2,1,0} slice(%convert.1), slice={[0:1], [0:8], [4:8]}
  ROOT %bitcast.2 = bf16[8,4]{1,0} bitcast(%slice.1)
}

%fused_product (param_0: bf16[8,4]) -> (f32[8,8], s8[64]) {
  %param_0 = bf16[8,4]{1,0} parameter(0)
  ROOT %custom-call.9 = (f32[8,8]{1,0}, s8[64]{0}) custom-call(%param_0), custom_call_target="__cublas$lt$matmul"
}

%body (arg: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %arg = (s32[], f32[8,16]{1,0}) parameter(0)
  %get-tuple-element.1 = s32[] get-tuple-element(%arg), index=0
  %get-tuple-element.2 = f32[8,16]{1,0} get-tuple-element(%arg), index=1
  %copy.3 = f32[8,16]{1,0} copy(%get-tuple-element.2)
  ROOT %tuple.1 = (s32[], f32[8,16]{1,0}) tuple(%get-tuple-element.1, %copy.3)
}

ENTRY %main (x: f32[8,16]) -> f32[8,8] {
  %x = f32[8,16]{1,0} parameter(0)
  %loop_slice_fusion = bf16[8,4]{1,0} fusion(%x), kind=kLoop, calls=%fused_slice
  %wrapped = (f32[8,8]{1,0}, s8[64]{0}) fusion(%loop_slice_fusion), kind=kCustom, calls=%fused_product
  %call.2 = (f32[8,8]{1,0}, s32[]) custom-call(%loop_slice_fusion), custom_call_target="triton_kernel_call_ffi"
  %tuple.2 = (s32[], f32[8,16]{1,0}) tuple(%constant.1, %x)
  %while.1 = (s32[], f32[8,16]{1,0}) while(%tuple.2), condition=%cond, body=%body
  ROOT %get-tuple-element.5 = f32[8,8]{1,0} get-tuple-element(%wrapped), index=0
}
"""


def test_bytes_and_kinds():
    slice_, product = 2 * 32, 4 * 64 + 64
    assert kernels_of(PROGRAM) == [
        Kernel(4 * 32 + slice_, "XLA's", "loop_slice_fusion", "bf16[8,4]{1,0}"),
        Kernel(slice_ + product, "product", "wrapped", "(f32[8,8]{1,0}, s8[64]{0})"),
        Kernel(slice_ + 4 * 64 + 4, "kernel of ours", "call.2", "(f32[8,8]{1,0}, s32[])"),
        Kernel(2 * 4 * 128, "XLA's", "copy.3", "f32[8,16]{1,0}"),
    ]
