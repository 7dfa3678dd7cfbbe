"""Lists the exports, and reads what each of those named holds: names.py URI NAME.... Prints JSON."""

import json
import sys

import nbd  # type: ignore[import-not-found, unused-ignore]


def listed(uri: str) -> list[str]:
    names: list[str] = []
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(uri)
    handle.opt_list(lambda name, description: names.append(name))
    handle.opt_abort()
    return names


def content(uri: str, name: str) -> "str | None":
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(uri)
    handle.set_export_name(name)
    try:
        handle.opt_go()
    except nbd.Error:
        handle.opt_abort()
        return None
    text = handle.pread(handle.get_size(), 0).decode()
    handle.shutdown()
    return str(text)


def main(uri: str, *names: str) -> None:
    print(json.dumps({"listed": listed(uri), "contents": {name: content(uri, name) for name in names}}))


main(*sys.argv[1:])
