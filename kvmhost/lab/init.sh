#!/bin/busybox sh
# The first process of an emulated host, in its initial file system: loads modules, mounts the
# root and goes on in it with session.sh. Whatever fails is named on the console, and the
# kernel's panic then ends the machine.
/bin/busybox --install -s /bin
fail() { echo "kvmhost-lab: $*" >/dev/console; exit 1; }
try() { "$@" || fail "$*"; }
try mount -t proc proc /proc
try mount -t sysfs sysfs /sys
try mount -t devtmpfs devtmpfs /dev
ln -s /proc/self/fd /dev/fd
for n in 0:stdin 1:stdout 2:stderr; do ln -s "fd/${n%:*}" "/dev/${n#*:}"; done
while read -r module; do try insmod "/modules/$module.ko"; done </modules/order

mkdir -p /lower /upper
try mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=loose,ro root /lower
try mount -t tmpfs -o size=75% tmpfs /upper
mkdir -p /upper/files /upper/work /new
try mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /new

for name in proc sys dev; do try mount --move /$name /new/$name; done
mkdir -p /new/dev/shm /new/dev/pts
try mount -t tmpfs tmpfs /new/dev/shm
try mount -t devpts devpts /new/dev/pts
try mount -t tmpfs tmpfs /new/run
# What a kernel may lack.
mount -t cgroup2 cgroup2 /new/sys/fs/cgroup 2>/dev/null &&
    echo +memory >/new/sys/fs/cgroup/cgroup.subtree_control 2>/dev/null
mount -t debugfs debugfs /new/sys/kernel/debug 2>/dev/null
mount -t tracefs tracefs /new/sys/kernel/tracing 2>/dev/null
ip link set lo up
hostname lab

mkdir -p /new/run/kvmhost-lab
try cp /bin/busybox /session.sh /job.sh /mode /new/run/kvmhost-lab/
[ -d /project ] && try cp -r /project /new/run/kvmhost-lab/
exec switch_root /new /run/kvmhost-lab/busybox sh /run/kvmhost-lab/session.sh
