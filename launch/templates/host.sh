#!/bin/bash
# What runs on a TPU host, from the folder that it lies in; every verb may be repeated.
#   host.sh bootstrap          uv, Python 3.12 and the wheel beside this script, in a virtual environment
#   host.sh start              start run.sh detached, under systemd (again, if it is running)
#   host.sh look [OFFSET]      one line: host, state, exit code, bytes of the log; then the log from OFFSET, or without
#                              one the last lines of a program that has failed
#   host.sh stop               SIGTERM to the program, and wait until it has saved and ended
set -euo pipefail
cd "$(dirname "$0")"
here=$PWD
unit=$(basename "$here")
uv_version=0.13.9
seconds_to_save=600

refuse() {
  echo "posttrain-refused: $(hostname): $*"
  exit 3
}

alive() { sudo systemctl is-active --quiet "$unit"; }

look() {
  local state="absent 0" size=0
  if [ -f ended ]; then
    state="ended $(cat ended)"
  elif [ -f started ]; then
    if alive; then state="running 0"; elif [ -f ended ]; then state="ended $(cat ended)"; else state="ended 137"; fi
  fi
  if [ -f log ]; then size=$(stat -c %s log); fi
  local from=${1:-$size}
  local end=$((size - from > 65536 ? from + 65536 : size))
  echo "posttrain-host $(hostname) $state $end"
  if [ "$end" -gt "$from" ]; then tail -c "+$((from + 1))" log | head -c "$((end - from))"; fi
  if [ $# -eq 0 ] && [[ ! $state =~ ^(running|absent|ended\ (0|75)$) ]]; then tail -n 40 log; fi
}

bootstrap() {
  chmod 700 .
  if [ -f secrets.env ]; then chmod 600 secrets.env; fi
  local stamp
  stamp=$(cat host.sh constraints.txt packages.txt ./*.whl | sha256sum | cut -c 1-64)
  if [ "$(cat .venv/stamp 2>/dev/null || true)" != "$stamp" ]; then
    export PATH="$HOME/.local/bin:$PATH"
    if ! command -v cc >/dev/null; then
      sudo apt-get -qq update && sudo apt-get -qq install --yes build-essential || refuse "no C compiler, and apt-get cannot install one"
    fi
    command -v uv >/dev/null || python3 -m pip install --quiet --user "uv==$uv_version" ||
      refuse "uv cannot be installed: has the host a way to the package index (an external address, or Cloud NAT)?"
    rm -rf .venv
    uv venv --quiet --python 3.12 .venv || refuse "there is no Python 3.12, and uv cannot fetch it"
    uv pip install --quiet --python .venv/bin/python --constraint constraints.txt "$(echo ./*.whl)[tpu,tasks,gcs]" ||
      refuse "the packages of $(echo ./*.whl) cannot be installed: has the host a way to the package index (an external address, or Cloud NAT)?"
    if [ -s packages.txt ]; then
      uv pip install --quiet --python .venv/bin/python --no-deps --requirements packages.txt ||
        refuse "$(tr '\n' ' ' <packages.txt)cannot be installed"
    fi
    echo "$stamp" >.venv/stamp
  fi
  if [ -f bucket-name ]; then mount_bucket; fi
  echo "posttrain-ready $(hostname)"
}

mount_bucket() { # for models and data; the run folder is written without it
  if mountpoint -q bucket; then return; fi
  command -v gcsfuse >/dev/null || sudo apt-get -qq install --yes gcsfuse >/dev/null ||
    refuse "there is no gcsfuse to mount gs://$(cat bucket-name) with: mount it by other means, and give paths"
  mkdir -p bucket
  gcsfuse --implicit-dirs -o ro "$(cat bucket-name)" bucket >/dev/null ||
    refuse "gs://$(cat bucket-name) cannot be mounted: give the hosts' service account roles/storage.objectAdmin on it"
}

start() {
  if alive; then stop; fi
  rm -f ended
  date +%s >started
  local secrets=()
  if [ -f secrets.env ]; then secrets=(--property="EnvironmentFile=$here/secrets.env"); fi
  # Only the wrapper gets the signal (KillMode=mixed) and passes it on: the program's own workers live until it has saved.
  sudo systemd-run --quiet --collect --unit="$unit" --uid="$(id -u)" --gid="$(id -g)" \
    --setenv=HOME="$HOME" --setenv=PATH="$PATH" --property=WorkingDirectory="$here" --property=KillMode=mixed \
    --property=KillSignal=SIGTERM --property=TimeoutStopSec="$seconds_to_save" "${secrets[@]}" \
    --property=StandardOutput="append:$here/log" --property=StandardError="append:$here/log" \
    /bin/bash "$here/host.sh" main
}

main() { # under systemd: the program, and its exit code in a file
  /bin/bash run.sh &
  local child=$! code=0
  trap 'kill -TERM $child 2>/dev/null || true' TERM INT
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a signal ends a wait, not the program
  wait "$child" || code=$?
  echo "$code" >ended.partial
  mv ended.partial ended
}

stop() { sudo systemctl stop "$unit" 2>/dev/null || true; }

case "${1:-}" in
  bootstrap | start | main | stop) "$1" ;;
  look) look "${@:2}" ;;
  *) echo "usage: host.sh bootstrap|start|look [OFFSET]|stop" >&2 && exit 2 ;;
esac
