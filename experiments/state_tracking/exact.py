"""State tracking with weights written by hand: parity, cyclic groups in one layer and S3 in two, exact at any length.

python experiments/state_tracking/exact.py [--length 100000] [--json OUT]

The models are ordinary `LanguageModel`s with Mamba-3 layers, float32, without MLP; docs/expressivity.md explains the
weights. Every position of random sequences is answered twice, by a prefill (the chunked scan) and token by token by the
decode step; "no rotation" is the same weights with `rope_fraction=0`. A margin is the right logit minus the best other
one, over the largest logit of the position. Takes one to two minutes on two CPU cores.
"""

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.circumstances import circumstances
from m3jax.config import ModelConfig
from m3jax.data.tasks import Task, get_task, word_problem
from m3jax.data.tasks.word_problem import cyclic_table, permutation_table
from m3jax.models.language_model import LanguageModel
from m3jax.models.mamba3 import projection_widths
from m3jax.models.norm import EPSILON

ROWS = 4  # sequences of a task
STEP_SIZE = 2.0  # Δ: a phase advances by Δ π tanh(θ) = 2π tanh(θ), so that tanh(θ) is in turns
_SATURATED = 30.0  # sigmoid of it is 1 in float32, tanh even of a third of it
_NO_DECAY = -1e12  # heavy_tail of it is 1e-12

# Coordinates of the residual stream that all solutions have; then come those of each.
ONE, WRITE, FILL = 0, 1, 2  # always 1; 1 where the token writes into the state; what makes all embeddings equally long


class Head(NamedTuple):
    """What a head reads of the sum of phases since the writes, and where it adds it to the residual stream."""

    angle: int
    sine: bool  # sin φ, else cos φ
    gate: int  # coordinate v of the stream: the output is multiplied by silu(v)
    out: int


class Solution(NamedTuple):
    """A task and the model that solves it."""

    task: Task
    config: ModelConfig
    params: dict


def parity() -> Solution:
    """One half turn and one write per bit 1: the writes cancel in pairs, and cos φ reads 1 for odd, 0 for even."""
    turn, out, width = 3, 4, 5
    embedding = _embedding(writes=[0, 0, 1], rest=np.arctanh([[0], [0], [0.5]]), width=width)
    head = np.zeros((3, width))
    head[1, ONE], head[2, out] = 0.5, 1.0
    config = _config(3, width, n_layers=1, n_angles=1, a_floor=0.0)
    layer = _mixer(config, [(turn, 1.0)], [Head(0, False, ONE, out)])
    return Solution(get_task("parity"), config, _params(config, embedding, [layer], head))


def cyclic(order: int) -> Solution:
    """The word problem of Z_k: an angle for each prime power q of k, which the element e turns by e/q.

    BOS alone writes. Reading every e modulo every q leaves 1/(2q) of a turn for errors of the phase, not 1/(2k).
    """
    moduli = _prime_powers(order)
    cos = 3 + len(moduli)
    sin, width = cos + len(moduli), cos + 2 * len(moduli)
    elements = np.arange(order)
    residues = np.stack([elements % q / q for q in moduli], axis=1)
    task = word_problem(f"z{order}", cyclic_table(order))
    turns = np.zeros((task.vocab_size, len(moduli)))
    turns[:order] = residues - (residues > 0.5)  # the short way round
    head = np.zeros((task.vocab_size, width))
    head[:order, cos:sin], head[:order, sin:] = np.cos(2 * np.pi * residues), np.sin(2 * np.pi * residues)
    head[order + 1, WRITE] = 2 * len(moduli)  # above the elements, at most len(moduli)

    config = _config(task.vocab_size, width, n_layers=1, n_angles=len(moduli))
    heads = [Head(i, sine, ONE, (sin if sine else cos) + i) for sine in (False, True) for i in range(len(moduli))]
    layer = _mixer(config, [(3 + i, 1.0) for i in range(len(moduli))], heads)
    embedding = _embedding(_writes_of_bos(task, order), np.arctanh(turns), width)
    return Solution(task, config, _params(config, embedding, [layer], head))


def symmetric_3() -> Solution:
    """The word problem of S3, whose elements are r^a s^b with a of {-1, 0, 1}: two layers.

    (r^A s^B)(r^a s^b) = r^(A + (-1)^B a) s^(B + b). The first layer tracks (-1)^B and multiplies it by the token's a
    in a gate. Only the sign of the product counts, as it saturates the tanh of the second layer, whose Δ makes that a
    third of a turn: small errors of the first layer's phase do not reach the second's.
    """
    turn, gate, sign, direction, cos, sin, width = 3, 4, 5, 6, 7, 8, 9
    order, task = 6, get_task("s3")
    a, b = _rotation_and_flip(permutation_table(3, even=False))
    rest = np.zeros((task.vocab_size, 2))
    rest[:order] = np.stack([np.arctanh(b / 2), (-1.0) ** b * a], axis=1)  # silu of the second is 0.73, 0 or -0.27
    embedding = _embedding(_writes_of_bos(task, order), rest, width)

    config = _config(task.vocab_size, width, n_layers=2, n_angles=1, a_floor=0.0)
    first = _mixer(config, [(turn, 1.0)], [Head(0, False, ONE, sign), Head(0, False, gate, direction)])
    second = _mixer(config, [(direction, _SATURATED)], [Head(0, False, ONE, cos), Head(0, True, ONE, sin)], 2 / 3)
    head = np.zeros((task.vocab_size, width))
    head[:order, cos], head[:order, sin] = np.cos(2 * np.pi * a / 3), np.sin(2 * np.pi * a / 3)
    head[:order, sign] = (-1.0) ** b
    head[order + 1, WRITE] = 4  # above the elements, at most 2
    return Solution(task, config, _params(config, embedding, [first, second], head))


def without_rotation(solution: Solution) -> Solution:
    """The same weights in a model whose B and C do not rotate."""
    config = dataclasses.replace(solution.config, rope_fraction=0.0)
    params = jax.tree.map(lambda v: v, solution.params)  # a copy of the dicts
    projection = params["layers"]["mixer"]["in_proj"]
    projection["kernel"] = projection["kernel"][..., : -solution.config.n_angles]
    return Solution(solution.task, config, params)


SOLUTIONS = {
    "parity": parity,
    "z2": lambda: cyclic(2),
    "z3": lambda: cyclic(3),
    "z5": lambda: cyclic(5),
    "z60": lambda: cyclic(60),
    "s3": symmetric_3,
}


def _config(vocab_size: int, width: int, n_layers: int, n_angles: int, **changes) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size, pad_vocab_multiple=1, tie_embeddings=False, d_model=width, n_layers=n_layers,
        d_intermediate=0, expand=1, headdim=1, d_state=2 * n_angles, rope_fraction=1.0, dtype="float32", **changes,
    )  # fmt: skip


def _mixer(
    config: ModelConfig, turns: Sequence[tuple[int, float]], heads: Sequence[Head], step_size: float = STEP_SIZE
) -> dict:
    """The weights of a mixer.

    Args:
      config: head width 1, as many angles as `turns`.
      turns: for each angle, the coordinate of the stream that gives θ, and its factor.
      heads: those that are used, at most config.n_heads.
      step_size: Δ of every token and head.
    """
    h, n, s = config.n_heads, config.d_state, config.n_angles
    columns = {name: np.zeros((config.d_model, width)) for name, width in projection_widths(config).items()}
    columns["a"][ONE], columns["lam"][ONE] = _NO_DECAY, _SATURATED
    for angle, (coordinate, factor) in enumerate(turns):
        columns["omega"][coordinate, angle] = factor
    b_bias, c_bias, out = np.zeros((h, 1, n)), np.zeros((h, 1, n)), np.zeros((h, config.d_model))
    for i, head in enumerate(heads):
        columns["x"][WRITE, i] = columns["z"][head.gate, i] = 1
        b_bias[i, 0, head.angle] = 1  # the real part of the pair
        c_bias[i, 0, head.angle + s * head.sine] = -1 if head.sine else 1
        out[i, head.out] = 1 / (step_size * float(jax.nn.silu(1.0)))  # 1 where 1 was written and the gate is at 1
    return {
        "in_proj": {"kernel": np.concatenate([*columns.values()], axis=1)},
        "out_proj": {"kernel": out},
        "dt_bias": np.full(h, math.log(math.expm1(step_size))),
        "b_norm": {"scale": np.ones(n)},
        "c_norm": {"scale": np.ones(n)},
        "b_bias": b_bias,
        "c_bias": c_bias,
        "d": np.zeros(h),
    }


def _params(config: ModelConfig, embedding: np.ndarray, mixers: Sequence[dict], head: np.ndarray) -> dict:
    layers = [{"mixer_norm": {"scale": np.ones(config.d_model)}, "mixer": mixer} for mixer in mixers]
    params = {
        "embedding": embedding,
        "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers),
        "norm": {"scale": np.ones(config.d_model)},
        "head": head,
    }
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), params)


def _embedding(writes: Sequence[float], rest: np.ndarray, width: int) -> np.ndarray:
    """Rows [1, write, fill, rest, 0 ...] that RMSNorm leaves as they are: mean square and epsilon add to 1."""
    table = np.zeros((len(rest), width))
    table[:, ONE], table[:, WRITE], table[:, FILL + 1 : FILL + 1 + rest.shape[1]] = 1, writes, rest
    table[:, FILL] = np.sqrt(width * (1 - EPSILON) - np.sum(table**2, axis=1))
    return table


def _writes_of_bos(task: Task, order: int) -> np.ndarray:
    return np.arange(task.vocab_size) == order + 1


def _prime_powers(n: int) -> list[int]:
    """The powers of different primes whose product is n."""
    powers, p = [], 2
    while n > 1:
        q = 1
        while n % p == 0:
            n, q = n // p, q * p
        powers += [q] * (q > 1)
        p += 1
    return powers


def _rotation_and_flip(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a of {-1, 0, 1} and b of {0, 1} with g = r^a s^b for every element g of S3, from its multiplication table."""
    cubes = table[table.diagonal(), np.arange(6)]
    r, s = np.flatnonzero(cubes == 0)[1], np.flatnonzero(table.diagonal() == 0)[1]  # after the identity, 0
    a, b = np.zeros(6, int), np.zeros(6, int)
    for power, rotation in ((0, 0), (1, r), (-1, table[r, r])):
        a[rotation], b[rotation] = power, 0
        a[table[rotation, s]], b[table[rotation, s]] = power, 1
    return a, b


@functools.partial(jax.jit, static_argnums=(0, 1))
def sequences(task: Task, length: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Random tokens and the answers at every position, both [ROWS, length] int32."""
    drawn = length + 1 - task.positions(1)  # sequences that fill all positions, in the task's own count
    batch = task.sample(jax.random.key(seed), ROWS, drawn, drawn, length)
    if task.name == "parity":  # which asks only after the last bit
        return batch.tokens, 1 + jnp.cumsum(batch.tokens - 1, axis=1) % 2
    return batch.tokens, batch.targets


class Score(NamedTuple):
    """How a solution did, over all sequences."""

    right: int
    positions: int
    longest_right_prefix: int  # in the worst sequence
    smallest_margin: float


def score(solution: Solution, tokens: jax.Array, answers: jax.Array, *, decode: bool) -> Score:
    """Compares the most probable token at every position with the answers, after a prefill or step by step."""
    model, variables = LanguageModel(solution.config), {"params": solution.params}

    def judge(logits: jax.Array, answer: jax.Array) -> jax.Array:
        """The margin of the right logit, [...]."""
        right = jnp.take_along_axis(logits, answer[..., None], axis=-1)[..., 0]
        is_right = jax.nn.one_hot(answer, logits.shape[-1], dtype=bool)
        others = jnp.max(jnp.where(is_right, -jnp.inf, logits), axis=-1)
        return (right - others) / jnp.maximum(jnp.max(jnp.abs(logits), axis=-1), jnp.finfo(logits.dtype).tiny)

    @jax.jit
    def prefill(tokens: jax.Array, answers: jax.Array) -> jax.Array:
        hidden, _ = model.apply(variables, tokens, method="prefill")
        return judge(model.apply(variables, hidden, method="logits"), answers)

    @jax.jit
    def decode_all(tokens: jax.Array, answers: jax.Array) -> jax.Array:
        def step(state, inputs):
            logits, state = model.apply(variables, inputs[0], state, method="step")
            return state, judge(logits, inputs[1])

        _, margins = jax.lax.scan(step, model.initial_state(*tokens.shape), (tokens.T, answers.T))
        return margins.T

    margins = np.asarray((decode_all if decode else prefill)(tokens, answers))
    wrong = ~(margins > 0)
    prefixes = np.where(wrong.any(axis=1), wrong.argmax(axis=1), tokens.shape[1])
    return Score(int((~wrong).sum()), wrong.size, int(prefixes.min()), float(margins.min()))


def main() -> None:
    """Prints a line for each task and way, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=100_000, help="positions of a sequence")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--commit", help="what is measured, for the record")
    options = parser.parse_args()
    if options.length < 2:
        parser.error(f"--length {options.length}: expected at least 2.")
    report = circumstances(options.commit) | {"length": options.length, "rows": ROWS, "scores": {}}
    print(f"{'task':8s}{'parameters':>11s}  {'':14s}{'right':>10s}{'of':>10s}{'prefix':>10s}{'margin':>10s}")
    for name, make in SOLUTIONS.items():
        solution = make()
        tokens, answers = sequences(solution.task, options.length)
        size = sum(v.size for v in jax.tree.leaves(solution.params))
        frozen = without_rotation(solution)
        ways = {"prefill": (solution, False), "step": (solution, True), "no rotation": (frozen, False)}
        for way, (model, decode) in ways.items():
            result = score(model, tokens, answers, decode=decode)
            report["scores"].setdefault(name, {"parameters": size})[way] = result._asdict()
            counts = f"{result.right:10d}{result.positions:10d}{result.longest_right_prefix:10d}"
            print(f"{name:8s}{size:11d}  {way:14s}{counts}{result.smallest_margin:10.4f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
