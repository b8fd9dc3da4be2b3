# The README's commands, each a line of ordinary tools. Everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: demo test clean

.venv/user: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

.venv/developer: .venv/user requirements-dev.txt
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@

# Train CE, Focal, GHM-C and GHM-C + GHM-R on the demo set and compare them.
demo: .venv/user
	$(BIN)/python -m data.demo
	for loss in ce focal ghm_c ghm; do $(BIN)/python train.py --config configs/demo/$$loss.yaml --resume || exit; done
	$(BIN)/python scripts/compare.py runs/demo_ce runs/demo_focal runs/demo_ghm_c runs/demo_ghm
	@echo "Detections beside the ground truth: runs/demo_ghm/detections.png"
	@echo "Curves and pictures of all four:    $(BIN)/tensorboard --logdir runs"

# One thread for each test process: with more they would wait for each other's cores. A file's tests stay together.
test: export OMP_NUM_THREADS := 1
test: .venv/developer
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadscope

clean:
	rm -rf .venv runs/demo_* datasets/demo
