"""Ablations of the Mamba-3 mixer: each is the whole mixer with a part held fixed, and decodes like it scans."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.config import ModelConfig
from m3jax.kernels import mamba3_scan
from m3jax.models import mamba3, scan_on_mesh
from m3jax.models.mamba3 import Mamba3Mixer, projection_widths
from m3jax.training.flops import forward_flops_per_token
from tests import tolerances

WHOLE = ModelConfig(
    d_model=8, headdim=4, d_state=8, ngroups=2, mimo_rank=2, n_layers=1, d_intermediate=0,
    dtype="float64", param_dtype="float64", state_dtype="float64",
)  # fmt: skip
ABLATIONS = {
    "nothing rotates": {"rope_fraction": 0.0},
    "standard rotation": {"rotation": "standard", "rope_fraction": 1.0},
    "trapezoid": {"fixed_lambda": 0.5},
    "exponential Euler": {"fixed_lambda": 1.0},
    "no biases": {"bc_bias": False},
    "all at once": {"rotation": "standard", "fixed_lambda": 1.0, "bc_bias": False},
}
LENGTH = 13
DOCUMENTS = np.stack([np.repeat([1, 2, 3], [5, 1, 7]), np.repeat([4, 0], [9, 4])])
TOLERANCE = tolerances.rounding("float64", WHOLE.d_state * LENGTH)  # sums run along the sequence


def _inputs(length: int = LENGTH) -> np.ndarray:
    """The first feature of every token is 1, so that a row of the projection can be a bias."""
    u = np.random.default_rng(0).normal(size=(2, length, WHOLE.d_model))
    u[..., 0] = 1
    return u


def _mixer(changes: dict) -> tuple[Mamba3Mixer, dict]:
    """With parameters that all differ from each other."""
    mixer = Mamba3Mixer(dataclasses.replace(WHOLE, **changes))
    shapes = jax.eval_shape(lambda: mixer.init(jax.random.key(0), jnp.zeros((1, 1, WHOLE.d_model))))["params"]
    rng = np.random.default_rng(1)
    return mixer, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)


def _insert_columns(params: dict, changes: dict, name: str, raw: float) -> dict:
    """`params` with columns that give the raw coefficient `name` the value `raw` for every token."""
    widths = list(projection_widths(dataclasses.replace(WHOLE, **changes)).items())
    before = sum(width for _, width in widths[: [key for key, _ in widths].index(name)])
    kernel = params["in_proj"]["kernel"]
    new = np.zeros((kernel.shape[0], projection_widths(WHOLE)[name]))
    new[0] = raw
    kernel = np.concatenate([kernel[:, :before], new, kernel[:, before:]], axis=1)
    return params | {"in_proj": {"kernel": kernel}}


@pytest.mark.parametrize(("ablation", "name", "raw"), [
    ("nothing rotates", "omega", 0.0),
    ("trapezoid", "lam", 0.0),
    ("exponential Euler", "lam", 40.0),  # whose sigmoid is 1 in float64
])  # fmt: skip
def test_equals_the_whole_mixer_with_a_coefficient_held_fixed(ablation, name, raw, x64):
    mixer, params = _mixer(ABLATIONS[ablation])
    expected = Mamba3Mixer(WHOLE).apply(
        {"params": _insert_columns(params, ABLATIONS[ablation], name, raw)}, _inputs(), DOCUMENTS
    )
    actual = mixer.apply({"params": params}, _inputs(), DOCUMENTS)
    tolerances.assert_close(actual[0], expected[0], TOLERANCE, ablation)


def test_no_biases_are_biases_of_zero(x64):
    mixer, params = _mixer({"bc_bias": False})
    _, whole = _mixer({})
    zeros = {name: np.zeros_like(whole[name]) for name in ("b_bias", "c_bias")}
    assert jax.tree.structure(params | zeros) == jax.tree.structure(whole)
    expected, _ = Mamba3Mixer(WHOLE).apply({"params": params | zeros}, _inputs(), DOCUMENTS)
    tolerances.assert_close(mixer.apply({"params": params}, _inputs(), DOCUMENTS)[0], expected, TOLERANCE, "output")


def _rotary_angles(documents: np.ndarray, angles: int) -> np.ndarray:
    """Standard RoPE, [b, l, s] radians: tokens of the document so far, times 10000^(-i/s)."""
    position = np.stack([[(row[: t + 1] == row[t]).sum() for t in range(len(row))] for row in documents])
    return position[..., None] * np.array([10_000.0 ** (-i / angles) for i in range(angles)])


def test_standard_rotation_turns_by_position_and_says_nothing_to_the_step_size(x64, monkeypatch):
    # Against B and C of every head turned beforehand, and a scan that turns nothing: outputs and all gradients.
    mixer, params = _mixer({"rotation": "standard"})
    m, weights = mixer.config, np.random.default_rng(2).normal(size=(2, LENGTH, WHOLE.d_model))
    turn = np.exp(1j * _rotary_angles(DOCUMENTS, m.n_angles))[:, :, None, None]  # [b, l, 1, 1, s]

    def turned(v, bias):  # [b, l, r, g, n] → [b, l, r, h, n]
        v = jnp.repeat(v, m.n_heads // m.ngroups, axis=3) + jnp.swapaxes(bias, 0, 1)[None, None]
        s = m.n_angles
        pairs = (v[..., :s] + 1j * v[..., s : 2 * s]) * turn
        return jnp.concatenate([pairs.real, pairs.imag, v[..., 2 * s :]], axis=-1)

    def scan_of_turned(*, b, c, b_bias, c_bias, omega, **others):
        return mamba3_scan(b=turned(b, b_bias), c=turned(c, c_bias), omega=omega[..., :0], **others)

    def outputs_and_gradients():
        def loss(params):
            y, _ = mixer.apply({"params": params}, _inputs(), DOCUMENTS)
            return jnp.sum(y * weights), y

        (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return y, gradients

    y, gradients = outputs_and_gradients()
    monkeypatch.setattr(scan_on_mesh, "mamba3_scan", scan_of_turned)
    expected_y, expected = outputs_and_gradients()
    tolerances.assert_close(y, expected_y, TOLERANCE, "y")
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: tolerances.assert_close(a, b, TOLERANCE, jax.tree_util.keystr(path)), gradients, expected
    )


def test_standard_phases_are_positions_times_rates(x64):
    mixer, params = _mixer({"rotation": "standard", "dtype": "float32"})
    documents = np.repeat(DOCUMENTS, 200, axis=1)
    zero = mamba3.initial_state(mixer.config, 2, 0)
    u = _inputs(documents.shape[1] + 1)
    _, state = mixer.apply({"params": params}, u[:, :-1], documents, zero)
    _, state = mixer.apply({"params": params}, u[:, -1], None, state)
    documents = np.concatenate([documents, documents[:, -1:]], axis=1)
    expected = np.repeat(_rotary_angles(documents, mixer.config.n_angles)[:, None, -1], mixer.config.n_heads, axis=1)
    tolerances.assert_phase_close(state.angle, expected, tolerances.phase_of_equal_steps(expected.max()), "phase")


@pytest.mark.parametrize("ablation", ["nothing rotates", "trapezoid", "all at once"])
def test_pieces_and_steps_equal_the_whole(ablation, x64):
    mixer, params = _mixer(ABLATIONS[ablation])
    u, state = _inputs(), mamba3.initial_state(mixer.config, 2, 0)
    expected, _ = mixer.apply({"params": params}, u, DOCUMENTS)
    y, state = mixer.apply({"params": params}, u[:, :10], DOCUMENTS[:, :10], state)
    tolerances.assert_close(y, expected[:, :10], TOLERANCE, "first piece")
    for t in range(10, LENGTH):
        y, state = mixer.apply({"params": params}, u[:, t], None, state)
        tolerances.assert_close(y, expected[:, t], TOLERANCE, f"token {t}")


@pytest.mark.parametrize("ablation", list(ABLATIONS))
def test_projections_are_counted(ablation, x64):
    mixer, params = _mixer(ABLATIONS[ablation])
    sizes = sum(params[name]["kernel"].size for name in ("in_proj", "out_proj"))
    assert forward_flops_per_token(mixer.config, 1)["projections"] == 2 * sizes
