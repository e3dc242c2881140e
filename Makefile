# Two commands do all the set-up: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
THREADS ?= $(shell nproc 2>/dev/null || echo 2)
# pip compiles on one core what it installs, for half a minute; a file of a package that cannot be compiled is no failure.
define INSTALL
$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '$(1)'
@$(BIN)/python -m compileall -qq -j $(THREADS) $(VENV)/lib || true
endef
RUN := runs/quickstart
# glibc gives freed memory back and asks for it again all the time; told to keep it, a forward pass took a fifth less.
TUNING := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592
# Tests run in processes of one thread each, at most four of them: every one imports torch.
WORKERS ?= $(shell test $(THREADS) -lt 4 && echo $(THREADS) || echo 4)

.DEFAULT_GOAL := help
.PHONY: help install install-dev quickstart claims claims-quick check test faults gpu-check zero-check docs wheel wheel-check clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(call INSTALL,.)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(call INSTALL,.[dev])
	@touch $@

install: $(VENV)/.installed ## Install vipo into .venv, at the tested versions

install-dev: $(VENV)/.installed-dev ## The same with what the tests need

quickstart: $(VENV)/.installed ## Post-train the embedded FLUX on this machine and write a report (minutes)
	@n=1; while [ -e $(RUN)-$$n ]; do n=$$((n + 1)); done; \
	if [ -e $(RUN) ]; then mv $(RUN) $(RUN)-$$n && echo "Your earlier $(RUN) is $(RUN)-$$n now; nothing of it is lost."; fi
	OMP_NUM_THREADS=$(THREADS) $(TUNING) $(BIN)/vipo train recipes/quickstart.yaml --output $(RUN)
	@echo "Open $(RUN)/report.html; pictures are in $(RUN)/samples, maps in $(RUN)/maps."

CLAIMS := runs/claims

claims: $(VENV)/.installed-dev ## Rerun every table of docs/results.md into runs/claims (hours; goes on where it was stopped)
	$(BIN)/python experiments/claims/run.py --out $(CLAIMS)/results --pictures $(CLAIMS)
	test -f $(CLAIMS)/results/gradient.json || $(BIN)/python experiments/claims/gradient.py --out $(CLAIMS)/results/gradient.json \
		--directions $(CLAIMS)/sample-rate-1e-3-0.safetensors $(CLAIMS)/vipo-rate-1e-3-0.safetensors
	$(BIN)/python experiments/claims/page.py --results $(CLAIMS)/results --pictures $(CLAIMS) --html $(CLAIMS)/results.html

claims-quick: $(VENV)/.installed-dev ## The same machinery with one seed and two iterations (minutes); the figures mean nothing
	$(BIN)/python experiments/claims/run.py --quick --out $(CLAIMS)-quick/results --pictures $(CLAIMS)-quick
	$(BIN)/python experiments/claims/gradient.py --iterations 2 --out $(CLAIMS)-quick/results/gradient.json \
		--directions $(CLAIMS)-quick/sample-0.safetensors $(CLAIMS)-quick/vipo-0.safetensors
	$(BIN)/python experiments/claims/page.py --results $(CLAIMS)-quick/results --pictures $(CLAIMS)-quick --html $(CLAIMS)-quick/results.html

check: $(VENV)/.installed-dev ## Lint, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(VENV)/.installed-dev ## The tests that need no GPU and no network (about eleven minutes on two cores)
	OMP_NUM_THREADS=1 $(TUNING) $(BIN)/pytest --numprocesses $(WORKERS) --dist worksteal

# A machine with a GPU may have a torch of its own: GPU_PYTHON is then the Python that has it; vipo is taken from src/.
GPU_PYTHON ?= $(shell test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON))
GPU_OUT := runs/gpu-check

gpu-check: ## What this GPU does and whether a ratio became worse: nine minutes, 80 GB, nothing is downloaded
	PYTHONPATH=$(CURDIR)/src:$$PYTHONPATH $(GPU_PYTHON) -W ignore benchmarks/gpu/check.py --out $(GPU_OUT)

faults: $(VENV)/.installed-dev ## Kills, full disks, damaged files and bad input by the hundred (20 minutes)
	OMP_NUM_THREADS=1 $(BIN)/pytest --run-long -m long

zero-check: $(VENV)/.installed-dev ## DeepSpeed's ZeRO-2 and ZeRO-3 in two processes against one (minutes; installs the extra)
	$(call INSTALL,.[deepspeed])
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_zero.py tests/test_engine_files.py

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(call INSTALL,.[docs])
	@touch $@

docs: $(VENV)/.installed-docs ## Build the documentation into site/, strictly: links, anchors, references, examples
	OMP_NUM_THREADS=1 $(BIN)/pytest --quiet tests/test_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean --strict
	@echo "Look at it: $(BIN)/python -m http.server --directory site"

wheel: $(VENV)/.installed-dev ## Build the wheel into dist/
	$(BIN)/python -m build --wheel

wheel-check: $(VENV)/.installed-dev ## The wheel in a fresh environment for each extra, from a package index (half an hour)
	OMP_NUM_THREADS=1 $(BIN)/pytest --run-needs-index tests/test_wheel.py

clean: ## Remove what was built (not runs/)
	rm -rf $(VENV) dist build site .mypy_cache .ruff_cache .pytest_cache
