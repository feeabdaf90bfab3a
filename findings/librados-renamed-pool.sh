#!/bin/sh
# librados looks a pool's name up in the map that the session has, which on a quiet session is the one of its beginning.
#
# Version:  librados2 and ceph-mon 16.2.15+ds-0+deb12u2 (Debian 12, amd64).
# Expected: rados_ioctx_create of a session that is connected opens the pool that has the name at that moment, and
#           rados_pool_list tells the pools that there are.
# Seen:     no new map comes to a session that has nothing open and asks nothing. Ten seconds after a pool was renamed
#           and a new one was made by its old name, the old name still opens the renamed pool, without an error, so that
#           whoever writes by name writes to the other one; the list lacks the new name. A session that begins then
#           is right, and so is the old one behind rados_wait_for_latest_osdmap.
# Needs:    Debian 12 with its package archive, Python 3, port 17789 of 127.0.0.1. One monitor, no OSD: nothing is written.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
version=16.2.15+ds-0+deb12u2
folder=$(mktemp -d)
monitor=
trap '[ -z "$monitor" ] || kill "$monitor" || true; rm -rf "$folder"' EXIT
cd "$folder"
chmod 755 .
mkdir packages tools mon
# What the monitor needs beside a bare system, whatever is installed here.
apt-get -o Dir::State::status=/dev/null --no-install-recommends --print-uris -y install "ceph-mon=$version" 2>apt.log |
    sed -n "s/^'[^']*' \([^_ ]*\)_.*/\1/p" |
    grep -E '^(ceph-(mon|base|common)|lib.*)$' | grep -Ev '^lib(c6|c-bin|gcc-s1|stdc\+\+6|python3.*|perl.*)$' >wanted
[ -s wanted ] || { cat apt.log >&2; exit 2; }
(cd packages && xargs apt-get -q -o APT::Sandbox::User=root download <../wanted >../apt.log 2>&1) ||
    { cat apt.log >&2; exit 2; }
for package in packages/*.deb; do dpkg-deb -x "$package" tools; done
libraries=$(find "$folder/tools" -name '*.so*' -printf '%h\n' | sort -u | tr '\n' ':')
cat >ceph.conf <<END
[global]
fsid = 5b6a53a1-7b6c-4d3c-9c6f-0a6c3b1f2d11
mon host = v2:127.0.0.1:17789
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
mon allow pool size one = true
run dir = $folder
log file = $folder/\$name.log
[mon]
mon data = $folder/mon
END
run() { LD_LIBRARY_PATH=$libraries "$@"; }
run tools/usr/bin/monmaptool --create --fsid 5b6a53a1-7b6c-4d3c-9c6f-0a6c3b1f2d11 \
    --addv a '[v2:127.0.0.1:17789]' monmap >made 2>&1 || { cat made >&2; exit 2; }
run tools/usr/bin/ceph-mon -c ceph.conf --mkfs -i a --monmap monmap >made 2>&1 || { cat made >&2; exit 2; }
LD_LIBRARY_PATH=$libraries tools/usr/bin/ceph-mon -f -c ceph.conf -i a >said 2>&1 &
monitor=$!
cat >look.py <<'END'
import ctypes, json, sys, time
rados = ctypes.CDLL("librados.so.2")
rados.rados_ioctx_get_id.restype = ctypes.c_int64

def done(code):
    if code < 0:
        print("librados answers", code, file=sys.stderr)
        sys.exit(2)

def session():
    it = ctypes.c_void_p()
    done(rados.rados_create(ctypes.byref(it), b"admin"))
    done(rados.rados_conf_read_file(it, b"ceph.conf"))
    done(rados.rados_conf_set(it, b"client_mount_timeout", b"60"))
    done(rados.rados_connect(it))
    return it

def tell(it, **words):
    command = (ctypes.c_char_p * 1)(json.dumps(words).encode())
    empty = [ctypes.c_void_p() for _ in range(2)], [ctypes.c_size_t() for _ in range(2)]
    (said, status), (one, two) = empty
    done(rados.rados_mon_command(it, command, ctypes.c_size_t(1), None, ctypes.c_size_t(0), ctypes.byref(said),
                                 ctypes.byref(one), ctypes.byref(status), ctypes.byref(two)))

def number(it, name):
    pool = ctypes.c_void_p()
    done(rados.rados_ioctx_create(it, name, ctypes.byref(pool)))
    found = rados.rados_ioctx_get_id(pool)
    rados.rados_ioctx_destroy(pool)
    return found

def names(it):
    room = ctypes.create_string_buffer(4096)
    done(rados.rados_pool_list(it, room, ctypes.c_size_t(4096)))
    return {name.decode() for name in room.raw.split(b"\0") if name}

admin = session()
tell(admin, prefix="osd pool create", pool="one", pg_num=1)
kept = session()
before = number(kept, b"one")
tell(admin, prefix="osd pool rename", srcpool="one", destpool="two")
tell(admin, prefix="osd pool create", pool="one", pg_num=1)
time.sleep(10)
listed, opened = names(kept), number(kept, b"one")
fresh = session()
right = number(fresh, b"one")
done(rados.rados_wait_for_latest_osdmap(kept))
after = number(kept, b"one")
print(f"pool 'one' was {before}; renamed, and a new 'one' is {right}: the kept session opens {opened} and lists "
      f"{sorted(listed)}; with the latest map it opens {after}")
if before == right:
    sys.exit(2)
sys.exit(0 if opened == before and "two" not in listed and after == right else 1)
END
code=0
run python3 look.py || code=$?
[ "$code" = 2 ] && tail -5 said >&2
[ "$code" = 0 ] && echo "as seen: librados $version opens a renamed pool by its old name" || echo "exit code $code" >&2
exit "$code"
