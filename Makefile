# Every target sets itself up in .venv; nothing but Python 3.11+ and make is needed.
# pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) apply as usual.
# With TORCH=2.11.0, say, any target uses that version, in an environment beside the first.

PYTHON ?= python3
VENV := .venv$(addprefix -torch-,$(TORCH))
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	--constraint $(VENV)/constraints.txt
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
DEMO := runs/demo
CORE := gcfunc tests/tensors tests/centralization tests/step tests/algorithms

# Threads that spin while they wait make training ten times slower on a machine that is busy.
export OMP_WAIT_POLICY ?= passive

# Two versions must not read each other's cache of compiled graphs: AOTAutograd would load objects
# that lack what its own have.
ifdef TORCH
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/$(VENV)/inductor
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo quick test slow counts bench gpu lint format notebooks clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-14s %s\n", $$1, $$2}'

# A demo that was interrupted left its checkpoint behind: go on from there.
demo: $(STAMPS)/recipes ## train on real images with and without gradient centralization
	$(BIN)/gcfunc train $(if $(wildcard $(DEMO)/checkpoint.pt),--resume,--compare --out) $(DEMO)

# On torch and small tools alone. conftest.py sets the markers.
quick: $(STAMPS)/quick ## lint, and test the core, in a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --ignore-missing-imports gcfunc
	$(BIN)/python -m pytest -q -n 2 -m "not slow and not compiles and not processes" $(CORE)

test: $(STAMPS)/dev ## run every test, doctest and notebook
	$(BIN)/python -m pytest -n 2 --dist loadfile
	$(BIN)/python -m pytest --nbmake $(NOTEBOOKS)

slow: $(STAMPS)/dev ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

counts: $(STAMPS)/bench ## write down the graphs, kernels, bytes and collectives that make test expects
	$(BIN)/python -m benchmarks.gates.counts --update
	$(BIN)/python -m benchmarks.cuda_code --update

# Without the wait policy above, which would make short parallel loops slow. OPTIONS are pytest's:
# make bench OPTIONS='-k "adamw and resnet50"'
BENCH := env -u OMP_WAIT_POLICY $(BIN)/python
SUITE := $(BENCH) -m pytest -c benchmarks/gates/pytest.ini benchmarks/gates/test_ratios.py $(OPTIONS)

WHAT ?= ratios
WHATS := ratios save compare budgets noise peers scaling growing
# Hold every step to its budget, as a ratio to torch: two hours, on a quiet machine.
bench-ratios := $(SUITE) --benchmark-quiet
# Measure the same, whatever the budgets are, and keep the run.
bench-save := $(SUITE) --benchmark-quiet --benchmark-autosave --ungated
# The same as ratios, and compare with the run kept last.
bench-compare := $(SUITE) --benchmark-compare --benchmark-compare-fail=min:25%
# Set the budgets from the runs kept.
bench-budgets := $(BENCH) -m benchmarks.gates.budgets
# Run a sample five times, to see what noise there is: ten minutes.
bench-noise := $(BENCH) -m benchmarks.gates.noise
# Compare with other libraries, and write README's figures: an hour.
PEERS := peers.speed peers.overhead peers.memory peers.compile_time peers.train_step peers.hooks
bench-peers := for command in $(PEERS) tables.figures; do \
	$(BENCH) -m benchmarks.$$command || exit 1; done
# Plot time and memory over the number and size of tensors: twenty minutes.
bench-scaling := $(BENCH) -m benchmarks.curves.scaling
# Print time and memory while a model grows through 200 sizes: five minutes.
bench-growing := $(BENCH) -m benchmarks.curves.growing

bench: $(if $(bench-$(WHAT)),$(STAMPS)/bench) ## measure speed, with WHAT=ratios (default), save, compare, budgets, noise, peers, scaling or growing
	$(or $(bench-$(WHAT)),$(error WHAT=$(WHAT): there are only $(WHATS)))

# Installs nothing: where nothing is set up, PYTHON is taken as it is: make gpu PYTHON=python3.12
# Without a GPU: make gpu OPTIONS=--rehearse
gpu: ## test and measure on a GPU, with what is installed, in 9 minutes
	$(if $(wildcard $(STAMPS)/venv),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu.day $(OPTIONS)

lint: $(STAMPS)/dev ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMPS)/dev ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(STAMPS)/dev ## execute the notebooks again, keeping their outputs
	$(BIN)/jupytext --sync $(NOTEBOOKS)
	$(BIN)/python -m pytest --nbmake --overwrite $(NOTEBOOKS)
	$(BIN)/nbstripout --keep-output --keep-count --extra-keys metadata.language_info.version $(NOTEBOOKS)

clean: ## remove the environment, caches and training output
	rm -rf $(VENV) build dist runs *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch and the build backend go first: the constraints then hold while gcfunc itself is built.
# With another torch comes the torchvision that asks for it.
$(STAMPS)/venv: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gcfunc needs Python 3.11 or newer; try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	sed -E '$(if $(TORCH),s/^torch==.*/torch==$(TORCH)/; /^(torchvision|setuptools)==/d)' $< > $(VENV)/$<
	$(PIP_INSTALL) torch 'setuptools>=77' || { printf '%s\n' \
		"" "$$(sed -n 's/^torch==/torch /p' $(VENV)/$<) could not be installed; pip says why above." \
		"On Linux it comes with CUDA and needs 7 GB of disk, as a CPU build 2 GB;" \
		"$$(df -Pk . | awk 'NR == 2 { printf "%.1f", $$4 / 1e6 }') GB are free here." \
		"Another version may do: make TORCH=2.13.0 $(MAKECMDGOALS)" >&2; exit 1; }
	@mkdir -p $(@D) && touch $@

$(STAMPS)/recipes $(STAMPS)/quick $(STAMPS)/bench $(STAMPS)/dev: $(STAMPS)/%: $(STAMPS)/venv pyproject.toml
	$(PIP_INSTALL) --no-build-isolation --editable '.[$*]'
	@$(if $(TORCH),! $(BIN)/python -m pip show -q torchvision 2>/dev/null || \
		$(BIN)/python -c 'import torchvision' 2>/dev/null || \
		{ echo "torchvision does not import beside this build of torch: it is removed"; \
		$(BIN)/python -m pip uninstall --quiet --yes torchvision; })
	@touch $@
