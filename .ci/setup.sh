#!/usr/bin/env bash
# Creates or updates .venv: PyTorch, ROS 2 from wheels, the libraries, the messages of msg/, this package, a software renderer.
# `make setup` calls it without arguments; `.ci/setup.sh colcon` adds colcon. A step whose inputs have not changed since it last
# succeeded is skipped: its stamp in .venv/.setup holds the hash of those inputs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=$root/.venv
stamps=$venv/.setup
log=
extra=${1:-}

# Modules of another ROS installation or virtual environment must not be found instead of those in .venv.
unset PYTHONPATH PYTHONHOME AMENT_PREFIX_PATH CMAKE_PREFIX_PATH COLCON_PREFIX_PATH LD_LIBRARY_PATH _ROS_WHEELS_BOOTSTRAP_COMPLETE

die() {
  printf 'set-up: %s\n' "$*" >&2
  exit 1
}

# ---- what the machine must have -----------------------------------------------------------------------------------------------

usable_python() {  # a CPython 3.10-3.12 that can make a virtual environment and has its C headers
  "$1" - <<'PY' 2>/dev/null
import ensurepip, os, sys, sysconfig, venv
headers = os.path.join(sysconfig.get_path('include'), 'Python.h')
sys.exit(not ((3, 10) <= sys.version_info[:2] <= (3, 12) and os.path.exists(headers)))
PY
}

choose_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    usable_python "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.10, 3.11 or 3.12 with venv and C headers (on Debian: apt-get install python3.11-venv python3.11-dev)."
    command -v "$PYTHON"
    return
  fi
  while read -r candidate; do
    if usable_python "$candidate"; then
      echo "$candidate"
      return
    fi
  done < <(type -ap python3.11)
  if type -p python3.11 >/dev/null; then
    die 'python3.11 is here but lacks venv or its C headers: apt-get install python3.11-venv python3.11-dev, or name another interpreter: make PYTHON=/path/to/python3.'
  fi
  die 'Python 3.11 is missing: apt-get install python3.11 python3.11-venv python3.11-dev, or name a Python 3.10 or 3.12: make PYTHON=/path/to/python3.'
}

check_machine() {
  [ "$(uname -sm)" = 'Linux x86_64' ] \
    || die "the ROS 2 wheels exist for Linux x86_64 only, this is $(uname -sm): install ROS 2 from your distribution and build with colcon (README.md)."
  command -v c++ >/dev/null || command -v g++ >/dev/null || die 'a C++ compiler is missing: apt-get install g++.'
  command -v cmake >/dev/null || die 'CMake is missing: apt-get install cmake.'
  local version
  version=$(cmake --version | sed -n '1s/[^0-9]*\([0-9.]*\).*/\1/p')
  [ "$(printf '3.19\n%s\n' "$version" | sort -V | head -n 1)" = 3.19 ] || die "CMake $version is too old: 3.19 or newer is needed."
}

# ---- steps --------------------------------------------------------------------------------------------------------------------

hash_of() { find "$@" -type f -not -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-32; }

explain() {  # the last lines of a failed step's log and what to do about them
  echo >&2
  tail -n 15 "$log" | sed 's/^/  | /' >&2
  if grep -q '^mujoco is broken' "$log"; then
    die "the mujoco package in .venv cannot be imported: run 'make clean' and the command again."
  elif grep -q '^no OpenGL renderer' "$log"; then
    die 'MuJoCo found no OpenGL software renderer: apt-get install libegl1 libgl1-mesa-dri (or libosmesa6), then run the command again.'
  elif grep -qiE 'Temporary failure in name resolution|Connection (refused|broken|aborted)|NewConnectionError|Network is unreachable|ProxyError|ReadTimeout|from versions: none' "$log"; then
    die "step '$1' failed: the Python package index cannot be reached or has nothing for this interpreter; check the network and pip's configuration, then run the command again."
  elif grep -qE 'No matching distribution found|Could not find a version' "$log"; then
    die "step '$1' failed: $(grep -m1 -oE '(No matching distribution found|Could not find a version).*' "$log" | cut -c1-160). Is pip's index complete, and is the interpreter Python 3.10-3.12?"
  elif grep -q 'No space left on device' "$log"; then
    die "step '$1' failed: the disk is full; .venv needs about 3 GB, and 8 GB if pip chooses a PyTorch with CUDA."
  fi
  die "step '$1' failed; the whole log is $log."
}

number=0
step() {  # step NAME INPUT_HASH LABEL COMMAND...: run it with progress unless its stamp has that hash
  local name=$1 hash=$2 label=$3 began=$SECONDS pid
  shift 3
  number=$((number + 1))
  [ "$(cat "$stamps/$name" 2>/dev/null)" = "$hash" ] && return
  changed=1
  log=$stamps/$name.log
  rm -f "$stamps/$name"
  printf '[%d/%d] %s ...' "$number" "$total" "$label"
  set -m  # a process group of its own, so that an interrupt ends all of it
  ("$@") >"$log" 2>&1 </dev/null &
  pid=$!
  set +m
  trap 'kill -- "-$pid" 2>/dev/null; echo; die interrupted' INT TERM
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.5
    if [ -t 1 ]; then
      printf '\r[%d/%d] %s ... %d s' "$number" "$total" "$label" $((SECONDS - began))
    elif [ $(((SECONDS - began) % 30)) = 29 ]; then
      printf ' %d s ...' $((SECONDS - began))
      sleep 1
    fi
  done
  wait "$pid" || explain "$label"
  trap - INT TERM
  if [ -t 1 ]; then printf '\r[%d/%d] %s: %d s    \n' "$number" "$total" "$label" $((SECONDS - began)); else printf ' %d s\n' $((SECONDS - began)); fi
  printf '%s\n' "$hash" >"$stamps/$name"
}

# Not compiled here: Python compiles what is imported when it is, and most of torch and transformers never is.
install_list() { "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-compile -r "requirements/$1.txt"; }

requirement_step() {  # requirement_step NAME LABEL
  step "$1" "$base_hash-$(hash_of "requirements/$1.txt")" "$2" install_list "$1"
}

build_messages() {
  rm -rf "$stamps/build_msg"
  PATH=$venv/bin:$PATH cmake -S msg -B "$stamps/build_msg" -DCMAKE_INSTALL_PREFIX="$venv" -DCMAKE_PREFIX_PATH="$venv" -DBUILD_TESTING=OFF \
    -DPython3_EXECUTABLE="$venv/bin/python"
  PATH=$venv/bin:$PATH cmake --build "$stamps/build_msg" -j"$(nproc)" --target install
  "$venv/bin/python" -c 'import vla_policy_msgs.msg, vla_policy_msgs.srv'
}

# An editable wheel has no data files, so what colcon and pip install below share/ and lib/ is linked here: edits show at once.
install_package() {
  local name=vla_policy_ros executable item
  "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-index --no-deps --no-build-isolation --editable .
  rm -rf "$venv/share/$name" "$venv/lib/$name"
  mkdir -p "$venv/share/$name" "$venv/lib/$name" "$venv/share/ament_index/resource_index/packages"
  ln -sfn "$root/resource/$name" "$venv/share/ament_index/resource_index/packages/$name"
  for item in package.xml config checkpoints; do ln -s "$root/$item" "$venv/share/$name/$item"; done
  mkdir "$venv/share/$name/launch"  # a real folder: `ros2 launch` does not look into linked ones
  ln -s "$root"/launch/*.launch.py "$venv/share/$name/launch/"
  "$venv/bin/python" - "$name" <<'PY' | while read -r executable; do ln -s "../../bin/$executable" "$venv/lib/$name/$executable"; done
import importlib.metadata, sys
for entry in importlib.metadata.distribution(sys.argv[1]).entry_points:
    print(entry.name)
PY
}

renders() {  # renders BACKEND: can MuJoCo draw a frame with it, without a display?
  env -u DISPLAY MUJOCO_GL="$1" "$venv/bin/python" - <<'PY'
import mujoco
model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><light pos="0 0 3"/><geom size="1" pos="0 0 -2"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(data)
    assert renderer.render().any(), 'the frame is black'
PY
}

find_renderer() {  # writes the name of the OpenGL backend that works, installing one where that is possible
  local backend
  MUJOCO_GL=disable "$venv/bin/python" -c 'import mujoco' || { echo 'mujoco is broken' && return 1; }
  for backend in egl osmesa; do
    if renders "$backend"; then
      echo "$backend" >"$stamps/renderer"
      return
    fi
  done
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y --no-install-recommends libegl1 libgl1-mesa-dri \
      || { apt-get update && apt-get install -y --no-install-recommends libegl1 libgl1-mesa-dri; }
    renders egl && echo egl >"$stamps/renderer" && return
  fi
  echo 'no OpenGL renderer'
  return 1
}

# ---- the whole ----------------------------------------------------------------------------------------------------------------

began=$SECONDS
changed=0
check_machine

healthy() { "$venv/bin/python" -c 'import pip' 2>/dev/null && head -n 3 "$venv/bin/pip" | grep -qF "$venv/bin/"; }  # scripts name their folder
if [ -e "$venv" ] && ! healthy; then
  echo 'set-up: .venv is broken or was moved here from another folder; making it anew'
  rm -rf "$venv"
fi
if [ ! -e "$venv" ]; then
  python=$(choose_python)
  echo "set-up: creating .venv with $("$python" -V 2>&1) ($python)"
  "$python" -m venv "$venv" || die "$python cannot create a virtual environment: apt-get install python3.11-venv."
elif [ -n "${PYTHON:-}" ] && [ "$("$PYTHON" -V 2>&1)" != "$("$venv/bin/python" -V 2>&1)" ]; then
  die ".venv was made with $("$venv/bin/python" -V), not with PYTHON=$PYTHON: run 'make clean' first."
fi
mkdir -p "$stamps"
# Two commands started at once would install into each other's way.
exec 9>"$stamps/lock"
if command -v flock >/dev/null && ! flock -n 9; then
  echo 'set-up: waiting for another set-up of this folder'
  flock 9
fi

total=9
base_hash=$("$venv/bin/python" -V | cut -d' ' -f2)
requirement_step torch 'PyTorch'
requirement_step ros 'ROS 2 Jazzy'
requirement_step runtime 'libraries'
requirement_step training 'training libraries'
requirement_step messages 'message build tools'
requirement_step dev 'test tools'
step msg "$base_hash-$(hash_of msg requirements/ros.txt requirements/messages.txt)" 'building the messages' build_messages
step package "$base_hash-$(hash_of setup.py setup.cfg resource launch)" 'installing vla_policy_ros' install_package
step gl "$base_hash-$(hash_of requirements/runtime.txt)" 'software renderer' find_renderer
if [ "$extra" = colcon ]; then
  total=10
  requirement_step colcon 'colcon'
fi

if [ "$changed" = 1 ]; then
  echo "set-up: done in $((SECONDS - began)) s"
else
  echo "set-up: up to date"
fi
