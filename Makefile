# make demo: the small model that comes with the engine, and answers of it.   make test: everything CI needs.
# Both set up .venv here first. make parity: compare with transformers (installs torch, .venv-parity).
# make test-clients: the server with clients that people use (installs them, .venv-clients, build/clients).
# make test-sanitize: the CPU's kernels and threads under the compiler's sanitizers.

PYTHON ?= python3
VENV := .venv
# What pip installs depends on: the kernels are built with it.
SOURCES := pyproject.toml CMakeLists.txt engine/version.py engine/backends/cpu/CMakeLists.txt \
	$(wildcard engine/ops/*.h engine/ops/cpu/* engine/ops/cpu/fused/* engine/backends/cpu/*.cpp engine/backends/cpu/*.h)
COMPILERS := $(if $(filter default,$(origin CXX)),c++ g++ clang++,$(CXX))
# The status of a pipe is that of what failed in it.
SHELL := bash
.SHELLFLAGS := -o pipefail -c

.PHONY: demo test test-cuda test-clients test-sanitize lint parity lines clean needed needed-node

demo: $(VENV)/.run
	$(VENV)/bin/python cli.py graph
	$(VENV)/bin/python cli.py -st -p "What can you do?"
	$(VENV)/bin/python cli.py -no-cnv -p "Question: What is 27 plus 48?\nAnswer:"
	$(VENV)/bin/python cli.py -no-cnv -p "Question: Sort these numbers: 42, 7, 95, 19\nAnswer:"
	$(VENV)/bin/python cli.py -no-cnv -p "Question: Anna went to the kitchen. Anna took the ball. Anna \
	went to the garden. Where is the ball?\nAnswer:"
	$(VENV)/bin/python cli.py -st --reasoning off -p $(CHAIN)
	$(VENV)/bin/python cli.py -st --reasoning on -p $(CHAIN)
	$(VENV)/bin/python cli.py --temp 0 --prompts docs/requests.jsonl

# Too long for this model without thinking.
CHAIN := "Start with 58. Subtract 20. Add 53. Add 68. Add 22. What is the result?"

test: lint
	$(VENV)/bin/python -m pytest -q -n 2 -m "not timing and not clients"
	$(VENV)/bin/python -m pytest -q -m timing

# Needs a GPU; CUDA=12 for a driver of CUDA 12. An extra of what is installed: pip builds nothing.
CUDA ?= 13
test-cuda: $(VENV)/.test
	$(VENV)/bin/pip install -q --disable-pip-version-check "gdn-engine[cuda$(CUDA)]"
	$(VENV)/bin/python -m pytest -q -m cuda tests

test-clients: needed-node $(VENV)-clients/.clients build/clients/.agents
	$(VENV)-clients/bin/python -m pytest -q tests/clients

# Agents' command lines; others may need a later Node.js, or other options.
AGENTS := @qwen-code/qwen-code@0.15.10 opencode-ai@1.18.33
NODE := 20

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
	rm -rf build $(VENV) $(VENV)-parity $(VENV)-clients

needed:
	@$(PYTHON) -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))" 2> /dev/null || \
	{ echo "error: expected Python 3.11 or later with venv (apt-get install python3-venv)," \
	"got PYTHON=$(PYTHON): $$($(PYTHON) --version 2>&1 | tail -n 1)" >&2; exit 1; }
	@for c in $(COMPILERS); do if command -v $$c > /dev/null; then exit 0; fi; done; \
	echo "error: expected a C++17 compiler ($(COMPILERS)), found none: apt-get install g++" >&2; exit 1

needed-node:
	@node -e "process.exit(parseInt(process.versions.node) < $(NODE) ? 1 : 0)" 2> /dev/null && \
	command -v npm > /dev/null || { echo "error: expected Node.js $(NODE) or later and npm" \
	"(apt-get install nodejs npm), got node: $$(node --version 2> /dev/null || echo none)," \
	"npm: $$(command -v npm || echo none)" >&2; exit 1; }

# $(call install,environment,extra). pip's output goes to a log; shown are its errors and what is
# compiled: in a terminal each file in the same line, elsewhere every tenth.
STEP = \[[0-9]*$(1)\/[0-9]*\]
define install
	@echo "$(1): installing packages, and compiling what is new of the CPU kernels (all of them: two minutes)"
	@$(PYTHON) -m venv $(1)
	@if [ -t 1 ]; then echo; over=$$'\e[A\e[K'; step='$(call STEP,)'; else step='$(call STEP,0)'; fi; \
	$(1)/bin/pip install -v --disable-pip-version-check -e '.$(2)' 2>&1 | tee $(1)/install.log | \
	sed -un "s/^ *\($$step\) Building.*gdn_cpu_\([a-z0-9]*\)\.dir.*\/\(.*\)\.o$$/$$over\1 \2: \3/p; \
	/gdn-engine: expected/p; /: error: /p; /^ *ERROR: /p" || \
	{ echo "error: pip could not install gdn-engine: see $(1)/install.log" >&2; exit 1; }
endef

# The stamps say which extra an environment has; pip is asked again, and what changed of the kernels
# built again, only when a source is newer.
$(VENV)/.run: $(SOURCES) | needed
	$(call install,$(VENV),)
	@touch $@

$(VENV)/.test: $(SOURCES) | needed
	$(call install,$(VENV),[test])
	@touch $@ $(VENV)/.run

$(VENV)-parity/.parity: $(SOURCES) | needed
	$(call install,$(VENV)-parity,[parity])
	@touch $@

$(VENV)-clients/.clients: $(SOURCES) | needed
	$(call install,$(VENV)-clients,[clients])
	@touch $@

# Of their installation scripts one is needed, and not every npm runs it: it links the binary.
build/clients/.agents: Makefile | needed-node
	@echo "build/clients: installing $(AGENTS)"
	@npm install --loglevel error --no-audit --no-fund --ignore-scripts --prefix build/clients $(AGENTS)
	@cd build/clients/node_modules/opencode-ai && node postinstall.mjs
	@touch $@
