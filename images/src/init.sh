#!/bin/busybox sh
# PID 1 of a pod node: makes the usual mounts, loads the modules of the pod's
# devices, gives the virtio ports their names and becomes the guest agent.
# There is no udev in here. With root= on the command line it mounts that disk
# instead and becomes the init of the system there.

export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=linux
B=/bin/busybox

$B mount -t proc -o nosuid,nodev,noexec proc /proc
$B mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
$B mount -t devtmpfs -o nosuid,mode=0755 devtmpfs /dev
$B mkdir -p /dev/pts /dev/shm
$B mount -t devpts -o nosuid,noexec,mode=0620,ptmxmode=0666 devpts /dev/pts
$B mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs /dev/shm
# The root is in memory already: /run and /tmp need no file system of their own,
# which would hide the files that the image holds there.
$B ln -sf /proc/self/fd /dev/fd
$B ln -sf /proc/self/fd/0 /dev/stdin
$B ln -sf /proc/self/fd/1 /dev/stdout
$B ln -sf /proc/self/fd/2 /dev/stderr
$B --install -s 2>/dev/null

init=/usr/bin/lupin-guest-agent
node= root= type=ext4 access=rw
read -r cmdline </proc/cmdline
for word in $cmdline; do
    case $word in
        lupin.init=*) init=${word#lupin.init=} ;;
        lupin.node=*) node=${word#lupin.node=} ;;
        root=/dev/*) root=${word#root=} ;;
        rootfstype=*) type=${word#rootfstype=} ;;
        ro | rw) access=$word ;;
    esac
done
$B hostname "${node:+node}${node:-lupin}"
$B ip link set lo up 2>/dev/null

# `module.parameter=value` on the command line is for the one who loads the
# module to pass on: the kernel does that for built-in ones only.
parameters_of() {
    for word in $cmdline; do
        case $word in
            "$1".* | "${1//_/-}".*) printf '%s ' "${word#*.}" ;;
        esac
    done
}

while read -r file; do
    module=${file##*/}
    # Unquoted: every parameter is a word of its own.
    $B insmod "$file" $(parameters_of "${module%.ko}") ||
        echo "lupin: cannot load $file" >/dev/console
done </etc/lupin/modules

if [ -n "$root" ]; then
    # Disks are found while their drivers load, or a little later.
    tries=250
    while [ ! -b "$root" ] && [ $tries -gt 0 ]; do
        $B sleep 0.02
        tries=$((tries - 1))
    done
    $B mkdir -p /root.new
    if ! $B mount -t "$type" -o "$access" "$root" /root.new; then
        echo "lupin: cannot mount root=$root ($type); powering off" >/dev/console
        $B poweroff -f
    fi
    for place in /dev/shm /dev/pts; do
        $B umount "$place"
    done
    for place in /proc /sys /dev; do
        $B mount -o move "$place" "/root.new$place"
    done
    exec $B switch_root /root.new /sbin/init
fi

name_ports() {
    $B mkdir -p /dev/virtio-ports
    for port in /sys/class/virtio-ports/*; do
        [ -s "$port/name" ] || continue
        read -r name <"$port/name"
        $B ln -sf "../${port##*/}" "/dev/virtio-ports/$name"
    done
}

# The host tells the names of the ports some time after the driver came up.
# Only a node of a pod has ports to wait for.
name_ports
tries=100
while [ -n "$node" ] && [ ! -e /dev/virtio-ports/org.lupin.agent ] && [ $tries -gt 0 ]; do
    $B sleep 0.02
    tries=$((tries - 1))
    name_ports
done

if [ ! -x "$init" ]; then
    echo "lupin: this image holds no $init; powering off" >/dev/console
    $B poweroff -f
fi
if [ "$init" = /usr/bin/lupin-guest-agent ]; then
    exec "$init" --init
fi
exec "$init"
