# Everything a newcomer needs: `make quickstart` and `make test`. Python 3.11 or newer and pip are all they assume.
PYTHON ?= python3
VENV ?= .venv
PEERS ?= .venv-peers
CUDA ?= .venv-cuda
BIN := $(VENV)/bin
export JAX_PLATFORMS ?=

.PHONY: quickstart test check peers cuda proofs gpu tpu clean

$(BIN)/tokeff: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $(BIN)/tokeff

$(PEERS)/.done: setup.py
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet torch==2.13.0
	$(PEERS)/bin/python -m pip install --quiet torch==2.13.0 transformers==5.2.0 kvpress==0.5.5 safetensors
	touch $(PEERS)/.done

$(CUDA)/.done: setup.py
	$(PYTHON) -m venv $(CUDA)
	$(CUDA)/bin/python -m pip install --quiet jax==0.10.2 jax-cuda13-plugin==0.10.2 \
		flatbuffers absl-py nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88
	touch $(CUDA)/.done

quickstart: $(BIN)/tokeff  ## environment, model, the first experiment and its report
	$(BIN)/tokeff fetch smollm2-135m
	$(BIN)/tokeff run configs/quickstart.py
	@echo "open runs/quickstart/report.html"

peers: $(PEERS)/.done  ## the other libraries that tests compare with, in an environment of their own

cuda: $(CUDA)/.done  ## the compiler for GPUs, which needs none, in an environment of its own

test: $(BIN)/tokeff peers cuda  ## environment, model, every test
	$(BIN)/tokeff fetch smollm2-135m
	JAX_PLATFORMS=cpu TOKEFF_PEERS_PYTHON=$(abspath $(PEERS))/bin/python TOKEFF_CUDA_PYTHON=$(abspath $(CUDA))/bin/python \
		$(BIN)/python -m pytest -n 2 --dist loadgroup

check: $(BIN)/tokeff  ## style and types
	$(BIN)/ruff check .
	$(BIN)/basedpyright

proofs: $(BIN)/tokeff peers  ## the long proofs; results go to experiments/results
	$(BIN)/tokeff fetch smollm2-135m
	JAX_PLATFORMS=cpu TOKEFF_PEERS_PYTHON=$(abspath $(PEERS))/bin/python $(BIN)/python -m pytest -n 2 --dist loadgroup -m proof
	$(BIN)/python experiments/lossless.py --draft checkpoints/smollm2-135m-draft
	$(BIN)/python experiments/aot_8b_decode.py

# $(PYTHON) must have jax for the device, and nothing else. Run again after an interruption: what is done is not done again.
gpu tpu:  ## every kernel checked and timed on the GPU, or TPU, of this machine
	$(PYTHON) -m tokeff.bench.device --platform $@

clean:
	rm -rf $(VENV) $(PEERS) $(CUDA) build dist *.egg-info
