# The first process of an emulated host, in its root file system: runs job.sh with the ports of
# the machine outside as its output, reports its status, and powers off.
#
# On the port lab.control it writes "ready", and "status N" when all output has been taken.
b=/run/kvmhost-lab/busybox
here=/run/kvmhost-lab

port() {
    for p in /sys/class/virtio-ports/*; do
        [ "$($b cat "$p/name")" = "$1" ] && echo "/dev/${p##*/}" && return
    done
    echo "kvmhost-lab: no port $1" >/dev/console
    exit 1
}

# The emulation is 20 to 50 times slower than the processor outside.
export KVMHOST_TIME_SCALE="${KVMHOST_TIME_SCALE:-20}"
exec 3>"$(port lab.control)"
echo ready >&3
if [ "$($b cat $here/mode)" = shell ]; then
    $b setsid $b cttyhack /bin/sh $here/job.sh
    status=$?
else
    # Pipes between the job and the ports: a port can be opened only once, but programs
    # open /dev/stdout and /dev/stderr again.
    $b mkfifo $here/out $here/err
    $b cat <$here/out >"$(port lab.out)" &
    pumps=" $! "
    $b cat <$here/err >"$(port lab.err)" &
    pumps="$pumps$! "
    $b setsid /bin/sh $here/job.sh </dev/null >$here/out 2>$here/err &
    wait $!
    status=$?
    # Whatever the job left behind would hold the pipes open.
    for p in /proc/[0-9]*; do
        p=${p#/proc/}
        case "$pumps$$ " in *" $p "*) ;; *) kill -9 "$p" ;; esac
    done 2>/dev/null
    wait
fi
echo "status $status" >&3
$b poweroff -f
