#!/usr/bin/env bash
# The executor on a machine with four memory nodes of uneven size, for those who have none: this checkout in an emulated
# guest, whose root is the host's, read-only. For what is right, not for what is fast: every instruction is emulated.
#
#     benchmarks/numa_guest.sh FOLDER
#
# FOLDER: a Linux kernel with its modules, as `apt-get download linux-image-6.1.0-56-amd64` and `dpkg -x *.deb FOLDER`
# leave it. Needs qemu-system-x86_64, a static busybox, cpio, and what `make build` makes, in a checkout that is not below
# /tmp, of which the guest has its own. Takes some minutes.
set -euo pipefail
folder=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kernel=$(echo "$folder"/boot/vmlinuz-*)
tests=$(echo "$PWD"/build/native-*-release)
modules=(virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci netfs fscache 9pnet 9pnet_virtio 9p)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir -p "$work"/init/{bin,modules,proc,sys,dev,root}
cp "$(command -v busybox)" "$work/init/bin/busybox"
for name in "${modules[@]}"; do
  find "$folder/lib/modules/${kernel##*/vmlinuz-}" -name "$name.ko" -exec cp {} "$work/init/modules/" \;
done

cat >"$work/init/init" <<END
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for name in ${modules[*]}; do [ ! -f /modules/\$name.ko ] || insmod /modules/\$name.ko; done
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=262144 host /root
mount -t proc proc /root/proc; mount -t sysfs sys /root/sys; mount -t devtmpfs dev /root/dev
mkdir -p /root/dev/shm; mount -t tmpfs tmpfs /root/dev/shm; mount -t tmpfs tmpfs /root/tmp
echo madvise >/sys/kernel/mm/transparent_hugepage/enabled
cp /inside /root/tmp/; chroot /root /bin/bash /tmp/inside; echo "status of the guest: \$?"
poweroff -f
END
cat >"$work/init/inside" <<END
export HOME=/tmp COLUMNS=150 PATH=/usr/bin:/bin PYTHONDONTWRITEBYTECODE=1
cd "$PWD" || exit 1
failed=0
lscpu | grep NUMA
for test in node_memory memory_report thread_pool work_queue expert_loader executor; do
  echo "== test_\$test"; "$tests/test_\$test" || failed=1
done
for numa in auto off 1 0,2-3; do
  echo "== bench layer --numa \$numa"
  .venv/bin/python -m kt_vllm.cli bench layer --hidden 2048 --intermediate 1024 --experts 32 --top-k 4 --tokens 1,16 \\
    --threads \$([ \$numa = 1 ] && echo 1 || echo 4) --numa \$numa --isa avx2 --seconds 0.2 --repeats 3 \\
    --limit-seconds 0.1 --dram-mib 64 || failed=1
done
echo "== pytest"
.venv/bin/python -m pytest -q -p no:cacheprovider tests/unit/test_numa.py tests/kernels/test_native_lifecycle.py || failed=1
exit \$failed
END
chmod +x "$work/init/init"
(cd "$work/init" && find . | cpio --quiet -o -H newc) >"$work/init.cpio"

nodes=() number=0 first=0
for node in 2G:2 1G:1 2G:2 1G:1; do # memory:CPUs
  last=$((first + ${node#*:} - 1))
  nodes+=(-object "memory-backend-ram,id=memory$number,size=${node%:*}")
  nodes+=(-numa "node,nodeid=$number,memdev=memory$number,cpus=$first-$last")
  number=$((number + 1)) first=$((last + 1))
done
timeout 1800 qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp "$first" -m 6G "${nodes[@]}" \
  -virtfs local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap -nographic -no-reboot \
  -kernel "$kernel" -initrd "$work/init.cpio" -append "console=ttyS0 panic=-1 quiet" </dev/null | tee "$work/log"
grep -q "status of the guest: 0" "$work/log"
