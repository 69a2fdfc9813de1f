# make demo | make test | make bench: each sets up .venv on first use and can be run again at any time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# CPU builds by default. Plain torch from PyPI brings gigabytes of CUDA; say TORCH=torch to want that.
TORCH ?= torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# A process for each core (tests/conftest.py says which takes what). `make test WORKERS=` needs but one, for a debugger.
WORKERS ?= -n logical --maxprocesses 4 --no-loadscope-reorder
SOURCES := $(shell find commands runtime export calibration bench -type f -not -name '*.pyc' 2>/dev/null) $(wildcard setup.py)

.PHONY: demo test lint bench clean

demo: $(VENV)/package
	$(BIN)/metaembed-export --model demo --budget 8,16 -o demo-out/bundle -f
	$(BIN)/metaembed-bench scenes -o demo-out/pages --split test --count 300 -f
	$(BIN)/metaembed-search demo-out/bundle "a red umbrella" --images demo-out/pages/pages -k 5

test: $(VENV)/package
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

lint: $(VENV)/package
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	cd tests && ../$(BIN)/mypy --config-file ../pyproject.toml -p metaembed.runtime

bench: $(VENV)/package
	$(BIN)/metaembed-export --model demo --budget all -o bench-out/bundle -f --quiet
	rm -rf bench-out/records && mkdir -p bench-out/records
	$(BIN)/metaembed-bench quality bench-out/bundle -o bench-out/records/quality.jsonl
	$(BIN)/metaembed-bench efficiency -o bench-out/records/efficiency.jsonl
	$(BIN)/metaembed-bench parity bench-out/bundle -o bench-out/records/parity.jsonl
	$(BIN)/metaembed-bench report bench-out/records -o bench-out/report

# The real wheel, not an editable install: what is tested is what is shipped.
$(VENV)/package: $(VENV)/dependencies $(SOURCES)
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	touch $@

$(VENV)/dependencies: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)" || $(BIN)/pip install --quiet --extra-index-url $(TORCH_INDEX) "$(TORCH)" || $(BIN)/pip install --quiet torch
	$(BIN)/pip install --quiet ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist demo-out bench-out *.egg-info
