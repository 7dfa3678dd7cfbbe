#!/bin/sh
# Make the machine's disk, kernel and initial RAM disk from Debian's packages: image.sh DIRECTORY
# run.py keeps what this makes, and makes it anew when this file has changed.
set -eu
cd "$1"

# The kernel's NBD client and vsock_loopback are modules of Debian's cloud kernel. There is no /etc/fstab: the root file
# system is what the kernel's command line says.
packages=linux-image-cloud-amd64,initramfs-tools,systemd,systemd-sysv,udev,dbus,kmod,util-linux,e2fsprogs,procps
packages=$packages,nbd-client,libnbd-bin,python3-libnbd,python3-installer,python3-pytest,python3-pytest-timeout

# What the second disk brings (see run.py) is unpacked and started. Nobody logs in and nothing is done by the clock, so
# the boot ends with basic.target.
cat >vm-tests.service <<'UNIT'
[Unit]
After=basic.target
SuccessAction=poweroff-force
FailureAction=poweroff-force

[Service]
ExecStartPre=/bin/tar --extract --no-same-owner --file=/dev/vdb --directory=/srv
ExecStart=/bin/sh /srv/tests/vm/guest/start.sh
StandardInput=null
StandardOutput=file:/dev/ttyS1
StandardError=inherit
Type=oneshot

[Install]
WantedBy=basic.target
UNIT

# Runs in the new system. Without a machine ID each boot would be the first one; with all drivers in the initial RAM
# disk, it would take long to unpack.
cat >settle.sh <<'SETTLE'
set -eu
rm -rf /usr/share/doc/* /usr/share/man/* /usr/share/locale/*
systemctl enable vm-tests.service
systemctl mask timers.target
systemctl set-default basic.target
systemd-machine-id-setup
echo MODULES=list >/etc/initramfs-tools/conf.d/small
printf '%s\n' virtio_pci virtio_blk ext4 >>/etc/initramfs-tools/modules
update-initramfs -u
SETTLE

mmdebstrap --variant=minbase --format=ext2 --include="$packages" \
    --customize-hook='copy-in vm-tests.service /etc/systemd/system' \
    --customize-hook='chroot "$1" sh <settle.sh' \
    --customize-hook='download /vmlinuz vmlinuz' \
    --customize-hook='download /initrd.img initrd' \
    bookworm root.img

# Room for the tests' own disks, and the holes and the journal of a file system of today.
truncate --size=2G root.img
e2fsck -fy root.img >/dev/null || [ $? -eq 1 ]
resize2fs root.img
tune2fs -O extents,has_journal root.img
