# The demo: runs a container from a real image under Husk. Runs in the test node, or on a host with KVM and containerd.
set -eu
image=husk.test/python:latest
for tar in "${HUSK_IMAGES:?}"/*.tar; do
    ctr images import "$tar" > /dev/null
done
program='import os, sys, platform
print("Hello from Python", platform.python_version(), "on", platform.freedesktop_os_release()["PRETTY_NAME"])
print("Kernel:", os.uname().release)
print("Memory:", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20, "MiB, CPUs:", os.cpu_count())'

husk() {
    ctr run --rm --runtime io.containerd.husk.v2 "$image" "husk-demo-$1" python3 -c "$program"
}

echo
echo "\$ ctr run --rm --runtime io.containerd.husk.v2 $image husk-demo python3 -c …"
output=$(husk 1)
echo "$output" | sed 's/^/    /'
guest=$(echo "$output" | sed -n 's/^Kernel: //p')
host=$(uname -r)
echo
echo "Guest kernel: $guest. Host kernel: $host."
if [ -z "$guest" ] || [ "$guest" = "$host" ]; then
    echo "The container did not run in a guest kernel." >&2
    exit 1
fi
# Runs the container again, with a warm page cache. The timeline of this start is shown.
: > "${HUSK_TIMELINE:?}"
husk 2 > /dev/null
