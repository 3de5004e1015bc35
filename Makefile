SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test report clean

bin := .venv/bin

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## set up, bring the weights, train the small model and write the report (no GPU, no key)
	@scripts/install
	@$(bin)/tutelage fetch
	@$(bin)/tutelage run --name "demo-$$(date +%Y%m%d-%H%M%S)" || [ $$? -eq 3 ] # 3: played, and the gate said no

# No test may need more than what `fetch` has brought.
test: export HF_HUB_OFFLINE := 1
# Two workers of one thread each: most tests have too little to do for two threads.
test: export OMP_NUM_THREADS := 1
test: ## set up for development, then lint, check formats, types, imports, and run the tests
	@scripts/install dev
	@$(bin)/tutelage fetch
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy src
	$(bin)/lint-imports
	$(bin)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

report: ## write the report of the newest run, or of RUN=name, again
	@scripts/install
	@$(bin)/tutelage report $(RUN)

clean: ## remove what can be made again (.venv, caches, builds); runs/ stays
	rm -rf .venv build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
