"""The configuration: frozen dataclasses with every field and its default, checked once at the boundary.

A config file (see configs/) starts from `default_config()`, a locked `ConfigDict` with every key there is, and changes
what differs. `build_config` checks it whole and returns the dataclasses; nothing below this module sees a ConfigDict.
"""

import copy
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from m3jax.errors import ConfigError

_DTYPES = ("float32", "bfloat16", "float64")
# Keys of the model that are read when parameters are initialised, and never after.
INITIALISATION_KEYS = ("dt_min", "dt_max", "dt_init_floor", "residuals_per_layer")
MIXERS = ("attention", "gated_deltanet", "mamba2", "mamba3")
_IMPLEMENTATIONS = ("mosaic", "reference", "triton", "xla")


@dataclass(frozen=True)
class ModelConfig:
    """The language model. Names follow the released Mamba-3 configs; the letters are those of docs/mamba3.md."""

    vocab_size: int = 128256
    pad_vocab_multiple: int = 8  # the embedding has vocab_size rounded up to a multiple of this many rows
    tie_embeddings: bool = True  # the head is the embedding; False: a weight of its own
    d_model: int = 768
    n_layers: int = 12
    mixers: str = "mamba3"  # of the layers in turn, repeated to the last: names with commas between, see mixer_pattern
    d_intermediate: int = 1500  # SwiGLU width, rounded up to a multiple of 128; 0 = no MLP
    expand: int = 2  # heads * headdim = expand * d_model
    headdim: int = 64  # p
    d_state: int = 128  # n
    ngroups: int = 1  # g, heads that share B and C
    mimo_rank: int = 1  # r; 1 = SISO
    rope_fraction: float = 0.5  # share of the state's coordinates that rotate: 0, 0.5 or 1
    rotation: str = "data"  # what turns them: data, rates from the input; standard, RoPE's fixed ones, base 10,000
    fixed_lambda: float | None = None  # λ of every token: 1 = exponential Euler, 0.5 = trapezoid; None = from the input
    bc_bias: bool = True  # biases on B and C
    a_activation: str = "heavy_tail"  # or "softplus", what the first released version used
    a_floor: float = 1e-4
    outproj_norm: bool = False  # RMSNorm per head before the gate (hybrids)
    dt_min: float = 1e-3  # the initial step sizes are log-uniform in [dt_min, dt_max], never under dt_init_floor
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    d_conv: int = 4  # tokens that the short convolution of mamba2 and gated_deltanet sees
    gdn_heads: int = 4
    gdn_headdim: int = 128  # of queries and keys
    gdn_expand_v: int = 2  # width of values over that of keys
    gdn_negative_eigenvalues: bool = False  # write strengths up to 2 instead of 1: eigenvalues down to -1
    attention_heads: int = 12  # of queries
    attention_kv_heads: int | None = None  # of keys and values, a divisor; None = as many
    attention_headdim: int = 64
    rope_theta: float = 10_000.0  # base of attention's rotary positions; 0 = no positions (NoPE)
    residuals_per_layer: int = 2  # the layers' output projections start divided by sqrt(residuals_per_layer * n_layers)
    dtype: str = "bfloat16"  # of activations and matmul operands
    param_dtype: str = "float32"
    state_dtype: str = "float32"  # of the recurrent state carried between calls
    chunk_size: int | None = None  # None = the scan's own choice
    scan_implementation: str | None = None  # mosaic, reference, triton or xla; None = the fastest
    remat: str = "full"  # what the backward recomputes per layer: none, dots (all but matmuls and scans) or full
    scan_layers: bool = True  # one loop over the layers; False: none, for faster steps and longer compilation

    @property
    def mixer_pattern(self) -> tuple[str, ...]:
        """The mixers of the first layers, after which they repeat."""
        return tuple(name.strip() for name in self.mixers.split(","))

    @property
    def d_inner(self) -> int:
        """Width of the mixer's inner stream, heads * headdim."""
        return self.expand * self.d_model

    @property
    def n_heads(self) -> int:
        """Number of heads h."""
        return self.d_inner // self.headdim

    @property
    def n_angles(self) -> int:
        """Number of rotary angles s."""
        return int(self.d_state * self.rope_fraction) // 2

    @property
    def n_kv_heads(self) -> int:
        """Heads of keys and values in attention."""
        return self.attention_kv_heads or self.attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return round_up(self.vocab_size, self.pad_vocab_multiple)

    @property
    def d_mlp(self) -> int:
        """Width of the MLP as built, d_intermediate rounded up to a multiple of 128."""
        return round_up(self.d_intermediate, 128)


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from. `source` and the other fields are described in docs/data.md."""

    source: str = "kjv"  # kjv | a glob of .txt/.jsonl/.parquet (.gz .xz .bz2 .zst) | tokens:DIR | hf:NAME
    validation_source: str | None = None  # None = hold out the last `holdout` of source
    holdout: float = 0.05  # share of the source's text, from its end
    text_field: str = "text"  # of .jsonl, .parquet and Hugging Face data sets
    hf_subset: str | None = None
    hf_split: str = "train"
    tokenizer: str = "bytes"  # bytes | path of a tokenizer.json | a Hugging Face hub name
    sequence_length: int = 2048
    batch_size: int = 256  # sequences per optimizer step, over all devices
    seed: int = 0  # of the order
    cache_dir: str | None = None  # of tokenised sources; None = ~/.cache/m3jax


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up."""

    learning_rate: float = 3e-3  # the peak
    final_learning_rate: float = 1e-5
    schedule: str = "cosine"  # cosine | wsd (warm-up, stable, linear decay) | constant
    warmup_fraction: float = 0.01  # the share of the steps over which the rate rises from 0
    decay_fraction: float = 0.2  # wsd only: the share of the steps over which it decays
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_bc_bias_and_mimo: bool = False  # decay B/C biases and MIMO weights, as the released training code does
    clip_norm: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """The run."""

    steps: int = 190_735  # the schedule's length
    stop_at: int | None = None  # end early at this step, the schedule unchanged
    seed: int = 0  # of the initialisation
    init_from: str | None = None  # whatever m3jax.load takes: a new run starts from the parameters there
    grad_accumulation: int = 1  # microbatches per step
    loss_chunk: int = 1024  # tokens whose logits exist at one time
    ema_decay: float = 0.0  # 0 = no exponential moving average of the parameters
    nonfinite: str = "stop"  # on a non-finite loss or gradient: stop | skip | rollback
    log_every: int = 10
    eval_every: int = 1000  # 0 = only at the end
    eval_batches: int = 50  # 0 = the whole held-out set
    tensorboard: bool = False
    wandb_project: str | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int = 1000  # steps
    keep: int = 3  # the newest
    keep_every: int = 0  # steps whose checkpoints are kept for good; 0 = none


@dataclass(frozen=True)
class MeshConfig:
    """Devices: batch over data * fsdp, parameters and optimizer state over fsdp, every sequence over sequence."""

    data: int = -1  # -1 = all devices that the others leave
    fsdp: int = 1
    sequence: int = 1


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


def default_config() -> ConfigDict:
    """Returns every key with its default, locked, for a config file to change."""
    return ConfigDict(dataclasses.asdict(Config()), type_safe=False).lock()


def config_to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as nested plain dicts, as it is stored with checkpoints."""
    return dataclasses.asdict(config)


def build_config(values: ConfigDict | dict[str, Any]) -> Config:
    """Checks a whole configuration and freezes it.

    Args:
      values: nested keys and values; keys that are left out take their defaults.

    Raises:
      ConfigError: an unknown key, a value of the wrong type, or sizes that do not fit; the message names the key, the
        value, what was expected and, for a typo, the nearest valid key.
    """
    if isinstance(values, ConfigDict):
        values = values.to_dict()
    config = from_values(Config, values)
    _check_model(config.model)
    _check_rest(config)
    return config


def override(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Returns nested `values` with `overrides`, {"group.key": value}, applied; `build_config` checks the result."""
    values = copy.deepcopy(values)
    for dotted, value in overrides.items():
        group, key = dotted.split(".")
        values.setdefault(group, {})[key] = value
    return values


def nearest_key_hint(key: str, valid: Iterable[str]) -> str:
    """Returns ' Did you mean ...?' for the valid key closest to `key`, or the list of valid keys."""
    valid = sorted(valid)
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" Valid keys: {', '.join(valid)}."


def from_values(cls: type, values: Any, path: str = "config") -> Any:
    """Makes a dataclass of nested values.

    Args:
      cls: the dataclass; its fields may be dataclasses.
      values: nested keys and values; keys that are left out take their defaults.
      path: what the keys are under, for messages.

    Raises:
      ConfigError: an unknown key or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{path} = {values!r}: expected a group of keys.")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ConfigError(f"Unknown key {path}.{key}.{nearest_key_hint(key, hints)}")
    return cls(**{key: _convert(hints[key], value, f"{path}.{key}") for key, value in values.items()})


def _convert(expected: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(expected):
        return from_values(expected, value, path)
    allowed = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    if float in allowed and type(value) is int:
        value = float(value)
    if type(value) not in allowed:
        names = " or ".join("None" if t is types.NoneType else t.__name__ for t in allowed)
        raise ConfigError(f"{path} = {value!r} is a {type(value).__name__}: expected {names}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} = {value!r}: expected a finite number.")
    return value


def require(condition: bool, key: str, value: Any, expected: str) -> None:
    """Raises ConfigError with the key, its value and what was expected, unless the condition holds."""
    if not condition:
        raise ConfigError(f"config.{key} = {value!r}: expected {expected}.")


def _check_model(m: ModelConfig) -> None:
    for name in ("vocab_size", "pad_vocab_multiple", "d_model", "n_layers", "expand", "headdim", "d_state", "ngroups",
                 "mimo_rank", "residuals_per_layer"):  # fmt: skip
        require(getattr(m, name) >= 1, f"model.{name}", getattr(m, name), "at least 1")
    for name in m.mixer_pattern:
        one_of("model.mixers", name, MIXERS)
    require(m.n_layers % len(m.mixer_pattern) == 0, "model.n_layers", m.n_layers,
            f"a multiple of the {len(m.mixer_pattern)} layers of model.mixers")  # fmt: skip
    require(m.d_intermediate >= 0, "model.d_intermediate", m.d_intermediate, "a width, or 0 for no MLP")
    require(m.d_inner % m.headdim == 0, "model.headdim", m.headdim, f"a divisor of expand * d_model = {m.d_inner}")
    require(m.n_heads % m.ngroups == 0, "model.ngroups", m.ngroups, f"a divisor of the {m.n_heads} heads")
    require(m.rope_fraction in (0, 0.5, 1), "model.rope_fraction", m.rope_fraction, "0, 0.5 or 1")
    require(
        m.rope_fraction == 0 or (m.d_state * m.rope_fraction) % 2 == 0,
        "model.d_state", m.d_state, f"a size of which rope_fraction = {m.rope_fraction} is an even number",
    )  # fmt: skip
    require(m.d_conv >= 2, "model.d_conv", m.d_conv, "at least 2")
    for name in ("gdn_heads", "gdn_headdim", "gdn_expand_v", "attention_heads", "attention_headdim"):
        require(getattr(m, name) >= 1, f"model.{name}", getattr(m, name), "at least 1")
    kv = m.attention_kv_heads
    require(kv is None or (kv >= 1 and m.attention_heads % kv == 0), "model.attention_kv_heads", kv,
            f"None or a divisor of the {m.attention_heads} heads of queries")  # fmt: skip
    require(m.rope_theta >= 0, "model.rope_theta", m.rope_theta, "a positive base, or 0 for no positions")
    require(m.rope_theta == 0 or m.attention_headdim % 2 == 0, "model.attention_headdim", m.attention_headdim,
            "an even width, whose halves rope_theta turns")  # fmt: skip
    one_of("model.rotation", m.rotation, ("data", "standard"))
    require(m.fixed_lambda is None or 0 < m.fixed_lambda <= 1, "model.fixed_lambda", m.fixed_lambda,
            "None or a number in (0, 1]")  # fmt: skip
    one_of("model.a_activation", m.a_activation, ("heavy_tail", "softplus"))
    require(m.a_floor >= 0, "model.a_floor", m.a_floor, "at least 0")
    require(0 < m.dt_min <= m.dt_max, "model.dt_min", m.dt_min, f"a number in (0, dt_max = {m.dt_max}]")
    for name in ("dtype", "param_dtype", "state_dtype"):
        one_of(f"model.{name}", getattr(m, name), _DTYPES)
    require(m.chunk_size is None or m.chunk_size >= 1, "model.chunk_size", m.chunk_size, "None or at least 1")
    if m.scan_implementation is not None:
        one_of("model.scan_implementation", m.scan_implementation, _IMPLEMENTATIONS)
    one_of("model.remat", m.remat, ("none", "dots", "full"))


def _check_rest(config: Config) -> None:
    data, opt, train, ckpt, mesh = config.data, config.optimizer, config.train, config.checkpoint, config.mesh
    require(0 <= data.holdout < 1, "data.holdout", data.holdout, "a share in [0, 1)")
    require(0 <= data.seed < 2**31, "data.seed", data.seed, "an integer in [0, 2**31)")
    for name in ("sequence_length", "batch_size"):
        require(getattr(data, name) >= 1, f"data.{name}", getattr(data, name), "at least 1")
    require(opt.learning_rate > 0, "optimizer.learning_rate", opt.learning_rate, "a positive number")
    one_of("optimizer.schedule", opt.schedule, ("cosine", "wsd", "constant"))
    require(0 <= opt.warmup_fraction <= 1, "optimizer.warmup_fraction", opt.warmup_fraction, "a share in [0, 1]")
    longest = 1 - opt.warmup_fraction if opt.schedule == "wsd" else 1
    require(0 < opt.decay_fraction <= longest, "optimizer.decay_fraction", opt.decay_fraction,
            f"a share in (0, {longest}], what the warm-up leaves")  # fmt: skip
    for name in ("beta1", "beta2"):
        require(0 <= getattr(opt, name) < 1, f"optimizer.{name}", getattr(opt, name), "a number in [0, 1)")
    for name in ("final_learning_rate", "weight_decay"):
        require(getattr(opt, name) >= 0, f"optimizer.{name}", getattr(opt, name), "at least 0")
    require(opt.clip_norm > 0, "optimizer.clip_norm", opt.clip_norm, "a positive number")
    for name in ("steps", "grad_accumulation", "loss_chunk", "log_every"):
        require(getattr(train, name) >= 1, f"train.{name}", getattr(train, name), "at least 1")
    for name in ("eval_every", "eval_batches"):
        require(getattr(train, name) >= 0, f"train.{name}", getattr(train, name), "at least 0")
    require(train.stop_at is None or 1 <= train.stop_at <= train.steps, "train.stop_at", train.stop_at,
            f"None or a step in [1, train.steps = {train.steps}]")  # fmt: skip
    require(data.batch_size % train.grad_accumulation == 0, "train.grad_accumulation", train.grad_accumulation,
            f"a divisor of data.batch_size = {data.batch_size}")  # fmt: skip
    require(0 <= train.ema_decay < 1, "train.ema_decay", train.ema_decay, "a number in [0, 1)")
    one_of("train.nonfinite", train.nonfinite, ("stop", "skip", "rollback"))
    require(ckpt.every >= 1, "checkpoint.every", ckpt.every, "at least 1")
    require(ckpt.keep >= 1, "checkpoint.keep", ckpt.keep, "at least 1")
    require(ckpt.keep_every >= 0, "checkpoint.keep_every", ckpt.keep_every, "at least 0")
    for name in ("fsdp", "sequence"):
        require(getattr(mesh, name) >= 1, f"mesh.{name}", getattr(mesh, name), "at least 1")
    require(mesh.data == -1 or mesh.data >= 1, "mesh.data", mesh.data, "-1 or at least 1")


def one_of(key: str, value: str, choices: Iterable[str]) -> None:
    """Raises ConfigError with the choices and the nearest of them, unless the value is one."""
    if value not in choices:
        hint = difflib.get_close_matches(value, choices, n=1)
        nearest = f" Did you mean {hint[0]!r}?" if hint else ""
        raise ConfigError(f"config.{key} = {value!r}: expected one of {', '.join(choices)}.{nearest}")


def round_up(value: int, multiple: int) -> int:
    """Returns the least multiple of `multiple` that is not under `value`."""
    return -(-value // multiple) * multiple
