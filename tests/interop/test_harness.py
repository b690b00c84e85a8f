"""lm-evaluation-harness on tasks of local data: its numbers against direct computations. Skipped without lm_eval."""

import functools
import json

import jax
import numpy as np
import pytest
import tokenizers

from m3jax import evaluate
from m3jax.config import build_config
from m3jax.data.tokenizer import ByteTokenizer, JsonTokenizer
from m3jax.errors import ConfigError
from m3jax.inference import generate_text
from m3jax.models.language_model import LanguageModel
from m3jax.training.checkpoint import Checkpointer
from m3jax.training.step import init_state
from tests.inference.test_text import Script, ScriptedModel
from tests.tolerances import rounding

pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
from lm_eval.api.instance import Instance

from m3jax.interop import harness

BYTES, BOS = ByteTokenizer(), ByteTokenizer.bos_id
MAX_LENGTH, TERMS = 48, 48 * 8 * 16

CHOICES = {
    "In the beginning God created the": ["heaven", "man", "zebra"],
    "And Abraham begat": ["Isaac", "Moses"],
    "And the earth was without form, and void; and darkness": ["was", "is"],
    "Thou shalt not": ["kill", "sing", "sleep", "eat"],
}
TEXTS = [{"text": "In the beginning."}, {"text": "And the earth was without form" + ", and void" * 6}]
COMMON = "dataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files:\n    test: {file}\n"
TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
    "doc_to_target: answer\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n"
    "  - metric: bits_per_byte\n  - metric: word_perplexity\n",
    "continue": "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs:\n  until: ['e']\n  max_gen_toks: 8\nmetric_list:\n  - metric: exact_match\n",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, model, parameters) of a model of random parameters."""
    model = {"vocab_size": 258, "d_model": 16, "n_layers": 1, "d_intermediate": 0, "headdim": 8, "d_state": 8}
    data = {"sequence_length": MAX_LENGTH, "batch_size": 4}
    config = build_config({"model": model | {"dtype": "float32"}, "data": data})
    model = LanguageModel(config.model)
    state = jax.jit(lambda: init_state(config, model))()
    # Larger ones than at the start, so that the most probable tokens differ.
    state = state.replace(params=jax.tree.map(lambda leaf: 5 * leaf, state.params))
    workdir = tmp_path_factory.mktemp("run")
    checkpointer = Checkpointer(workdir, config.checkpoint)
    checkpointer.save(state, config, BYTES, {})
    checkpointer.wait()
    return workdir, model, state.params


@pytest.fixture(scope="module")
def log_p(run):
    """log p of tokens after tokens, all of them read, at most MAX_LENGTH."""
    _, model, params = run
    logits = jax.jit(model.apply)

    def sum_of(context, tokens):
        read = [*context, *tokens][:-1]
        assert len(read) <= MAX_LENGTH
        padded = np.array([read + [9] * (MAX_LENGTH - len(read))], np.int32)
        values = np.asarray(logits({"params": params}, padded)[0], np.float64)[len(context) - 1 : len(read)]
        values -= np.log(np.exp(values).sum(-1, keepdims=True))
        return float(values[np.arange(len(tokens)), tokens].sum())

    return sum_of


@pytest.fixture
def wrapped(run):
    _, model, params = run
    return harness.HarnessModel(model, params, BYTES, max_length=MAX_LENGTH, batch_size=4)


def requests(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def rolling(log_p, text):
    """Σ log p of a text's bytes, each predicted once, in windows that read as much as fits."""
    tokens = list(text.encode())
    total = log_p([BOS], tokens[:MAX_LENGTH])
    for start in range(MAX_LENGTH, len(tokens), MAX_LENGTH):
        end = min(start + MAX_LENGTH, len(tokens))
        total += log_p(tokens[end - MAX_LENGTH - 1 : start], tokens[start:end])
    return total


def write_tasks(folder, rows):
    for name, text in TASKS.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        (folder / f"{name}.yaml").write_text(f"task: m3jax_{name}\n{COMMON.format(file=file)}{text}")


def test_command_on_local_tasks(run, log_p, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "TaskManager", functools.cache(harness.TaskManager))  # reads 14,000 files
    workdir, model, params = run
    prompts = ["In the beginning", "And", "And he said unto"]
    answers = generate_text(model, params, BYTES, prompts, max_new_tokens=8, temperature=0, stop=["e"])
    answers[1] += "?"
    choices = []
    for i, (question, options) in enumerate(CHOICES.items()):
        context, continuations = [BOS, *question.encode()], [list(f" {answer}".encode()) for answer in options]
        scores = [log_p((context + c)[-(MAX_LENGTH + 1) :][: -len(c)], c) for c in continuations]
        right = (int(np.argmax(scores)) + i % 2) % len(scores)  # of every other question one that is not the likeliest
        by_length = np.argmax(np.array(scores) / [len(answer) for answer in options]) == right
        choices.append({"question": question, "choices": options, "answer": right, "by_length": bool(by_length)})
    to_continue = [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]
    rows = {"choice": choices, "rolling": TEXTS, "continue": to_continue}
    write_tasks(tmp_path, rows)
    names = [f"m3jax_{name}" for name in TASKS]
    arguments = ["--checkpoint", str(workdir), "--tasks", *names, "--include-path", str(tmp_path)]
    evaluate.main([*arguments, "--json", str(tmp_path / "out.json")])
    summary = json.loads((tmp_path / "out.json").read_text())
    results = {name: summary["results"][f"m3jax_{name}"] for name in TASKS}

    assert results["choice"]["acc,none"] == 0.5
    assert results["choice"]["acc_norm,none"] == np.mean([row["by_length"] for row in choices])

    total = sum(rolling(log_p, row["text"]) for row in TEXTS)
    n_bytes, n_words = (sum(len(of(row["text"])) for row in TEXTS) for of in (str.encode, str.split))
    bits, perplexity = results["rolling"]["bits_per_byte,none"], results["rolling"]["word_perplexity,none"]
    assert bits == pytest.approx(-total / n_bytes / np.log(2), rel=rounding("float32", TERMS))
    assert np.log(perplexity) == pytest.approx(-total / n_words, rel=rounding("float32", TERMS))

    assert results["continue"]["exact_match,none"] == pytest.approx(2 / 3)
    assert summary["step"] == 0 and summary["n-samples"]["m3jax_choice"]["effective"] == len(CHOICES)
    assert "m3jax_rolling" in capsys.readouterr().out

    evaluate.main([*arguments, "--limit", "1", "--json", str(tmp_path / "out.json")])
    limited = json.loads((tmp_path / "out.json").read_text())
    assert {counts["effective"] for counts in limited["n-samples"].values()} == {1}


def test_likelihoods(wrapped, log_p):
    long = "a context of more bytes than the model reads, " * 2
    pairs = [("And the", " earth"), ("", "And"), ("And the ", "sea"), ("\n", "x"), (long, " end")]
    found = wrapped.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    expected = [
        log_p([BOS, *b"And the"], list(b" earth")),
        log_p([BOS], list(b"And")),
        log_p([BOS, *b"And the"], list(b" sea")),  # the space goes to the continuation
        log_p([BOS], list(b"\nx")),
        log_p([*long.rstrip().encode(), *b"  end"][-(MAX_LENGTH + 1) : -5], list(b"  end")),
    ]
    assert [score for score, _ in found] == pytest.approx(expected, rel=rounding("float32", TERMS))


def test_greedy_continuation_is_told(run, wrapped):
    _, model, params = run
    contexts = [f"the {letter}" for letter in "abcdefghijklmnop"]
    texts = generate_text(model, params, BYTES, contexts, max_new_tokens=1, temperature=0)
    pairs = [(context, text) for context, text in zip(contexts, texts, strict=True) if text.strip() and text.isascii()]
    assert pairs
    pairs += [(context, chr(ord(text) ^ 1)) for context, text in pairs]
    found = wrapped.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True] * (len(pairs) // 2) + [False] * (len(pairs) // 2)


def test_rolling_takes_every_token_once(wrapped, log_p):
    texts = ["short", "x" * MAX_LENGTH, "And the earth was without form, and void; " * 3, ""]
    found = wrapped.loglikelihood_rolling(requests("loglikelihood_rolling", *((t,) for t in texts)), disable_tqdm=True)
    expected = [*(rolling(log_p, text) for text in texts[:3]), 0]
    assert found == pytest.approx(expected, rel=rounding("float32", TERMS))


def says(*texts):
    """A wrapped model that says the texts in its rows, whatever the prompts."""
    rows = [[*text.encode(), BYTES.eos_id] for text in texts]
    longest = max(map(len, rows))
    script = Script(tuple((*row, *[BYTES.eos_id] * (longest - len(row))) for row in rows))
    return harness.HarnessModel(ScriptedModel(script), {}, BYTES, max_length=1000, batch_size=4)


def continued(model, arguments, *prompts):
    return model.generate_until(requests("generate_until", *((p, arguments) for p in prompts)), disable_tqdm=True)


def test_generation_ends():
    model = says("Abraham begat Isaac", "Amen")
    assert continued(model, {"until": ["\n"]}, "0", "1") == ["Abraham begat Isaac", "Amen"]
    assert continued(model, {"until": [" begat", ""], "max_gen_toks": 20}, "0", "1") == ["Abraham", "Amen"]
    assert continued(model, {"until": "h", "max_gen_toks": 3}, "0", "1") == ["Abr", "Ame"]


def test_generation_by_length_and_kind(run, wrapped, monkeypatch):
    _, model, params = run
    prompts = ["And it came to pass", "In", "x" * 60, "And the", "Thou", "God", ""]
    asked = [{"until": [], "max_gen_toks": 4 + 4 * (i % 2)} for i in range(len(prompts))]
    calls, generate = [], harness.generate
    monkeypatch.setattr(
        harness, "generate", lambda *args, **options: calls.append(args[2]) or generate(*args, **options)
    )
    found = wrapped.generate_until(requests("generate_until", *zip(prompts, asked, strict=True)), disable_tqdm=True)
    for prompt, arguments, text in zip(prompts, asked, found, strict=True):
        if len(prompt) < 60:
            n = arguments["max_gen_toks"]
            assert [text] == generate_text(model, params, BYTES, [prompt], max_new_tokens=n, temperature=0)
    assert max(len(prompt) for rows in calls for prompt in rows) == MAX_LENGTH - 4  # of the long one, its end
    assert {len(rows) for rows in calls} <= {1, 2, 4}


def test_samples_of_one_prompt_differ(wrapped):
    sampling = {"until": [], "do_sample": True, "temperature": 1.5, "top_k": 200, "max_gen_toks": 8}
    first, second = continued(wrapped, sampling, "And", "And")
    assert first != second
    assert continued(wrapped, sampling, "And", "And") == [first, second]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"until": [], "no_repeat_ngram_size": 2}, "no_repeat_ngram_size = 2: generation here has .*temperature"),
        ({"until": [], "num_beams": 4}, "num_beams = 4"),
        ({"until": [], "max_gen_toks": MAX_LENGTH}, f"max_gen_toks = {MAX_LENGTH}.*config.data.sequence_length"),
    ],
)
def test_what_generation_cannot_do(wrapped, arguments, message):
    with pytest.raises(ConfigError, match=message):
        continued(wrapped, arguments, "And")


def tokenizer(special_tokens, processor=None):
    content = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    content.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    content.add_special_tokens(special_tokens)
    if processor is not None:
        content.post_processor = processor
    return JsonTokenizer("words", content.to_str())


def test_bos_is_where_the_tokenizer_puts_it():
    template = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    options = {"max_length": MAX_LENGTH, "batch_size": 4}
    with_bos = harness.HarnessModel(None, {}, tokenizer(["<s>", "</s>"], template), **options)
    assert with_bos.tok_encode("a b") == [3, 0, 1] and with_bos.prefix_token_id == 3
    assert with_bos.tok_encode("a b", add_special_tokens=False) == [0, 1]
    plain = tokenizer(["<|endoftext|>"])
    without = harness.HarnessModel(None, {}, plain, **options)
    assert without.tok_encode("a b") == [0, 1] and without.prefix_token_id == without.eot_token_id == 3
    asked = harness.HarnessModel(None, {}, plain, add_bos=True, **options)
    assert asked.tok_encode("a b") == [3, 0, 1]
    with pytest.raises(ConfigError, match="neither BOS nor EOS"):
        harness.HarnessModel(None, {}, tokenizer([]), **options).loglikelihood(requests("loglikelihood", ("", "a")))
    with pytest.raises(ConfigError, match="has no BOS"):
        harness.HarnessModel(None, {}, tokenizer([]), add_bos=True, **options)


def test_unknown_task(run):
    with pytest.raises(ConfigError, match=r"--tasks lambada_opnai: .* Did you mean lambada_openai"):
        evaluate.main(["--checkpoint", str(run[0]), "--tasks", "lambada_opnai"])
