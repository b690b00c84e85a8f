"""The scan against arrays computed with the authors' own code (tests/reference/README.md)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.config import ModelConfig
from m3jax.interop.released_tensors import rotary_order
from m3jax.kernels import mamba3_scan
from tests import tolerances

_FILES = Path(__file__).parents[1] / "reference"


def _order(fixed: dict) -> np.ndarray:
    n, s = fixed["Q"].shape[-1], fixed["Angles"].shape[-1]
    return rotary_order(ModelConfig(d_state=n, rope_fraction=2 * s / n, mimo_rank=4 if "MIMO_V" in fixed else 1))


def _run(arrays: dict, fixed: dict, implementation: str, chunk_size: int | None):
    """The scan on arrays in the golden layout; the results in that layout too, the axis n in our order."""
    siso = "MIMO_V" not in arrays
    order = _order(fixed)
    q, k = (arrays[name][..., order] for name in ("Q", "K"))
    q_bias, k_bias = (arrays[name][..., order] for name in ("Q_bias", "K_bias"))
    if siso:
        q, k, q_bias, k_bias = q[:, :, None], k[:, :, None], q_bias[:, None], k_bias[:, None]
    dt, adt, trap = (jnp.swapaxes(arrays[name], 1, 2) for name in ("DT", "ADT", "Trap"))
    segment_ids = None
    if "cu_seqlens" in fixed:
        lengths = np.diff(fixed["cu_seqlens"])
        segment_ids = np.repeat(np.arange(len(lengths)), lengths)[None]
    y, state = mamba3_scan(
        arrays["V"], dt, adt / dt, k, q, jax.nn.sigmoid(trap), jnp.pi * jnp.tanh(arrays["Angles"]),
        b_bias=k_bias, c_bias=q_bias, d=arrays["D"], z=arrays["Z"],
        mimo_x=arrays.get("MIMO_V"), mimo_z=arrays.get("MIMO_Z"), mimo_o=arrays.get("MIMO_Out"),
        segment_ids=segment_ids, implementation=implementation, chunk_size=chunk_size, return_state=True,
    )  # fmt: skip
    last_k = state.b[:, :, 0] if siso else jnp.swapaxes(state.b, 1, 2)
    return y, {"final_angle": state.angle, "final_ssm": state.ssm, "final_k": last_k, "final_v": state.x}


@pytest.mark.parametrize("name", ["op_siso_basic", "op_mimo_basic", "op_siso_varlen"])
@pytest.mark.parametrize(
    ("implementation", "chunk_size", "dtype"),
    [("reference", None, "float64"), ("xla", None, "float64"), ("xla", 5, "float64"), ("xla", 16, "float32"),
     ("reference", None, "float32")],
)  # fmt: skip
def test_outputs_states_and_gradients(name, implementation, chunk_size, dtype, x64):
    fixed = dict(np.load(_FILES / f"{name}.npz"))
    arrays = {key[5:]: fixed[key[5:]].astype(dtype) for key in fixed if key.startswith("grad_")}

    def weighted(arrays):
        y, final = _run(arrays, fixed, implementation, chunk_size)
        return jnp.sum(y * fixed["cot_out"].astype(dtype)), (y, final)

    gradients, (y, final) = jax.jit(jax.grad(weighted, has_aux=True))(arrays)
    order = _order(fixed)
    terms = fixed["Q"].shape[-1] * arrays.get("MIMO_V", np.ones((1, 1, 1))).shape[1] * fixed["V"].shape[1]
    tolerance = tolerances.golden(dtype, terms)
    tolerances.assert_close(y, fixed["out"], tolerance, "out")
    for key, value in final.items():
        expected = fixed[key][-len(value) :]  # of packed files the last document's
        expected = expected[..., order] if key in ("final_ssm", "final_k") else expected
        if key == "final_angle":
            phase = tolerances.GOLDEN_PHASE + tolerances.rounding(dtype, y.shape[1])
            tolerances.assert_phase_close(value, expected, phase, key)
        else:
            tolerances.assert_close(value, expected, tolerance, key)
    for key, value in gradients.items():
        tolerances.assert_close(value, fixed[f"grad_{key}"], tolerance, f"grad_{key}")
