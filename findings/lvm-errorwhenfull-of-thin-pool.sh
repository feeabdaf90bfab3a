#!/bin/sh
# lvcreate takes --errorwhenfull for a thin pool that is asked for by one spelling, and calls it unsupported with thin
# pools where the same pool is asked for by the other one.
#
# Version:  lvm2 2.03.16-2 (Debian 12, amd64).
# Expected: lvcreate(8) and --help list "--errorwhenfull y|n" under "--type thin-pool", and lvmthin(7) says that it is an
#           option of lvcreate; --type thin-pool and --thinpool NAME mean the same, so both take it.
# Seen:     with --type thin-pool (also beside --thinpool) lvcreate ends with exit code 3 and "Option --errorwhenfull is
#           unsupported with thin pools", before it looks at the volume group. With --thinpool or --thin alone it takes
#           the option and goes on, here to the group that does not exist or a kernel without device-mapper. lvchange
#           sets it in any case.
# Needs:    root, Debian 12 with its package archive.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
version=2.03.16-2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
chmod 755 .
mkdir packages tools system
apt-get -o Dir::State::status=/dev/null --no-install-recommends --print-uris -y install "lvm2=$version" 2>apt.log |
    sed -n "s/^'[^']*' \([^_ ]*\)_.*/\1/p" | grep -E '^(lvm2|libaio.*|libdevmapper.*|libreadline.*|libedit.*)$' >wanted
[ -s wanted ] || { cat apt.log >&2; exit 2; }
(cd packages && xargs apt-get -q -o APT::Sandbox::User=root download <../wanted >../apt.log 2>&1) ||
    { cat apt.log >&2; exit 2; }
for package in packages/*.deb; do dpkg-deb -x "$package" tools; done
LD_LIBRARY_PATH=$(find "$folder/tools" -name '*.so*' -printf '%h\n' | sort -u | tr '\n' ':')
export LD_LIBRARY_PATH LVM_SYSTEM_DIR="$folder/system"

# "refused", "taken" or, where lvcreate said neither, what it said.
fate() {
    tools/sbin/lvm lvcreate --errorwhenfull y --size 8m "$@" >said 2>&1 && { echo "made"; return; }
    if grep -q 'errorwhenfull is unsupported with thin pools' said; then
        echo refused
    elif grep -Eq 'not found|device-mapper' said; then
        echo taken
    else
        cat said
    fi
}

tools/sbin/lvm lvcreate --help 2>&1 | sed -n '/--type thin-pool/,/COMMON_OPTIONS/p' | grep -q -- --errorwhenfull || exit 2
first=$(fate --type thin-pool --name pool no-such-group)
both=$(fate --type thin-pool --thinpool pool no-such-group)
second=$(fate --thinpool pool no-such-group)
third=$(fate --thin no-such-group/pool)
echo "--type thin-pool: $first, with --thinpool: $both; --thinpool alone: $second; --thin alone: $third"
[ "$first,$both,$second,$third" = refused,refused,taken,taken ]
