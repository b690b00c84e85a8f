# make train: a small Mamba-3 MIMO model on the bundled text, from a bare machine.  make test: the whole CPU suite.
# make test-gpu: the kernels' tests and timings on a GPU.  make test-mosaic: the Mosaic GPU kernels interpreted on a CPU.
# make notebook: executes the notebook again.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
RUN := runs/tiny_mimo
# Large allocations in 2 MiB pages: a training step on a CPU is 1.2 times as fast (docs/performance.md).
export GLIBC_TUNABLES = glibc.malloc.hugetlb=1

.PHONY: train test test-gpu test-mosaic lint wheel notebook

train: $(VENV)/installed
	@mkdir -p $(RUN)
	@echo "== baselines on the same held-out text"
	@$(PY) experiments/bits_per_byte/baselines.py --config configs/tiny_mimo.py --json $(RUN)/baselines.json
	@echo "== training"
	@$(PY) -m m3jax.train --config configs/tiny_mimo.py --workdir $(RUN)
	@echo "== held-out bits per byte"
	@$(PY) -m m3jax.evaluate --checkpoint $(RUN) --json $(RUN)/evaluation.json > /dev/null
	@$(PY) experiments/bits_per_byte/report.py --evaluation $(RUN)/evaluation.json --baselines $(RUN)/baselines.json
	@echo "== a sample"
	@$(PY) -m m3jax.generate --checkpoint $(RUN) --prompt "In the beginning" --temperature 0.7 --max-new-tokens 400
	@echo "== everything is in $(RUN): checkpoints/, metrics.jsonl, loss.png, evaluation.json, baselines.json"

test: $(VENV)/installed-test
	@$(PY) -m pytest -n auto

# With the Python that has jax for the GPU, jax-triton, pytest and hypothesis: make test-gpu GPU_PYTHON=python3
# Ten workers need the memory of a GPU of 80 GB; on several GPUs there may be as many times more.
GPU_PYTHON ?= $(PY)
GPU_WORKERS ?= 10
COMMIT ?= $(shell git describe --always --dirty 2>/dev/null)
MEASUREMENTS ?= docs/measurements
test-gpu: export PYTHONPATH := .:$(PYTHONPATH)
test-gpu:
	@$(GPU_PYTHON) -m pytest -m gpu -n $(GPU_WORKERS) -p no:benchmark tests/gpu
	@mkdir -p $(MEASUREMENTS)
	@$(GPU_PYTHON) experiments/latency/scan.py --json $(MEASUREMENTS)/scan.json --commit "$(COMMIT)"
	@$(GPU_PYTHON) experiments/latency/step.py --json $(MEASUREMENTS)/step.json --commit "$(COMMIT)"

# With a Python of 3.12 or later that has jax 0.11, flax, jax-triton and the rest of what the suite needs.
test-mosaic: export PYTHONPATH := .:$(PYTHONPATH)
test-mosaic:
	@$(GPU_PYTHON) -m pytest tests/kernels/test_mosaic_*.py

NOTEBOOK := experiments/notebooks/mamba3_tour
notebook: $(VENV)/installed
	@$(PY) -m pip install --quiet --editable ".[notebooks]"
	@$(PY) -m jupytext --to ipynb --set-kernel python3 --execute $(NOTEBOOK).py

lint: $(VENV)/installed-test
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

wheel: $(VENV)/installed-test
	@bash tests/check_wheel.sh $(PY)

$(VENV)/installed: setup.cfg pyproject.toml
	@echo "== installing into $(VENV) (a minute or two)"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --upgrade pip
	@$(PY) -m pip install --quiet --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@echo "== installing what the tests need"
	@$(PY) -m pip install --quiet --editable ".[test]"
	@# What jax-triton needs to compile kernels without a GPU; alone (7 MB), jax does not look for one because of it.
	@test "$$(uname -s)" != Linux || $(PY) -m pip install --quiet --no-deps \
	    "jax-cuda13-plugin==$$($(PY) -c 'import jaxlib; print(jaxlib.__version__)')"
	@touch $@
