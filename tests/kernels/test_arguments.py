"""Bad arguments of the scan are refused by name before anything compiles."""

import numpy as np
import pytest

from m3jax.kernels import Mamba3State, mamba3_scan, mamba3_step
from tests.kernels.cases import Case, make


@pytest.mark.parametrize(("change", "message"), [
    ({"dt": np.zeros((2, 20, 4), np.float32)}, r"dt has shape \(2, 20, 4\); expected \[b, l, h\] = \(2, 21, 4\)"),
    ({"z": np.zeros((2, 21, 4, 9), np.float32)}, r"z has shape .* expected \[b, l, h, p\]"),
    ({"b": np.zeros((2, 21, 1, 3, 12), np.float32), "c": np.zeros((2, 21, 1, 3, 12), np.float32)}, "groups g = 3"),
    ({"omega": np.zeros((2, 21, 7), np.float32)}, "s = 7 angles; the state width n = 12 allows 6"),
    ({"segment_ids": np.zeros((2, 20), np.int32)}, r"segment_ids has shape \(2, 20\)"),
    ({"chunk_size": 0}, "chunk_size = 0; expected at least 1"),
    ({"implementation": "cuda"}, "implementation = 'cuda'; expected None or one of reference, triton, xla"),
    ({"x": np.zeros((21, 4, 8), np.float32)}, r"x must be \[b, l, h, p\]"),
    ({"initial_state": Mamba3State.zeros(2, 4, 8, 12, 2, 3)}, r"state.b has shape \(2, 4, 2, 12\)"),
])  # fmt: skip
def test_scan_names_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        mamba3_scan(**(make(Case(), "float32") | change))


def test_empty_sequence():
    with pytest.raises(ValueError, match="length 0"):
        mamba3_scan(**make(Case(l=0), "float32"))


@pytest.mark.parametrize(("name", "shape"), [("x", (2, 21, 4, 8)), ("segment_ids", (2, 21))])
def test_wrong_dtypes(name, shape):
    value = np.zeros(shape, np.int32) if name == "x" else np.zeros(shape, np.float32)
    with pytest.raises(TypeError, match=f"{name} has dtype"):
        mamba3_scan(**(make(Case(), "float32") | {name: value}))


def test_step_names_the_argument():
    args = {name: v[:, 0] if v.shape[:2] == (2, 21) else v for name, v in make(Case(), "float32").items()}
    with pytest.raises(ValueError, match=r"state.ssm has shape .*; expected \[b, h, p, n\]"):
        mamba3_step(**args, state=Mamba3State.zeros(2, 4, 8, 11, 1, 3)._replace(b=np.zeros((2, 4, 1, 12), np.float32)))
