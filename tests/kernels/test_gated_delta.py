"""The gated delta rule: chunks against tokens, tokens against a loop in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.kernels import gated_delta_scan, gated_delta_step
from tests import tolerances

B, L, H, N, P = 2, 75, 3, 12, 10
DOCUMENTS = np.stack([np.repeat([3, 1, 2], [20, 1, 54]), np.repeat([1, 2], [64, 11])])


def make(seed: int = 0, dtype: str = "float64") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, B, L, H, N))
    return {
        name: np.asarray(v, dtype)
        for name, v in {
            "q": q / np.sqrt(N),
            "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
            "v": rng.normal(size=(B, L, H, P)),
            "log_decay": -np.exp(rng.uniform(-6, 1, size=(B, L, H))),
            "beta": rng.uniform(0, 2, size=(B, L, H)),
        }.items()
    }


def make_state(dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng(7).normal(size=(B, H, P, N)).astype(dtype)


def naive_step(token: dict[str, np.ndarray], state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """S ← e^g S (I - β k kᵀ) + β v kᵀ, as written."""
    o, state = np.zeros(token["v"].shape), state.copy()
    for b, h in np.ndindex(state.shape[:2]):
        q, k, v, g, beta = (token[name][b, h] for name in ("q", "k", "v", "log_decay", "beta"))
        turned = state[b, h] @ (np.eye(k.size) - beta * np.outer(k, k))
        state[b, h] = np.exp(g) * turned + beta * np.outer(v, k)
        o[b, h] = state[b, h] @ q
    return o, state


def naive(args: dict, state: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`naive_step` of every token, from S = 0 where a document begins."""
    o = np.zeros((B, L, H, P))
    for t in range(L):
        if t:
            state = np.where((documents[:, t] == documents[:, t - 1])[:, None, None, None], state, 0)
        o[:, t], state = naive_step({name: v[:, t] for name, v in args.items()}, state)
    return o, state


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_equals_the_equation(x64, implementation):
    args, state = make(), make_state()
    o, final = gated_delta_scan(
        **args, initial_state=state, segment_ids=DOCUMENTS, implementation=implementation, return_state=True,
        **({"chunk_size": 16} if implementation == "xla" else {}),
    )  # fmt: skip
    expected_o, expected = naive(args, state, DOCUMENTS)
    tolerance = tolerances.rounding("float64", L * N)
    tolerances.assert_close(o, expected_o, tolerance, "o")
    tolerances.assert_close(final, expected, tolerance, "S")


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("chunk_size", [1, 16, None])
def test_gradients_of_chunks_equal_those_of_tokens(x64, documents, chunk_size):
    args, state = make(1), make_state()
    rng = np.random.default_rng(2)
    cotangents = rng.normal(size=(B, L, H, P)), rng.normal(size=state.shape)

    def gradients(**options):
        def projection(args, state):
            out = gated_delta_scan(
                **args, initial_state=state, segment_ids=documents, return_state=True, **options
            )  # fmt: skip
            return sum(jnp.sum(v * ct) for v, ct in zip(out, cotangents, strict=True))

        found, of_state = jax.jit(jax.grad(projection, argnums=(0, 1)))(args, state)
        return found | {"state": of_state}

    actual = gradients(implementation="xla", chunk_size=chunk_size)
    for name, expected in gradients(implementation="reference").items():
        tolerances.assert_close(actual[name], expected, tolerances.rounding("float64", L * N), name)


@pytest.mark.parametrize("decay", [-1e6, -np.inf])
def test_a_decay_that_leaves_nothing(decay):
    args = make(dtype="float32")
    args["log_decay"][:, 7] = decay
    o, expected = (gated_delta_scan(**args, implementation=kind) for kind in ("xla", "reference"))
    tolerances.assert_close(o, expected, tolerances.rounding("float32", L * N), "o")


def test_float32_with_keys_that_are_nearly_one():
    """The hardest system: every token overwrites what the one before wrote."""
    args = make(3, "float32")
    args["k"] = np.broadcast_to(args["k"][:, :1], args["k"].shape)
    args["beta"][:], args["log_decay"][:] = 1.0, 0.0
    actual = gated_delta_scan(**args)
    expected = np.einsum("blhp,blhn,blhn->blhp", args["v"], args["k"], args["q"])
    tolerances.assert_close(actual, expected, tolerances.rounding("float32", N), "o")


@pytest.mark.parametrize("unit_eps", [None, 0.5])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_steps_equal_the_scan(implementation, unit_eps):
    args, state = make(4, "float32"), make_state("float32")
    options = {"unit_eps": unit_eps, "implementation": implementation}
    expected, final = gated_delta_scan(**args, initial_state=state, return_state=True, unit_eps=unit_eps)
    step = jax.jit(functools.partial(gated_delta_step, **options))
    for t in range(L):
        o, state = step(**{name: v[:, t] for name, v in args.items()}, state=state)
        tolerances.assert_close(o, expected[:, t], tolerances.rounding("float32", L * N), f"token {t}")
    tolerances.assert_close(state, final, tolerances.rounding("float32", L * N), "S")


def test_keys_of_length_1(x64):
    args = make(6)
    plain = args | {"q": args["q"] / np.sqrt(np.square(args["q"]).sum(-1, keepdims=True) + 0.5) / np.sqrt(N)}
    plain["k"] = args["k"] / np.sqrt(1.5)
    actual = gated_delta_scan(**args, unit_eps=0.5)
    tolerances.assert_close(actual, gated_delta_scan(**plain), tolerances.rounding("float64", L * N), "o")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_step_rounds_no_keys_of_length_1(implementation):
    token, state = {name: v[:, 0] for name, v in make(7, "float32").items()}, make_state("float32")
    token |= {name: jnp.asarray(token[name], "bfloat16") for name in "qk"}
    actual = gated_delta_step(**token, state=state, unit_eps=0.5, implementation=implementation)
    with jax.enable_x64(True):
        wide = {name: np.asarray(v, "float64") for name, v in token.items()}
        expected = gated_delta_step(**wide, state=state.astype("float64"), unit_eps=0.5)
    for name, value, exact in zip(("o", "S"), actual, expected, strict=True):
        tolerances.assert_close(value, exact, tolerances.rounding("float32", N), name)


@pytest.mark.parametrize(("change", "message"), [
    ({"k": np.zeros((B, L, H, N + 1))}, r"k has shape .*; expected \(2, 75, 3, 12\)"),
    ({"beta": np.zeros((B, L))}, "beta has shape"),
    ({"initial_state": np.zeros((B, H, N, P))}, r"expected \[b, h, p, n\]"),
    ({"segment_ids": np.zeros((B, L + 1), int)}, "segment_ids has shape"),
    ({"chunk_size": 0}, "chunk_size = 0; expected at least 1"),
    ({"implementation": "mosaic"}, "expected None or one of reference, triton, xla"),
])  # fmt: skip
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        gated_delta_scan(**make() | change)


def test_a_step_names_what_it_cannot_run():
    token = {name: v[:, 0] for name, v in make().items()}
    with pytest.raises(ValueError, match="implementation = 'mosaic'; expected None or one of reference, triton, xla"):
        gated_delta_step(**token, state=make_state(), implementation="mosaic")


def test_integers_are_refused():
    with pytest.raises(TypeError, match="v has dtype int32"):
        gated_delta_scan(**make() | {"v": np.zeros((B, L, H, P), np.int32)})
