"""Steps per second and memory of a study's groups: python experiments/state_tracking/timing.py --config mamba3_paper.

Times the last steps of one group for every model config, tasks with the same shapes once, and says how long the whole
study would take if every step were of those: the widest of a curriculum, or a mixture. Takes files too, for instance
experiments/recall/configs/zoology.py, with a multiple of the lengths that alternate as --steps.
"""

import dataclasses
import json
import tempfile
import time
from pathlib import Path

import jax

from m3jax.circumstances import circumstances
from m3jax.cli import Parser, read_config, run_main
from m3jax.studies.config import StudyConfig, build_study
from m3jax.studies.files import GroupFiles
from m3jax.studies.grid import Group, make_groups
from m3jax.studies.program import preset_path
from m3jax.studies.questions import Questions
from m3jax.studies.runs import train_block
from m3jax.studies.sweep import GroupTrainer
from m3jax.training.flops import forward_flops_per_token

_PRESETS = Path(__file__).parent / "configs"


def flops_of(group: Group, questions: Questions) -> float:
    """Operations of a step of all runs on such arrays, forward and backward; the head's at supervised positions."""
    _, _, batch, answers = questions.targets.shape
    width = questions.tokens.shape[-1]
    parts = forward_flops_per_token(group.model, width)
    head = parts.pop("head")
    return 3 * len(group.runs) * batch * (width * sum(parts.values()) + answers * head)


def time_group(study: StudyConfig, group: Group) -> dict[str, float]:
    """Compiles the last block of a group's training and runs it three times; the fastest counts."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = GroupTrainer(study, group, GroupFiles(Path(folder), study, group))
    n = study.train.block_steps
    recipe, state, *rest = trainer.block(study.train.steps - n)
    began = time.perf_counter()
    compiled = train_block.lower(recipe, state, *rest).compile()
    compilation, seconds = time.perf_counter() - began, []
    for _ in range(3):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, *rest))
        seconds.append((time.perf_counter() - began) / n)
    *_, questions = rest
    width = sum(len(of_kind.tokens) * of_kind.tokens.shape[-1] for of_kind in questions) / n
    tokens = len(group.runs) * sum(len(of_kind.tokens) * of_kind.tokens[0, 0].size for of_kind in questions) / n
    flops = sum(len(of_kind.tokens) * flops_of(group, of_kind) for of_kind in questions) / n
    memory = compiled.memory_analysis()
    # XLA counts what a loop does once: the loop over steps is meant, one over layers would be missed.
    # Of several kinds of steps it counts each once.
    counted = (group.model.n_layers == 1 or not group.model.scan_layers) and len(questions) == 1
    return {
        "width": width,
        "steps_per_second": 1 / min(seconds),
        "tokens_per_second": tokens / min(seconds),
        "gigaflop_per_step": flops / 1e9,
        "gigabytes_per_step": compiled.cost_analysis()["bytes accessed"] / 1e9 if counted else None,
        "teraflop_per_second": flops / min(seconds) / 1e12,
        "memory_gb": (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 1e9,
        "compilation_seconds": compilation,
    }


def measure(study: StudyConfig, groups: list[Group]) -> list[dict[str, object]]:
    """Times every model config once and prints a line for each."""
    rows, seen = [], {}
    for group in groups:
        arrays = (span._replace(longest=study.train.arrays[-1]) for span in study.training_spans)
        key = (
            group.model,
            *((group.width(span, study.train.bos, study.train.packed), group.answers(span)) for span in arrays),
        )
        seen.setdefault(key, []).append(group)
    for same in seen.values():
        row = {"groups": [group.name for group in same], "layers": same[0].model.n_layers, "runs": len(same[0].runs)}
        row |= time_group(study, same[0])
        rows.append(row)
        print(
            f"{', '.join(row['groups']):60s} {row['layers']} layers, {row['runs']} runs, width {row['width']:.0f}: "
            f"{row['steps_per_second']:7.1f} steps/s, {row['tokens_per_second'] / 1e6:6.2f}M tokens/s, "
            f"{row['teraflop_per_second']:5.2f} TFLOP/s, {row['memory_gb']:5.2f} GB of memory, "
            f"compiled in {row['compilation_seconds']:.0f} s",
            flush=True,
        )
    return rows


def main() -> None:
    """Times a preset, or a part of it, and writes JSON."""
    parser = Parser("experiments/state_tracking/timing.py", __doc__.splitlines()[0], StudyConfig)
    parser.add_argument("--config", required=True, metavar="PRESET")
    parser.add_argument("--tasks", nargs="+", metavar="TASK")
    parser.add_argument("--models", nargs="+", metavar="MODEL")
    parser.add_argument("--steps", type=int, default=20, help="of a timed block")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--commit", help="what is measured, for the record")
    options, overrides = parser.parse()
    full = read_config(preset_path(options.config, _PRESETS), overrides, build_study)
    study = dataclasses.replace(full, train=dataclasses.replace(full.train, block_steps=options.steps))
    with jax.default_matmul_precision(study.train.matmul_precision):
        rows = measure(study, make_groups(study, options.tasks, options.models))
    total = sum(len(row["groups"]) * full.train.steps / row["steps_per_second"] for row in rows)
    print(f"all groups, every step like these: {total / 60:.1f} minutes, without compilation and evaluation")
    if options.json:
        options.json.write_text(json.dumps(circumstances(options.commit) | {"timing": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
