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

# Train CE, Focal, GHM-C and GHM-C + GHM-R, both with a limit, on the demo set and compare them.
demo: .venv/user
	$(BIN)/python -m data.demo --quick
	@mkdir -p runs
	@echo "training ce, focal, ghm_c_limited and ghm_limited, two at a time, one or two minutes each; progress is in runs/demo_*.log"
	@printf '%s\n' ce focal ghm_c_limited ghm_limited | OMP_NUM_THREADS=1 xargs -n 1 -P 2 sh -c '\
	    log=runs/demo_$$0.log; \
	    $(BIN)/python train.py --config configs/demo/$$0.yaml --resume >$$log 2>&1 || { tail -n 1 $$log; exit 255; }; \
	    echo "demo_$$0: $$(tr "\r" "\n" <$$log | grep "^epoch .* AP " | tail -n 1)"'
	$(BIN)/python scripts/compare.py $(addprefix runs/demo_,ce focal ghm_c_limited ghm_limited) --html runs/demo.html
	@echo "Detections beside the ground truth: runs/demo_ghm_limited/detections.png"
	@echo "The comparison as a page:           runs/demo.html"
	@echo "Curves and pictures of all four:    $(BIN)/tensorboard --logdir runs"

# One thread for each test process: with more they would wait for each other's cores. A file's tests stay together.
# mypy, which uses one core, runs beside them.
test: export OMP_NUM_THREADS := 1
test: .venv/developer
	$(BIN)/ruff check .
	$(BIN)/mypy & types=$$!; \
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder; tests=$$?; \
	wait $$types && exit $$tests

clean:
	rm -rf .venv runs/demo_* runs/demo.html datasets/demo datasets/demo_quick
