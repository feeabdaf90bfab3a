#!/bin/sh
# A file system that somebody has frozen can be unmounted: it is gone from sight then, keeps its device, and comes back
# frozen.
#
# Version:  Linux 6.18 (and 6.1 of Debian 12's user-mode-linux), util-linux 2.38.1-5+deb12u3, e2fsprogs 1.47.0-2+b2.
# Expected: umount(2) writes back and ends the file system, or refuses with EBUSY as long as it is frozen (fsfreeze(8)),
#           so that a device whose mounts are all gone is free.
# Seen:     umount exits 0 and no mount is left in any table. The device stays in use all the same: to open it alone
#           (O_EXCL, as mkfs and cryptsetup do) fails with EBUSY, and there is no path left by which it could be thawed.
#           Mounted again it is the same file system, frozen still: who writes to it waits. fsfreeze --unfreeze and a second
#           umount let the device go.
# Needs:    root, Debian 12 with its package archive, loop devices. The mount is in a mount namespace of its own.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
folder=$(mktemp -d)
loop=
trap '[ -z "$loop" ] || losetup --detach "$loop"; rm -rf "$folder"' EXIT
cd "$folder"
chmod 755 .
for package in e2fsprogs=1.47.0-2+b2 libext2fs2=1.47.0-2+b2 libcom-err2=1.47.0-2+b2 libss2=1.47.0-2+b2 \
    util-linux=2.38.1-5+deb12u3 mount=2.38.1-5+deb12u3; do
    apt-get -q -o APT::Sandbox::User=root download "$package" >>apt.log 2>&1 || { cat apt.log >&2; exit 2; }
done
for package in *.deb; do dpkg-deb -x "$package" tools; done
LD_LIBRARY_PATH=$(find "$folder/tools" -name 'libext2fs.so.2*' -printf '%h\n' -quit)
export LD_LIBRARY_PATH
truncate -s 64M disk
loop=$(losetup --find --show disk) || exit 2
tools/sbin/mkfs.ext4 -q "$loop"
cat >try.sh <<'SH'
loop=$1
mkdir place
mount=tools/bin/mount umount=tools/bin/umount freeze=tools/sbin/fsfreeze

alone() {
    python3 -c 'import os, sys; os.open(sys.argv[1], os.O_RDONLY | os.O_EXCL)' "$loop" 2>/dev/null && echo free || echo "in use"
}

"$mount" "$loop" place
"$umount" place
echo "unmounted: $(alone)"
"$mount" "$loop" place
"$freeze" --freeze place
code=0
"$umount" place || code=$?
echo "unmounted while frozen: exit code $code, $(grep -c " $PWD/place " /proc/self/mountinfo) mounts, $(alone)"
[ "$code" = 0 ] || { "$freeze" --unfreeze place; "$umount" place; exit 0; }
"$mount" "$loop" place
code=0
"$freeze" --unfreeze place 2>/dev/null || code=$?
echo "mounted again: thawing it has exit code $code"
"$umount" place
echo "thawed and unmounted: $(alone)"
SH
unshare --mount --propagation private sh -eu try.sh "$loop" | tee said
cat >expected <<'TEXT'
unmounted: free
unmounted while frozen: exit code 0, 0 mounts, in use
mounted again: thawing it has exit code 0
thawed and unmounted: free
TEXT
cmp -s expected said
