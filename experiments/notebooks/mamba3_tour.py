# %% [markdown]
"""
# A tour of Mamba-3

Four experiments on what is new in Mamba-3 (arXiv 2603.15569), each small enough for a CPU:

1. the trapezoidal rule against Euler's, on an integral known in closed form;
2. the complex transition as a rotation: parity by weights written by hand, then by gradient descent;
3. MIMO against SISO with the same state;
4. prefill and decoding give the same.

`make notebook` runs this file again and writes `mamba3_tour.ipynb`, which shows the plots.
"""

# %%
import math
import sys
from pathlib import Path

sys.path.insert(0, str(next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "experiments").is_dir())))

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from experiments.state_tracking import exact
from m3jax.config import ModelConfig
from m3jax.kernels import Mamba3State, mamba3_scan, mamba3_step
from m3jax.models.language_model import LanguageModel

# %% [markdown]
r"""
## 1. The trapezoid

A state space model integrates $\dot h = A h + x(t)$ over steps of size $\Delta$. The part without input is exact,
$e^{\Delta A}$. For the input, $\int_0^\Delta e^{(\Delta-s)A} x(t+s)\,ds$, Mamba-2 takes the value at the right end of
the step (exponential Euler), Mamba-3 a mean of both ends:

$$h_t = e^{\Delta A} h_{t-1} + (1-\lambda)\,\Delta\, e^{\Delta A}\, x_{t-1} + \lambda\,\Delta\, x_t .$$

$\lambda = 1$ is Euler, $\lambda = \tfrac12$ the trapezoidal rule; the model learns $\lambda$ for every token. With
$A = -1$ and $x = \sin \omega t$ the answer is known,
$h(t) = (\sin\omega t - \omega\cos\omega t + \omega e^{-t})/(1+\omega^2)$, so the error can be measured: it falls with
$\Delta$ for Euler, with $\Delta^2$ for the trapezoid.
"""

# %%
END, OMEGA = 4.0, 3.0


def integrate(steps, lam):
    """The state at the end of every step, from the scan with one head, one channel and one state coordinate."""
    t = np.arange(steps + 1) * END / steps
    one = np.ones((1, steps + 1, 1))
    x, bc = np.sin(OMEGA * t)[None, :, None, None], one[..., None, None]
    y = mamba3_scan(x, one * END / steps, -one, bc, bc, one * lam, np.zeros((1, steps + 1, 0)))
    return t, np.asarray(y)[0, :, 0, 0]


def largest_error(steps, lam):
    t, h = integrate(steps, lam)
    true = (np.sin(OMEGA * t) - OMEGA * np.cos(OMEGA * t) + OMEGA * np.exp(-t)) / (1 + OMEGA**2)
    return np.abs(h - true).max()


sizes = np.array([16, 64, 256, 1024])
with jax.enable_x64(True):
    errors = {name: [largest_error(n, lam) for n in sizes] for name, lam in (("Euler", 1.0), ("trapezoid", 0.5))}
orders = {name: -np.polyfit(np.log(sizes[1:]), np.log(e[1:]), 1)[0] for name, e in errors.items()}

figure, axes = plt.subplots(figsize=(5.5, 3.5), layout="constrained")
for name, e in errors.items():
    axes.loglog(END / sizes, e, "o-", label=f"{name}: order {orders[name]:.2f}")
axes.set(xlabel="step size Δ", ylabel="largest error of h", title="sin 3t, A = −1")
axes.grid(alpha=0.3)
axes.legend()
print(
    {name: f"order {order:.3f}, error {errors[name][-1]:.1e} with {sizes[-1]} steps" for name, order in orders.items()}
)

# %% [markdown]
r"""
## 2. The rotation

The transition is a decay and a turn: pairs of state coordinates turn by $\Delta_t\,\pi\tanh\theta_t$, which the token
decides. A positive decay can only forget; a turn can count. Parity needs half a turn for every 1, counting modulo $k$ a
$k$-th of a turn.

`experiments/state_tracking/exact.py` writes the weights of whole language models that way (docs/expressivity.md has the
equations). Below: the phase of the model of $\mathbb Z_5$ while it reads, and all of its answers.
"""

# %%
z5 = exact.cyclic(5)
tokens, answers = exact.sequences(z5.task, 400)
frozen = exact.score(exact.without_rotation(z5), tokens, answers, decode=False)
logits = jax.jit(LanguageModel(z5.config).apply)({"params": z5.params}, tokens)
# An element's logit is the product of the state's direction with its own, so the five of them give the direction back.
directions = np.exp(2j * np.pi * np.arange(5) / 5)
states = np.asarray(logits[..., :5]) @ directions * 2 / 5
states = states[:, 1:] / np.abs(states[:, 1:])

figure, axes = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained", width_ratios=(1, 1.5))
axes[0].plot(states.real.ravel(), states.imag.ravel(), "o", markersize=9, alpha=0.3)
for v, direction in enumerate(directions):
    axes[0].annotate(str(v), (0.75 * direction.real, 0.75 * direction.imag), ha="center", va="center")
axes[0].set(aspect="equal", title="directions of all states, after any prefix", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))
fifths = np.angle(states[0, :40]) / (2 * np.pi) * 5
axes[1].step(range(40), (fifths + 0.5) % 5 - 0.5, where="mid", label="phase, in fifths of a turn")
axes[1].plot(range(40), answers[0, 1:41], "x", label="running sum modulo 5")
axes[1].set(xlabel="token", title="one sequence", ylim=(-0.3, 5.6))
axes[1].legend(loc="upper right", ncols=2)
right = int(jnp.sum(logits.argmax(axis=-1) == answers))
print(f"right: {right} of {answers.size}; the same weights without rotation: {frozen.right}")

# %% [markdown]
"""
Can it be learned? One layer, trained from random weights on the parity of every prefix, lengths growing from 4 to 16.
What matters is where it starts: a head can turn by at most π times its step size Δ, so heads that start at the usual
Δ < 0.1 cannot make half a turn; here they start near 1 (`dt_min`, `dt_max`). The same model without rotation is trained
the same way.
"""

# %%
STEPS, WIDTH, BATCH = 300, 16, 16


def parity_batch(key, batch, width):
    tokens = 1 + jax.random.bernoulli(key, 0.5, (batch, width)).astype(jnp.int32)
    return tokens, 1 + jnp.cumsum(tokens - 1, axis=1) % 2


def parity_model(rope_fraction):
    return LanguageModel(
        ModelConfig(
            vocab_size=3, pad_vocab_multiple=1, tie_embeddings=False, d_model=8, n_layers=1, d_intermediate=0,
            headdim=8, d_state=8, rope_fraction=rope_fraction, dt_min=0.8, dt_max=1.25, a_floor=0.0,
            dtype="float32", remat="none",
        )
    )  # fmt: skip


def train(model, seed):
    key, init_key = jax.random.split(jax.random.key(seed))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-2, STEPS)))

    def loss(params, key, length):
        tokens, answers = parity_batch(key, BATCH, WIDTH)
        losses = optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": params}, tokens), answers)
        return jnp.mean(losses, where=(jnp.arange(WIDTH) < length)[None, :])

    def step(carry, i):
        params, state = carry
        length = jnp.minimum(4 + 2 * WIDTH * i // STEPS, WIDTH)
        value, gradient = jax.value_and_grad(loss)(params, jax.random.fold_in(key, i), length)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    @jax.jit
    def run():
        params = model.init(init_key, jnp.zeros((1, 1), jnp.int32))["params"]
        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(STEPS))
        return params, losses

    return run()


test_tokens, test_answers = parity_batch(jax.random.key(1), 128, 256)
models = {"rotation": parity_model(1.0), "no rotation": parity_model(0.0)}
curves, accuracy, learned = {}, {}, {}
for name, model in models.items():
    learned[name], curves[name] = train(model, seed=0)
    logits = jax.jit(model.apply)({"params": learned[name]}, test_tokens)
    accuracy[name] = np.asarray(logits.argmax(axis=-1) == test_answers).mean(axis=0)
by_hand = exact.parity()
logits = jax.jit(LanguageModel(by_hand.config).apply)({"params": by_hand.params}, test_tokens)
accuracy["by hand"] = np.asarray(logits.argmax(axis=-1) == test_answers).mean(axis=0)

figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for name, losses in curves.items():
    axes[0].semilogy(losses, label=name, linewidth=1)
axes[0].axhline(math.log(2), color="gray", linestyle=":", label="guessing")
axes[0].set(xlabel="step", ylabel="loss (nats)")
axes[0].legend()
for name, shares in accuracy.items():
    axes[1].plot(1 + np.arange(len(shares)), shares, label=name)
axes[1].axvline(WIDTH, color="gray", linestyle=":", label="longest in training")
axes[1].set(xlabel="bits read", ylabel="right", xscale="log")
axes[1].legend(loc="lower left")

# The phase after one token, from the decode state: how far a 0 and a 1 turn each head's angles.
prefill = jax.jit(models["rotation"].apply, static_argnames="method")
_, state = prefill({"params": learned["rotation"]}, jnp.array([[1], [2]]), method="prefill")
turns = np.asarray(state[0].angle) / (2 * np.pi)  # [bit, head, angle]
print("turns between a 0 and a 1, per head and angle; half a turn is parity:")
print(np.round((turns[1] - turns[0]) % 1, 3))
print({name: f"up to {WIDTH} bits {a[:WIDTH].mean():.3f}, up to 256 {a.mean():.3f}" for name, a in accuracy.items()})

# %% [markdown]
r"""
Some of the learned turns are near a half, none is at it, and their errors add up: accuracy falls beyond the lengths
seen in training, where the weights written by hand stay right. What a model can express and what training finds are two
questions.
"""

# %% [markdown]
r"""
## 3. MIMO

A SISO token adds one outer product $x \otimes B$ to a head's state $[p, n]$; a MIMO token of rank $r$ adds $r$ of them
and reads with $r$ vectors $C$. The state stays as large, and decoding moves hardly more bytes, with $r$ times the
arithmetic, which a GPU that waits for memory has to spare.

A task that shows what it is worth: a token brings four pairs (key, value) at once, four such tokens follow each other,
then each of the 16 keys is asked for. One head with a state of 8 × 16 holds all 16 values exactly if each is written
under its own key. Rank 1 has one key per token, serves one of the four values and loses ¾ of the variance; rank 2 loses
½; rank 4 nothing. (Four heads with a quarter of the state and a B and C of their own each, `ngroups=4`, could do this
too; in MIMO every rank reaches the whole state.)
"""

# %%
KEYS, PAIRS, VALUE = 16, 4, 2  # pairs of a token


def recall_batch(key, batch):
    """Tokens [keys one-hot, values, 0] of all pairs, then a question [0, 0, key] for each key; answers [b, 16, 2]."""
    order_key, value_key = jax.random.split(key)
    order = jnp.argsort(jax.random.uniform(order_key, (batch, KEYS)), axis=1)
    values = jax.random.normal(value_key, (batch, KEYS, VALUE))
    written = [jax.nn.one_hot(order, KEYS), jnp.take_along_axis(values, order[..., None], axis=1)]
    written = jnp.concatenate([v.reshape(batch, KEYS // PAIRS, -1) for v in written], axis=-1)
    questions = jnp.broadcast_to(jnp.eye(KEYS), (batch, KEYS, KEYS))
    before = written.shape[1:]
    return jnp.concatenate(
        [jnp.pad(written, ((0, 0), (0, 0), (0, KEYS))), jnp.pad(questions, ((0, 0), (0, 0), (before[1], 0)))], axis=1
    ), values


def recall(params, u):
    """One Mamba-3 head without decay, rotation and gate: λ = 1, Δ = 1."""
    rank = params["mimo_x"].shape[1]
    one = jnp.ones((*u.shape[:2], 1))
    b, c = ((u @ params[name]).reshape(*u.shape[:2], rank, 1, KEYS) for name in ("b", "c"))
    x = (u @ params["x"])[:, :, None]
    mimo = {name: params[name] for name in ("mimo_x", "mimo_o")}
    y = mamba3_scan(x, one, 0 * one, b, c, one, jnp.zeros((*u.shape[:2], 0)), **mimo)
    return y[:, -KEYS:, 0] @ params["out"]


def train_recall(rank, seed, steps=500, width=PAIRS * VALUE):
    shapes = {"x": (PAIRS * (KEYS + VALUE) + KEYS, width), "out": (width, VALUE), "mimo_x": (1, rank, width)}
    shapes |= {name: (shapes["x"][0], rank * KEYS) for name in ("b", "c")} | {"mimo_o": (1, rank, width)}
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, steps))

    def step(carry, key):
        params, state = carry
        u, answer = recall_batch(key, 32)
        loss, gradient = jax.value_and_grad(lambda params: jnp.mean((recall(params, u) - answer) ** 2))(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), loss

    @jax.jit
    def run():
        keys = jax.random.split(jax.random.key(seed), len(shapes) + steps)
        params = {
            k: jax.random.normal(i, v) * 0.3 for (k, v), i in zip(shapes.items(), keys[: len(shapes)], strict=True)
        }
        return jax.lax.scan(step, (params, optimizer.init(params)), keys[len(shapes) :])[1]

    return np.asarray(run())


def decode_step(rank, heads=64, p=64, n=128):
    """Bytes and FLOP of a decode step of one scan of the 1.5B models, batch 1: arrays in and out, once each."""
    wide = {"x": (1, heads, p), "z": (1, heads, p), "b": (1, rank, 1, n), "c": (1, rank, 1, n)}
    narrow = {name: (1, heads) for name in ("dt", "a", "lam")} | {"omega": (1, n // 4)}
    narrow |= {name: (heads, rank, n) for name in ("b_bias", "c_bias")} | {"d": (heads,)}
    if rank > 1:
        narrow |= {name: (heads, rank, p) for name in ("mimo_x", "mimo_z", "mimo_o")}
    inputs = {
        k: jax.ShapeDtypeStruct(v, jnp.bfloat16 if k in wide else jnp.float32) for k, v in (wide | narrow).items()
    }
    inputs["state"] = jax.eval_shape(lambda: Mamba3State.zeros(1, heads, p, n, rank, n // 4, jnp.bfloat16))
    compiled = jax.jit(lambda inputs: mamba3_step(**inputs)).lower(inputs).compile()
    outputs = jax.eval_shape(lambda inputs: mamba3_step(**inputs), inputs)
    n_bytes = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves((inputs, outputs)))
    return n_bytes, compiled.cost_analysis()["flops"]


ranks = (1, 2, 4)
recalled = {rank: train_recall(rank, seed=0) for rank in ranks}
steps = {rank: decode_step(rank) for rank in ranks}

figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for rank, losses in recalled.items():
    axes[0].plot(np.convolve(losses, np.ones(10) / 10, "valid"), label=f"rank {rank}", linewidth=1)
    axes[0].axhline(1 - rank / PAIRS, color="gray", linestyle=":", linewidth=1)
axes[0].set(xlabel="step", ylabel="share of variance lost", title="same state, 8 × 16", ylim=(-0.05, 1.2))
axes[0].legend()
axes[1].bar([str(rank) for rank in ranks], [flop / n_bytes for n_bytes, flop in steps.values()])
axes[1].set(xlabel="rank", ylabel="FLOP per byte", title="a decode step of the 1.5B models' scan")
for rank, (n_bytes, flop) in steps.items():
    lost = recalled[rank][-20:].mean()
    print(f"rank {rank}: loses {lost:.3f}; a decode step moves {n_bytes / 1e6:.2f} MB and takes {flop / 1e6:.1f} MFLOP")

# %% [markdown]
r"""
## 4. Prefill and decode

The chunked scan and the decode step are two programs for one recurrence. Over 512 tokens of a random two-layer MIMO
model in float32, the logits of decoding token by token are those of one prefill, up to rounding, and the difference
does not grow: the phases are summed in turns in one, wrapped at every step in the other (docs/mamba3.md).
"""

# %%
model = LanguageModel(
    ModelConfig(vocab_size=256, d_model=64, n_layers=2, d_intermediate=128, headdim=32, d_state=32, mimo_rank=2,
                dtype="float32")
)  # fmt: skip
tokens = jax.random.randint(jax.random.key(0), (1, 512), 0, 256)
variables = jax.jit(model.init)(jax.random.key(1), tokens[:, :1])


@jax.jit
def decode(tokens):
    def step(state, token):
        logits, state = model.apply(variables, token, state, method="step")
        return state, logits

    return jax.lax.scan(step, model.initial_state(*tokens.shape), tokens.T)[1].swapaxes(0, 1)


prefilled, decoded = jax.jit(model.apply)(variables, tokens), decode(tokens)
difference = np.asarray(jnp.max(jnp.abs(prefilled - decoded), axis=-1) / jnp.max(jnp.abs(prefilled)))[0]

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.semilogy(difference, ".", markersize=3)
axes.axhline(np.finfo(np.float32).eps, color="gray", linestyle=":", label="float32's unit, 1.2e-7")
axes.set(xlabel="token", ylabel="largest difference of logits", title="decode against prefill, relative")
axes.legend()
print(f"largest difference of {decoded.size} logits, relative to the largest: {difference.max():.1e}")
