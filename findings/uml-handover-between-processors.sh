#!/bin/sh
# A system call in user-mode Linux takes several times as long on a host with two processors as on one of them.
#
# Version:  user-mode-linux 6.1um4+b13 of Debian 12 (kernel 6.1), a guest with one processor.
# Expected: a guest with one processor gains, or at least does not lose, where its host has a second one to spare.
# Seen:     the guest's kernel and each of its processes are processes of the host that wait for each other by turns. On
#           an idle host they are put on different processors, and each turn crosses: 400,000 system calls took 20 s,
#           bound to one processor of the same host 5 s. A busy host puts them together now and then, so that one
#           process of the guest runs at twice the speed of another one for minutes.
# Needs:    Debian 12 on x86_64 with two processors, root, apt, /dev/shm; half a minute on an idle machine.
# Exit:     0 as seen (at least 1.5 times as long), 1 when that has changed, 2 when it could not be tried.
set -eu
[ "$(id -u)" = 0 ] && [ "$(nproc)" -ge 2 ] || exit 2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
apt-get download -qq user-mode-linux=6.1um4+b13 2>/dev/null || exit 2
dpkg -x user-mode-linux_*.deb package
cat >init <<'SH'
#!/bin/sh
mount -t proc none /proc
read -r before _ </proc/uptime
dd if=/dev/zero of=/dev/null bs=1 count=200000 2>/dev/null
read -r after _ </proc/uptime
echo "took $before $after"
exec /sbin/poweroff -f
SH
chmod +x init

seconds() { # of 400,000 system calls in a guest on these processors of the host
    HOME=$folder TMPDIR=/dev/shm timeout 300 taskset -c "$1" package/usr/bin/linux.uml mem=128M umid="try$1" \
        uml_dir="$folder/" root=/dev/root rootfstype=hostfs rootflags=/ ro init="$folder/init" con=null con0=null,fd:1 \
        </dev/null 2>&1 | awk '$1 == "took" { print $3 - $2 }'
}

first=$(taskset -cp $$ | sed 's/.*: //; s/[,-].*//')
two=$(seconds "$(taskset -cp $$ | sed 's/.*: //')")
one=$(seconds "$first")
[ -n "$two" ] && [ -n "$one" ] || exit 2
echo "all processors: $two s, one processor: $one s"
if awk -v two="$two" -v one="$one" 'BEGIN { exit !(two >= 1.5 * one) }'; then
    echo "as seen: the guest is slower where it may use more than one processor of its host"
    exit 0
fi
echo "changed" >&2
exit 1
