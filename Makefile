# Everything a developer types. A virtual environment in .venv is made on the first call; `make PYTHON=python3.12 ...` picks another Python.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Both threads on one core make a CPU run a hundred times slower.
export OMP_PROC_BIND ?= true

.PHONY: help demo demo-detection demo-segmentation test test-openmmlab test-timm sanitize parity dev lint format bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1|/' | column -t -s '|'

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON): not found; visionssm needs Python 3.10 to 3.13"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"Python {v[0]}.{v[1]} is not supported, visionssm needs 3.10 to 3.13: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment (Debian: apt-get install python3-venv)"; exit 1; }

# One stamp per extra; editing the requirements installs again.
$(VENV)/.installed-%: pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$*]'
	@$(BIN)/python -c 'import cv2' 2>/dev/null || { \
	  echo "libGL is missing (Debian: apt-get install libgl1): installing opencv-python-headless in place of opencv-python"; \
	  $(BIN)/python -m pip uninstall -q -y opencv-python && $(BIN)/python -m pip install -q --force-reinstall --no-deps -c constraints.txt opencv-python-headless; }
	@touch $@

# mmcv's operators are compiled once, 10 to 14 minutes on two cores; pip keeps the wheel (`pip cache list onedl_mmcv`). It needs a C++17
# compiler, torch in the same environment, hence no build isolation, and these four; MAX_JOBS=2 keeps it within 4 GB of memory.
$(VENV)/.installed-openmmlab: pyproject.toml setup.py constraints.txt | $(VENV)/.installed-dev
	@command -v c++ >/dev/null || { echo "mmcv needs a C++ compiler (Debian: apt-get install g++)"; exit 1; }
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel ninja psutil
	MMCV_WITH_OPS=1 MAX_JOBS=$${MAX_JOBS:-2} $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation --no-deps onedl-mmcv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[openmmlab]'
	@$(BIN)/python -c 'import cv2' 2>/dev/null || { \
	  $(BIN)/python -m pip uninstall -q -y opencv-python && $(BIN)/python -m pip install -q --force-reinstall --no-deps -c constraints.txt opencv-python-headless; }
	@touch $@

demo: $(VENV)/.installed-train  ## train a nano VMamba on real handwritten digits, a minute or two on two cores
	$(BIN)/python tools/train.py configs/classification/vmamba-nano_digits.py

demo-detection: $(VENV)/.installed-openmmlab  ## train a nano detector on scenes of handwritten digits, five minutes on two cores
	$(BIN)/python tools/draw_digit_scenes.py work_dirs/digit-scenes
	$(BIN)/python tools/train.py configs/detection/mask-rcnn_vmamba-nano_fpn_digit-scenes.py

demo-segmentation: $(VENV)/.installed-openmmlab  ## train a nano segmentor on the same scenes, two minutes on two cores
	$(BIN)/python tools/draw_digit_scenes.py work_dirs/digit-scenes
	$(BIN)/python tools/train.py configs/segmentation/upernet_vmamba-nano_digit-scenes.py

test: $(VENV)/.installed-dev  ## run the tests
	$(BIN)/python -m pytest

test-openmmlab: $(VENV)/.installed-openmmlab  ## run the tests that need mmdet and mmseg, compiling mmcv on the first call; none may skip
	VISIONSSM_REQUIRE_OPENMMLAB=1 $(BIN)/python -m pytest tests/openmmlab

sanitize: $(VENV)/.installed-dev  ## run the CUDA C++ kernels, emulated on the CPU, under AddressSanitizer
	cd tests/ops && TRITON_INTERPRET=1 EMULATOR_FLAGS="-fsanitize=address -g" ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
	  LD_PRELOAD=$$(g++ -print-file-name=libasan.so) ../../$(BIN)/python -m pytest -q -s -p no:cacheprovider test_csrc_kernels.py test_csrc_variants.py test_csrc_sequence.py

parity: $(VENV)/.installed-dev  ## print how far every model is from the published one
	$(BIN)/python -m pytest -q tests/models -k parity

test-timm: $(VENV)/.installed-dev  ## run timm's own test file on our models (downloads timm's source distribution)
	$(BIN)/python tools/run_timm_tests.py

dev: $(VENV)/.installed-dev  ## set up for development: editable install, link for editors and type checkers, git hooks
	@ln -sfn ../ops visionssm/ops
	$(BIN)/pre-commit install

lint: $(VENV)/.installed-dev  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev  ## mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev  ## time the operator and the models on this machine
	$(BIN)/python tools/benchmark_ops.py --device cpu
	$(BIN)/python tools/benchmark_models.py --device cpu

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info work_dirs
