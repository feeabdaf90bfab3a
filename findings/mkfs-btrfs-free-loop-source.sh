#!/bin/sh
# mkfs.btrfs refuses any device or file while one mount on the node names a loop device that is free as its source.
#
# Version:  btrfs-progs 6.2-1+deb12u2 (Debian 12, amd64).
# Expected: mkfs.btrfs looks at mounts to see whether its target is in use; a mount that has nothing to do with the
#           target does not matter.
# Seen:     for each mount whose source is a loop device it asks for the backing file, and when that loop device is not
#           bound it ends: "cannot check mount status of TARGET: No such device or address", exit code 1, nothing
#           written. On a busy node the same happens by itself, when a loop device is let go of by its unmount between
#           the read of the mount table and the question.
# Needs:    root, Debian 12 with its package archive, /dev/loop-control. The mount is in a mount namespace of its own.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
version=6.2-1+deb12u2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
chmod 755 .
apt-get -q -o APT::Sandbox::User=root download "btrfs-progs=$version" >apt.log 2>&1 || { cat apt.log >&2; exit 2; }
dpkg-deb -x btrfs-progs_*.deb tools
mkfs=$folder/tools/usr/sbin/mkfs.btrfs
[ -x "$mkfs" ] || mkfs=$folder/tools/sbin/mkfs.btrfs
loop=$(losetup --find) || exit 2
truncate -s 256M first second
"$mkfs" -q first || { echo "mkfs.btrfs fails without such a mount too" >&2; exit 2; }
mkdir place
code=0
unshare --mount --propagation private sh -c '
    mount -t tmpfs "$1" place && "$2" -q second' sh "$loop" "$mkfs" 2>said || code=$?
cat said
if [ "$code" = 1 ] && grep -q "cannot check mount status of second: No such device or address" said; then
    echo "as seen: btrfs-progs $version fails for a file that no mount knows, as a mount names the free $loop"
    exit 0
fi
echo "changed: exit code $code" >&2
exit 1
