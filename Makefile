# make demo: the small model that comes with the engine, and answers of it.   make test: everything CI needs.
# Both set up .venv here first. make parity: compare with transformers (installs torch, .venv-parity).
# make test-sanitize: the CPU's kernels and threads under the compiler's sanitizers.

PYTHON ?= python3
VENV := .venv
# What pip installs depends on: the kernels are built with it.
SOURCES := pyproject.toml CMakeLists.txt engine/version.py $(wildcard engine/ops/*.h engine/ops/cpu/* engine/backends/cpu/*.cpp)
COMPILERS := $(if $(filter default,$(origin CXX)),c++ g++ clang++,$(CXX))

.PHONY: demo test test-cuda test-sanitize lint parity lines clean compiler

demo: $(VENV)/.run
	$(VENV)/bin/python cli.py graph
	$(VENV)/bin/python cli.py --no-display-prompt -p "Question: What can you do?\nAnswer:"
	$(VENV)/bin/python cli.py -p "Question: What is 27 plus 48?\nAnswer:"
	$(VENV)/bin/python cli.py -p "Question: Sort these numbers: 42, 7, 95, 19\nAnswer:"
	$(VENV)/bin/python cli.py -p "Question: Anna went to the kitchen. Anna took the ball. Anna \
	went to the garden. Where is the ball?\nAnswer:"

test: lint
	$(VENV)/bin/python -m pytest -q -n 2 -m "not timing"
	$(VENV)/bin/python -m pytest -q -m timing

# Needs a GPU; CUDA=12 for a driver of CUDA 12.
CUDA ?= 13
test-cuda: $(VENV)/.test
	$(VENV)/bin/pip install -q ".[cuda$(CUDA)]"
	$(VENV)/bin/python -m pytest -q -m cuda tests

test-sanitize: $(VENV)/.test
	tests/sanitize/run $(VENV)/bin/python

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files "*.h" "*.cpp" "*.cuh" "*.cu")

parity: $(VENV)-parity/.parity
	$(VENV)-parity/bin/python -m pytest -q tests/parity

lines:
	@echo "lines of Python:  $$(git ls-files engine cli.py | grep '\.py$$' | xargs cat | wc -l)"
	@echo "lines of kernels: $$(git ls-files engine | grep -E '\.(h|cpp|cuh|cu)$$' | xargs -r cat | wc -l)"

clean:
	rm -rf build $(VENV) $(VENV)-parity

compiler:
	@for c in $(COMPILERS); do if command -v $$c > /dev/null; then exit 0; fi; done; \
	echo "error: expected a C++17 compiler ($(COMPILERS)), found none: apt-get install g++" >&2; exit 1

# The stamps say which extra an environment has; pip is asked again, and what changed of the kernels
# built again, only when a source is newer.
$(VENV)/.run: $(SOURCES) | compiler
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/.test: $(SOURCES) | compiler
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/.run

$(VENV)-parity/.parity: $(SOURCES) | compiler
	$(PYTHON) -m venv $(VENV)-parity
	$(VENV)-parity/bin/pip install -q --disable-pip-version-check -e '.[parity]'
	@touch $@
