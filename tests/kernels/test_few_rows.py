"""Products of few rows: XLA's, and the kernels for one and for several in Triton's interpreter, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax_triton", exc_type=ImportError)

from m3jax.config import ModelConfig
from m3jax.kernels import Sums, add_and_norm, choice, few_rows_product, products
from m3jax.kernels.few_rows import triton_product, triton_rows
from m3jax.kernels.few_rows.form import Form
from m3jax.kernels.few_rows.triton_product import Tiling
from m3jax.models.language_model import LanguageModel
from tests import tolerances
from tests.kernels import interpreter

INNER, OUTER, EPSILON = 72, 40, 1e-3  # whole tiles of no tiling
OTHER = Tiling(32, 16, 2, 3)
SEVERAL = {  # rows, and how the weight is laid over programs
    "turned": (20, triton_rows.Tiling(16, 16, 1, 3, 1)),
    "turned, parts": (3, triton_rows.Tiling(32, 16, 1, 3, 2)),
    "parts": (72, triton_rows.Tiling(32, 16, 1, 3, 4)),
    "whole parts": (72, triton_rows.Tiling(64, 8, 1, 3, 3)),
    "default": (128, None),
}
FORMS = {
    "bare": {},
    "norm": {"scale": True},
    "residual": {"residual": True},
    "norm, gate": {"scale": True, "gated": True},
    "gate, residual": {"gated": True, "residual": True},
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpreter.use(monkeypatch)
    monkeypatch.setattr(triton_rows, "compute_capability", lambda: 90)


def _inputs(rows=1, dtype="float32", scale=False, residual=False, gated=False, seed=0):
    """x, weight, scale and residual; x and residual in float32 where they are a residual stream."""
    rng = np.random.default_rng(seed)
    x = 3 * rng.normal(size=(rows, INNER))
    weight = rng.normal(size=(INNER, OUTER * (1 + gated))) / np.sqrt(INNER)
    return (
        jnp.asarray(x, "float32" if scale else dtype),
        jnp.asarray(weight, dtype),
        jnp.asarray(rng.normal(size=INNER), dtype) if scale else None,
        jnp.asarray(rng.normal(size=(rows, OUTER)), "float32") if residual else None,
    )


def _form(gated=False, **_):
    return Form(EPSILON, gated)


def _exact(x, weight, scale, residual, form):
    x, weight, scale, residual = (
        None if v is None else np.asarray(v, np.float64) for v in (x, weight, scale, residual)
    )
    if scale is not None:
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + form.epsilon) * scale
    y = x @ weight
    if form.gated:
        value, gate = np.split(y, 2, axis=-1)
        y = value * gate / (1 + np.exp(-gate))
    return y if residual is None else y + residual


def _assert_exact(actual, args, form):
    expected = _exact(*args, form)
    tolerance = tolerances.rounding("float32", INNER)
    if args[1].dtype != jnp.float32:  # x, the product, and twice in the gate
        tolerance += 4 * float(jnp.finfo(jnp.bfloat16).eps) / 2
    tolerances.assert_close(actual, expected, tolerance, "y")


@pytest.mark.parametrize("tiling", [None, OTHER])
@pytest.mark.parametrize("form", FORMS)
def test_equals_float64(form, tiling):
    args = _inputs(**FORMS[form])
    form = _form(**FORMS[form])
    _assert_exact(triton_product.product(*args, form, tiling=tiling), args, form)


@pytest.mark.parametrize("case", SEVERAL)
@pytest.mark.parametrize("gated", [False, True])
def test_several_rows_equal_float64(case, gated):
    rows, tiling = SEVERAL[case]
    args = _inputs(rows, "bfloat16", gated=gated)
    if gated and tiling:  # parts of a gate's input cannot be gated
        tiling = tiling._replace(parts=1)
    y = triton_rows.product(*args[:2], gated, tiling)
    assert y.dtype == ("bfloat16" if len(y) == 1 else "float32") and (tiling is None or len(y) == tiling.parts)
    _assert_exact(Sums(None, y).added(jnp.bfloat16), args, _form(gated))


@pytest.mark.parametrize("rows", [3, 72])
def test_a_row_is_a_sum_of_its_own(rows):
    """What is no number in the other rows of x changes no bit."""
    x, weight, *_ = _inputs(rows, "bfloat16")
    one, other = (triton_rows.product(v, weight, False)[:, -1] for v in (x, x.at[:-1].set(jnp.nan)))
    np.testing.assert_array_equal(one, other)


def test_what_is_pending_is_added_on_the_way_to_the_norm():
    x, weight, _, residual = _inputs(3, "bfloat16", residual=True)
    scale = jnp.asarray(np.random.default_rng(1).normal(size=OUTER), "bfloat16")
    options = {"residual": residual, "implementation": "triton"}
    pending = few_rows_product(x, weight, pending=True, **options)
    assert isinstance(pending, Sums)
    assert interpreter.launches(lambda *args: add_and_norm(*args, EPSILON, jnp.bfloat16), pending, scale) == 1
    y, normed = jax.jit(add_and_norm, static_argnums=(2, 3))(pending, scale, EPSILON, "bfloat16")
    for v in (y, few_rows_product(x, weight, **options)):
        _assert_exact(v, (x, weight, None, residual), _form())
    exact = np.asarray(y, np.float64)
    exact *= np.asarray(scale, np.float64) / np.sqrt(np.square(exact).mean(-1, keepdims=True) + EPSILON)
    tolerances.assert_close(normed, exact, float(jnp.finfo(jnp.bfloat16).eps), "norm")
    with pytest.raises(ValueError, match=r"scale has shape \(39,\); expected \[out\] = \(40,\)"):
        add_and_norm(pending, scale[1:], EPSILON, jnp.bfloat16)


@pytest.mark.parametrize("implementation", ["triton", "xla"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("form", FORMS)
def test_types(form, dtype, implementation):
    args = x, weight, scale, residual = _inputs(1 if implementation == "triton" else 2, dtype, **FORMS[form])
    y = few_rows_product(
        x, weight, scale=scale, residual=residual, epsilon=EPSILON, gated=FORMS[form].get("gated", False),
        implementation=implementation,
    )  # fmt: skip
    assert y.dtype == (dtype if residual is None else residual.dtype)
    _assert_exact(y, args, _form(**FORMS[form]))


def test_every_column_is_a_sum_of_its_own():
    """Enormous numbers in one column of the weight change no other."""
    x, weight, *_ = _inputs()
    y = triton_product.product(x, weight, None, None, _form())
    other = triton_product.product(x, weight.at[:, 7].set(1e30), None, None, _form())
    np.testing.assert_array_equal(jnp.delete(other, 7, axis=1), jnp.delete(y, 7, axis=1))


@pytest.mark.parametrize(("rows", "dtype"), [(1, "float32"), (3, "bfloat16")])
def test_gradients_are_those_of_xla(rows, dtype):
    x, weight, scale, residual = _inputs(rows, dtype, scale=True, gated=True, residual=True)

    def gradients(implementation):
        def run(x, weight, scale, residual):
            return few_rows_product(
                x, weight, scale=scale, residual=residual, epsilon=EPSILON, gated=True, implementation=implementation
            )

        y, pullback = jax.vjp(run, x, weight, scale, residual)
        return pullback(jnp.cos(y))

    for actual, expected in zip(*(jax.jit(gradients, static_argnums=0)(v) for v in ("triton", "xla")), strict=True):
        tolerances.assert_close(actual, expected, tolerances.rounding(dtype, INNER), "gradient")


@pytest.mark.parametrize(("implementation", "devices", "launches"), [
    (None, 1, 1), (None, 8, 0), ("triton", 8, 1), ("xla", 1, 0),
])  # fmt: skip
def test_what_is_asked_for_runs(implementation, devices, launches, monkeypatch):
    monkeypatch.setattr(choice, "partitioned", lambda: devices > 1)
    x, weight, *_ = _inputs()
    assert interpreter.launches(lambda x: few_rows_product(x, weight, implementation=implementation), x) == launches


def test_what_the_kernel_cannot_take_is_left_to_xla(monkeypatch):
    monkeypatch.setattr(choice, "partitioned", lambda: False)
    one, whole, *_ = _inputs()
    for x, weight, reason in (
        (one[None], whole, r"x has shape \(1, 1, 72\); the Triton products take \[rows, in\] of up to 128 rows"),
        (jnp.zeros((129, INNER)), whole, r"x has shape \(129, 72\)"),
        (jnp.zeros((2, INNER)), whole, "weight has dtype float32; the Triton product of several rows takes bfloat16"),
        (jnp.zeros((2, INNER)), whole[:, :-1].astype("bfloat16"), "rows of x and of weight, .* have 144 and 78 bytes"),
        (one, whole.astype("float16"), "weight has dtype float16; the Triton product takes float32 and bfloat16"),
        (one, whole[:, :-1], "a row of weight, or of its half if gated, has 156 bytes"),
    ):
        assert interpreter.launches(few_rows_product, x, weight) == 0, reason
        with pytest.raises(ValueError, match=f'implementation = "triton" cannot run here: {reason}'):
            few_rows_product(x, weight, implementation="triton")


@pytest.mark.parametrize(("wrong", "message"), [
    ({"x": np.zeros((2, 71), np.float32)}, r"x has shape \(2, 71\); expected \[..., 72\], as weight has shape"),
    ({"x": np.zeros((2, INNER), np.int32)}, "x has dtype int32; expected a floating point dtype"),
    ({"scale": np.zeros(71, np.float32)}, r"scale has shape \(71,\); expected \[in\] = \(72,\)"),
    ({"weight": np.zeros((INNER, 41), np.float32), "gated": True}, "expected an even number of columns"),
    ({"residual": np.zeros((2, 41), np.float32)}, r"residual has shape \(2, 41\); expected \(2, 40\)"),
    ({"implementation": "cuda"}, "implementation = 'cuda'; expected None or one of triton, xla"),
])  # fmt: skip
def test_bad_arguments_are_named(wrong, message):
    x, weight, *_ = _inputs(2)
    with pytest.raises((TypeError, ValueError), match=message):
        few_rows_product(**{"x": x, "weight": weight} | wrong)


@pytest.mark.parametrize(("shape", "computed"), [((1, 6), 8), ((7, 6), 8), ((8, 6), 8), ((9, 6), 9), ((1, 2, 6), 1)])
def test_xla_has_enough_rows_on_a_gpu(monkeypatch, shape, computed):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    rows = []

    def product(x):
        rows.append(x.shape[0])
        return 2 * x[..., :5]

    np.testing.assert_array_equal(jax.jit(lambda x: products.enough_rows(product, x))(x), 2 * x[..., :5])
    assert rows == [computed]


@pytest.mark.parametrize(("rows", "scan_implementation", "launches"), [
    # Of a layer two in the mixer, its step and two in the MLP; with several rows what is pending, but after the last.
    (1, None, 2 * (4 + 1)), (3, None, 2 * (4 + 1) + 3), (1, "xla", 0), (3, "xla", 0),
])  # fmt: skip
def test_a_step_of_a_model_has_a_kernel_for_each_product(monkeypatch, rows, scan_implementation, launches):
    """The same logits as XLA's."""
    monkeypatch.setattr(choice, "partitioned", lambda: False)
    config = ModelConfig(
        vocab_size=48, d_model=32, n_layers=2, d_intermediate=48, attention_heads=2, attention_kv_heads=2,
        attention_headdim=16, mixers="attention", scan_implementation=scan_implementation,
        dtype="float32" if rows == 1 else "bfloat16",
    )  # fmt: skip
    model = LanguageModel(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    token, state = jnp.arange(rows), model.initial_state(rows, 4)

    def step(params, token, state):
        return model.apply({"params": params}, token, state, method="step")[0]

    assert interpreter.launches(step, params, token, state) == launches
    if launches:
        logits = jax.jit(step)(params, token, state)
        monkeypatch.setattr(choice, "partitioned", lambda: True)
        tolerances.assert_close(
            logits, jax.jit(step)(params, token, state), tolerances.rounding(config.dtype, config.d_model), "logits"
        )
