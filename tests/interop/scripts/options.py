"""Haggles about several exports on one connection.

options.py URI NAME...: of the given exports, which all hold their own name; prints what it finds as JSON.
"""

import json
import sys

import nbd  # type: ignore[import-not-found, unused-ignore]


def listed(handle: nbd.NBD) -> list[str]:
    names: list[str] = []
    count = handle.opt_list(lambda name, description: names.append(name))
    assert count == len(names)
    return names


def contexts(handle: nbd.NBD) -> list[str]:
    found: list[str] = []
    handle.opt_list_meta_context(found.append)
    return found


def is_refused(handle: nbd.NBD, name: str, go: bool) -> bool:
    handle.set_export_name(name)
    try:
        handle.opt_go() if go else handle.opt_info()
    except nbd.Error:
        return bool(handle.aio_is_negotiating())
    return False


def main(uri: str, *names: str) -> None:
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.set_full_info(True)
    handle.connect_uri(uri)
    sizes, canonical = {}, {}
    found: dict[str, object] = {"listed": listed(handle), "contexts": contexts(handle)}
    for name in names:
        handle.set_export_name(name)
        handle.opt_info()
        sizes[name] = handle.get_size()
        canonical[name] = handle.get_canonical_export_name()
        assert handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        assert not is_refused(handle, name, go=False)
        assert is_refused(handle, f"{name} that is not there", go=False)
        assert is_refused(handle, "../" + name, go=True)
    handle.set_export_name(names[-1])
    handle.opt_go()
    found["content"] = handle.pread(handle.get_size(), 0).decode()
    assert handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.shutdown()
    print(json.dumps({**found, "sizes": sizes, "canonical": canonical}))


main(*sys.argv[1:])
