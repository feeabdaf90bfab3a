#!/bin/sh
# On a small device with logical blocks of 4096 bytes mke2fs makes no second superblock, and e2fsck mends nothing then.
#
# Version:  e2fsprogs 1.47.0-2+b2 (Debian 12, amd64).
# Expected: ext4 keeps copies of its superblock, so that one damaged sector at the start can be mended: as it is for
#           64 MiB on a device with blocks of 512 bytes, by "e2fsck -y" alone.
# Seen:     mke2fs gives a file system below 512 MiB blocks of 1024 bytes ("small" in mke2fs.conf), eight groups in
#           64 MiB, several with a copy. Where the device's logical block is 4096 bytes, which is also what dm-crypt
#           shows for encryption sectors of that size, it silently takes blocks of 4096: up to 128 MiB are one group,
#           and there is no copy. After the same damage e2fsck ends with exit code 8 and the files are out of reach.
# Needs:    root, Debian 12 with its package archive, loop devices with blocks of 4096 bytes (losetup --sector-size).
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
version=1.47.0-2+b2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
chmod 755 .
for package in e2fsprogs libext2fs2 libcom-err2 libss2; do
    apt-get -q -o APT::Sandbox::User=root download "$package=$version" >>apt.log 2>&1 || { cat apt.log >&2; exit 2; }
done
for package in *.deb; do dpkg-deb -x "$package" tools; done
LD_LIBRARY_PATH=$(find "$folder/tools" -name 'libext2fs.so.2*' -printf '%h\n' -quit)
export LD_LIBRARY_PATH

# Exit code of e2fsck after the superblock's checksum, the last four bytes of 1024, was overwritten.
after_damage() {
    truncate -s 64M "disk$1"
    loop=$(losetup --find --show --sector-size "$1" "disk$1") || exit 2
    tools/sbin/mkfs.ext4 -q "$loop"
    copies=$(tools/sbin/dumpe2fs "$loop" 2>/dev/null | grep -c 'Backup superblock' || true)
    printf '\0\0\0\0' | dd of="$loop" bs=1 seek=$((1024 + 1020)) conv=notrunc,fsync status=none
    code=0
    tools/sbin/e2fsck -f -y "$loop" >"said$1" 2>&1 || code=$?
    losetup --detach "$loop"
    echo "logical blocks of $1 bytes: $copies copies of the superblock, e2fsck ends with exit code $code"
}

small=$(after_damage 512)
large=$(after_damage 4096)
echo "$small"
echo "$large"
case $small in *": 0 copies"*) ;; *"exit code 1")
    case $large in *": 0 copies"*"exit code 8") echo "as seen: e2fsprogs $version"; exit 0 ;; esac ;;
esac
echo "changed" >&2
exit 1
