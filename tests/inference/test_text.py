"""From text to text: whole characters only, stop strings across tokens, and tokenizers that need context."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from m3jax.data.tokenizer import ByteTokenizer, JsonTokenizer
from m3jax.errors import ConfigError, DataError
from m3jax.inference.text import ContinuedText, generate_text

BYTES = ByteTokenizer()


def word_tokenizer(vocabulary):
    content = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    content.decoder = tokenizers.decoders.Fuse()
    return JsonTokenizer("words", content.to_str())


@dataclass(frozen=True)
class Script:
    rows: tuple[tuple[int, ...], ...]  # the tokens of each row, all of one length
    vocab_size: int = BYTES.vocab_size


class ScriptedModel(nn.Module):
    """Says a row of its script, the one whose number is the last token of the prompt; no number: the first."""

    config: Script

    def separate_layers(self, params):
        return params

    def initial_state(self, batch, capacity):
        return jnp.zeros((batch, 2), jnp.int32)  # row of the script, position in it

    def prefill(self, tokens, segment_ids, state):
        number = tokens[:, -1] - ord("0")
        row = jnp.where((number >= 0) & (number < len(self.config.rows)), number, 0)
        return jnp.zeros((*tokens.shape, 2), jnp.int32).at[..., 0].set(row[:, None]), state.at[:, 0].set(row)

    def logits(self, hidden):
        return jax.nn.one_hot(jnp.array(self.config.rows)[hidden[:, 0], hidden[:, 1]], self.config.vocab_size)

    def step(self, token, state):
        state = state.at[:, 1].add(1)
        return self.logits(state), state


def say(*texts, n=None, stop=(), on_text=None):
    """Lets a model say the bytes of the texts, each followed by EOS; returns what `generate_text` makes of it."""
    rows = [[*text.encode(), BYTES.eos_id] for text in texts]
    longest = max(map(len, rows))
    script = Script(tuple((*row, *[BYTES.eos_id] * (longest - len(row))) for row in rows))
    options = dict(max_new_tokens=n or longest, temperature=0, stop=stop, on_text=on_text)
    return generate_text(ScriptedModel(script), {}, BYTES, [f"prompt {i}" for i in range(len(texts))], **options)


def pieces(tokenizer, tokens, prompt=(), stop=()):
    """Feeds tokens to ContinuedText; returns the pieces and the text object."""
    text = ContinuedText(tokenizer, prompt, stop)
    given_out = []
    for token in tokens:
        given_out.append(text.add(token))
        if text.stopped:
            break
    return [*given_out, text.finish()], text


def test_texts_end_at_eos_and_at_max_new_tokens():
    assert say("Abraham begat Isaac", "Amen") == ["Abraham begat Isaac", "Amen"]
    assert say("Abraham begat Isaac", "Amen", n=7) == ["Abraham", "Amen"]


def test_half_a_character_is_never_given_out():
    heard = []
    assert say("a€😀é", on_text=lambda row, piece: heard.append((row, piece))) == ["a€😀é"]
    assert heard == [(0, "a"), (0, "€"), (0, "😀"), (0, "é")]


def test_character_cut_off_by_the_limit_is_left_out():
    heard = []
    assert say("a€", n=3, on_text=lambda row, piece: heard.append(piece)) == ["a"]
    assert heard == ["a"]


def test_stop_string_across_tokens_is_cut_out_and_ends_its_row_alone():
    heard = {0: "", 1: ""}

    def on_text(row, piece):
        heard[row] += piece
        assert "\n" not in heard[0]

    texts = say("one\n\ntwo", "o n\ne.", stop=["\n\n", "xyz"], on_text=on_text)
    assert texts == ["one", "o n\ne."]
    assert list(heard.values()) == texts
    assert say("one\n\ntwo", "o n\ne.", stop=["\n\n", "xyz"]) == texts


def test_start_of_a_stop_string_comes_out_when_it_is_none():
    heard = []
    assert say("The end", stop=["end."], on_text=lambda row, piece: heard.append(piece)) == ["The end"]
    assert heard == ["T", "h", "e ", "end"]


def first_stop(text, stop):
    """Cuts the text before the stop string that is complete first, reading character by character."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(st.text("ab€", min_size=1, max_size=3), max_size=12),
    stop=st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_match_a_search_by_character(words, stop):
    """Tokens of several characters: the result does not depend on how the text is cut into tokens."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["", *words]))}
    tokenizer = word_tokenizer(vocabulary)
    given_out, text = pieces(tokenizer, [vocabulary[word] for word in words], stop=stop)
    assert "".join(given_out) == text.text == first_stop("".join(words), stop)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40))
def test_pieces_of_any_bytes_are_the_whole_decoded_at_once(data):
    given_out, text = pieces(BYTES, data, prompt=BYTES.encode("€").tolist())
    whole = data.decode(errors="replace")
    assert "".join(given_out) == text.text
    assert whole.startswith(text.text)
    assert set(whole[len(text.text) :]) <= {"\ufffd"}


def test_space_in_front_of_a_word_is_kept():
    """A decoder that drops the first word's space must be given the words before."""
    vocabulary = {"▁In": 0, "▁the": 1, "▁beg": 2, "inning": 3}
    content = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="▁In"))
    content.decoder = tokenizers.decoders.Metaspace()
    tokenizer = JsonTokenizer("metaspace", content.to_str())
    assert tokenizer.decode([1, 2]) == "the beg"
    assert pieces(tokenizer, [1, 2, 3], prompt=[0])[0] == [" the", " beg", "inning", ""]


def test_bos_is_put_in_front_of_the_prompt():
    prompts = []

    class Listening(ScriptedModel):
        def prefill(self, tokens, segment_ids, state):
            jax.debug.callback(lambda t, s: prompts.append(t[s == 1].tolist()), tokens, segment_ids)
            return super().prefill(tokens, segment_ids, state)

    model = Listening(Script(((BYTES.eos_id,),)))
    assert generate_text(model, {}, BYTES, ["Hi"], max_new_tokens=1, temperature=0) == [""]
    assert generate_text(model, {}, BYTES, [""], max_new_tokens=1, temperature=0) == [""]
    jax.effects_barrier()
    assert prompts == [[256, 72, 105], [256]]


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (ConfigError, dict(prompts="In the beginning"), "prompts = 'In the beginning': expected a list of texts"),
        (ConfigError, dict(stop="\n"), r"stop = '\\n': expected a list of texts"),
        (ConfigError, dict(stop=["a", ""]), "stop holds ''"),
        (ConfigError, dict(model=ScriptedModel(Script(((0,),), 256))), "'bytes' has 258 tokens, the model 256"),
        (ConfigError, dict(temperature=-1), "temperature = -1"),
        (DataError, dict(prompts=[]), "no rows"),
        (DataError, dict(prompts=["a", ""], tokenizer=word_tokenizer({"a": 0})), "prompt 1 = '' has no tokens"),
    ],
)
def test_bad_arguments_are_named(error, change, message):
    arguments = (
        dict(model=ScriptedModel(Script(((0,),))), params={}, tokenizer=BYTES, prompts=["a"], max_new_tokens=1) | change
    )
    with pytest.raises(error, match=message):
        generate_text(**arguments)
