# Two commands do everything on a fresh machine: `make run` and `make test`.
SHELL := bash
BIN := .venv/bin
TEST_WORKERS ?= 2

.PHONY: help run test faults setup lint bench ui deployments params dvc lock clean

help:  ## these lines
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

run: setup  ## the main job on the embedded default: curate, train, evaluate, register, report
	@$(BIN)/reelflow run recommend $(ARGS)

test: lint  ## lint, types, import rules and all tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) -q $(ARGS)

faults: setup  ## the long fault suite: kills, storage, inputs, limits (over an hour)
	@OMP_NUM_THREADS=1 REELFLOW_FAULTS=long $(BIN)/python -m pytest -n $(TEST_WORKERS) -q --timeout=7200 --dist=worksteal $(or $(ARGS),tests/faults)

setup:  ## the set-up alone: .venv from requirements.lock
	@infra/setup.sh

lint: setup  ## format, lint, types, import rules
	@$(BIN)/ruff format --check --quiet . || { echo "remedy: $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-cache >.venv/lint-imports.log || { cat .venv/lint-imports.log; exit 1; }

bench: setup  ## every benchmark behind docs/results.md (minutes)
	@for name in $$($(BIN)/reelflow bench | awk '{print $$1}'); do $(BIN)/reelflow bench $$name || exit 1; done

ui: setup  ## Prefect, MLflow and a worker, on free ports
	@$(BIN)/reelflow ui $(ARGS)

deployments: setup  ## infra/prefect.yaml from the flows
	@$(BIN)/python -c "import flows.deployments as d; d.POOL_FILE.write_text(d.pool_file())"

params: setup  ## params.yaml with every parameter of every stage; values are kept
	@$(BIN)/python -m components.pipeline.params_file

dvc: setup  ## dvc.yaml from the stage registry
	@$(BIN)/python -m components.pipeline.dvc

lock: setup  ## requirements.lock from pyproject.toml
	@$(BIN)/python infra/lock.py

clean:  ## everything the platform made here, not the environment
	@rm -rf .platform out
