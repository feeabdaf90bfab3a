#!/bin/sh
# Installs the system packages that the work on luks-csi needs, those that are missing only.
# `system.sh python PYTHON`: enough for a virtual environment; `system.sh`: the demo and the device tests; `system.sh
# cluster`: the tests in a cluster too; `system.sh data`: the benchmark of the data path.
set -eu

fail() {
    echo "luks-csi: $1" >&2
    exit 1
}

ID=unknown VERSION_ID= PRETTY_NAME=$(uname -s)
[ ! -r /etc/os-release ] || . /etc/os-release
case $ID in
debian) oldest=12 VERSION_ID=${VERSION_ID:-99} ;; # testing and unstable have no number
ubuntu) oldest=24.04 ;;
*) oldest= ;;
esac
[ -n "$oldest" ] && dpkg --compare-versions "$VERSION_ID" ge "$oldest" ||
    fail "this is $PRETTY_NAME, but only Debian 12 or newer and Ubuntu 24.04 or newer are supported; use one of them, in a container or virtual machine for example."

install() {
    sudo=
    [ "$(id -u)" = 0 ] || sudo=sudo
    [ -z "$sudo" ] || command -v sudo >/dev/null || fail "the packages $* are missing; install them as root or install sudo."
    echo "installing $*" >&2
    apt() { $sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq "$@"; }
    # Fresh machines have no package lists, or old ones.
    apt install -y --no-install-recommends "$@" >/dev/null 2>&1 && return
    apt update && apt install -y --no-install-recommends "$@" >/dev/null ||
        fail "apt-get could not install $*; its message above says why."
}

if [ "${1-}" = python ]; then
    "$2" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail "$2 is not Python 3.11 or newer; name one with make PYTHON=…."
    "$2" -c 'import ensurepip, venv' 2>/dev/null || install python3-venv
    command -v cc >/dev/null || install gcc libc6-dev # for csi_driver/luks/bulk.c
    exit
fi

packages="btrfs-progs bzip2 cryptsetup-bin e2fsprogs iproute2 kmod lvm2 lz4 mount procps qemu-utils runc
    thin-provisioning-tools unzip util-linux xfsprogs xz-utils zstd"
# Without device-mapper the device tests run in a guest: tests/machine. Newer CPUs need a shim compiled for it.
grep -qs device-mapper /proc/misc || modprobe -q dm_mod 2>/dev/null || packages="$packages gcc libc6-dev udev
    user-mode-linux"
[ "${1-}" != cluster ] || packages="$packages buildah busybox-static ca-certificates containerd
    containernetworking-plugins debian-archive-keyring gcc gpg libc6-dev mmdebstrap opensc openssl softhsm2
    user-mode-linux"
[ "${1-}" != data ] || packages="$packages fio"
[ "${1-}" != ceph ] || packages="$packages ceph-common ceph-mgr ceph-mon ceph-osd"
installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ] && return
    # Docker's own packages bring these two, and apt-get would remove Docker for Debian's.
    case $1 in containerd | runc) command -v "$1" >/dev/null ;; *) false ;; esac
}
missing=
for package in $packages; do
    installed "$package" || missing="$missing $package"
done
[ -z "$missing" ] || install $missing
