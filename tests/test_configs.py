"""Every file in configs/ builds, and its model has the number of parameters that its docstring states."""

import ast
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from m3jax.cli import read_config
from m3jax.models.language_model import LanguageModel

_FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
# Millions of parameters in the paper's table of sizes.
_PAPER = {"180m": 187, "440m": 443, "880m": 893, "1b": 1495}


def _count(path: Path) -> int:
    model = LanguageModel(read_config(path).model)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.stem)
def test_docstring_states_the_parameter_count(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    stated = int(re.search(r"Parameters: ([\d,]+)", docstring)[1].replace(",", ""))
    assert _count(path) == stated
    size = path.stem.split("_")[0]
    if size in _PAPER:  # MIMO models match SISO ones but for the rounding of the MLP's width
        assert stated / 1e6 == pytest.approx(_PAPER[size], rel=0.003)


def test_all_sizes_are_there():
    expected = {f"{size}_{kind}" for size in (*_PAPER, "tiny") for kind in ("siso", "mimo")}
    assert expected <= {path.stem for path in _FILES}
