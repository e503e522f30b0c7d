# Every target makes its own set-up in .venv first, once: again only when what it installs has changed.
#   make demo DEMO_ARGS="--quick --out results"     make test TEST_ARGS="tests/wire -x"
#   make fuzz FUZZ_ARGS="--seconds 3600"            every decoder of what the network brings, by atheris
#   PYTHON=python3.12                               the Python that .venv is made with
#   PIP_OPTIONS="--extra-index-url ..."             given to pip: another index, a build of torch without CUDA, a folder of wheels

PYTHON ?= python3
PIP_OPTIONS ?=
DEMO_ARGS ?=
TEST_ARGS ?=
FUZZ_ARGS ?=
export PIP_OPTIONS

BIN := .venv/bin
TYPED := .venv/typed
MAPPED = $(shell sed -n 's/^ *lwfed\.[a-z_]* = \([a-z_]*\)$$/\1/p' setup.cfg)

.PHONY: setup demo test test-slow fuzz lint
.DELETE_ON_ERROR:

setup: .venv/.installed-test
	@echo "Ready: $(BIN)/lwfed, $(BIN)/edge-agent, $(BIN)/cloud-server"

demo: .venv/.installed-demo
	$(BIN)/lwfed demo $(DEMO_ARGS)

test: .venv/.installed-test
	$(BIN)/pytest --numprocesses auto --dist loadfile $(TEST_ARGS)

test-slow: .venv/.installed-test
	$(BIN)/pytest -m slow $(TEST_ARGS)

fuzz: .venv/.installed-fuzz
	$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

# mypy sees the packages under the names that they are installed by, as a copy: it does not follow an editable installation.
lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPED) && mkdir -p $(TYPED)
	cp -r lwfed $(TYPED)/lwfed && cp -r $(MAPPED) $(TYPED)/lwfed/
	cd $(TYPED) && MYPYPATH=. ../bin/mypy --config-file ../../setup.cfg --cache-dir ../../.mypy_cache -p lwfed

.venv/.installed-%: setup.cfg pyproject.toml constraints.txt tools/setup_env.py
	$(PYTHON) -I tools/setup_env.py $*
