# Two commands matter: `make demo` and `make test`. Both set up .venv first; a second run finds everything in place.

SHELL := /bin/bash
VENV := $(CURDIR)/.venv
ARGS ?=
PYTHON ?=

# Another ROS installation in the shell would mix its modules with those of the wheels.
unexport PYTHONPATH AMENT_PREFIX_PATH CMAKE_PREFIX_PATH COLCON_PREFIX_PATH _ROS_WHEELS_BOOTSTRAP_COMPLETE PYTHONHOME VIRTUAL_ENV

# The environment of everything that runs: tools of .venv, shared memory large enough for raw images, nobody else's robot.
RUN = export PATH="$(VENV)/bin:$$PATH" AMENT_PREFIX_PATH="$(VENV)" \
	ROS_AUTOMATIC_DISCOVERY_RANGE="$${ROS_AUTOMATIC_DISCOVERY_RANGE:-LOCALHOST}" \
	FASTRTPS_DEFAULT_PROFILES_FILE="$${FASTRTPS_DEFAULT_PROFILES_FILE:-$(CURDIR)/config/fastdds.xml}" \
	MUJOCO_GL="$${MUJOCO_GL:-$$(cat $(VENV)/.setup/renderer)}" PYTHONUNBUFFERED=1;

# Parts of a training, each from the checkpoint of the one before, by two processes that share its steps.
TRAIN = for part in $(1); do torchrun --standalone --nproc-per-node 2 --no-python vla-policy train $$part || exit; done

.PHONY: help setup demo test lint bench checkpoint gripper colcon clean

help:  ## list the commands
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST)

setup:  ## create or update .venv (PYTHON=/path/to/python chooses the interpreter)
	@PYTHON="$(PYTHON)" .ci/setup.sh

demo: setup  ## simulator and policy in a closed loop (ARGS='--headless --seconds 30 --json d.json')
	@$(RUN) vla-policy demo $(ARGS)

# All tests: on every core, but for those that talk over DDS, which measure time and get the machine to themselves.
test: setup  ## run the tests (ARGS='-k packaging')
ifeq ($(strip $(ARGS)),)
	@$(RUN) export OMP_NUM_THREADS=1; python -m pytest -n logical --dist loadfile -m 'not dds' && python -m pytest -m dds
else
	@$(RUN) export OMP_NUM_THREADS=1; python -m pytest $(ARGS)
endif

lint: setup  ## ruff and mypy
	@$(RUN) ruff check . && mypy

bench: setup  ## measure what each stage costs on this machine
	@$(RUN) python benchmarks/stages.py $(ARGS)

# Two hours: each part goes on where an interrupt left it.
checkpoint: setup  ## train checkpoints/tabletop anew from nothing, into runs/tabletop_visited/checkpoint
	@$(RUN) export OMP_NUM_THREADS=1; $(call TRAIN,tabletop_perception tabletop tabletop_visited)

# The same for the other arm, from the towers of the same first part.
gripper: setup  ## train the checkpoint of the arm with a gripper, into runs/tabletop_gripper_revisited/checkpoint
	@$(RUN) export OMP_NUM_THREADS=1; \
	$(call TRAIN,tabletop_perception tabletop_gripper tabletop_gripper_fine tabletop_gripper_place tabletop_gripper_visited tabletop_gripper_revisited)

colcon: setup  ## build both packages as on a robot, into install/
	@PYTHON="$(PYTHON)" .ci/setup.sh colcon
	@$(RUN) export CMAKE_PREFIX_PATH="$(VENV)"; colcon build --base-paths . msg --event-handlers console_direct+ $(ARGS)

clean:  ## remove what the commands above made, but for runs/
	rm -rf .venv build install log demo .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
