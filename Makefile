PYTHON ?= $(shell command -v python3.11 || command -v python3)

demo: .venv/installed  ## read the change between two pictures with the shipped control
	.venv/bin/python invert.py out_dir=outputs/demo

test: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.PHONY: demo test
