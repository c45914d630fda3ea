# Every target does its own set-up; nothing but packages is downloaded.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo demo-all demo-r1 demo-tools demo-vlm report test quick lint bench clean

$(VENV)/.core: requirements-core.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements-core.txt
	touch $@

$(VENV)/.dev: requirements.txt requirements-dev.txt requirements-eval.txt $(VENV)/.core
	$(PIP) -r requirements-dev.txt
	touch $@

demo: $(VENV)/.core  ## from scratch to a model that answers, in minutes
	$(BIN)/python scripts/demo.py

demo-all: $(VENV)/.core  ## continues from demo: DPO, LoRA, distillation, reasoning, each evaluated
	$(BIN)/python scripts/demo_all.py

demo-r1: $(VENV)/.core  ## continues from demo: reinforcement learning with the DeepSeek-R1 recipe
	$(BIN)/python scripts/demo_r1.py

demo-tools: $(VENV)/.core  ## on from the demo: it learns to call a calculator, a calendar, a table
	$(BIN)/python scripts/demo_tools.py

demo-vlm: $(VENV)/.core  ## the demo's model learns to see
	$(BIN)/python scripts/demo_vlm.py

report: $(VENV)/.core  ## a report on the models in out/: report.html beside them
	$(BIN)/python scripts/report.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2

quick: $(VENV)/.dev  ## the fast half of the tests, in less than a minute
	$(BIN)/python -m pytest -q -n 2 -m quick

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

bench: $(VENV)/.core
	$(BIN)/python -m benchmarks.train_throughput

clean:  ## caches only, never data or weights
	rm -rf .pytest_cache .ruff_cache dataset/.cache dataset/demo/.cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
