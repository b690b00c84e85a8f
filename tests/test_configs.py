"""Every file in configs/ builds, and its model has the number of parameters that its docstring states."""

import ast
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from m3jax.cli import read_config
from m3jax.config import config_to_dict
from m3jax.models.language_model import LanguageModel

_FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
# Millions of parameters in the paper's table of sizes.
_PAPER = {"180m": 187, "440m": 443, "880m": 893, "1b": 1495}
_RIVALS = ("mamba2", "gdn", "transformer", "hybrid")


def _count(path: Path) -> int:
    model = LanguageModel(read_config(path).model)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _stated(path: Path) -> int:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    return int(re.search(r"Parameters: ([\d,]+)", docstring)[1].replace(",", ""))


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.stem)
def test_docstring_states_the_parameter_count(path):
    stated = _stated(path)
    assert _count(path) == stated
    size, kind = path.stem.split("_")
    if kind in _RIVALS:  # the MLP's width is a multiple of 128
        assert stated == pytest.approx(_stated(path.with_name(f"{size}_siso.py")), rel=0.01)
        assert f"{stated:,}" in (path.parents[1] / "docs" / "models.md").read_text()
    elif size in _PAPER:  # MIMO models match SISO ones but for the rounding of the MLP's width
        assert stated / 1e6 == pytest.approx(_PAPER[size], rel=0.003)


def test_all_sizes_are_there():
    expected = {f"{size}_{kind}" for size in (*_PAPER, "tiny") for kind in ("siso", "mimo")}
    expected |= {f"{size}_{kind}" for size in _PAPER for kind in _RIVALS}
    assert expected <= {path.stem for path in _FILES}


@pytest.mark.parametrize("kind", _RIVALS)
def test_rivals_differ_in_the_mixers_and_what_pays_for_them(kind):
    free = {
        "mixers",
        "d_intermediate",
        "gdn_heads",
        "attention_heads",
        "attention_kv_heads",
        "rope_theta",
        "outproj_norm",
    }
    for size in _PAPER:
        rival, siso = (config_to_dict(read_config(_FILES[0].with_name(f"{size}_{k}.py"))) for k in (kind, "siso"))
        assert {key for key, value in siso["model"].items() if rival["model"][key] != value} <= free
        assert rival | {"model": None} == siso | {"model": None}
