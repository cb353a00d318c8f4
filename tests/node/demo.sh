# The demo: the same image under runc and under Husk.
set -eu
image=${HUSK_IMAGE:-husk.test/python:latest}
for tar in "${HUSK_IMAGES:?}"/*.tar; do ctr images import "$tar"; done
echo
echo "This machine's kernel: $(uname -r)"
echo
echo "\$ ctr run --rm --runtime io.containerd.husk.v2 $image demo python3 -c …"
ctr run --rm --runtime io.containerd.husk.v2 "$image" demo python3 -c '
import os, sys
print("Hello from Python", sys.version.split()[0], "in a container")
print("Kernel in here:", os.uname().release)
print("Processes in here:", sum(name.isdigit() for name in os.listdir("/proc")))'
