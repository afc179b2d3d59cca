# The whole set-up: `make demo` or `make test` on a fresh machine with Python 3.10 or newer.
# TORCH_INDEX: where to take PyTorch's CPU build from, which is 4 GB smaller (see README.md).
PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
READY := .venv/.ready

.PHONY: install demo docs test test-pythons test-tensorrt faults check clean

install: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet --disable-pip-version-check torch torchvision --index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,cpu,ncnn,report,docs,dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/edgekd demo --out demo

# The variable turns off Material's notice about MkDocs 2.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file docs/mkdocs/mkdocs.yml

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The tests that need no torch, on every Python that pyproject.toml names and this machine has (pyenv's and uv's, too).
test-pythons:
	$(PYTHON) tests/pythons.py build/pythons

# Every network with NVIDIA's real builder, which needs no GPU: 180 MB of wheels once, and about ten minutes.
test-tensorrt: $(READY)
	$(BIN)/python tests/tensorrt_builds.py benchmarks/results/tensorrt-rtx-builds.md

# 100,000 mutated inputs and 300 kills: about an hour; `make test` has a few of both. Their summaries are committed.
faults: $(READY)
	rm -rf build/faults
	$(BIN)/python tests/faults/base.py build/faults
	$(BIN)/python tests/faults/fuzz.py --base build/faults --count 4600 --out build/faults.jsonl > tests/faults/readers.json
	$(BIN)/python tests/faults/kills.py --base build/faults --count 300 > tests/faults/kills.json

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv demo build dist
