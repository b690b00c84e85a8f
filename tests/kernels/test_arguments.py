"""Bad arguments of the scan are refused by name before anything compiles."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from m3jax.kernels import Mamba3State, gpu, mamba3_projected_step, mamba3_scan, mamba3_step
from m3jax.kernels.mamba3 import api
from m3jax.kernels.mamba3.inputs import Sequence
from tests.kernels.cases import Case, make, make_projected, make_state

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("change", "message"), [
    ({"dt": np.zeros((2, 20, 4), np.float32)}, r"dt has shape \(2, 20, 4\); expected \[b, l, h\] = \(2, 21, 4\)"),
    ({"z": np.zeros((2, 21, 4, 9), np.float32)}, r"z has shape .* expected \[b, l, h, p\]"),
    ({"b": np.zeros((2, 21, 1, 3, 12), np.float32), "c": np.zeros((2, 21, 1, 3, 12), np.float32)}, "groups g = 3"),
    ({"omega": np.zeros((2, 21, 7), np.float32)}, "s = 7 angles; the state width n = 12 allows 6"),
    ({"segment_ids": np.zeros((2, 20), np.int32)}, r"segment_ids has shape \(2, 20\)"),
    ({"chunk_size": 0}, "chunk_size = 0; expected at least 1"),
    ({"implementation": "cuda"}, "implementation = 'cuda'; expected None or one of mosaic, reference, triton, xla"),
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


def _token(args: dict) -> dict:
    """The first token of a scan's arguments."""
    return {name: v[:, 0] if v.shape[:2] == (2, 21) else v for name, v in args.items()}


def test_step_names_the_argument():
    args = _token(make(Case(), "float32"))
    with pytest.raises(ValueError, match=r"state.ssm has shape .*; expected \[b, h, p, n\]"):
        mamba3_step(**args, state=Mamba3State.zeros(2, 4, 8, 11, 1, 3)._replace(b=np.zeros((2, 4, 1, 12), np.float32)))


@pytest.mark.parametrize(("change", "message"), [
    ({"projected": np.zeros((2, 130), np.float32)}, r"projected has shape \(2, 130\); .* is 79 \+ 24g for g groups"),
    ({"fixed_lambda": 0.5}, r"projected has shape .*expected \[b, 2hp \+ 2h \+ s \+ 2rgn\], which is 75 \+ 24g"),
    ({"projected": np.zeros((2, 2, 127), np.float32)}, r"expected projected \[b, width\]"),
    ({"projected": np.zeros((3, 127), np.float32)}, r"state.angle has shape .*; expected \[b, h, s\] = \(3, 4, 3\)"),
    ({"projected": np.zeros((2, 151), np.float32)}, "groups g = 3"),
    ({"b_norm": np.zeros(11, np.float32)}, r"b_norm has shape \(11,\); expected \[n\] = \(12,\)"),
    ({"d": np.zeros(3, np.float32)}, r"d has shape \(3,\); expected \[h\] = \(4,\)"),
    ({"a_activation": "relu"}, "a_activation = 'relu'; expected one of heavy_tail, softplus"),
    ({"implementation": "cuda"}, "implementation = 'cuda'; expected None or one of"),
])  # fmt: skip
def test_projected_step_names_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        mamba3_projected_step(**(make_projected(Case(), "float32") | {"state": make_state(Case(), "float32")} | change))


def _assert_both_refuse(message: str) -> None:
    message = f'implementation = "triton" cannot run here: {message}'
    with pytest.raises(ValueError, match=message):
        mamba3_scan(**make(Case(), "float32"), implementation="triton")
    with pytest.raises(ValueError, match=message):
        mamba3_step(**_token(make(Case(), "float32")), state=make_state(Case(), "float32"), implementation="triton")


@pytest.fixture
def on_a_gpu(monkeypatch):
    pytest.importorskip("jax_triton", exc_type=ImportError)
    monkeypatch.setattr(api, "no_triton_here", lambda: None)


@pytest.mark.parametrize(("change", "chunk_size", "message"), [
    ({"r": 3}, None, r"rank 3; the Triton kernels take powers of two up to 16"),
    ({"n": 512}, None, r"n = 512, p = 8; the Triton kernels take n up to 256 and p up to 128"),
    ({"p": 129}, None, r"n = 12, p = 129"),
    ({}, 48, r"chunk_size = 48; the Triton kernels take powers of two with 16 to 128 rows"),
    ({"r": 4}, 64, r"chunk_size = 64"),
])  # fmt: skip
def test_triton_scan_refuses(change, chunk_size, message, on_a_gpu):
    with pytest.raises(ValueError, match=f'implementation = "triton" cannot run here: {message}'):
        mamba3_scan(
            **make(dataclasses.replace(Case(), **change), "float32"), chunk_size=chunk_size, implementation="triton"
        )


def test_triton_refuses_what_its_offsets_cannot_reach():
    scan = pytest.importorskip("m3jax.kernels.mamba3.triton.scan", exc_type=ImportError)

    def inputs(batch):  # x of batch · 2^22 elements, at rank 4 four times as many
        x = jax.ShapeDtypeStruct((batch, 1024, 64, 64), "bfloat16")
        bc = jax.ShapeDtypeStruct((batch, 1024, 4, 1, 64), "bfloat16")
        return Sequence(x, None, None, bc, bc, None, None, None)

    assert scan.unsupported(inputs(127), None) is None
    assert "2^31 elements" in scan.unsupported(inputs(128), None)
    assert "the batch is 65536" in scan.unsupported(inputs(65536), None)


@pytest.mark.parametrize(("change", "message"), [
    ({"r": 9}, "rank 9; the Triton step takes ranks up to 8"),
    ({"n": 512}, "n = 512, p = 8; the Triton step takes n up to 256"),
])  # fmt: skip
def test_triton_step_refuses(change, message, on_a_gpu):
    case = dataclasses.replace(Case(), **change)
    with pytest.raises(ValueError, match=f'implementation = "triton" cannot run here: {message}'):
        mamba3_step(**_token(make(case, "float32")), state=make_state(case, "float32"), implementation="triton")


def test_triton_refuses_float64(on_a_gpu, x64):
    with pytest.raises(ValueError, match="x has dtype float64; the Triton kernels take float32"):
        mamba3_scan(**make(Case()), implementation="triton")
    with pytest.raises(ValueError, match="x has dtype float64; the Triton step takes float32"):
        mamba3_step(**_token(make(Case())), state=make_state(Case()), implementation="triton")


def test_triton_refuses_a_cpu():
    pytest.importorskip("jax_triton", exc_type=ImportError)
    _assert_both_refuse("the default device is a cpu")


def test_triton_refuses_a_small_gpu(monkeypatch):
    pytest.importorskip("jax_triton", exc_type=ImportError)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(gpu, "compute_capability", lambda: 75)
    _assert_both_refuse(r"cpu is not an NVIDIA GPU of compute capability 8\.0 or more")


def test_works_without_jax_triton():
    script = """
import sys
sys.modules["jax_triton"] = None
from m3jax.kernels import mamba3_scan
from tests.kernels.cases import Case, make
mamba3_scan(**make(Case(), "float32"))
mamba3_scan(**make(Case(), "float32"), implementation="triton")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    message = r'implementation = "triton" cannot run here: .*jax_triton.* \(install the extra "cuda"\)\.$'
    assert re.search(message, done.stderr.strip()), done.stderr


def test_step_names_the_implementation():
    with pytest.raises(ValueError, match="implementation = 'cuda'; expected None or one of mosaic, reference, triton"):
        mamba3_step(**_token(make(Case(), "float32")), state=make_state(Case(), "float32"), implementation="cuda")
