PYTHON ?= python3

.PHONY: demo check
# Make the environment and write text with the demo.
demo: .venv/user
	.venv/bin/python generate.py --seed 23

# Make the environment and check everything: style, types, tests.
check: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m pytest -n 2 --dist loadfile

.venv/user: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q torch==$$(sed -n 's/^torch==//p' requirements.txt)
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/user
	.venv/bin/pip install -q -r requirements-dev.txt
	touch $@
