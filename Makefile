# make setup makes .venv; make demo shows the main job; make test proves it.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Tools of other projects that the tests check themselves against.
PEERS := qemu-utils libnbd-bin nbdkit fio libvhdi-utils 7zip e2fsprogs xfsprogs cryptsetup-bin
# Kinds of qcow2 images: tests/variants.py. The models and crash experiments have matrices of their own.
VARIANTS := extended_l2 refcount_bits=1 refcount_bits=64 compat=0.10 data_file compression_type=zstd cluster_size=512
VARIED := tests/image tests/operations tests/engine tests/crash tests/cli tests/compat
SOURCES := src tests demo $(wildcard bench fuzz tools)

.PHONY: help setup setup-peers demo test variants lint format bench soak clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## .venv with the command qcow and what development needs

$(READY): pyproject.toml tools/make-venv
	@tools/make-venv $(VENV)
	@touch $@

setup-peers: ## the Debian packages that tests compare with (installed when root, named otherwise)
	@tools/setup-peers $(PEERS)

demo: setup ## the main job on a real disk that is built here
	@$(BIN)/python demo/demo.py

test: setup ## every test; a missing peer is installed when root
	@if [ "$$(id -u)" = 0 ]; then tools/setup-peers $(PEERS); fi
	$(BIN)/python -m pytest -n auto -m "not soak" $(ARGS)

variants: setup ## the tests of images again, on every other kind of qcow2 image
	@for name in $(VARIANTS); do \
		echo "--image-options=$$name"; \
		$(BIN)/python -m pytest -q -n auto --hypothesis-profile=brief --image-options=$$name $(VARIED) $(ARGS) || exit 1; \
	done

lint: setup ## ruff, its formatter, mypy --strict and the tidy test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/tidy_test.py

format: setup ## let ruff mend what it can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: setup ## paired runs against qemu-img; writes the table of README
	$(BIN)/python -m bench.run $(ARGS)

soak: setup ## the long suites
	$(BIN)/python -m pytest -n auto -m "soak or not soak" --hypothesis-profile=search --timeout 7200 $(ARGS)

clean: ## everything that make produced
	rm -rf $(VENV) build dist .demo .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests demo bench fuzz -name __pycache__ -type d -prune -exec rm -rf {} +
