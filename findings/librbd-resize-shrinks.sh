#!/bin/sh
# librbd's rbd_resize makes an image shorter without a word; `rbd resize`, which calls the same library, refuses to.
#
# Version:  librbd1, ceph-osd, ceph-mon and ceph-common 16.2.15+ds-0+deb12u2 (Debian 12, amd64).
# Expected: an image is not made shorter by who does not say that he means it, as at the command line (--allow-shrink).
# Seen:     rbd_resize to half the size returns 0, and what lay behind is gone: lengthened again, it reads as zeros.
#           `rbd resize` to that size answers EINVAL and names --allow-shrink, and so does rbd_resize2 with allow_shrink
#           false. So a program that looks at the size and then enlarges by rbd_resize cuts off what somebody else has
#           added between the two; to be safe it has to call rbd_resize2.
# Needs:    Debian 12 with its package archive, Python 3, ports 17790 and 17800 to 17899 of 127.0.0.1. The OSD is in memory.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
version=16.2.15+ds-0+deb12u2
folder=$(mktemp -d)
daemons=
trap '[ -z "$daemons" ] || kill $daemons || true; wait; rm -rf "$folder"' EXIT
cd "$folder"
chmod 755 .
mkdir packages tools mon osd
# What they need beside a bare system, whatever is installed here.
apt-get -o Dir::State::status=/dev/null --no-install-recommends --print-uris -y install \
    "ceph-mon=$version" "ceph-osd=$version" "ceph-common=$version" 2>apt.log |
    sed -n "s/^'[^']*' \([^_ ]*\)_.*/\1/p" |
    grep -E '^(ceph-(mon|osd|base|common)|lib.*)$' | grep -Ev '^lib(c6|c-bin|gcc-s1|stdc\+\+6|python3.*|perl.*)$' >wanted
[ -s wanted ] || { cat apt.log >&2; exit 2; }
(cd packages && xargs apt-get -q -o APT::Sandbox::User=root download <../wanted >../apt.log 2>&1) ||
    { cat apt.log >&2; exit 2; }
for package in packages/*.deb; do dpkg-deb -x "$package" tools; done
libraries=$(find "$folder/tools" -name '*.so*' -printf '%h\n' | sort -u | tr '\n' ':')
cat >ceph.conf <<END
[global]
fsid = 0c1f6a52-6c39-4f0e-8f4b-7a2d3f0b9e61
mon host = v2:127.0.0.1:17790
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind port min = 17800
ms bind port max = 17899
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
[osd]
osd data = $folder/osd
osd objectstore = memstore
osd class dir = $(dirname "$(find "$folder/tools" -name 'libcls_rbd.so' | head -1)")
memstore device bytes = 268435456
END
run() { LD_LIBRARY_PATH=$libraries "$@"; }
tried() { run "$@" >made 2>&1 || { cat made >&2; exit 2; }; }
tried tools/usr/bin/monmaptool --create --fsid 0c1f6a52-6c39-4f0e-8f4b-7a2d3f0b9e61 --addv a '[v2:127.0.0.1:17790]' monmap
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
osd=a3f0c5de-51f4-4a08-93f8-2f0f6b3c7d10
tried python3 -c "from tell import *; tell(session(), prefix='osd new', uuid='$osd')"
tried tools/usr/bin/ceph-osd -c ceph.conf -i 0 --mkfs --osd-uuid "$osd"
LD_LIBRARY_PATH=$libraries tools/usr/bin/ceph-osd -f -c ceph.conf -i 0 >said.osd 2>&1 &
daemons="$daemons $!"
cat >look.py <<'END'
import ctypes, subprocess, sys
from tell import done, rados, session, tell
rbd = ctypes.CDLL("librbd.so.1")
MIB, PRECIOUS = 1 << 20, b"precious"
told = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p)(lambda *_: 0)
number = ctypes.c_uint64
rbd.rbd_create.argtypes = ctypes.c_void_p, ctypes.c_char_p, number, ctypes.c_void_p
rbd.rbd_resize.argtypes = ctypes.c_void_p, number
rbd.rbd_resize2.argtypes = ctypes.c_void_p, number, ctypes.c_ubyte, type(told), ctypes.c_void_p
for each in (rbd.rbd_write, rbd.rbd_read):
    each.argtypes, each.restype = (ctypes.c_void_p, number, ctypes.c_size_t, ctypes.c_char_p), ctypes.c_ssize_t

def size():
    found = number()
    done(rbd.rbd_get_size(image, ctypes.byref(found)))
    return found.value // MIB

it, pool, image, order = session(), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int(0)
tell(it, prefix="osd pool create", pool="rbd", pg_num=1)
done(rados.rados_wait_for_latest_osdmap(it))
done(rados.rados_ioctx_create(it, b"rbd", ctypes.byref(pool)))
done(rbd.rbd_create(pool, b"disk", 16 * MIB, ctypes.byref(order)))
done(rbd.rbd_open(pool, b"disk", ctypes.byref(image), None))
done(rbd.rbd_write(image, 12 * MIB, len(PRECIOUS), PRECIOUS))
command = ["tools/usr/bin/rbd", "-c", "ceph.conf", "resize", "--no-progress", "--size", "8M", "rbd/disk"]
refused = subprocess.run(command, capture_output=True, text=True)
asked = rbd.rbd_resize2(image, 8 * MIB, 0, told, None)
before = size()
answer = rbd.rbd_resize(image, 8 * MIB)
after = size()
done(rbd.rbd_resize(image, 16 * MIB))
left = ctypes.create_string_buffer(len(PRECIOUS))
done(rbd.rbd_read(image, 12 * MIB, len(PRECIOUS), left))
print(f"16 MiB to 8: 'rbd resize' exits with {refused.returncode}, rbd_resize2 answers {asked}, {before} MiB are there; "
      f"rbd_resize answers {answer}, {after} MiB are there, and behind them was {left.raw} when it was 16 again")
as_seen = refused.returncode == 22 and "--allow-shrink" in refused.stderr and asked == -22 and before == 16
sys.exit(0 if as_seen and (answer, after, left.raw) == (0, 8, bytes(len(PRECIOUS))) else 1)
END
code=0
run python3 look.py || code=$?
[ "$code" = 2 ] && tail -n 5 said.mon said.osd >&2
[ "$code" = 0 ] && echo "as seen: rbd_resize of librbd $version makes an image shorter" || echo "exit code $code" >&2
exit "$code"
