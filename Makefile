# Two commands matter: `make demo` and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A pip index of CPU builds, for Linux machines without a GPU where plain pip would bring the CUDA build:
#   make demo TORCH_INDEX=<url of the PyTorch CPU index>
TORCH_INDEX ?=
TORCH_ARGS := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test quick lint bench docs clean

$(VENV)/.base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import sys; assert sys.version_info >= (3, 11), 'Surefoot needs Python 3.11 or newer'"
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) torch==2.13.0 $(TORCH_ARGS)
	$(PIP) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e '.[dev,docs]'
	$(PIP) cleanlab==2.9.0 foolbox==3.3.4 tqdm
	$(PIP) --no-deps torchattacks==3.5.1
	touch $@

demo: $(VENV)/.base
	OMP_NUM_THREADS=2 $(BIN)/surefoot harden small_cnn --data digits --label-noise 0.4 --with elr,tract,crop_selection \
		--epochs 40 --budget quick --out surefoot-report

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

quick: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/pyright

bench: $(VENV)/.dev
	$(PIP) adversarial-robustness-toolbox==1.20.1 'statsmodels>=0.14' appdirs pyyaml packaging
	$(PIP) --no-deps auto-lirpa==0.3 torch_tract==1.0.0
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run.py

docs: $(VENV)/.dev
	$(BIN)/python docs/build.py && $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) site surefoot-report .pytest_cache .ruff_cache .hypothesis
