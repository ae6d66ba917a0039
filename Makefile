PYTHON ?= $(shell command -v python3.11 || command -v python3)
INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check

demo: .venv/installed  ## read the change between two pictures with the shipped control
	.venv/bin/python invert.py out_dir=outputs/demo

page: .venv/installed-page  ## draw and read in the browser
	.venv/bin/python gradio_control.py

test: .venv/installed .venv/installed-benchmarks .venv/installed-page  ## style, and the tests that take minutes at most
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto

test-slow: .venv/installed .venv/installed-benchmarks .venv/installed-page  ## the other tests: trainings, long readings, benchmarks
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto -m slow

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -r $<
	touch $@

.venv/installed-benchmarks: benchmarks/requirements.txt .venv/installed
	$(INSTALL) -r $<
	touch $@

.venv/installed-page: requirements-page.txt .venv/installed
	$(INSTALL) --no-deps -r $<
	touch $@

.PHONY: demo page test test-slow
