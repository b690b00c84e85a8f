"""The program: python -m m3jax.generate on a checkpoint of a tiny untrained model."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import m3jax
from m3jax import evaluate
from m3jax.config import build_config
from m3jax.data.tokenizer import ByteTokenizer
from m3jax.errors import CheckpointError, ConfigError, DataError
from m3jax.generate import main
from m3jax.inference import generate_text
from m3jax.models.language_model import LanguageModel
from m3jax.training.checkpoint import Checkpointer
from m3jax.training.step import init_state
from tests.tolerances import rounding

CONFIG = build_config(
    {
        "model": dict(
            vocab_size=258, d_model=32, n_layers=1, d_intermediate=0, headdim=16, d_state=16, dtype="float32"
        ),
        "train": dict(ema_decay=0.5, steps=2000),
    }
)
MODEL = LanguageModel(CONFIG.model)
PROMPTS = ["In the beginning", "Ω"]


@pytest.fixture(scope="module")
def state():
    state = jax.jit(lambda: init_state(CONFIG, MODEL))()
    return state.replace(ema=jax.tree.map(lambda p: -p, state.params))


@pytest.fixture(scope="module")
def workdir(state, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    write_run(workdir, CONFIG, state)
    return workdir


def write_run(workdir, config, state):
    checkpointer = Checkpointer(workdir, config.checkpoint)
    checkpointer.save(state, config, ByteTokenizer(), {})
    checkpointer.wait()


@pytest.fixture
def run(workdir, capsys):
    def run(*arguments):
        main(["--checkpoint", str(workdir), "--max-new-tokens=12", *arguments])
        return capsys.readouterr().out

    return run


def expected(params, prompts, seed=0, **options):
    return generate_text(
        MODEL, params, ByteTokenizer(), prompts, max_new_tokens=12, key=jax.random.key(seed), **options
    )


def test_single_prompt_is_streamed_and_printed_alike(run, state):
    (text,) = expected(state.params, PROMPTS[:1])
    assert len(text) > 5
    assert run("--prompt", PROMPTS[0]) == run("--prompt", PROMPTS[0], "--no-stream") == f"{PROMPTS[0]}{text}\n"


def test_several_prompts_and_samples_follow_one_another(run, state, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[1]}\n\n", encoding="utf-8")
    printed = run("--prompt", PROMPTS[0], "--prompt-file", str(tmp_path / "prompts.txt"), "--num-samples=2", "--seed=5")
    repeated = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    texts = expected(state.params, repeated, seed=5)
    assert len(set(texts)) == 4
    assert printed == "".join(
        f"--- {i} of 4 ---\n{prompt}{text}\n" for i, (prompt, text) in enumerate(zip(repeated, texts, strict=True), 1)
    )


def test_options_reach_the_sampler(run, state):
    greedy = expected(state.params, PROMPTS[:1], temperature=0)[0]
    for options in (["--temperature=0"], ["--top-k=1"], ["--top-p=1e-9"], ["--min-p=1"]):
        assert run("--prompt", PROMPTS[0], *options) == f"{PROMPTS[0]}{greedy}\n"
    assert run("--prompt", PROMPTS[0], "--top-k=1", "--stop", greedy[2:4]) == f"{PROMPTS[0]}{greedy[:2]}\n"
    average = expected(state.ema, PROMPTS[:1], temperature=0)[0]
    assert run("--prompt", PROMPTS[0], "--top-k=1", "--ema", "--step=0") == f"{PROMPTS[0]}{average}\n" != greedy


def test_conversation_keeps_its_state(run, state, monkeypatch, tmp_path):
    """Two turns, then a third of another process; the text of each is that of the whole before it."""
    typed = iter(["One", "two", EOFError, "three", EOFError])

    def read(prompt):
        line = next(typed)
        if line is EOFError:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    flags = ["--interactive", "--temperature=0", "--session", str(tmp_path / "s")]
    first, second = run(*flags), run(*flags)
    assert first.startswith("A turn ends after 12 tokens, at the end of a text. Ctrl-D ends the conversation.\n")
    text, expected_turns = [256], []
    for line in ("One\n", "two\n", "three\n"):
        text += line.encode()
        tokens = m3jax.generate(MODEL, state.params, [text], max_new_tokens=12, temperature=0, stop_tokens=[257])[0]
        text += tokens[tokens >= 0].tolist()
        expected_turns.append(ByteTokenizer().decode(tokens[tokens >= 0]))
    turns = [turn.rstrip("\ufffd") for turn in expected_turns]  # a character that is cut off is left out
    assert first.split("\n", 1)[1] == f"{turns[0]}\n{turns[1]}\n\n"
    greeting, rest = second.split("\n", 1)
    assert greeting.startswith(f"The conversation in {tmp_path / 's'} goes on after ")
    assert rest.split("\n", 1)[1] == f"{turns[2]}\n\n"


def test_saved_conversation_keeps_its_room_or_is_given_another(monkeypatch, tmp_path, capsys):
    attention = dict(mixers="attention", attention_heads=2, attention_headdim=16)
    config = build_config({"model": dataclasses.asdict(CONFIG.model) | attention})
    write_run(tmp_path, config, jax.jit(lambda: init_state(config, LanguageModel(config.model)))())
    flags = ["--checkpoint", str(tmp_path), "--interactive", "--max-new-tokens=3", "--session", str(tmp_path / "s")]

    def converse(*more):
        monkeypatch.setattr(importlib.import_module("m3jax.generate"), "typed_lines", lambda: iter(["One\n"]))
        main([*flags, *more])

    converse("--capacity=8")
    with pytest.raises(ConfigError, match="4 tokens after 8 need room for 12: expected at most capacity = 8"):
        converse()
    converse("--capacity=15")
    assert "goes on after 8 tokens" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="capacity = 14: expected room for the 15 tokens"):
        converse("--capacity=14")


def test_evaluation_by_steps_is_that_of_the_sequence(workdir, tmp_path, capsys):
    """Documents and all; a state in bfloat16 gives another number, by less than its rounding explains."""
    (tmp_path / "text.txt").write_text("all work and no play\n" * 9)
    flags = ["--config.data.sequence_length=24", "--config.data.batch_size=2", "--batches=1"]
    flags += [f"--config.data.validation_source={tmp_path}/text.txt", f"--config.data.cache_dir={tmp_path}"]

    def loss(*more):
        evaluate.main(["--checkpoint", str(workdir), "--json", str(tmp_path / "out.json"), *flags, *more])
        return json.loads((tmp_path / "out.json").read_text())["loss"]

    whole, steps = loss(), loss("--by-steps")
    narrow = loss("--by-steps", "--config.model.state_dtype=bfloat16")
    assert "by decode steps, state in bfloat16\n" in capsys.readouterr().out
    assert abs(steps - whole) <= rounding("float32", 32) * whole
    assert 0 < abs(narrow - steps) <= rounding("bfloat16", 32) * whole


def test_as_a_program(workdir, state):
    arguments = ["--checkpoint", str(workdir), "--prompt", PROMPTS[1], "--max-new-tokens=12"]
    command = [sys.executable, "-W", "error", "-m", "m3jax.generate", *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=os.environ | {"PYTHONUTF8": "1"})
    assert done.stderr == ""
    assert done.stdout == f"{PROMPTS[1]}{expected(state.params, PROMPTS[1:])[0]}\n"
    assert done.returncode == 0


def test_the_program_does_not_hide_the_function(state):
    assert importlib.import_module("m3jax.generate").main is main
    tokens = m3jax.generate(MODEL, state.params, np.array([[1, 2]]), max_new_tokens=3, temperature=0)
    assert tokens.shape == (1, 3)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ConfigError, [], "Nothing to continue: give --prompt"),
        (
            ConfigError,
            ["--interactive", "--prompt=a"],
            "--interactive takes lines from the keyboard: expected no --prompt",
        ),
        (ConfigError, ["--prompt=a", "--session=s"], "--session keeps a conversation: expected --interactive"),
        (ConfigError, ["--prompt=a", "--repetition-penalty=0"], "repetition_penalty = 0.0: expected .* over 0"),
        (ConfigError, ["--prompt=a", "--num-samples=0"], "--num-samples: 0: expected at least 1"),
        (ConfigError, ["--prompt=a", "--seed=-1"], r"--seed: -1: expected an integer in \[0, 2\^32\)"),
        (ConfigError, ["--prompt=a", "--top-k=many"], "--top-k: invalid int value: 'many'"),
        (ConfigError, ["--prompt=a", "--temprature=0"], "Unknown argument --temprature=0. Did you mean --temperature"),
        (ConfigError, ["--prompt=a", "--max-new-tokens=0"], "max_new_tokens = 0"),
        (ConfigError, ["--prompt=a", "--top-p=2"], "top_p = 2.0"),
        (ConfigError, ["--prompt=a", "--stop="], "stop holds ''"),
        (DataError, ["--prompt-file=none.txt"], "--prompt-file none.txt: No such file"),
        (CheckpointError, ["--prompt=a", "--step=7"], "step 7"),
    ],
)
def test_bad_arguments_are_named(run, error, arguments, message):
    with pytest.raises(error, match=message):
        run(*arguments)


def test_prompt_file_of_another_encoding_is_named(run, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match=r"prompts.txt: .*UTF-8"):
        run("--prompt-file", str(tmp_path / "prompts.txt"))
