#!/bin/sh
# Install what is to be tested, its units included, and run the command that came with it. This runs in the machine, as
# root, from the directory that the second disk was unpacked to; what it prints goes to run.py.
trap 'echo "The tests have ended with status $?."' EXIT
cd /srv || exit

for wheel in wheels/*.whl; do
    python3 -m installer --compile-bytecode 0 "$wheel" || exit
done
systemctl daemon-reload || exit

mkdir tmp  # not one that PrivateTmp=yes hides
export COLUMNS=120 TMPDIR=/srv/tmp
xargs --null --arg-file=command env
