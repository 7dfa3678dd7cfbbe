#!/bin/sh
# Install what is to be tested, its units included, and test it. This runs in the machine, as root, from the
# directory that the second disk was unpacked to; what it prints goes to run.py.
trap 'echo "The tests have ended with status $?."' EXIT
cd /srv || exit

for wheel in wheels/*.whl; do
    python3 -m installer --compile-bytecode 0 "$wheel" || exit
done
systemctl daemon-reload || exit

# A test is a line; what did not pass is shown at the end.
mkdir tmp  # not one that PrivateTmp=yes hides
export COLUMNS=120 TMPDIR=/srv/tmp
xargs --null --arg-file=arguments python3 -B -m pytest -v --tb=short --color=no --no-header -p no:cacheprovider \
    -c /dev/null --rootdir=/srv --import-mode=importlib --timeout=100 --timeout-method=thread tests/vm/guest
