"""Continues prompts with a trained model: `python -m m3jax.generate --checkpoint DIR --prompt "In the beginning"`."""

import argparse
import signal
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from m3jax.cli import Parser, run_main
from m3jax.errors import ConfigError, DataError
from m3jax.inference import Session, generate, generate_text
from m3jax.inference.decode import check_max_new_tokens
from m3jax.inference.interactive import converse, typed_lines, what_ends_a_turn
from m3jax.inference.sampling import GENERATOR, SamplingParams
from m3jax.loading import read_checkpoint
from m3jax.models.language_model import LanguageModel
from m3jax.training.checkpoint import Checkpoint

_CAPACITY = 8192  # tokens of a new conversation


class _CallableModule(types.ModuleType):
    # `m3jax.generate` names this program and the public function: importing the one must not hide the other.
    __call__ = staticmethod(generate)


sys.modules[__name__].__class__ = _CallableModule


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program with these arguments (None = those of the process) and prints the texts."""
    arguments, overrides = _parser().parse(argv)
    _check_sampling(**_sampling(arguments))
    if arguments.interactive:
        _converse(arguments, overrides)
        return
    if arguments.session is not None:
        raise ConfigError("--session keeps a conversation: expected --interactive with it.")
    prompts = [p for p in _read_prompts(arguments) for _ in range(arguments.num_samples)]
    checkpoint = _read_checkpoint(arguments, overrides)
    streams = len(prompts) == 1 and not arguments.no_stream
    if streams:
        print(prompts[0], end="", flush=True)
    texts = generate_text(
        LanguageModel(checkpoint.config.model),
        checkpoint.params,
        checkpoint.tokenizer,
        prompts,
        key=jax.random.key(arguments.seed, impl=GENERATOR),
        stop=arguments.stop,
        on_text=(lambda row, piece: print(piece, end="", flush=True)) if streams else None,
        **_sampling(arguments),
    )
    if streams:
        print()
        return
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=1):
        if len(prompts) > 1:
            print(f"--- {i} of {len(prompts)} ---")
        print(f"{prompt}{text}")


def _converse(arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
    if arguments.prompt or arguments.prompt_file is not None or arguments.num_samples != 1:
        raise ConfigError(
            "--interactive takes lines from the keyboard: expected no --prompt, --prompt-file, --num-samples."
        )
    path = arguments.session
    if path is not None and not Path(path).parent.is_dir():
        raise ConfigError(f"--session {path}: there is no folder {Path(path).parent}.")
    checkpoint = _read_checkpoint(arguments, overrides)
    model, tokenizer = LanguageModel(checkpoint.config.model), checkpoint.tokenizer
    if path is not None and Path(path).exists():
        session = Session.load(path, model, checkpoint.params, capacity=arguments.capacity)
        print(f"The conversation in {path} goes on after {session.length} tokens.")
    else:
        session = Session(model, checkpoint.params, capacity=arguments.capacity or _CAPACITY)
    print(what_ends_a_turn(tokenizer, arguments.max_new_tokens, arguments.stop))
    converse(
        session,
        tokenizer,
        typed_lines(),
        lambda text: print(text, end="", flush=True),
        stop=arguments.stop,
        after_turn=(lambda: session.save(path)) if path is not None else (lambda: None),
        seed=arguments.seed,
        **_sampling(arguments),
    )
    print()


def _read_checkpoint(arguments: argparse.Namespace, overrides: dict[str, Any]) -> Checkpoint:
    return read_checkpoint(arguments.checkpoint, arguments.step, ema=arguments.ema, overrides=overrides)


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: getattr(arguments, name) for name in names}


def _check_sampling(max_new_tokens: int, **sampling: float) -> None:
    """Before a checkpoint is read, which may take a while."""
    check_max_new_tokens(max_new_tokens)
    SamplingParams.for_batch(1, **sampling)


def _parser() -> Parser:
    parser = Parser("m3jax.generate", "Continues prompts with a trained model.")
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a workdir, one checkpoint in it, or a released one")
    add("--step", type=int, help="of the checkpoint; the newest by default")
    add("--ema", action="store_true", help="take the moving average of the parameters")
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    add("--prompt-file", metavar="FILE", help="a text file with one prompt a line")
    add("--max-new-tokens", type=int, default=256, metavar="N")
    add("--temperature", type=float, default=1.0, metavar="T", help="0 takes the most probable token")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable tokens; 0 = all")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the tokens that together reach P; 1 = all")
    add("--min-p", type=float, default=0.0, metavar="P", help="no token below P times the best one's probability")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="over 1: what is there already comes less")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends a text; may be given several times")
    add("--num-samples", type=_at_least_1, default=1, metavar="K", help="continuations of each prompt")
    add("--seed", type=_seed, default=0, help="the same seed draws the same texts")
    add("--no-stream", action="store_true", help="print the text when it is complete, not as it is generated")
    add("--interactive", action="store_true", help="continue line after line from the keyboard; the state is kept")
    add("--session", metavar="FILE", help="of --interactive: goes on from this file if it is there; saved every turn")
    capacity = f"of --interactive: tokens in all, where the model has attention; the file's own or {_CAPACITY}"
    add("--capacity", type=_at_least_1, metavar="N", help=capacity)
    return parser


def _read_prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt)
    if arguments.prompt_file is not None:
        try:
            lines = Path(arguments.prompt_file).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"--prompt-file {arguments.prompt_file}: {reason}. Expected a UTF-8 text file.") from error
        prompts += [line for line in lines if line]
    if not prompts:
        raise ConfigError("Nothing to continue: give --prompt TEXT, or --prompt-file FILE with one prompt a line.")
    return prompts


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text}: expected an integer in [0, 2^32)")
    return int(text)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for terminals that cannot show a character
    for number in (signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)  # there is nothing to save, and Python would wait for the device first
    run_main(main)
