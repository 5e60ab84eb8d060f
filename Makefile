# make demo: from a fresh clone to a trained model, annotated images and scores on synthetic data
# make test: from a fresh clone to a green test run
# make lint: the linter alone; part of make test
PYTHON ?= python3
.PHONY: demo test lint soak

demo: .venv/installed
	.venv/bin/python sample_data.py
	.venv/bin/python data_processing.py
	.venv/bin/python train.py --optimizer adamw --epochs 20 --train-threshold
	.venv/bin/python predict.py --data data/stage_2_test_images --labels data/stage_2_test_labels.csv --model output/final.pth.tar \
	  --output output/predictions

test: lint
	.venv/bin/python -m pytest -q

lint: .venv/tests-installed
	.venv/bin/ruff check

# slow tests: a training run killed 20 times, 4,000 mutated files
soak: .venv/tests-installed
	.venv/bin/python -m pytest -q -m soak

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/tests-installed: .venv/installed tests/requirements.txt requirements-extra.txt
	.venv/bin/pip install -q -r tests/requirements.txt
	touch $@
