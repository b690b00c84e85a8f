"""lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) for the models here.

Importing this file needs `lm_eval`, the extra `eval`. Tokens are made as its Hugging Face models make them, and scores
follow its definitions (`lm_eval.api.model.LM`).
"""

import difflib
import importlib.metadata
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window, make_table
from tqdm import tqdm

from m3jax.data.tokenizer import Tokenizer
from m3jax.errors import ConfigError, DataError
from m3jax.inference import generate
from m3jax.inference.batches import length_batches
from m3jax.inference.likelihood import Continuation, score_continuations
from m3jax.inference.text import ContinuedText
from m3jax.models.language_model import LanguageModel
from m3jax.training.checkpoint import Checkpoint

_NEW_TOKENS = 256  # of a task that does not say how many; the harness' own number
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_GENERATION_KEYS = {*_SAMPLING, "do_sample", "until", "max_gen_toks"}


class HarnessModel(TemplateLM):
    """A model of any kind as the harness wants it.

    Texts begin with BOS where the tokenizer itself puts it there; an empty context is BOS alone (EOS for a tokenizer
    without one). Of more tokens than `max_length` the first are left out.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        batch_size: int,
        add_bos: bool | None = None,
    ):
        """Wraps a model.

        Args:
          model: a language model.
          params: its parameters.
          tokenizer: the one it was trained with.
          max_length: tokens that it reads at most.
          batch_size: sequences of that length computed at one time; more of shorter ones. Generation takes this many.
          add_bos: whether texts begin with BOS; None = what the tokenizer does.
        """
        super().__init__()
        self._model, self._params, self._text_tokenizer = model, params, tokenizer
        self.max_length, self._batch_size = max_length, batch_size
        self._add_bos = tokenizer.adds_bos if add_bos is None else add_bos
        if self._add_bos and tokenizer.bos_id is None:
            raise ConfigError(f"Tokenizer {tokenizer.name!r} has no BOS to put in front of texts.")

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a document."""
        return self._text_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context consists of."""
        bos, eos = self._text_tokenizer.bos_id, self._text_tokenizer.eos_id
        if bos is None and eos is None:
            raise ConfigError(
                f"Tokenizer {self._text_tokenizer.name!r} has neither BOS nor EOS: a text without context, as this "
                "task has it, cannot be scored."
            )
        return eos if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text, with BOS in front if add_special_tokens says so (None = as the model was made)."""
        adds = self._add_bos if add_special_tokens is None else add_special_tokens
        bos = [self._text_tokenizer.bos_id] if adds and self._text_tokenizer.bos_id is not None else []
        return bos + self._text_tokenizer.encode(string).tolist()

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts; every token once, after as many as max_length allows.

        A text begins after BOS, which itself is not scored.
        """
        windows, owners = [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            tokens = self.tok_encode(text, add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append(("", *make_disjoint_window(window)))
                owners.append(i)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        sums = [0.0] * len(requests)
        for i, (log_likelihood, _) in zip(owners, scores, strict=True):
            sums[i] += log_likelihood
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues the contexts up to a stop string, EOS or max_gen_toks tokens.

        Raises:
          ConfigError: a task that asks for what generation here cannot do, or for as many tokens as max_length.
        """
        alike: dict[str, list[int]] = {}  # requests, by what they ask for
        for i, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts: dict[int, str] = {}
        params = jax.jit(self._model.separate_layers)(self._params)  # once, not in every call
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as progress:
            for members in alike.values():
                options = _generation_options(requests[members[0]].args[1])
                prompts = [self._prompt(requests[i].args[0], options["max_new_tokens"]) for i in members]
                n_tokens = self._batch_size * self.max_length
                for batch in length_batches([len(prompt) for prompt in prompts], n_tokens, self._batch_size):
                    numbers = [members[j] for j in batch.members]
                    new = self._continue(params, [prompts[j] for j in batch.members], numbers, batch.rows, **options)
                    texts |= dict(zip(numbers, new, strict=True))
                    progress.update(len(new))
        return [texts[i] for i in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        continuations = [Continuation(self._tokens_or_prefix(context), tokens) for _, context, tokens in requests]
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        found = score_continuations(
            self._model,
            self._params,
            continuations,
            max_length=self.max_length,
            batch_tokens=self._batch_size * self.max_length,
        )
        for i, score in tqdm(found, total=len(requests), desc="Scoring", disable=disable_tqdm):
            scores[i] = tuple(score)
        return scores

    def _tokens_or_prefix(self, tokens: list[int]) -> list[int]:
        return tokens or [self.prefix_token_id]

    def _prompt(self, text: str, max_new_tokens: int) -> list[int]:
        room = self.max_length - max_new_tokens
        if room < 1:
            raise ConfigError(
                f"The task asks for max_gen_toks = {max_new_tokens} new tokens: expected fewer than the "
                f"{self.max_length} of config.data.sequence_length, so that there is room for the prompt."
            )
        return self._tokens_or_prefix(self.tok_encode(text))[-room:]

    def _continue(
        self, params: Any, prompts: list[list[int]], numbers: list[int], n_rows: int, *, stop: list[str], **options: Any
    ) -> list[str]:
        """The texts that continue prompts; `numbers` of the requests decide what is drawn."""
        n_copies = n_rows - len(prompts)  # of the first, which end when it does
        rows, numbers = prompts + n_copies * prompts[:1], numbers + n_copies * numbers[:1]
        texts = [ContinuedText(self._text_tokenizer, prompt, stop) for prompt in rows]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.array(numbers))
        ends = [] if self.eot_token_id is None else [self.eot_token_id]

        def add(tokens: np.ndarray) -> list[bool]:
            for text, token in zip(texts, tokens.tolist(), strict=True):
                if token >= 0 and token not in ends:
                    text.add(token)
            return [text.stopped for text in texts]

        generate(self._model, params, rows, key=keys, stop_tokens=ends, on_tokens=add, **options)
        for text in texts[: len(prompts)]:
            text.finish()
        return [text.text for text in texts[: len(prompts)]]


def evaluate_tasks(
    checkpoint: Checkpoint,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    add_bos: bool | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint on tasks of the harness.

    Args:
      checkpoint: of `m3jax.loading.read_checkpoint`; its config's data.sequence_length is how many tokens the model
        reads at most, data.batch_size / train.grad_accumulation how many such sequences are computed at one time.
      tasks: names of tasks, groups or tags.
      include_path: a folder with more tasks, as YAML files.
      num_fewshot: examples in front of each question; None = what the tasks say.
      limit: only this many documents of each task.
      add_bos: as in HarnessModel.

    Returns:
      What the harness returns: results by task, versions, numbers of examples.

    Raises:
      ConfigError: an unknown task (with the nearest name).
      DataError: a task's data set that cannot be had.
    """
    config = checkpoint.config
    manager = TaskManager(include_path=include_path)
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=1)
            hint = f"Did you mean {near[0]}?" if near else "--include-path names a folder with tasks of your own."
            raise ConfigError(f"--tasks {task}: lm_eval has no such task, group or tag. {hint}")
    model = HarnessModel(
        LanguageModel(config.model),
        checkpoint.params,
        checkpoint.tokenizer,
        max_length=config.data.sequence_length,
        batch_size=config.data.batch_size // config.train.grad_accumulation,
        add_bos=add_bos,
    )
    try:
        return simple_evaluate(
            model, tasks=list(tasks), task_manager=manager, num_fewshot=num_fewshot, limit=limit, log_samples=False
        )
    except (ConnectionError, FileNotFoundError) as error:  # what `datasets` raises without a network
        raise DataError(f"--tasks {' '.join(tasks)}: a data set cannot be had ({error}).") from error


def table(results: dict[str, Any]) -> str:
    """The results as a table of text, groups below."""
    return "\n".join(make_table(results, part) for part in ("results", "groups") if results.get(part))


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the results and what they depend on, of plain types."""
    kept = {name: results[name] for name in ("results", "groups", "versions", "n-shot", "n-samples") if name in results}
    kept["lm_eval"] = importlib.metadata.version("lm_eval")
    return json.loads(json.dumps(kept, default=handle_non_serializable))


def _generation_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """The options of `generate`, and `stop`, that a task's generation_kwargs mean."""
    given = {key: value for key, value in normalize_gen_kwargs(arguments, _NEW_TOKENS).items() if value is not None}
    if given.get("num_beams") == 1:
        del given["num_beams"]
    unknown = sorted(given.keys() - _GENERATION_KEYS)
    if unknown:
        raise ConfigError(
            f"The task's generation_kwargs have {', '.join(f'{key} = {given[key]!r}' for key in unknown)}: generation "
            f"here has {', '.join(sorted(_GENERATION_KEYS))} only."
        )
    options = {key: given[key] for key in _SAMPLING if key in given}
    options["temperature"] = float(given.get("temperature", 1.0)) if given["do_sample"] else 0.0
    return options | {"max_new_tokens": given["max_gen_toks"], "stop": [text for text in given["until"] if text]}
