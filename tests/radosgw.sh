#!/bin/bash
# Ceph's S3 gateway on loopback, for tests: one monitor, one disk that is a sparse file, one gateway; all below one folder.
#
#   tests/radosgw.sh install                            Debian's packages, if they are missing
#   tests/radosgw.sh run FOLDER PORT MONITOR_PORT       until it is told to end, or whoever started it has ended
#
# `run` takes the credentials from RADOSGW_KEY_ID and RADOSGW_SECRET_KEY.
set -euo pipefail

programs="ceph-mon ceph-osd radosgw radosgw-admin ceph monmaptool"
packages="ceph-mon ceph-osd ceph-common radosgw"

has_all_programs() {
    for program in $programs; do
        command -v "$program" >/dev/null || return 1
    done
}

install_packages() {
    has_all_programs && return
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "Ceph is not installed, and only root can install it. On Debian or Ubuntu: sudo apt-get install $packages" >&2
        exit 64
    fi
    echo "Installing Debian's packages of Ceph: $packages (about 250 MB)" >&2
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q >/dev/null
    apt-get install -y -q --no-install-recommends $packages >/dev/null
}

write_config() {
    cat >"$CEPH_CONF" <<CONFIG
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon host = [v1:127.0.0.1:$monitor_port]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr2 = false
# nobody but this machine can reach it, and it holds nothing of worth; S3's own credentials are checked all the same
auth cluster required = none
auth service required = none
auth client required = none
run dir = $folder
admin socket = $folder/\$name.asok
log file = $folder/\$name.log
mon cluster log file = $folder/cluster.log
crash dir = $folder
# one disk holds everything once
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon max pg per osd = 1000
# a test machine's disk is as full as it is
mon data avail warn = 1
mon data avail crit = 0
# the disk is placed by hand: at its start it may not know yet to which cluster it speaks, and ends over that
osd crush update on start = false
osd class update on start = false
bluestore block size = $((8 << 30))
osd memory target = $((1 << 30))

[mon.a]
mon data = $folder/monitor
[osd.0]
osd data = $folder/disk
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:$port tcp_nodelay=1
rgw dns name = 127.0.0.1
CONFIG
}

# waits until a command succeeds, for so many seconds at most
until_true() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $deadline ] || { echo "This did not come to pass: $*" >&2; exit 1; }
        sleep 0.2
    done
}

is_up() { ceph --connect-timeout 5 osd stat | grep -q '1 up'; }

run() {
    folder=$1 port=$2 monitor_port=$3
    export CEPH_CONF=$folder/ceph.conf
    mkdir -p "$folder/monitor" "$folder/disk"
    write_config
    parent=$PPID
    trap 'kill $(jobs -p) 2>/dev/null; wait; exit 0' TERM INT
    trap 'kill -KILL $(jobs -p) 2>/dev/null || true' EXIT

    monmaptool --create --fsid "$(sed -n 's/^fsid = //p' "$CEPH_CONF")" \
        --addv a "[v1:127.0.0.1:$monitor_port]" "$folder/monmap" >/dev/null
    ceph-mon -i a --mkfs --monmap "$folder/monmap"
    ceph-mon -i a -f &
    until_true 60 ceph --connect-timeout 5 -s

    disk=$(cat /proc/sys/kernel/random/uuid)
    ceph osd new "$disk" 0 >/dev/null
    ceph-osd -i 0 --mkfs --osd-uuid "$disk" 2>/dev/null
    ceph osd crush add osd.0 1.0 root=default host=localhost 2>/dev/null
    ceph-osd -i 0 -f 2>/dev/null &
    until_true 60 is_up

    radosgw-admin user create --uid=tests --display-name=tests --max-buckets=0 \
        --access-key="$RADOSGW_KEY_ID" --secret="$RADOSGW_SECRET_KEY" >/dev/null
    radosgw -n client.rgw.a -f &
    while kill -0 "$parent" 2>/dev/null && [ "$(jobs -pr | wc -l)" = 3 ]; do
        sleep 1 &
        wait $!
    done
    echo "One of Ceph's programs, or whoever started them, has ended; their logs are in $folder" >&2
    exit 1
}

case "${1:-}" in
    install) install_packages ;;
    run) [ $# = 4 ] && run "$2" "$3" "$4" ;;
    *) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
