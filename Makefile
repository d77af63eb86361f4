# make demo: from a fresh clone to a trained model.  make test: lint and the whole suite.  Both make the virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint format mlflow clean

demo: $(VENV)/installed
	launch/demo.sh $(BIN)

test: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadgroup

lint: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/shellcheck launch/*.sh launch/slurm.sbatch launch/kubernetes/pod.sh .ci/run
	$(BIN)/hadolint Dockerfile

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The runs of the demo in MLflow's pages, on this machine only.
mlflow: $(VENV)/installed
	$(BIN)/mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///runs/mlflow.db

$(VENV)/installed: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	DS_BUILD_OPS=0 $(PIP) --editable '.[deepspeed,test]'
	touch $@

clean:
	rm -rf $(VENV) store runs .pytest_cache .ruff_cache *.egg-info
