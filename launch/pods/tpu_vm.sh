#!/usr/bin/env bash
# NAME=nf ZONE=us-central2-b TYPE=v4-32 BUCKET=mine REPO=https://github.com/me/nfnets launch/pods/tpu_vm.sh --config=configs/nfnet.py --workdir=/mnt/bucket/f0
#
# Asks for a spot TPU as a queued resource, waits for it, installs on all workers, mounts the Cloud Storage bucket at /mnt/bucket,
# trains on all of them, and asks again when the TPU is taken away. It runs on any machine with gcloud; started again, it goes on with
# the TPU of that name. --dry-run as the first argument prints the commands. RUNTIME (the VM's image), BRANCH and MOST_RESTARTS may
# be set too. The TPU is deleted when training is done, but not when it failed.
set -euo pipefail

run() { "$@"; }
if [ "${1:-}" = --dry-run ]; then
  shift
  run() { printf '%q ' "$@"; echo; }
fi
dry() { [ "$(run true)" != "" ]; }
: "${NAME:?a name for the TPU}" "${ZONE:?e.g. us-central2-b}" "${TYPE:?e.g. v4-32}" "${REPO:?a git URL that the workers can clone}" "${BUCKET:?the bucket of the workdir, without gs://}"
[ $# -gt 0 ] || { echo "error: no arguments for launch.train, e.g. --config=configs/nfnet.py --workdir=/mnt/bucket/f0" >&2; exit 2; }

tpus() { run gcloud compute tpus "$@" --zone="$ZONE"; }
ssh_all() { tpus tpu-vm ssh "$NAME" --worker=all --command="$1"; }
# Prints the TPU's state, NONE if there is no such TPU, and nothing if gcloud could not say.
state() { tpus queued-resources describe "$NAME" --format="value(state.state)" 2>&1 | sed 's/.*NOT_FOUND.*/NONE/; /ERROR/d' || true; }

# First this ends what a broken ssh connection has left running.
install="if read -r loop python < pids; then kill \$loop \$python; while kill -0 \$python; do sleep 1; done; fi 2> /dev/null
rm -rf nfnets-run status pids && git clone --depth=1 --branch=${BRANCH:-main} $(printf %q "$REPO") nfnets-run && cd nfnets-run &&
curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv venv -q --python 3.12 .venv &&
~/.local/bin/uv pip install -q --python .venv -r requirements.txt 'jax[tpu]' gcsfs && { command -v gcsfuse > /dev/null || {
curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null &&
echo \"deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main\" |
sudo tee /etc/apt/sources.list.d/gcsfuse.list && sudo apt-get -q update && sudo apt-get -qy install gcsfuse; }; } &&
{ mountpoint -q /mnt/bucket || { sudo install -d -o \"\$USER\" /mnt/bucket && gcsfuse --implicit-dirs --rename-dir-limit=100000 \\
--metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 $(printf %q "$BUCKET") /mnt/bucket; }; }"
# Each worker starts its process again, so that all can meet anew; launch.pods.local knows after which statuses.
train="cd nfnets-run && { .venv/bin/python -m launch.pods.local --restarts=${MOST_RESTARTS:-50} -- \
.venv/bin/python -m launch.train $(printf '%q ' "$@") & echo \$\$ \$! > ../pids; wait \$!; s=\$?; echo \$s > ../status; exit \$s; }"

for ((attempt = 0; attempt <= ${MOST_RESTARTS:-50}; attempt++)); do
  if dry || [ "$(state)" = NONE ]; then
    tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="${RUNTIME:-tpu-ubuntu2204-base}" --spot
  fi
  until dry; do case $(state) in ACTIVE | FAILED | SUSPEND* | NONE) break ;; *) sleep 30 ;; esac; done
  for tries in 1 2 3 4 5; do
    if ssh_all "$install" && ssh_all "$train"; then
      tpus queued-resources delete "$NAME" --force --quiet; exit 0
    fi
    # gcloud's status does not tell a broken ssh connection from a training that ended; the workers' files do
    case $(state) in FAILED | SUSPEND* | NONE) break ;; esac
    if [ -n "$(ssh_all "cat status" 2> /dev/null || true)" ] || [ "$tries" = 5 ]; then
      echo "error: installing or training failed; the TPU is still there: gcloud compute tpus queued-resources delete $NAME --force --zone=$ZONE" >&2
      exit 1
    fi
    sleep 30
  done
  echo "the TPU was taken away; asking again" >&2
  tpus queued-resources delete "$NAME" --force --quiet || true
done
echo "error: given up after ${MOST_RESTARTS:-50} restarts" >&2
exit 76
