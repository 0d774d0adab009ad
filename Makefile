# make train   sets everything up and runs the main job on this machine's CPU
# make test    sets everything up and runs all checks and tests
# make lock    resolves the pinned environment anew (requirements/cpu.txt)

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: train test check setup lock clean
.DELETE_ON_ERROR:

train: $(READY)
	$(VENV)/bin/lightning-ray train examples/sql --name quickstart

test: check
	$(VENV)/bin/python -m pytest -m 'not e2e'
	$(VENV)/bin/python -m pytest -m e2e

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

setup: $(READY)

# The lock lists every package, so that nothing is resolved here: --no-deps also keeps out torchvision, torchaudio and
# torchcodec, which the engine's package asks for, text policies do not need, and whose wheels do not fit the CPU build of torch.
$(READY): pyproject.toml requirements/cpu.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lightning-ray needs Python 3.11 or newer; set PYTHON=")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/cpu.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(READY)

lock:
	rm -rf .lock && $(PYTHON) -m venv .lock
	.lock/bin/python -m pip install --quiet torch==2.13.0 && .lock/bin/python -m pip install --quiet '.[cpu,dev]'
	.lock/bin/python -m pip freeze --all | grep -v -E '^(pip|torchvision|torchaudio|torchcodec|lightning-ray)\b|^-e' | sed 's/+cpu$$//' > requirements/cpu.txt
	rm -rf .lock

clean:
	rm -rf $(VENV) .lock build *.egg-info
