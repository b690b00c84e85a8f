"""Modular arithmetic with brackets, without multiplication: a curriculum from length 8 to 160, tested at 256.

As mamba3_paper.py but for what this task takes (docs/state_tracking.md): many narrow heads (32 with states of 16 x 32),
an MLP, a curriculum that begins with expressions of a few digits, five seeds at one rate, which falls from the length
of 60 on, and an average of parameters, measured as training goes. Training asks for longer memory than tests of its
length: half of the expressions are cut unevenly (m3jax/data/tasks/brackets.py), and three of four of the last steps
have lengths of 150 to 160. Tests are drawn as the task has them.
The gated delta rule, whose values are whole times as wide as keys, has four heads with states of 64 x 64, as many
numbers, a rate of its own, and expressions that are cut evenly, with which it learns better:

python experiments/state_tracking/sweep.py --config brackets
python experiments/state_tracking/sweep.py --config brackets --config.grid.models=gdn_negative \
    --config.model.expand=4 --config.model.headdim=64 --config.model.d_state=64 --config.grid.learning_rates=2.8e-3 \
    --config.train.drawn_as= --workdir runs/br_gdn_own \
    --config.train.stages=8:600,12:600,16:600,20:800,28:1200,40:2400,60:2200,80:2600,120:3000,160:10000
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As mamba3_paper.py but for the keys that are set here."""
    config = runpy.run_path(str(Path(__file__).with_name("mamba3_paper.py")))["get_config"]()
    task = "modular_arithmetic_brackets_without_times"
    config.grid.tasks = f"{task}:3"
    config.grid.models = "mamba3_siso,mamba3_standard_rope,mamba3_no_rope,mamba2"
    config.grid.widths = "64"
    config.grid.learning_rates = "1.4e-3"
    config.grid.seeds = 5
    config.grid.initial_steps = "0.1-1"
    config.model.rope_fraction = 1.0
    config.model.d_intermediate = 128
    config.model.expand = 8
    config.model.headdim = 16
    config.model.d_state = 32
    config.optimizer.schedule = "wsd"
    config.optimizer.decay_fraction = 0.75
    short = "8:600,12:600,16:600,20:800,28:1200,40:2400,60:2200,80:2600"
    config.train.stages = short + ",120:3000,160 150-160 150-160 150-160:14000"
    config.train.drawn_as = f"{task}:{task}_uneven"
    config.train.array_lengths = "20,40,80,160"
    config.train.batch_size = 128
    config.train.label_smoothing = 0.0
    config.train.ema_decay = 0.999
    config.train.validate_every = 1000
    config.evaluation.lengths = "20,40,80,160,256"
    config.evaluation.sequences = 2048
    return config
