#!/bin/sh
# lvm closes what it inherits, also when it is told to say nothing of it: a lock that was to live as long as it is free.
#
# Version:  lvm2 2.03.16-2 (Debian 12, amd64).
# Expected: a lock of flock(2) whose descriptor a program inherits is held until that program ends, as with sleep(1); of
#           LVM_SUPPRESS_FD_WARNINGS lvm(8) says that it suppresses the warnings about unexpected descriptors.
# Seen:     with the variable too lvm closes every descriptor above 2 as it starts. While it is still at work, here
#           waiting for its script, somebody else gets the lock. Of what is inherited only the first three stay open.
# Needs:    Debian 12 with its package archive, flock(1).
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
version=2.03.16-2
folder=$(mktemp -d)
started=
trap '[ -z "$started" ] || kill "$started" 2>/dev/null || true; rm -rf "$folder"' EXIT
cd "$folder"
chmod 755 .
mkdir packages tools system
apt-get -o Dir::State::status=/dev/null --no-install-recommends --print-uris -y install "lvm2=$version" 2>apt.log |
    sed -n "s/^'[^']*' \([^_ ]*\)_.*/\1/p" | grep -E '^(lvm2|libaio.*|libdevmapper.*|libreadline.*|libedit.*)$' >wanted
[ -s wanted ] || { cat apt.log >&2; exit 2; }
(cd packages && xargs apt-get -q -o APT::Sandbox::User=root download <../wanted >../apt.log 2>&1) ||
    { cat apt.log >&2; exit 2; }
for package in packages/*.deb; do dpkg-deb -x "$package" tools; done
libraries=$(find "$folder/tools" -name '*.so*' -printf '%h\n' | sort -u | tr '\n' ':')
mkfifo script

# Whether the lock is free while a program runs that was started with its descriptor.
while_it_runs() {
    name=$1
    shift
    : >"lock-$name"
    exec 9>"lock-$name"
    flock 9
    "$@" >said 2>&1 &
    started=$!
    exec 9>&-
    state=held
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        sleep 0.5
        kill -0 "$started" || { cat said >&2; exit 2; }
        ! flock --nonblock "lock-$name" true || { state=free; break; }
    done
    kill "$started"
    { wait "$started" || true; } 2>wait.log
    started=
    echo "while $name is at work the lock is $state"
}

usual=$(while_it_runs sleep sleep 60)
seen=$(while_it_runs lvm env LD_LIBRARY_PATH="$libraries" LVM_SYSTEM_DIR="$folder/system" LVM_SUPPRESS_FD_WARNINGS=1 \
    "$folder/tools/sbin/lvm" "$folder/script")
echo "$usual"
echo "$seen"
case "$usual $seen" in *held*free) echo "as seen: lvm2 $version"; exit 0 ;; esac
echo "changed" >&2
exit 1
