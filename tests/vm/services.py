"""A guest whose first process is systemd: the same root, writable on top, but pivoted to, so that it is the root of everything in there.

virtme-ng boots its own first process and has no way to be told another that sees this root; the kernel's command line is changed on its way to QEMU. Of
what a distribution starts at boot, only what services may rely on is started: under emulation each costs a second.
"""

from __future__ import annotations

from pathlib import Path

MASKED = (
    *("dev-hugepages.mount", "dev-mqueue.mount", "kmod-static-nodes.service", "proc-sys-fs-binfmt_misc.automount", "sys-fs-fuse-connections.mount"),
    *("sys-kernel-config.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount", "systemd-ask-password-console.path", "systemd-binfmt.service"),
    *("systemd-firstboot.service", "systemd-journal-flush.service", "systemd-machine-id-commit.service", "systemd-modules-load.service"),
    *("systemd-pcrphase-sysinit.service", "systemd-pcrphase.service", "systemd-pstore.service", "systemd-random-seed.service", "dbus.socket"),
    *("systemd-remount-fs.service", "systemd-repart.service", "systemd-sysctl.service", "systemd-sysusers.service", "systemd-timesyncd.service"),
    *("systemd-tmpfiles-setup-dev.service", "systemd-tmpfiles-setup.service", "systemd-udev-trigger.service", "systemd-udevd.service"),
    *("systemd-udevd-control.socket", "systemd-udevd-kernel.socket", "systemd-update-utmp.service", "cryptsetup.target", "integritysetup.target"),
    *("veritysetup.target", "timers.target", "paths.target"),
)

_INIT = """#!/bin/sh
PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mount -t tmpfs run /run
mount -n -t tmpfs none /lib/modules && ln -s {modules} /lib/modules/$(uname -r)
w=/run/wave-root
mkdir -p $w/lower $w/top $w/root
mount -t 9p -o ro,trans=virtio,version=9p2000.L,access=any,msize=262144,cache=loose wave $w/lower
mount -t tmpfs none $w/top
mkdir $w/top/upper $w/top/work
mount -t overlay -o lowerdir=$w/lower,upperdir=$w/top/upper,workdir=$w/top/work none $w/root
mount -t 9p -o rw,trans=virtio,version=9p2000.L,access=any,msize=262144 share $w/root{share}
touch $w/root{share}/begun
cd $w/root
rm -rf lib/modules/$(uname -r) && mkdir -p lib/modules && ln -s {modules} lib/modules/$(uname -r)
: >etc/fstab
rm -rf etc/systemd/system && mkdir -p etc/systemd/system
for unit in {masked}; do ln -s /dev/null etc/systemd/system/$unit; done
cp {share}/guest.target {share}/guest.service etc/systemd/system/
mkdir -p run-before
pivot_root . run-before
umount /run-before/proc /run-before/sys
exec chroot . /lib/systemd/systemd --system --unit=guest.target </dev/console >/dev/console 2>&1
"""
_TARGET = "[Unit]\nRequires=guest.service basic.target\nAfter=basic.target\n"
_SERVICE = """[Unit]
After=basic.target
[Service]
Type=oneshot
TimeoutStartSec=infinity
ExecStart=/bin/bash -c 'bash {share}/command.sh >{share}/output 2>&1; echo $? >{share}/code; \
journalctl --no-pager -o short-monotonic >{share}/journal 2>&1; dmesg >{share}/dmesg; sync; echo o >/proc/sysrq-trigger; sleep 60'
"""
_QEMU = """#!/bin/bash
# the kernel's command line names another first process
for word; do
    [ "${{last:-}}" != -append ] || word=$(sed -E 's, init=.*$, init=/bin/sh -- {share}/init.sh,' <<<"$word")
    words+=("$word"); last=$word
    [ "$word" != -append ] || last=-append
done
exec qemu-system-x86_64 "${{words[@]}}"
"""


def prepare(share: Path, image: Path) -> tuple[Path, str]:
    """Write what the boot needs into the folder that both sides see. Returns (the program to start as QEMU, an option for it)."""
    modules = next(iter(sorted(image.parents[1].glob("**/lib/modules/*"))), None)
    (share / "init.sh").write_text(_INIT.format(share=share, modules=modules, masked=" ".join(MASKED)))
    (share / "guest.target").write_text(_TARGET)
    (share / "guest.service").write_text(_SERVICE.format(share=share))
    (share / "qemu").write_text(_QEMU.format(share=share))
    (share / "qemu").chmod(0o755)
    return share / "qemu", f"-virtfs local,path={share},mount_tag=share,security_model=none,multidevs=remap"
