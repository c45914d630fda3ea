# Every target does its own set-up; nothing but packages is downloaded.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo demo-all demo-vlm test lint bench clean

$(VENV)/.user: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.user
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(VENV)/.user  ## from nothing to a model that answers, in minutes
	$(BIN)/python scripts/demo.py

demo-all: $(VENV)/.user  ## on from there: DPO, LoRA, distillation, reasoning, each measured
	$(BIN)/python scripts/demo_all.py

demo-vlm: $(VENV)/.user  ## the demo's model learns to see
	$(BIN)/python scripts/demo_vlm.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.user
	$(BIN)/python -m benchmarks.train_throughput

clean:  ## caches only, never data or weights
	rm -rf .pytest_cache .ruff_cache dataset/.cache dataset/demo/.cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
