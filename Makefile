# Everything a developer does with this repository. `make` lists the targets; each sets up what it needs by itself.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory --no-builtin-rules

# A process that compiles every module anew takes a fifth longer to start, and the tests start hundreds.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
STAMP := .venv/.tidings-setup
PROTOS = $(shell cd protos && find . -name '*.proto' | sed 's,^\./,,' | LC_ALL=C sort)
# The plugins for mypy's stubs are found on PATH.
PROTOC = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iprotos
GENERATED := tidings/users/v1 tidings/notifications/v1
CODE := services migrations deploy tests examples bench tools
# Arguments for pytest: `make test ARGS="tests/devstack -k mail"`.
ARGS ?=
# The image: its name, its tag, what builds it, and more for that, such as --build-arg PYTHON_IMAGE=...
IMAGE ?= tidings
TAG ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
DOCKER ?= $(firstword $(foreach tool,docker podman,$(if $(shell command -v $(tool)),$(tool))))
BUILD_ARGS ?=
# Where the sources are published, for the image's label.
SOURCE ?=
# Tests wait for processes much of their time: two more workers than processors.
JOBS ?= $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2) + 2 )))

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: setup
setup: $(STAMP) ## make .venv with everything that uv.lock names (a no-op when up to date)

# uv is taken from PATH, else from PyPI into .uv/, by whichever of venv and pip --target this Python has. A .venv that works
# keeps its Python. The system's certificates are those a company's proxy is known by.
$(STAMP): pyproject.toml uv.lock
	@python=; \
	for candidate in python3 python3.14 python3.13 python3.12 python3.11; do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			python=$$(command -v "$$candidate"); break; \
		fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "error: Tidings needs Python 3.11 or newer; this machine has $$(python3 --version 2>/dev/null || echo none)." >&2; \
		echo "       Debian, Ubuntu: apt-get install python3.11 python3.11-venv; or see https://www.python.org/downloads/" >&2; \
		exit 1; \
	fi; \
	uv=$$(command -v uv || true); \
	if [ -z "$$uv" ] || ! "$$uv" --version >/dev/null 2>&1; then \
		uv=.uv/bin/uv; \
		if ! "$$uv" --version >/dev/null 2>&1; then \
			echo "setup: getting uv from PyPI"; \
			rm -rf .uv; \
			if "$$python" -m venv .uv >/dev/null 2>&1; then \
				.uv/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5'; \
			else \
				rm -rf .uv; \
				"$$python" -m pip install --quiet --disable-pip-version-check --target .uv 'uv>=0.5' || { \
					echo "error: $$python has neither venv nor pip. Debian, Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
			fi; \
			echo '*' > .uv/.gitignore; \
		fi; \
	fi; \
	if [ -e /etc/ssl/certs/ca-certificates.crt ]; then export UV_SYSTEM_CERTS=true; fi; \
	echo "setup: .venv from uv.lock"; \
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=; fi; \
	"$$uv" sync --quiet --locked --all-extras $${python:+--python "$$python"}
	@touch $@

.PHONY: docs-metrics
docs-metrics: setup ## write the tables of docs/metrics.md from the code
	@$(BIN)/python -m tools.metrics_table

.PHONY: run
run: setup ## the whole system in the foreground; Ctrl-C stops it, the data stays in .tidings/
	@exec $(BIN)/python -m devstack run

.PHONY: test
test: setup ## every test that needs no cluster; ARGS="..." for pytest
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

.PHONY: check
check: check-code check-imports check-protos check-migrations check-image check-manifests ## everything that CI checks besides the tests

.PHONY: check-code
check-code: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy $(wildcard $(CODE))

.PHONY: check-imports
check-imports: setup
	$(BIN)/lint-imports

# Compatibility is held against the newest release; a shallow clone without tags has none to compare with.
.PHONY: check-protos
check-protos: setup
	$(BIN)/buf lint
	@if tag=$$(git describe --tags --abbrev=0 --match 'v*' 2>/dev/null); then \
		echo "buf breaking against $$tag"; $(BIN)/buf breaking --against ".git#tag=$$tag"; \
	fi
	@out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; \
	$(PROTOC) --python_out="$$out" --grpc_python_out="$$out" --mypy_out=quiet:"$$out" --mypy_grpc_out=quiet:"$$out" $(PROTOS); \
	for package in $(GENERATED); do \
		diff -r -x __pycache__ -x __init__.py "$$out/$$package" "services/$$package" || { \
			echo "error: the generated code is not that of protos/; run: make proto" >&2; exit 1; }; \
	done; \
	echo "generated code is up to date"

.PHONY: check-migrations
check-migrations: setup
	@out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; \
	for name in users notifications; do \
		$(BIN)/python -m migrations sql "$$name" > "$$out/$$name.sql"; \
		$(BIN)/squawk --config migrations/squawk.toml "$$out/$$name.sql"; \
	done
	$(BIN)/pytest -q tests/migrations -k "tables_of_the_code or up_down_up"

.PHONY: check-image
check-image: setup
	$(BIN)/hadolint Dockerfile

.PHONY: check-manifests
check-manifests: setup
	$(BIN)/pytest -q tests/manifests/test_overlays.py tests/manifests/test_skaffold.py

.PHONY: image
image: ## build the image IMAGE:TAG with docker or podman; BUILD_ARGS="--build-arg PYTHON_IMAGE=..." for another base
	@if [ -z "$(DOCKER)" ]; then echo "error: there is neither docker nor podman on PATH to build the image with" >&2; exit 1; fi; \
	"$(DOCKER)" version >/dev/null 2>&1 || { echo "error: $(DOCKER) has no engine to build with; try: $(DOCKER) version" >&2; exit 1; }
	DOCKER_BUILDKIT=1 $(DOCKER) build $(BUILD_ARGS) --tag "$(IMAGE):$(TAG)" \
		--build-arg VERSION="$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" \
		--build-arg REVISION="$$(git describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null)" \
		--build-arg SOURCE="$(SOURCE)" .

.PHONY: pin-images
pin-images: setup ## write the digests that registries have for the tags of other people's images
	$(BIN)/python -m tools.pin_images Dockerfile $(wildcard deploy)

.PHONY: fmt
fmt: setup ## format, and fix what the linter can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: proto
proto: setup ## generate the Python code of protos/
	$(PROTOC) --python_out=services --grpc_python_out=services --mypy_out=quiet:services --mypy_grpc_out=quiet:services $(PROTOS)

.PHONY: bench
bench: setup ## the benchmarks (ARGS="replay --quick", ARGS=--help): ratios, JSON in bench/results/
	$(BIN)/python -m bench $(ARGS)

.PHONY: deploy-secrets
deploy-secrets: setup ## make what is missing of the certificates, tokens and passwords of a development cluster
	$(BIN)/python -m deploy.secrets

# Sources that are not committed get a tag of their own, for a tag that is there already would not be rolled out.
.PHONY: deploy
deploy: deploy-secrets ## build, migrate and roll out to kubectl's context: by skaffold if it is there, else by kubectl
	@if command -v skaffold >/dev/null; then exec skaffold run; fi; \
	tag="$(TAG)"; case "$$tag" in *-dirty) tag="$$tag-$$(date +%s)";; esac; \
	$(MAKE) image TAG="$$tag"; \
	$(BIN)/python -m deploy.apply --image "$(IMAGE):$$tag" $(if $(OVERLAY),--overlay $(OVERLAY))

.PHONY: smoke-test
smoke-test: setup ## let one change go all the way in the cluster of kubectl's context
	$(BIN)/python -m deploy.smoke_test

.PHONY: kind-up
kind-up: ## a kind cluster for development; kubectl's context becomes kind-tidings
	@command -v kind >/dev/null || { echo "error: kind is not installed: https://kind.sigs.k8s.io" >&2; exit 1; }
	@kind get clusters 2>/dev/null | grep -qx tidings || kind create cluster --config deploy/kind/cluster.yaml --wait 120s
	@kubectl config use-context kind-tidings

.PHONY: kind-down
kind-down: ## remove that cluster with all that is in it
	kind delete cluster --name tidings

# Calico, for minikube's own network enforces no policies.
.PHONY: minikube-up
minikube-up: ## a minikube cluster for development; kubectl's context becomes minikube
	@command -v minikube >/dev/null || { echo "error: minikube is not installed: https://minikube.sigs.k8s.io" >&2; exit 1; }
	minikube start --cni=calico --cpus=2 --memory=5g

.PHONY: faults
faults: setup ## kill, pause and cut everything for SECONDS (300), then judge the feed's promises; SEED=... repeats
	$(BIN)/python -m tests.faults $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED)) $(ARGS)

.PHONY: delivery-faults
delivery-faults: setup ## the same for deliveries: servers in trouble, replicas and Postgres struck for SECONDS (300); SEED=... repeats
	$(BIN)/python -m tests.delivery_faults $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED)) $(ARGS)

# Containers of Docker; an engine is started where none answers and root has dockerd.
.PHONY: containers
containers: setup ## build the image and run the kind overlay as containers: what is in force, and every step of tests/e2e
	TIDINGS_TEST_CONTAINERS=1 $(BIN)/pytest -rs tests/containers $(ARGS)

.PHONY: e2e
e2e: setup ## the steps of tests/e2e with IMAGE:TAG in kubectl's context, in a namespace of its own; BACKEND=containers without
	$(BIN)/python -m tests.e2e $(if $(BACKEND),--backend $(BACKEND),--image "$(IMAGE):$(TAG)") $(ARGS)

.PHONY: clean
clean: ## remove caches, .venv and node_modules; data in .tidings/ stays
	rm -rf .venv .uv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist tests/js/node_modules
	find . -name __pycache__ -type d -prune -not -path './.tidings/*' -exec rm -rf {} +
