"""Held-out numbers: their definition, and the command that measures a checkpoint."""

import importlib.util
import json
import math

import jax
import numpy as np
import pytest

from m3jax import evaluate as evaluate_command
from m3jax.data import load_tokenizer, open_validation
from m3jax.errors import CheckpointError, ConfigError
from m3jax.training.evaluation import Evaluation, evaluate
from m3jax.training.loop import train
from m3jax.training.sharding import make_mesh
from m3jax.training.step import init_params, make_eval_step
from tests.tolerances import assert_close, rounding
from tests.training.conftest import SmallModel, use_small_model

pytestmark = pytest.mark.usefixtures("quick_compilation", "small_model")


def test_numbers_by_their_definition(small_config):
    config = small_config({"mesh.data": 4, "train.grad_accumulation": 2})
    model, mesh = SmallModel(config.model), make_mesh(config)
    params = init_params(config, model)
    validation = open_validation(config, load_tokenizer("bytes"))
    result = evaluate(make_eval_step(config, model, mesh), params, validation, 0, mesh)

    nll = tokens = 0.0
    for batch in validation.batches():
        logits = np.asarray(jax.jit(model.apply)({"params": params}, batch["tokens"]), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll -= (np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0] * batch["weights"]).sum()
        tokens += batch["weights"].sum()
    assert result.tokens == tokens == validation.n_tokens
    assert result.bytes == validation.n_bytes
    tolerance = rounding(np.float32, int(tokens))
    assert_close(result.loss, nll / tokens, tolerance, "loss")
    assert_close(result.perplexity, math.exp(nll / tokens), 10 * tolerance, "perplexity")
    assert_close(result.bits_per_byte, nll / math.log(2) / validation.n_bytes, tolerance, "bits per byte")


def test_limit_takes_the_first_batches(small_config):
    config = small_config()
    model, mesh = SmallModel(config.model), make_mesh(config)
    validation = open_validation(config, load_tokenizer("bytes"))
    eval_step = make_eval_step(config, model, mesh)
    result = evaluate(eval_step, init_params(config, model), validation, 2, mesh)
    first_two = sum(batch["weights"].sum() for batch in validation.batches(2))
    assert result.tokens == first_two < validation.n_tokens
    assert result.bytes == round(first_two / validation.n_tokens * validation.n_bytes)


def test_few_batches_are_on_their_way(small_config, monkeypatch):
    """Simulated devices wait for one another forever where many programs are started."""
    config = small_config()
    validation, fetch, counts = open_validation(config, load_tokenizer("bytes")), jax.device_get, {"now": 0, "most": 0}

    def eval_step(params, batch):
        counts["now"] += 1
        counts["most"] = max(counts["most"], counts["now"])
        return batch["weights"].sum(), batch["weights"].sum()

    def fetched(v):
        counts["now"] -= 1
        return fetch(v)

    monkeypatch.setattr(jax, "device_get", fetched)
    result = evaluate(eval_step, None, validation, 5, make_mesh(config))
    assert result.loss == 1 and counts == {"now": 0, "most": 2}


def test_text_of_unknown_size_has_no_bits_per_byte():
    result = Evaluation(loss=1.0, perplexity=math.e, tokens=1000, bytes=None, bits_per_byte=None)
    assert str(result) == "loss 1.0000, perplexity 2.718 (1,000 tokens)"
    assert result.record("v") == {"v_loss": 1.0, "v_perplexity": math.e, "v_tokens": 1000}


@pytest.fixture(scope="module")
def workdir(small_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        use_small_model(patch)
        train(small_config({"train.steps": 2, "train.ema_decay": 0.9, "train.eval_batches": 0}), workdir)
    return workdir


def test_command_measures_what_training_measured(workdir, tmp_path, capsys):
    evaluate_command.main(["--checkpoint", str(workdir), "--json", str(tmp_path / "out.json")])
    output = capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text())
    record = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["step"] == 2 and result["checkpoint"] == str(workdir / "checkpoints" / "2")
    for name in ("loss", "perplexity", "bits_per_byte", "tokens", "bytes"):
        assert result[name] == pytest.approx(record[f"validation_{name}"], rel=1e-6)
    assert f"loss            {result['loss']:.5f}" in output and f"tokens          {result['tokens']:,}" in output

    evaluate_command.main(["--checkpoint", str(workdir), "--ema", "--json", str(tmp_path / "out.json")])
    average = json.loads((tmp_path / "out.json").read_text())
    assert average["loss"] == pytest.approx(record["validation_ema_loss"], rel=1e-6)


def test_command_on_other_data(workdir, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("words that the model has not seen\n" * 20)
    evaluate_command.main(
        ["--checkpoint", str(workdir), f"--config.data.validation_source={tmp_path}/other.txt", "--batches", "1"]
    )
    assert f"held-out data   {tmp_path}/other.txt" in capsys.readouterr().out


def test_tasks_need_the_harness(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"is not installed\. Run pip install -e '\.\[eval\]'"):
        evaluate_command.main(["--checkpoint", "/nowhere", "--tasks", "hellaswag"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "a", "--batches", "3"], "--batches, --both-a-activations and --by-steps are for held-out data"),
        (["--tasks", "a", "--limit", "0"], "--limit 0: expected at least 1"),
        (["--tasks", "a", "--num-fewshot", "-1"], "--num-fewshot -1: expected at least 0"),
        (["--tasks", "a", "--include-path", "/nowhere"], "--include-path /nowhere: no such folder"),
        (["--no-add-bos"], r"--add-bos is for --tasks NAME \.\.\."),
    ],
)
def test_options_of_tasks(monkeypatch, arguments, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=message):
        evaluate_command.main(["--checkpoint", "/nowhere", *arguments])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--checkpoint", "/nowhere"], CheckpointError, "/nowhere does not exist"),
        ([], ConfigError, "required: --checkpoint"),
        (["--checkpoint", "{}", "--step", "7"], CheckpointError, "no checkpoint of step 7: there are 2"),
        (["--checkpoint", "{}", "--config.data.sorce=x"], ConfigError, "Did you mean config.data.source"),
        (["--checkpoint", "{}", "--config.model.d_model=64"], CheckpointError, r"\(264, 32\).*\(264, 64\)"),
    ],
)
def test_command_with_bad_input(workdir, arguments, error, message):
    with pytest.raises(error, match=message):
        evaluate_command.main([argument.format(workdir) for argument in arguments])
