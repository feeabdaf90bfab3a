#!/bin/sh
# A volume group that has lost a disk tells the room on that disk as free, though nothing can be made in it any more.
#
# Version:  lvm2 2.03.16-2 (Debian 12, amd64).
# Expected: vg_free is room that lvcreate can give: without the disk that is gone, or 0, as the group cannot be changed.
# Seen:     vgs exits 0 and says vg_free as before, the extents of the lost disk included (pvs lists it as [unknown] with
#           all of its room free), while lvcreate, and here pvresize of the disk that is left, are refused: "Cannot
#           change VG ... while PVs are missing". Only vg_missing_pv_count, or the p in vg_attr, tells. Who publishes
#           vg_free as capacity draws volumes to a group that takes none.
# Needs:    root, Debian 12 with its package archive, loop devices. No device-mapper: no logical volume is made.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
version=2.03.16-2
folder=$(mktemp -d)
first=
second=
trap 'for loop in $first $second; do losetup --detach "$loop"; done; rm -rf "$folder"' EXIT
cd "$folder"
chmod 755 .
mkdir packages tools system locks
apt-get -o Dir::State::status=/dev/null --no-install-recommends --print-uris -y install "lvm2=$version" 2>apt.log |
    sed -n "s/^'[^']*' \([^_ ]*\)_.*/\1/p" | grep -E '^(lvm2|libaio.*|libdevmapper.*|libreadline.*|libedit.*)$' >wanted
[ -s wanted ] || { cat apt.log >&2; exit 2; }
(cd packages && xargs apt-get -q -o APT::Sandbox::User=root download <../wanted >../apt.log 2>&1) ||
    { cat apt.log >&2; exit 2; }
for package in packages/*.deb; do dpkg-deb -x "$package" tools; done
LD_LIBRARY_PATH=$(find "$folder/tools" -name '*.so*' -printf '%h\n' | sort -u | tr '\n' ':')
export LD_LIBRARY_PATH LVM_SYSTEM_DIR="$folder/system"
truncate -s 100M one two
first=$(losetup --find --show one) || exit 2
second=$(losetup --find --show two) || exit 2
cat >system/lvm.conf <<CONF
activation { udev_sync=0 udev_rules=0 monitoring=0 verify_udev_operations=0 }
global { use_lvmpolld=0 notify_dbus=0 event_activation=0 locking_dir="$folder/locks" }
backup { backup=0 archive=0 }
devices {
    use_devicesfile=0 obtain_device_list_from_udev=0 external_device_info_source="none"
    global_filter=["a|^$first\$|", "a|^$second\$|", "r|.*|"]
}
CONF
group="tried-$$"
lvm() { tools/sbin/lvm "$@" 2>>errors; }
told() { lvm vgs --noheadings --units m --nosuffix -o "$1" "$group" | tr -d ' '; }
lvm vgcreate "$group" "$first" "$second" >/dev/null || { cat errors >&2; exit 2; }
before=$(told vg_free)
losetup --detach "$second"
second=
after=$(told vg_free)
missing=$(told vg_missing_pv_count)
: >errors
code=0
lvm pvresize "$first" >/dev/null || code=$?
echo "vg_free $before MiB; one of the two disks gone ($missing): vg_free $after MiB; pvresize of the other has exit code $code"
[ "$missing" = 1 ] && [ "$after" = "$before" ] && [ "$code" != 0 ] && grep -q 'while PVs are missing' errors
