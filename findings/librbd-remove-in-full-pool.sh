#!/bin/sh
# Of a pool at its quota the first image that is ever removed stays there, and rbd_remove says that there is none.
#
# Version:  librbd1, librados2, ceph-osd, ceph-mon and ceph-mgr 16.2.15+ds-0+deb12u2 (Debian 12, amd64).
# Expected: removing is what makes room, so it works in a full pool; or it is refused by EDQUOT, as a write is.
# Seen:     rbd_remove answers ENOENT, which everybody takes for "gone already", and the image is there as it was. It takes
#           its way through the trash, whose object (rbd_trash) the first removal of a pool makes, and in a full pool no
#           object can be made. Once that is there, be it empty, the same call removes the image.
# Needs:    Debian 12 with its package archive, Python 3, ports 17791 and 17900 to 17999 of 127.0.0.1. The OSD is in memory.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
version=16.2.15+ds-0+deb12u2
folder=$(mktemp -d)
daemons=
trap '[ -z "$daemons" ] || kill $daemons || true; wait; rm -rf "$folder"' EXIT
cd "$folder"
chmod 755 .
mkdir packages tools mon osd mgr
# What they need beside a bare system, whatever is installed here.
apt-get -o Dir::State::status=/dev/null --no-install-recommends --print-uris -y install \
    "ceph-mon=$version" "ceph-osd=$version" "ceph-mgr=$version" "ceph-common=$version" 2>apt.log |
    sed -n "s/^'[^']*' \([^_ ]*\)_.*/\1/p" |
    grep -E '^(ceph-(mon|osd|mgr|base|common)|lib.*)$' | grep -Ev '^lib(c6|c-bin|gcc-s1|stdc\+\+6|python3(-.*)?|perl.*)$' >wanted
[ -s wanted ] || { cat apt.log >&2; exit 2; }
(cd packages && xargs apt-get -q -o APT::Sandbox::User=root download <../wanted >../apt.log 2>&1) ||
    { cat apt.log >&2; exit 2; }
for package in packages/*.deb; do dpkg-deb -x "$package" tools; done
libraries=$(find "$folder/tools" -name '*.so*' -printf '%h\n' | sort -u | tr '\n' ':')
cat >ceph.conf <<END
[global]
fsid = 4d1b7f0a-2f5e-4a53-9d3b-5b8a0a6f7c12
mon host = v2:127.0.0.1:17791
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind port min = 17900
ms bind port max = 17999
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd crush chooseleaf type = 0
run dir = $folder
log file = $folder/\$name.log
[mon]
mon data = $folder/mon
[mgr]
mgr data = $folder/mgr
mgr initial modules =
mgr module path = $folder/tools/usr/share/ceph/mgr
mgr tick period = 1
mgr stats period = 1
[osd]
osd data = $folder/osd
osd objectstore = memstore
osd class dir = $(dirname "$(find "$folder/tools" -name 'libcls_rbd.so' | head -1)")
memstore device bytes = 268435456
END
run() { LD_LIBRARY_PATH=$libraries "$@"; }
tried() { run "$@" >made 2>&1 || { cat made >&2; exit 2; }; }
tried tools/usr/bin/monmaptool --create --fsid 4d1b7f0a-2f5e-4a53-9d3b-5b8a0a6f7c12 --addv a '[v2:127.0.0.1:17791]' monmap
tried tools/usr/bin/ceph-mon -c ceph.conf --mkfs -i a --monmap monmap
LD_LIBRARY_PATH=$libraries tools/usr/bin/ceph-mon -f -c ceph.conf -i a >said.mon 2>&1 &
daemons=$!
cat >tell.py <<'END'
"""A session, and what it asks the monitors."""
import ctypes, json, sys
rados = ctypes.CDLL("librados.so.2")

def done(code):
    if code < 0:
        print("Ceph answers", code, file=sys.stderr)
        sys.exit(2)

def session():
    it = ctypes.c_void_p()
    done(rados.rados_create(ctypes.byref(it), b"admin"))
    done(rados.rados_conf_read_file(it, b"ceph.conf"))
    done(rados.rados_conf_set(it, b"client_mount_timeout", b"60"))
    done(rados.rados_conf_set(it, b"rados_osd_op_timeout", b"60"))
    done(rados.rados_connect(it))
    return it

def tell(it, **words):
    command = (ctypes.c_char_p * 1)(json.dumps(words).encode())
    said, status, one, two = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    done(rados.rados_mon_command(it, command, ctypes.c_size_t(1), None, ctypes.c_size_t(0), ctypes.byref(said),
                                 ctypes.byref(one), ctypes.byref(status), ctypes.byref(two)))
END
osd=c9b2a6d4-7e31-4c5f-8a60-1d2e3f4a5b6c
tried python3 -c "from tell import *; tell(session(), prefix='osd new', uuid='$osd')"
tried tools/usr/bin/ceph-osd -c ceph.conf -i 0 --mkfs --osd-uuid "$osd"
LD_LIBRARY_PATH=$libraries tools/usr/bin/ceph-osd -f -c ceph.conf -i 0 >said.osd 2>&1 &
daemons="$daemons $!"
LD_LIBRARY_PATH=$libraries tools/usr/bin/ceph-mgr -f -c ceph.conf -i x >said.mgr 2>&1 &
daemons="$daemons $!"
cat >look.py <<'END'
import ctypes, sys, time
from tell import done, rados, session, tell
rbd = ctypes.CDLL("librbd.so.1")
rbd.rbd_create.argtypes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_void_p
rados.rados_write_full.argtypes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t
rados.rados_create_write_op.restype = ctypes.c_void_p
rados.rados_write_op_create.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
rados.rados_write_op_operate.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)
EDQUOT, ENOENT, FULL_FORCE = 122, 2, 128

def is_there():
    image = ctypes.c_void_p()
    code = rbd.rbd_open_read_only(pool, b"disk", ctypes.byref(image), None)
    if code == 0:
        rbd.rbd_close(image)
    return code == 0

it, pool, order = session(), ctypes.c_void_p(), ctypes.c_int(0)
tell(it, prefix="osd pool create", pool="rbd", pg_num=1)
done(rados.rados_wait_for_latest_osdmap(it))
done(rados.rados_ioctx_create(it, b"rbd", ctypes.byref(pool)))
rados.rados_set_pool_full_try(pool)
done(rbd.rbd_create(pool, b"disk", 16 << 20, ctypes.byref(order)))
done(rados.rados_write_full(pool, b"some", b"x" * 1000, 1000))
tell(it, prefix="osd pool set-quota", pool="rbd", field="max_bytes", val="10")
until, number = time.monotonic() + 120, 0
while rados.rados_write_full(pool, b"more%d" % number, b"x", 1) != -EDQUOT:
    number += 1
    if time.monotonic() > until:
        print("the pool does not become full", file=sys.stderr)
        sys.exit(2)
    time.sleep(0.5)
    done(rados.rados_wait_for_latest_osdmap(it))
first, left = rbd.rbd_remove(pool, b"disk"), is_there()
make = rados.rados_create_write_op()
rados.rados_write_op_create(make, 0, None)
done(rados.rados_write_op_operate(make, pool, b"rbd_trash", None, FULL_FORCE))
second, left_then = rbd.rbd_remove(pool, b"disk"), is_there()
print(f"rbd_remove in the full pool answers {first}, the image is {'there' if left else 'gone'}; with an empty rbd_trash it "
      f"answers {second}, and the image is {'there' if left_then else 'gone'}")
sys.exit(0 if (first, left, second, left_then) == (-ENOENT, True, 0, False) else 1)
END
code=0
run python3 look.py || code=$?
[ "$code" = 2 ] && tail -n 5 said.mon said.osd said.mgr >&2
[ "$code" = 0 ] && echo "as seen: rbd_remove of librbd $version leaves the first image of a full pool" || echo "exit code $code" >&2
exit "$code"
