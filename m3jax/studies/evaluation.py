"""Accuracy of trained runs by length: all runs of a group answer the same sequences, which none of them trained on."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.studies.config import Span, StudyConfig
from m3jax.studies.grid import Group
from m3jax.studies.questions import TEST, VALIDATION, Questions, draw_questions, stream
from m3jax.studies.runs import PyTree, count_correct

_SEED = 2**31 - 1  # no run's
_SETS = {"validation": VALIDATION, "test": TEST}

AccuracyByLength = dict[str, list[float]]  # of every run
Accuracies = dict[str, AccuracyByLength]


def evaluate_group(study: StudyConfig, group: Group, params: PyTree) -> Accuracies:
    """Measures every run of a group.

    Args:
      study: evaluation says where, train how much fits the device at once.
      group: the runs.
      params: their parameters, [r, ...].

    Returns:
      {"validation" | "test": {label of the lengths: accuracy of every run}}; a set depends on task and lengths alone.
    """
    return {name: measure_on(name, study, group, params) for name in _SETS}


def measure_on(name: str, study: StudyConfig, group: Group, params: PyTree) -> AccuracyByLength:
    """Measures every run of a group on one of the sets, "validation" or "test"; else as evaluate_group."""
    return {span.label: _accuracies(study, group, params, _SETS[name], span) for span in study.evaluation.spans}


def lower_evaluation(study: StudyConfig, group: Group, params: PyTree) -> Iterator[jax.stages.Lowered]:
    """Yields what `evaluate_group` runs with the same arguments; once compiled, its calls find it."""
    for span in study.evaluation.spans:
        batches = _batches(study, group, VALIDATION, span)
        yield count_correct.lower(group.model, params, batches, study.train.runs_at_once)


def _accuracies(study: StudyConfig, group: Group, params: PyTree, purpose: int, span: Span) -> list[float]:
    batches = _batches(study, group, purpose, span)
    right, answers = count_correct(group.model, params, batches, study.train.runs_at_once)
    return (np.asarray(right) / float(answers)).tolist()


def _batches(study: StudyConfig, group: Group, purpose: int, span: Span) -> Questions:
    """The sequences of a set, [n, b, ...]."""
    train, n = study.train, study.evaluation.sequences
    width = group.width(span, train.bos)
    # As many positions at once as in a training step, which needs more memory.
    in_training = group.width(study.training_spans[0]._replace(longest=train.arrays[-1]), train.bos)
    fitting = max(1, train.batch_size * in_training // width)
    batch = next(size for size in range(min(n, fitting), 0, -1) if n % size == 0)
    key = stream(_SEED, purpose)
    if span.longest < 2**16:
        key = jax.random.fold_in(key, jnp.uint32(span.shortest * 2**16 + span.longest))
    else:
        key = jax.random.fold_in(jax.random.fold_in(key, span.shortest), span.longest)
    shortest, longest = span.shortest + group.shift, span.longest + group.shift
    questions = draw_questions(key, group.task(span), n, shortest, longest, width, group.answers(span), train.bos)
    return jax.tree.map(lambda v: v.reshape(n // batch, batch, *v.shape[1:]), questions)
